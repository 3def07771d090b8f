"""Paths as people read them; pictures of search results."""

import pytest
from PIL import Image

from utils.search.page import Answer, Hit, as_json, as_page, as_table, draw, printable


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("plain/x.png", "plain/x.png"),
        ("höhe 猫.png", "höhe 猫.png"),
        ("new\nline\t.png", "new\\nline\\t.png"),
        ("esc\x1b[31m.png", "esc\\x1b[31m.png"),  # would colour the terminal
        ("caf\udce9.png", "caf\\udce9.png"),  # a byte that is no UTF-8
    ],
)
def test_paths_are_one_line_of_clean_text(path, shown):
    assert printable(path) == shown


def answer(hits=3):
    image = Image.new("RGB", (300, 200), "red")
    found = [Hit(i + 1, f"{i}<i>.png", i / 3, image) for i in range(hits)]
    return Answer("q\n.png", image, found)


def test_table_and_json_tell_the_same():
    table = as_table(answer()).splitlines()
    assert table[0] == "q\\n.png:"
    assert table[2].split() == ["1", "0.0000", "0<i>.png"]
    (query,) = as_json([answer()])
    assert query["query"] == "q\n.png"
    assert [hit["distance"] for hit in query["results"]] == [0, 1 / 3, 2 / 3]


def test_pages_hold_reduced_pictures_and_escaped_names():
    page = as_page([answer()], "T&T", "note")
    assert page.count("<img class='large'") == 4
    assert "0&lt;i&gt;.png" in page
    assert "<i>" not in page
    assert "T&amp;T" in page
    assert len(page) < 60_000


@pytest.mark.parametrize(("many", "drawn"), [((1, 30), (1, 20)), ((25, 1), (20, 1))])
def test_figures_draw_no_more_than_fits(tmp_path, many, drawn):
    sizes = []
    for queries, hits in (many, drawn):
        draw([answer(hits)] * queries, tmp_path / "x.png", "title")
        with Image.open(tmp_path / "x.png") as image:
            sizes.append(image.size)
    assert sizes[0] == sizes[1]
