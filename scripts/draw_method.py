"""Draw figures/method.png: the method in one picture.

python scripts/draw_method.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def box(axis: plt.Axes, x: float, y: float, w: float, h: float, text: str, color: str) -> None:
    """A rounded box with its text, (x, y) its centre."""
    axis.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.03", fc="white", ec=color, lw=1.8
        )
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=9.5, color="black")


def arrow(axis: plt.Axes, start: tuple, end: tuple, color: str = GREY, style: str = "-|>") -> None:
    """An arrow from start to end."""
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=color, lw=1.5)
    )


def main() -> None:
    """Draw it."""
    figure, axis = plt.subplots(figsize=(10.5, 4.4), constrained_layout=True)
    axis.set_xlim(0, 10.5)
    axis.set_ylim(0.1, 4.4)
    axis.axis("off")
    axis.text(0.2, 4.15, "Training: no labels", fontsize=11, weight="bold")
    box(axis, 0.75, 2.85, 1.0, 0.7, "image", GREY)
    for y, name, color in ((3.55, "a", BLUE), (2.15, "b", ORANGE)):
        arrow(axis, (1.3, 2.85), (1.75, y))
        box(axis, 2.35, y, 1.1, 0.62, f"random\nview {name}", color)
        arrow(axis, (2.95, y), (3.4, y))
        box(axis, 4.15, y, 1.4, 0.62, "ResNet-18\n+ linear head", color)
        arrow(axis, (4.9, y), (5.3, y))
        box(axis, 5.85, y, 1.0, 0.62, f"descriptor\n$x_{name}$", color)
        arrow(axis, (6.4, y), (6.8, y))
        box(axis, 7.75, y, 1.8, 0.62, f"soft assignment\n$z_{name}$ from M codebooks", color)
    arrow(axis, (5.95, 3.2), (7.3, 2.5), BLUE, "<|-|>")
    arrow(axis, (5.95, 2.5), (7.3, 3.2), ORANGE, "<|-|>")
    pairs = "$x_a$ with $z_b$,\n$x_b$ with $z_a$"
    box(axis, 9.75, 2.85, 1.2, 1.1, f"cross-quantized\ncontrastive loss\n{pairs}", GREY)
    for y in (3.55, 2.15):
        arrow(axis, (8.7, y), (9.1, 2.85 + (0.25 if y > 3 else -0.25)))
    axis.plot([0.2, 10.3], [1.6, 1.6], color="#BBBBBB", lw=0.8)
    axis.text(0.2, 1.3, "Search", fontsize=11, weight="bold")
    box(axis, 2.0, 0.65, 2.4, 0.6, "database image:\nM codeword numbers, M log$_2$K bits", GREY)
    box(axis, 5.3, 0.65, 2.2, 0.6, "query image: descriptor x,\nM tables of K distances", GREY)
    arrow(axis, (6.45, 0.65), (7.1, 0.65))
    box(axis, 8.6, 0.65, 2.8, 0.6, "distance of an item:\nM look-ups and M - 1 additions", GREY)
    path = ROOT / "figures" / "method.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
