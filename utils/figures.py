"""Pictures of a run. Signs beside colours: legible in grey print and without colour vision."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
COLUMN, PAGE = 3.5, 7.0  # inches: one column, and both, of a paper
PNG_DPI = 300
DISTANCE_NAMES = {"squared_l2": "squared L2", "l2": "unsquared L2"}
DISTANCE_NAMES |= {"inner_product": "inner product"}

# to be printed at the size it is drawn at: nothing below 8 points
PRINT = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "figures",  # the same numbers give the same file
    "hatch.linewidth": 0.6,
}

Paths = Path | Sequence[Path]  # the same picture once for each; the ending says PNG or SVG


def save(figure: Figure, paths: Paths) -> None:
    """Write the picture to each path, whole or not at all, and close it.

    Raises:
        OSError: if a file cannot be written; an old one stays.
    """
    try:
        for path in [paths] if isinstance(paths, Path) else paths:
            kind = path.suffix[1:]
            temporary = path.with_name(path.name + ".tmp")
            undated = {"metadata": {"Date": None}} if kind == "svg" else {}
            try:
                figure.savefig(temporary, format=kind, dpi=PNG_DPI, **undated)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    finally:
        plt.close(figure)


@plt.rc_context(PRINT)
def learning_curve(
    entries: list[dict], path: Paths, name: str, distance: str, title: str = ""
) -> None:
    """Loss over steps and epochs, and mAP where it was evaluated. A dotted line marks the beginning
    of a second stage, whose loss is another one.

    Args:
        entries: lines of metrics.jsonl.
        path: where the picture goes.
        name: the metric to draw, "mAP@1000"; evaluations that lack it are left out.
        distance: of those evaluations.
        title: above the picture.
    """
    train = [e for e in entries if e["kind"] == "train" and "loss" in e]
    evals = [e for e in entries if e["kind"] == "eval" and e["distance"] == distance and name in e]
    figure, axis = plt.subplots(figsize=(COLUMN, 2.8), constrained_layout=True)
    stages = [e for e in train if "neighbour" not in e], [e for e in train if "neighbour" in e]
    for stage in stages:
        axis.plot([e["step"] for e in stage], [e["loss"] for e in stage], color=GREY, lw=0.7)
    if stages[1]:
        axis.axvline(stages[1][0]["step"], color=GREY, lw=0.8, ls=":")
        place = (stages[1][0]["step"], 0.02)
        axis.annotate("second stage ", place, xycoords=("data", "axes fraction"), ha="right")
    axis.set_xlabel("optimisation step")
    axis.set_ylabel("training loss (nats), line", color=GREY)
    if evals:
        right = axis.twinx()
        right.plot([e["step"] for e in evals], [e[name] for e in evals], "o--", color=BLUE)
        right.set_ylabel(f"{name} ({DISTANCE_NAMES.get(distance, distance)}), dots", color=BLUE)
        right.annotate(
            f"{evals[-1][name]:.3f}",
            (evals[-1]["step"], evals[-1][name]),
            xytext=(-2, 6),
            textcoords="offset points",
            ha="right",
            color=BLUE,
        )
        right.set_ylim(0, max(0.1, 1.25 * max(e[name] for e in evals)))
        if evals[-1]["epoch"] > 0 and evals[-1]["step"] > 0:
            steps = evals[-1]["step"] / evals[-1]["epoch"]  # in an epoch
            top = axis.secondary_xaxis("top", functions=(lambda s: s / steps, lambda e: e * steps))
            top.set_xlabel("epoch")
    figure.suptitle(title)
    save(figure, path)


@plt.rc_context(PRINT)
def retrieval_grid(
    queries: Tensor,
    names: Sequence[str],
    results: Tensor,
    relevant: Tensor,
    path: Paths,
    title: str = "",
) -> None:
    """Each row a query and its nearest images; right ones framed solid blue, wrong ones dashed
    orange with a cross.

    Args:
        queries: (R, 3, H, W) uint8.
        names: of the R queries' classes.
        results: (R, C, 3, H, W) uint8, nearest first.
        relevant: (R, C) bool, which of them are right.
        path: where the picture goes.
        title: above the picture.
    """
    rows, columns = results.shape[:2]
    cell, margin, head = 0.56, 0.8, 0.45  # inches: an image with its margin, class names, titles
    width, height = margin + cell * (columns + 1), head + cell * rows
    figure, axes = plt.subplots(rows, columns + 1, figsize=(width, height), squeeze=False)
    for r in range(rows):
        cells = [queries[r], *results[r]]
        for c, image in enumerate(cells):
            axis = axes[r][c]
            # "none" puts the very pixels into an SVG, a tenth of the size
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="none")
            axis.set_xticks([])
            axis.set_yticks([])
            right = c > 0 and bool(relevant[r, c - 1])
            for spine in axis.spines.values():
                spine.set_linewidth(0 if c == 0 else 2)
                spine.set_edgecolor(BLUE if right else ORANGE)
                spine.set_linestyle("solid" if right else "dashed")
            if c > 0 and not right:
                axis.text(
                    0.03,
                    0.97,
                    "×",
                    color="white",
                    va="top",
                    transform=axis.transAxes,
                    bbox={"facecolor": ORANGE, "edgecolor": "none", "pad": 0.4},
                )
        axes[r][0].set_ylabel(names[r], rotation=0, ha="right", va="center")
    axes[0][0].set_title("query")
    axes[0][1].set_title("nearest", loc="left")
    figure.suptitle(title, y=1 - 0.06 / height, va="top")
    figure.subplots_adjust(
        left=margin / width,
        right=1 - 0.05 / width,
        bottom=0.05 / height,
        top=1 - head / height,
        wspace=0.15,
        hspace=0.15,
    )
    save(figure, path)
