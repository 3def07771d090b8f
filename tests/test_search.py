"""search.py as a user calls it."""

import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image
from small_images import files_of, make_images

import search
from data.images import to_array
from utils.errors import UserError
from utils.search.index import open_index, split_paths
from utils.search.packing import pack_codes
from utils.trained import load_trained

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "two words.png",
    'quote\'s "double" <b>.png',
    "new\nline.png",
    "höhe/猫 🐈.png",
    *(f"{c}/{i}.png" for c in "abc" for i in range(8)),
]
FLAGS = ["--batch_size=8", "--num_workers=2", "--device=cpu"]


def call(*words):
    search.main([str(word) for word in words])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("images"), NAMES)
    (folder / "bad.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, images, tiny_model):
    index = tmp_path_factory.mktemp("built") / "index"
    call("build", f"--checkpoint={tiny_model}", f"--images={images}", f"--index={index}", *FLAGS)
    return index


@pytest.fixture
def index(tmp_path, built):
    return shutil.copytree(built, tmp_path / "index")


def query(capsys, index, image, *flags):
    """The JSON that a query prints."""
    capsys.readouterr()
    call("query", f"--index={index}", f"--image={image}", "--json", "--device=cpu", *flags)
    return json.loads(capsys.readouterr().out)


def test_the_index_holds_the_models_codes_of_every_image(built, images, tiny_model):
    index, model = open_index(built), load_trained(tiny_model).model
    assert list(index.paths) == sorted(NAMES, key=os.fsencode)
    batch = np.stack([to_array(Image.open(images / name), 16) for name in index.paths])
    codes = model.encode(torch.from_numpy(batch).float() / 255)
    assert (index.packed == pack_codes(codes.numpy(), 16)).all()
    assert index.packed.shape == (len(NAMES), 2)  # 4 codebooks of 16 words: two codes a byte
    assert (index.codebooks == model.quantizer.codebooks.detach().numpy()).all()
    assert index.skipped == [{"path": "bad.jpg", "reason": "is empty (0 bytes)"}]
    assert np.unique(index.packed, axis=0).shape[0] > 5  # or this test would say little


def test_a_relative_index_can_be_moved_with_its_images(tmp_path, images, tiny_model, capsys):
    shutil.copytree(images, tmp_path / "a" / "images")
    where = [f"--images={tmp_path}/a/images", f"--index={tmp_path}/a/index"]
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    (tmp_path / "a").rename(tmp_path / "b")
    page = tmp_path / "x.html"
    found = query(
        capsys,
        tmp_path / "b" / "index",
        tmp_path / "b" / "images" / "two words.png",
        f"--root={tmp_path}/b/images",
        f"--html={page}",
    )
    assert len(found["queries"][0]["results"]) == 10
    assert "cannot be read" not in page.read_text()


def test_a_query_ranks_by_distance_to_the_codes(built, images, tiny_model, capsys):
    name = "höhe/猫 🐈.png"
    found = query(capsys, built, images / name, "--k=100")
    assert found["images"] == len(NAMES)
    assert "FAISS IndexPQ, exact" in found["engine"]
    (answer,) = found["queries"]
    results = answer["results"]
    assert [r["rank"] for r in results] == list(range(1, len(NAMES) + 1))
    assert sorted(r["path"] for r in results) == sorted(NAMES)
    model = load_trained(tiny_model).model
    array = to_array(Image.open(images / name), 16)
    x = model.describe(torch.from_numpy(array)[None].float() / 255)
    z = model.quantizer.decode(torch.from_numpy(open_index(built).codes().astype(np.int64)))
    every = (x - z).square().sum(1).detach().numpy()
    for result in results:
        # sums of 16 squares of float32
        own = every[list(open_index(built).paths).index(result["path"])]
        assert result["distance"] == pytest.approx(own, abs=1e-5)
    assert [r["distance"] for r in results] == sorted(r["distance"] for r in results)


def test_both_engines_and_both_distances(built, images, capsys):
    image = images / "a/3.png"
    own = query(capsys, built, image, "--engine=own")
    auto = query(capsys, built, image)
    assert own["engine"].startswith("own exact search")
    distances = [[r["distance"] for r in q["queries"][0]["results"]] for q in (own, auto)]
    assert distances[0] == pytest.approx(distances[1], abs=1e-5)
    assert query(capsys, built, image, "--distance=l2")["engine"] == "own exact search, l2"


def test_a_folder_of_queries_and_the_table(built, images, capsys):
    call("query", f"--index={built}", f"--image={images / 'a'}", "--k=3", "--device=cpu")
    out, err = capsys.readouterr()
    blocks = out.strip().split("\n\n")
    assert [block.split(":")[0] for block in blocks] == [f"{i}.png" for i in range(8)]
    assert all(len(block.splitlines()) == 2 + 3 for block in blocks)
    assert "ms a query" in err


def test_unreadable_queries_are_left_out_or_end_the_command(built, images, capsys):
    found = query(capsys, built, images)
    assert len(found["queries"]) == len(NAMES)
    with pytest.raises(UserError, match=r"--image=.*bad\.jpg: bad\.jpg is empty"):
        call("query", f"--index={built}", f"--image={images / 'bad.jpg'}")
    with pytest.raises(UserError, match=r"--image=.*nowhere\.png: there is no such file"):
        call("query", f"--index={built}", f"--image={images / 'nowhere.png'}")


def test_figures(tmp_path, built, images, capsys):
    for name in ("out.png", "out.svg"):
        query(capsys, built, images / "a", f"--figure={tmp_path / name}")
    assert Image.open(tmp_path / "out.png").size[0] > 1000
    assert "<svg" in (tmp_path / "out.svg").read_text()
    with pytest.raises(UserError, match=r"--figure=.*none.x\.png: cannot be written"):
        query(capsys, built, images / "a", f"--figure={tmp_path / 'none' / 'x.png'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.svg"]


class Page(html.parser.HTMLParser):
    """Collects tags and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file(tmp_path, built, images, capsys):
    query(capsys, built, images / NAMES[1], "--k=40", f"--html={tmp_path / 'x.html'}")
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 1 + len(NAMES)
    assert all(attrs["src"].startswith("data:image/") for attrs in pictures)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "b<")]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    text = "".join(page.text)
    assert NAMES[1] in text  # its <b> is text, not a tag
    assert "new\\nline.png" in text
    assert "猫" in text


def test_pictures_that_are_gone_leave_a_gap(tmp_path, images, tiny_model, capsys):
    shutil.copytree(images, tmp_path / "images")
    where = [f"--images={tmp_path / 'images'}", f"--index={tmp_path / 'index'}"]
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    (tmp_path / "images" / "a" / "0.png").unlink()
    out = [f"--html={tmp_path / 'x.html'}", f"--figure={tmp_path / 'x.png'}"]
    query(capsys, tmp_path / "index", images / "b" / "0.png", "--k=100", *out)
    assert (tmp_path / "x.html").read_text().count("<div class='gone'>cannot be read") == 1
    assert (tmp_path / "x.png").exists()


def test_add_takes_new_images_only(tmp_path, index, images, tiny_model, capsys):
    before = files_of(index)
    call("add", f"--index={index}", f"--images={images}", *FLAGS)
    assert files_of(index) == before
    make_images(tmp_path / "more", ["x.png", "sub/y.png"], seed=3)
    call("add", f"--index={index}", f"--images={tmp_path / 'more'}", *FLAGS)
    assert f"{len(NAMES) + 2} images, 2 of them new" in capsys.readouterr().out
    added = [os.path.relpath(tmp_path / "more" / name, images) for name in ("sub/y.png", "x.png")]
    assert list(open_index(index).paths) == before[1] + added
    found = query(capsys, index, tmp_path / "more" / "x.png", "--k=100")
    assert added[1] in [r["path"] for r in found["queries"][0]["results"]]


def test_a_mended_image_comes_in_by_add(index, images, tmp_path, tiny_model):
    shutil.copytree(images, tmp_path / "images")
    where = [f"--images={tmp_path / 'images'}", f"--index={tmp_path / 'own'}"]
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    make_images(tmp_path / "images", ["bad.jpg"])
    call("add", *where, *FLAGS)
    assert "bad.jpg" in list(open_index(tmp_path / "own").paths)
    assert open_index(tmp_path / "own").skipped == []


def test_remove_by_path_folder_and_absence(tmp_path, images, tiny_model, capsys):
    shutil.copytree(images, tmp_path / "images")
    where = [f"--images={tmp_path / 'images'}", f"--index={tmp_path / 'own'}"]
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    index = tmp_path / "own"
    full = dict(zip(*reversed(_codes_and_paths(index)), strict=True))
    call("remove", f"--index={index}", "two words.png", tmp_path / "images" / "a")
    assert "9 images removed" in capsys.readouterr().out
    (tmp_path / "images" / "b" / "0.png").unlink()
    call("remove", f"--index={index}", "--missing")
    codes, paths = _codes_and_paths(index)
    gone = {"two words.png", "b/0.png", *(f"a/{i}.png" for i in range(8))}
    assert set(paths) == set(NAMES) - gone
    assert all(full[path] == code for path, code in zip(paths, codes, strict=True))
    with pytest.raises(
        UserError, match=r"two words\.png: is not in --index=.*; nothing was removed"
    ):
        call("remove", f"--index={index}", "b/1.png", "two words.png")
    assert open_index(index).N == len(paths)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match=r"folder of images .* itself is gone"):
        call("remove", f"--index={index}", "--missing")


def _codes_and_paths(index):
    found = open_index(index)
    return [row.tobytes() for row in found.packed], list(found.paths)


def test_an_index_may_become_empty(index, images, capsys):
    call("remove", f"--index={index}", images)
    assert open_index(index).N == 0
    call("verify", f"--index={index}")
    with pytest.raises(UserError, match="is empty; add images first"):
        call("query", f"--index={index}", f"--image={images / 'a/0.png'}")
    with pytest.raises(UserError, match="is empty; add images first"):
        call("export", f"--index={index}", "--to=faiss", f"--output={index.parent / 'x'}")
    call("add", f"--index={index}", f"--images={images}", *FLAGS)
    assert open_index(index).N == len(NAMES)


def test_info_and_verify(index, tiny_model, capsys):
    call("info", f"--index={index}", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["items"], told["skipped"], told["code_bits"]) == (len(NAMES), 1, 16)
    assert told["model"]["identity"] == load_trained(tiny_model).identity
    call("info", f"--index={index}")
    assert "16 bits: M=4 codebooks, K=16 words, d=4" in (out := capsys.readouterr().out)
    assert "bad.jpg: is empty (0 bytes)" in out
    call("verify", f"--index={index}")
    assert "is whole" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["faiss", "faiss-fastscan", "faiss-ivfpq"])
def test_export(tmp_path, index, images, tiny_model, capsys, kind):
    out = tmp_path / "x.faiss"
    call("export", f"--index={index}", f"--to={kind}", f"--output={out}")
    loaded = faiss.read_index(str(out))
    paths = split_paths((tmp_path / "x.faiss.paths").read_bytes())
    assert loaded.ntotal == len(paths) == len(NAMES)
    array = to_array(Image.open(images / "a/0.png"), 16)
    model = load_trained(tiny_model).model
    x = model.describe(torch.from_numpy(array)[None].float() / 255).detach().numpy()
    dist, ids = loaded.search(x, 10)
    own = query(capsys, index, images / "a/0.png")["queries"][0]["results"]
    if kind != "faiss-fastscan":
        assert dist[0] == pytest.approx([r["distance"] for r in own], abs=1e-4)
    with pytest.raises(UserError, match=r"x\.faiss is there already; --overwrite it"):
        call("export", f"--index={index}", f"--to={kind}", f"--output={out}")
    call("export", f"--index={index}", f"--to={kind}", f"--output={out}", "--overwrite")
    assert ids.min() >= 0


def test_strict_stops_at_the_first_bad_image(tmp_path, images, tiny_model):
    index = tmp_path / "index"
    where = [f"--images={images}", f"--index={index}"]
    with pytest.raises(UserError, match=r"--strict: 'bad\.jpg' is empty \(0 bytes\); mend or rem"):
        call("build", f"--checkpoint={tiny_model}", *where, *FLAGS, "--strict")
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    assert open_index(index).N == len(NAMES)


def test_a_build_does_not_replace_an_index_unasked(index, images, tiny_model):
    words = ["build", f"--checkpoint={tiny_model}", f"--images={images}", f"--index={index}"]
    with pytest.raises(UserError, match=r"holds an index of 28 images already; `search\.py add`"):
        call(*words, *FLAGS)
    call(*words, *FLAGS, "--overwrite")
    assert open_index(index).N == len(NAMES)


def test_no_image_can_be_read(tmp_path, tiny_model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_text("no")
    with pytest.raises(UserError, match=r"none of the 1 images could be read; the first: 'x\.png'"):
        call(
            "build",
            f"--checkpoint={tiny_model}",
            f"--images={tmp_path / 'images'}",
            f"--index={tmp_path / 'index'}",
        )


def test_cifar10_end_to_end(tmp_path, small_set, finished, capsys):
    index = tmp_path / "index"
    data = f"--data_dir={small_set}"
    words = ["--images=cifar10", f"--index={index}", data, *FLAGS]
    call("build", f"--checkpoint={finished}", *words)
    found = query(capsys, index, "test/00003.png", data, f"--html={tmp_path / 'x.html'}")
    assert found["images"] == 300
    assert found["queries"][0]["results"][0]["path"].startswith("train/")
    assert "cannot be read" not in (tmp_path / "x.html").read_text()
    with pytest.raises(UserError, match=r"--images: are files, and --index=.* is of cifar10"):
        call("add", f"--index={index}", f"--images={make_images(tmp_path / 'i', ['a.png'])}")
    with pytest.raises(UserError, match=r"test/99999\.png is no image of CIFAR-10"):
        query(capsys, index, "test/99999.png", data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["build"], "required: --index, --checkpoint, --images"),
        (["remove", "--index=x"], "nothing to remove; allowed are paths, and --missing"),
        (["query", "--index=x", "--image=y", "--k=0"], "--k: 0: must be a whole number at least 1"),
        (["export", "--index=x", "--to=annoy", "--output=y"], "invalid choice: 'annoy'"),
        (
            ["export", "--index=x", "--to=faiss", "--output=y", "--nlist=3"],
            "only --to=faiss-ivfpq has inverted lists",
        ),
        (["query", "--index=x", "--image=y", "--ndex=3"], "unrecognized arguments: --ndex=3"),
    ],
)
def test_bad_command_lines(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_no_index_there(tmp_path, images):
    for words in (
        ["info"],
        ["verify"],
        ["query", f"--image={images / 'a/0.png'}"],
        ["add", f"--images={images}"],
        ["remove", "x"],
        ["export", "--to=faiss", f"--output={tmp_path / 'y'}"],
    ):
        with pytest.raises(UserError, match=r"is not an index .*`search.py build` makes one"):
            call(words[0], f"--index={tmp_path / 'none'}", *words[1:])
    assert list(tmp_path.iterdir()) == []  # and nothing was made


def test_torchrun_shards_make_the_same_index(tmp_path, built, images, tiny_model):
    index = tmp_path / "index"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("search.py", "build", f"--checkpoint={tiny_model}"),
            *(f"--images={images}", f"--index={index}", *FLAGS),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert files_of(index) == files_of(built)
    assert done.stdout.count("28 images, 16 bits each") == 1


def test_a_large_jpeg_is_encoded_alike_as_image_and_as_query(tmp_path, tiny_model, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1200, 900)).save(tmp_path / "images" / f"{i}.jpg")
    where = [f"--images={tmp_path / 'images'}", f"--index={tmp_path / 'index'}"]
    call("build", f"--checkpoint={tiny_model}", *where, *FLAGS)
    args = search.parse_search_args(
        ["query", f"--index={tmp_path / 'index'}", f"--image={tmp_path / 'images'}", *FLAGS]
    )
    index = open_index(tmp_path / "index")
    encoding = search._encoding(args, index.model())
    _, _, x = search._read_queries(args, index, encoding)
    codes = encoding.trained.model.quantizer.encode(torch.from_numpy(x))
    assert (pack_codes(codes.numpy(), 16) == index.packed).all()


def test_one_folder_by_two_names_is_one_folder(tmp_path, index, images, tiny_model):
    (tmp_path / "link").symlink_to(images)
    before = files_of(index)
    call("add", f"--index={index}", f"--images={tmp_path / 'link'}", *FLAGS)
    assert files_of(index) == before
    call("remove", f"--index={index}", tmp_path / "link" / "a")
    assert open_index(index).N == len(NAMES) - 8


def test_an_image_without_an_ending_is_an_image(tmp_path, built, images, capsys):
    shutil.copy(images / "a/0.png", tmp_path / "upload_abc")
    results = [
        query(capsys, built, image)["queries"][0]["results"]
        for image in (tmp_path / "upload_abc", images / "a/0.png")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["remove", ""], "an empty path"),
        (["query", "--image="], "an empty path"),
        (["query", "--image=x", "--figure=x.pgf"], "--figure=x.pgf: allowed endings are .png"),
    ],
)
def test_more_bad_command_lines(built, words, message, capsys):
    with pytest.raises(SystemExit):
        call(words[0], f"--index={built}", *words[1:])
    assert message in capsys.readouterr().err


def test_exports_go_into_folders_that_exist(tmp_path, built):
    for place in (tmp_path / "none" / "x", tmp_path, ""):
        with pytest.raises(UserError, match=r"--output=.*: is not a file in a folder that exists"):
            call("export", f"--index={built}", "--to=faiss", f"--output={place}")


def test_a_wrong_folder_of_images_leaves_no_index(tmp_path, tiny_model):
    words = [f"--images={tmp_path / 'none'}", f"--index={tmp_path / 'index'}"]
    with pytest.raises(UserError, match="there is no such file"):
        call("build", f"--checkpoint={tiny_model}", *words)
    assert not (tmp_path / "index").exists()
