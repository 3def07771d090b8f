"""The end of a run: where things are, and two pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from utils.checkpoint import LAST
from utils.figures import learning_curve, retrieval_grid
from utils.logging import METRICS, read_metrics
from utils.loop import Trainer
from utils.metrics import ap_definition, relevance
from utils.setup import Run

COLUMNS = 10  # nearest images drawn


def report(
    run: Run,
    trainer: Trainer,
    metrics: list[dict],
    class_names: Sequence[str],
    left_out: int = 0,
) -> None:
    """Draw learning curve and retrieval grid into the run's folder, and say what is where.

    An evaluation alone writes `eval_only.json` and `eval_only_retrieval.png` instead, so that it
    never touches the files of a run.

    Args:
        run: the run that ended.
        trainer: what ran.
        metrics: of the last evaluation, the headline first; none if there were no labels or no
            queries.
        class_names: by class number.
        left_out: images of the split that could not be read.
    """
    if not run.ranks.is_main:
        return
    args, folder = run.args, run.args.output_dir
    if not metrics:
        _report_without_queries(run, trainer, left_out, len(class_names) > 1)
        return
    head = metrics[0]
    name = f"mAP@{args.Top_N}"
    title = f"{run.method}, {head['code_bits']:g} bits, {name} {head[name]:.3f}"
    if args.eval_only:
        path, grid = folder / "eval_only.json", folder / "eval_only_retrieval.png"
        path.write_text(json.dumps(metrics, indent=2) + "\n")
        places = [("result", path)]
    else:
        curve, grid = folder / "learning_curve.png", folder / "retrieval.png"
        learning_curve(read_metrics(folder), curve, name, head["distance"], title)
        places = [
            ("checkpoint", folder / LAST),
            ("log", folder / METRICS),
            ("learning curve", curve),
        ]
    if trainer.evaluate_model.encoded or not grid.exists():
        _draw_retrieval(trainer, grid, class_names, title)
    if grid.exists():
        places.append(("retrieved images", grid))
    if not trainer.step_is_known:
        when = "of the weights"
    elif trainer.step == args.epochs * trainer.epoch_steps:
        when = "of the last epoch"
    else:
        when = f"at step {trainer.step}, epoch {head['epoch']:.3g}"
    print(
        f"\nResult {when}: {name} = {head[name]:.4f} at {head['code_bits']:g} bits "
        f"({head['distance']}, {ap_definition(args.Top_N)}, "
        f"{head['queries']} queries{_missing(left_out)})"
    )
    for what, path in places:
        print(f"  {what + ':':18} {path}")


def _report_without_queries(run: Run, trainer: Trainer, left_out: int, labels: bool) -> None:
    without = "queries" if labels else "labels"
    folder, data = run.args.output_dir, run.args.image_dir or run.args.data_dir
    quantizer = getattr(trainer.model, "quantizer", None)  # of networks that can index images
    bits = "" if quantizer is None else f"{quantizer.code_bits:g} bits"
    curve = folder / "learning_curve.png"
    title = ", ".join(filter(None, [run.method, bits, f"images of {data.name}"]))
    title = title.replace("$", r"\$")  # no formula
    learning_curve(read_metrics(folder), curve, f"mAP@{run.args.Top_N}", run.args.distance, title)
    print(
        f"\nTrained to step {trainer.step}{bits and ' at '}{bits}; without {without} there is "
        f"no mAP{_missing(left_out)}.\n"
        f"  checkpoint:        {folder / LAST}\n"
        f"  log:               {folder / METRICS}\n"
        f"  learning curve:    {curve}"
    )
    if quantizer is None:
        return
    index = folder / "index"
    print(
        "Search with it:\n"
        f"  python search.py build --checkpoint {quote(str(folder))} --images {quote(str(data))} "
        f"--index {quote(str(index))}\n"
        f"  python search.py query --index {quote(str(index))} --image IMAGE --html result.html"
    )


def _draw_retrieval(trainer: Trainer, path: Path, class_names: Sequence[str], title: str) -> None:
    """The first query of each class and what it finds."""
    evaluation = trainer.evaluate_model
    (images, labels), (db_images, db_labels) = evaluation.query, evaluation.db
    if evaluation.encoded is None:
        with trainer.autocast():
            evaluation.encode(trainer.model)
    rows, index = evaluation.examples(trainer.model, COLUMNS)
    if not len(rows):
        return  # no query has a label
    names = [_class_name(class_names, label) for label in labels[rows].cpu()]
    pairs = zip(labels[rows].cpu(), db_labels.cpu()[index], strict=True)
    relevant = torch.cat([relevance(label[None], found) for label, found in pairs])
    retrieval_grid(images[rows].cpu(), names, db_images[index].cpu(), relevant, path, title)


def _class_name(names: Sequence[str], label: Tensor) -> str:
    """Of one image: its class, or its first label and how many more it has."""
    if label.dim() == 0:
        return names[int(label)]
    mine = label.nonzero()[:, 0].tolist()
    more = f" +{len(mine) - 1}" if len(mine) > 1 else ""
    return names[mine[0]] + more if mine else "none"


def _missing(left_out: int) -> str:
    return f", images left out that could not be read: {left_out}" if left_out else ""
