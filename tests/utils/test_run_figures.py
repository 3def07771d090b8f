"""Pictures: whole files in both formats, signs beside colours, nothing below 8 points."""

import xml.etree.ElementTree as ElementTree
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from utils import figures, run_figures

CLASSES = [f"class {c}" for c in range(10)]
CURVE = {"rank": [1, 10, 100], "recall": [0.01, 0.2, 1.0], "precision": [0.8, 0.5, 0.1]}
CURVES = {"a": CURVE, "b": CURVE}
LOG = [
    {"kind": "train", "step": 1, "epoch": 0, "loss": 3.0},
    {"kind": "train", "step": 2, "epoch": 1, "loss": 2.0},
    {"kind": "eval", "step": 2, "epoch": 2.0, "distance": "squared_l2", "mAP@50": 0.4},
]


def labels_and_points(n=60):
    return np.arange(n) % 10, np.random.default_rng(0).normal(size=(n, 2))


def draw_tsne(path):
    labels, points = labels_and_points()
    run_figures.tsne({"x": points, "quantized": points}, labels, CLASSES, path)


def draw_grid(path):
    images = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    right = torch.tensor([[True, False, True], [True, True, True]])
    figures.retrieval_grid(images[:, 0], CLASSES[:2], images[:, 1:], right, path, "title")


def draw_histogram(path):
    rng = np.random.default_rng(0)
    run_figures.distance_histogram(rng.gamma(4, size=200), rng.gamma(6, size=900), path)


def draw_usage(path):
    run_figures.codeword_usage(np.array([[0.25] * 4, [0, 1.0, 0, 0]]), [4.0, 1.0], path)


DRAWN = {
    "learning_curve": partial(
        figures.learning_curve, LOG, name="mAP@50", distance="squared_l2", title="title"
    ),
    "retrieval": draw_grid,
    "precision_recall": partial(run_figures.precision_recall, CURVES, 0.1),
    "precision_at_n": partial(run_figures.precision_at_n, CURVES, 0.1),
    "tsne": draw_tsne,
    "codeword_usage": draw_usage,
    "distance_histogram": draw_histogram,
}


@pytest.fixture
def kept(monkeypatch) -> list[Figure]:
    """The figures drawn, still to be looked into after they were written."""
    found = []
    real = Figure.savefig

    def savefig(figure, *args, **kwargs):
        found.append(figure)
        return real(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_whole_in_both_formats_and_printable(name, tmp_path, kept):
    png, svg = tmp_path / f"{name}.png", tmp_path / f"{name}.svg"
    DRAWN[name](path=[png, svg])
    assert sorted(p.name for p in tmp_path.iterdir()) == [png.name, svg.name]
    with Image.open(png) as image:
        image.load()
        width = image.width / figures.PNG_DPI
        assert 2 < width <= figures.PAGE + 0.01
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    texts = [e for e in ElementTree.parse(svg).iter() if e.tag.endswith("}text")]
    shown = [t for t in kept[-1].findobj(Text) if t.get_visible() and t.get_text()]
    assert texts  # text, not outlines
    assert min(t.get_fontsize() for t in shown) >= 8
    assert not plt.get_fignums()  # closed
    before = svg.read_bytes()
    torch.manual_seed(0)
    DRAWN[name](path=[png, svg])
    assert svg.read_bytes() == before


def test_lines_differ_without_colour(tmp_path, kept):
    run_figures.precision_recall(CURVES, 0.1, tmp_path / "a.png")
    looks = {(li.get_linestyle(), li.get_marker()) for li in kept[0].axes[0].get_lines()}
    assert len(looks) == 3  # both curves and chance


def test_ten_classes_have_ten_colours_and_ten_signs(tmp_path, kept):
    styles = [run_figures._class_style(c) for c in range(10)]
    assert len({s["marker"] for s in styles}) == len({s["color"] for s in styles}) == 10
    assert len({tuple(run_figures._class_style(c).items()) for c in range(100)}) == 100
    draw_tsne(tmp_path / "a.png")
    names = [t.get_text() for t in kept[0].axes[0].texts]
    assert names == CLASSES
    legend = [t.get_text() for t in kept[0].legends[0].get_texts()]
    assert legend == CLASSES
    # every point is drawn, once in each panel
    for axis, extra in zip(kept[0].axes, (10, 0), strict=True):  # the legend's own are empty
        drawn = [c for c in axis.collections if len(c.get_offsets())]
        assert sum(len(c.get_offsets()) for c in drawn) == 60
        assert len(axis.collections) == len(drawn) + extra


def test_a_class_is_named_where_it_is_densest():
    labels = np.array([0] * 30 + [1] * 30)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 2)) * 0.1
    points[30:] += [10, 0]
    points[0] = [5, 40]  # an outlier
    places = run_figures._name_places(points, labels, ["a", "b"])
    assert np.linalg.norm(places[0]) < 1
    assert np.linalg.norm(places[1] - [10, 0]) < 1


