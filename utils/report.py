"""The end of a run: where things are, and two pictures."""

import json

import torch
from torch import Tensor, nn

from data.cifar10 import CLASSES
from utils.checkpoint import LAST
from utils.evaluation import describe_images, encode_images
from utils.figures import learning_curve, retrieval_grid
from utils.logging import METRICS, read_metrics
from utils.retrieval import search
from utils.setup import Run

ROWS, COLUMNS = 10, 10


def report(
    run: Run,
    model: nn.Module,
    metrics: list[dict],
    query: tuple[Tensor, Tensor],
    db: tuple[Tensor, Tensor],
) -> None:
    """Draw learning curve and retrieval grid into the run's folder, and say what is where.

    Args:
        run: the run that ended.
        model: trained.
        metrics: of the last epoch, the headline first.
        query, db: images (N, 3, H, W) uint8 and labels.
    """
    if not run.ranks.is_main:
        return
    args, folder = run.args, run.args.output_dir
    head = metrics[0]
    name = f"mAP@{args.Top_N}"
    title = f"{run.method}, {head['code_bits']:g} bits, {name} {head[name]:.3f}"
    if args.eval_only:
        path = folder / "eval_only.json"
        path.write_text(json.dumps(metrics, indent=2) + "\n")
        places = [("result", path)]
    else:
        learning_curve(read_metrics(folder), folder / "learning_curve.png", title)
        places = [
            ("checkpoint", folder / LAST),
            ("log", folder / METRICS),
            ("learning curve", folder / "learning_curve.png"),
        ]
    _draw_retrieval(run, model, query, db, title)
    places.append(("retrieved images", folder / "retrieval.png"))
    print(
        f"\nResult of the last epoch: {name} = {head[name]:.4f} at {head['code_bits']:g} bits "
        f"({head['distance']}, AP over the relevant images found in the top {args.Top_N}, "
        f"{head['queries']} queries)"
    )
    for what, path in places:
        print(f"  {what + ':':18} {path}")


def _draw_retrieval(
    run: Run, model: nn.Module, query: tuple[Tensor, Tensor], db: tuple[Tensor, Tensor], title: str
) -> None:
    """The first query of each class and what it finds."""
    size, was_training = run.args.input_size, model.training
    labels = query[1]
    rows = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()][:ROWS]
    model.eval()
    x = describe_images(model, query[0][rows], size)
    codes = encode_images(model, db[0], size)
    model.train(was_training)
    codebooks = model.quantizer.codebooks.detach().float()
    _, index = search(x, codes, codebooks, COLUMNS, run.args.distance)
    index = index.cpu()
    with torch.no_grad():
        retrieval_grid(
            query[0][rows].cpu(),
            labels[rows].tolist(),
            db[0].cpu()[index],
            db[1].cpu()[index].tolist(),
            CLASSES,
            run.args.output_dir / "retrieval.png",
            title,
        )
