"""Pictures of a trained quantizer: arrays in, files out. In the style of `utils.figures`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np

from utils.figures import BLUE, COLUMN, GREY, ORANGE, PAGE, PRINT, Paths, save

LINES = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": ORANGE, "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
)
# Okabe and Ito's palette with yellow darkened for white paper, and three more; a sign for each
CLASS_COLOURS = (
    "#0072B2", "#D55E00", "#56B4E9", "#000000", "#8C564B",
    "#CC79A7", "#009E73", "#888888", "#B8A300", "#E69F00",
)  # fmt: skip
CLASS_MARKERS = ("o", "s", "^", "X", "v", "D", "P", "<", "*", ">")
NAME_BOX = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6}
LAYERS = 4  # in which points of all classes are drawn over one another
BINS = 60
SHOWN = 0.99  # share of the pairs up to which the histogram goes
MOST_MARKED = 64  # words in a codebook, up to which an unused one gets a cross of its own


@plt.rc_context(PRINT)
def precision_recall(curves: Mapping[str, Mapping], chance: float, path: Paths) -> None:
    """Mean precision over mean recall, rank by rank.

        precision(i) = mean_q hits_q(i) / i,   recall(i) = mean_q hits_q(i) / relevant_q

    Args:
        curves: for each name in the legend the `pr_curve` of `utils.metrics.evaluate_retrieval`.
        chance: precision of a random order, the mean share of relevant items.
        path: where the picture goes.
    """
    figure, axis = plt.subplots(figsize=(COLUMN, 2.5), constrained_layout=True)
    for i, (name, curve) in enumerate(curves.items()):
        # curves that nearly coincide carry their signs at different places
        every = (2 * i, 4)
        axis.plot(curve["recall"], curve["precision"], label=name, markevery=every, **LINES[i % 2])
    _chance(axis, chance)
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, _ceiling(curves))
    axis.legend(loc="best")
    save(figure, path)


@plt.rc_context(PRINT)
def precision_at_n(curves: Mapping[str, Mapping], chance: float, path: Paths) -> None:
    """Mean precision among the N nearest items, over N on a logarithmic axis.

        precision@N = mean_q hits_q(N) / N

    Args:
        curves: for each name in the legend `rank` and `precision`, ascending.
        chance: precision of a random order.
        path: where the picture goes.
    """
    figure, axis = plt.subplots(figsize=(COLUMN, 2.5), constrained_layout=True)
    for i, (name, curve) in enumerate(curves.items()):
        every = (2 * i, 4)
        axis.plot(curve["rank"], curve["precision"], label=name, markevery=every, **LINES[i % 2])
    _chance(axis, chance)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("N, nearest items looked at")
    axis.set_ylabel("precision@N")
    axis.set_ylim(0, _ceiling(curves))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.25))
    save(figure, path)


def _chance(axis: plt.Axes, chance: float) -> None:
    axis.axhline(chance, color=GREY, lw=0.8, ls=":", label=f"random order, {chance:.3f}")


def _ceiling(curves: Mapping[str, Mapping]) -> float:
    """Upper end of the axis of precision."""
    return min(1.05, max(0.1, 1.15 * max(max(curve["precision"]) for curve in curves.values())))


@plt.rc_context(PRINT)
def tsne(
    panels: Mapping[str, np.ndarray], labels: Sequence[int], classes: Sequence[str], path: Paths
) -> None:
    """Maps of the same images side by side; a class has a colour, a sign, and its name where it
    is densest.

    Args:
        panels: for each title (P, 2) points. The axes of t-SNE have no unit and are left out.
        labels: P class numbers.
        classes: names.
        path: where the picture goes.
    """
    labels = np.asarray(labels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(PAGE, 3.95), constrained_layout=True, squeeze=False
    )
    layers = np.arange(len(labels)) % LAYERS  # so that no class covers all others
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        for layer in range(LAYERS):
            for c in np.unique(labels):
                kept = (labels == c) & (layers == layer)
                if not kept.any():
                    continue
                axis.scatter(*points[kept].T, s=7, **_class_style(c))
        for c, place in _name_places(points, labels, classes).items():
            axis.text(*place, classes[c], ha="center", va="center", zorder=5, bbox=NAME_BOX)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.03)
    for c in np.unique(labels):
        axes[0][0].scatter([], [], s=26, label=classes[c], **_class_style(c))
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.6, handletextpad=0.3)
    save(figure, path)


def _class_style(c: int) -> dict[str, str | float]:
    colour = CLASS_COLOURS[c % len(CLASS_COLOURS)]
    # beyond ten classes the signs move on against the colours
    marker = CLASS_MARKERS[(c + c // len(CLASS_COLOURS)) % len(CLASS_MARKERS)]
    return {"color": colour, "marker": marker, "linewidths": 0.0}


def _name_places(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[int, np.ndarray]:
    """A place (2,) for each class's name: the point of its own that has the most neighbours of
    its own class beyond those of others, if no name stands there yet."""
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    unit = (points - points.min(axis=0)) / span  # (P, 2) in [0, 1]
    places: dict[int, np.ndarray] = {}
    boxes: list[tuple[np.ndarray, float]] = []  # centre and half the width of a name
    for c in np.unique(labels):
        own, others = unit[labels == c], unit[labels != c]
        score = _near(own, own) - 0.3 * _near(own, others)
        half = 0.013 * len(classes[c])  # of the panel's width, at 8 points

        def free(place: np.ndarray, half: float = half) -> bool:
            return all(
                abs(place[0] - x) > half + other or abs(place[1] - y) > 0.05
                for (x, y), other in boxes
            )

        order = np.argsort(-score, kind="stable")
        best = next((i for i in order if free(own[i])), order[0])
        boxes.append((own[best], half))
        places[int(c)] = points[labels == c][best]
    return places


def _near(points: np.ndarray, others: np.ndarray, radius: float = 0.08) -> np.ndarray:
    """How many of `others` lie within `radius` of each point, (P,)."""
    if len(others) == 0:
        return np.zeros(len(points))
    dist = np.linalg.norm(points[:, None] - others, axis=2)  # (P, others)
    return (dist < radius).sum(axis=1)


@plt.rc_context(PRINT)
def codeword_classes(counts: np.ndarray, classes: Sequence[str], title: str, path: Paths) -> None:
    """A row a codeword of one codebook: its items by class, in percent of the class.

    Codewords of one class are rows with a single dark cell; codewords that classes share are grey.

    Args:
        counts: (K, C) items of each class on each codeword.
        classes: C names.
        title: above the picture.
        path: where the picture goes.
    """
    shares = counts / np.maximum(1, counts.sum(axis=0))
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))  # by class, then by share
    figure, axis = plt.subplots(figsize=(COLUMN, 3.2), constrained_layout=True)
    image = axis.imshow(
        100 * shares[order], cmap="Greys", vmin=0, vmax=100, aspect="auto", interpolation="none"
    )
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(order)), [str(k + 1) for k in order], fontsize=6)
    axis.set_ylabel("codeword")
    figure.colorbar(image, ax=axis, aspect=25).set_label("% of the class's items")
    figure.suptitle(title)
    save(figure, path)


@plt.rc_context(PRINT)
def codeword_usage(usage: np.ndarray, perplexities: Sequence[float], path: Paths) -> None:
    """A row a codebook: its codewords from most used to least, and its perplexity.

    A healthy codebook is an even row; a collapsed one has a dark cell at the left, crosses (words
    that no item has) after it, and a short bar.

    Args:
        usage: (M, K) shares of the items, rows summing to 1.
        perplexities: M numbers in [1, K], exp(entropy) of the rows.
        path: where the picture goes.
    """
    M, K = usage.shape
    shares = -np.sort(-usage, axis=1)
    height = 0.75 + max(1.0, 0.2 * M)
    figure, (axis, bars) = plt.subplots(
        1,
        2,
        figsize=(PAGE, height),
        width_ratios=(3.4, 1),
        sharey=True,
        constrained_layout=True,
    )
    image = axis.imshow(
        100 * shares, cmap="Greys", vmin=0, aspect="auto", interpolation="none", origin="upper"
    )
    if K <= MOST_MARKED:
        unused = np.argwhere(shares == 0)
        axis.plot(unused[:, 1], unused[:, 0], "x", color=ORANGE, markersize=5)
    axis.set_yticks(range(M), [str(m + 1) for m in range(M)])
    axis.set_xticks([k - 1 for k in sorted({1, K // 4, K // 2, 3 * K // 4, K}) if k])
    axis.xaxis.set_major_formatter(lambda k, _: f"{k + 1:g}")
    axis.set_ylabel("codebook")
    axis.set_xlabel("codewords of a codebook, most used first; × is used by no item")
    colours = figure.colorbar(image, ax=axis, pad=0.01, aspect=12)
    colours.set_label(f"% of items\n(even: {100 / K:.3g})")
    bars.barh(range(M), perplexities, height=0.6, color=BLUE)
    for m, value in enumerate(perplexities):
        inside = value > 0.4 * K
        bars.text(
            value - 0.02 * K if inside else value + 0.02 * K,
            m,
            f"{value:.1f}",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
        )
    bars.axvline(K, color=GREY, lw=0.8, ls=":")
    bars.set_xlim(0, 1.04 * K)
    bars.set_xticks([0, K / 2, K])
    bars.tick_params(labelleft=False, left=False)
    bars.set_xlabel(f"perplexity (at most {K})")
    save(figure, path)


@plt.rc_context(PRINT)
def distance_histogram(relevant: np.ndarray, irrelevant: np.ndarray, path: Paths) -> None:
    """How far relevant items lie and how far irrelevant ones, in % of the pairs of either kind.

    Pairs of all queries are thrown together; a ranking compares the items of one query only, so
    kinds that overlap here may still be well ranked.

    Args:
        relevant, irrelevant: distances of the pairs of either kind, squared L2.
        path: where the picture goes.
    """
    figure, axis = plt.subplots(figsize=(COLUMN, 2.5), constrained_layout=True)
    everything = np.concatenate([relevant, irrelevant])
    low, high = everything.min(), np.quantile(everything, SHOWN)  # a long tail takes the room
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    looks = (
        (relevant, "relevant", {"histtype": "stepfilled", "fc": "#9CCBE8", "ec": BLUE}, "dotted"),
        (irrelevant, "irrelevant", {"histtype": "step", "ec": ORANGE, "hatch": "///"}, "dashed"),
    )
    for dist, name, look, style in looks:
        if len(dist):
            weights = np.full(len(dist), 100 / len(dist))
            label = f"{name}; {style}: mean {dist.mean():.3g}"
            axis.hist(dist, edges, weights=weights, label=label, **look)
            axis.axvline(dist.mean(), color=look["ec"], ls=style)
    axis.set_xlabel("squared L2 distance of query to coded item")
    axis.set_ylabel("% of pairs")
    axis.legend(loc="upper right", title=f"{1 - SHOWN:.0%} lie farther than shown")
    axis.set_xlim(edges[0], edges[-1])
    save(figure, path)