def test_names_do_not_cover_one_another():
    points = np.random.default_rng(0).uniform(size=(400, 2))
    places = run_figures._name_places(points, np.arange(400) % 4, CLASSES)
    for a in range(4):
        for b in range(a):
            gap = np.abs(places[a] - places[b])
            assert gap[0] > 0.013 * 14 * 0.99 or gap[1] > 0.05 * 0.99  # unit square, 7 letters each


def test_usage_is_drawn_sorted_with_a_cross_on_each_unused_word(tmp_path, kept):
    usage = np.array([[0.1, 0.6, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]])
    run_figures.codeword_usage(usage, [2.4, 1.0], tmp_path / "a.png")
    axis, bars = kept[0].axes[:2]
    assert axis.images[0].get_array().tolist() == [[60, 30, 10, 0], [100, 0, 0, 0]]
    (crosses,) = axis.get_lines()
    drawn = sorted(zip(crosses.get_xdata().tolist(), crosses.get_ydata().tolist(), strict=True))
    assert drawn == [(1, 1), (2, 1), (3, 0), (3, 1)]
    assert [b.get_width() for b in bars.patches] == [2.4, 1.0]
    assert [t.get_text() for t in bars.texts] == ["2.4", "1.0"]


@pytest.mark.parametrize(("M", "K"), [(1, 2), (1, 4096), (32, 256)])
def test_usage_of_codebooks_of_other_sizes(M, K, tmp_path, kept):
    run_figures.codeword_usage(np.full((M, K), 1 / K), [float(K)] * M, tmp_path / "a.png")
    shares, bars = kept[0].axes[:2]
    assert shares.images[0].get_array().shape == (M, K)
    assert [bar.get_width() for bar in bars.patches] == [K] * M


def test_histogram_shows_both_kinds_in_percent_and_in_grey(tmp_path, kept):
    near, far = np.linspace(1, 2, 100), np.linspace(3, 4, 900)
    run_figures.distance_histogram(near, far, tmp_path / "a.png")
    filled, outlined = kept[0].axes[0].patches
    assert filled.get_fill() and not filled.get_hatch()
    assert not outlined.get_fill() and outlined.get_hatch()
    heights = [p.get_xy()[:, 1].max() for p in (filled, outlined)]
    # each kind spans a third of the 60 bins: about 5% a bin, however many pairs it has
    assert heights == pytest.approx([5, 5], abs=0.7)
    means = [float(li.get_xdata()[0]) for li in kept[0].axes[0].get_lines()]
    assert means == pytest.approx([1.5, 3.5])


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (1, 1)])
def test_histogram_of_equal_distances_or_of_one_kind(sizes, tmp_path):
    run_figures.distance_histogram(np.ones(sizes[0]), np.ones(sizes[1]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def broken(figure, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="No space"):
        run_figures.precision_recall({"a": CURVE}, 0.1, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_colours_keep_apart_from_white_paper():
    for colour in (*run_figures.CLASS_COLOURS, figures.BLUE, figures.ORANGE, figures.GREY):
        red, green, blue = to_rgb(colour)
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75
