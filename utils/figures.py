"""Pictures of a run. Blue and orange, with signs beside colours: legible without colour vision."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
from torch import Tensor

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def learning_curve(
    entries: list[dict], path: Path, name: str, distance: str, title: str = ""
) -> None:
    """Loss over steps, and mAP where it was evaluated.

    Args:
        entries: lines of metrics.jsonl.
        path: where the PNG goes.
        name: the metric to draw, "mAP@1000"; evaluations that lack it are left out.
        distance: of those evaluations.
        title: above the picture.
    """
    train = [e for e in entries if e["kind"] == "train"]
    evals = [e for e in entries if e["kind"] == "eval" and e["distance"] == distance and name in e]
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axis.plot([e["step"] for e in train], [e["loss"] for e in train], color=GREY, lw=1)
    axis.set_xlabel("optimisation step")
    axis.set_ylabel("training loss (nats)", color=GREY)
    if evals:
        right = axis.twinx()
        right.plot([e["step"] for e in evals], [e[name] for e in evals], "o-", color=BLUE)
        right.set_ylabel(f"{name} ({distance})", color=BLUE)
        right.annotate(
            f"{evals[-1][name]:.3f}",
            (evals[-1]["step"], evals[-1][name]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            color=BLUE,
        )
        right.set_ylim(0, max(0.1, 1.25 * max(e[name] for e in evals)))
    axis.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def retrieval_grid(
    queries: Tensor,
    query_labels: Sequence[int],
    results: Tensor,
    result_labels: Sequence[Sequence[int]],
    classes: Sequence[str],
    path: Path,
    title: str = "",
) -> None:
    """Each row a query and its nearest images; right ones framed solid blue, wrong ones dashed
    orange with a cross.

    Args:
        queries: (R, 3, H, W) uint8.
        query_labels: R class numbers.
        results: (R, C, 3, H, W) uint8, nearest first.
        result_labels: R lists of C class numbers.
        classes: names.
        path: where the PNG goes.
        title: above the picture.
    """
    rows, columns = results.shape[:2]
    figure, axes = plt.subplots(
        rows, columns + 1, figsize=(0.85 * (columns + 1) + 0.9, 0.9 * rows + 0.7), squeeze=False
    )
    for r in range(rows):
        cells = [queries[r], *results[r]]
        for c, image in enumerate(cells):
            axis = axes[r][c]
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            right = c > 0 and result_labels[r][c - 1] == query_labels[r]
            for spine in axis.spines.values():
                spine.set_linewidth(0 if c == 0 else 3)
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
                    fontsize=11,
                    bbox={"facecolor": ORANGE, "edgecolor": "none", "pad": 0.6},
                )
        axes[r][0].set_ylabel(classes[query_labels[r]], rotation=0, ha="right", va="center")
    axes[0][0].set_title("query", fontsize=9)
    axes[0][1].set_title("nearest", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.subplots_adjust(left=0.14, right=0.99, bottom=0.02, top=1 - 0.62 / (0.9 * rows + 0.7))
    figure.savefig(path, dpi=150)
    plt.close(figure)
