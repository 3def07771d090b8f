"""The training loop that every main script shares: step, progress, checkpoint, evaluation."""

import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint import LAST, check_same, save_checkpoint
from utils.cuda_graph import StepGraph
from utils.device import autocast
from utils.distributed import Ranks
from utils.errors import UserError
from utils.logging import RunLog, plain
from utils.metrics import ap_definition
from utils.optimizers import build_optimizers, restore_optimizer, set_lr
from utils.progress import progress
from utils.schedule import lr_schedule

CHECKPOINT_SECONDS = 600  # a checkpoint at least this often, beside --checkpoint_every
AGREE_STEPS = 10  # between steps after which the ranks tell each other of signals and time
TIME_IS_OVER = 75  # exit code at --max_minutes: sysexits' "try again", here with --resume=auto
LOWEST_SCALE = 2.0**-24  # of fp16 gradients: below it every step so far has overflowed
# a resumed run draws the same images in the same order only if these are as they were, and another
# recipe is another run
FIXED_ON_RESUME = ["batch_size", "seed", "limit_train", "optimizer", "validate", "recipe"]
FIXED_ON_RESUME += ["dataset", "protocol", "split_seed", "freeze_trunk", "cached_views"]
STAGE_FLAGS = ["views", "neighbour_share", "neighbours"]  # and these, of SPQ
TUPLE_FLAGS = ["tuples", "pool", "negatives"]  # and these, of what mines tuples
# why a loop pauses, as bits of one number: the greatest over the ranks counts for all of them
LATE, OVER, SIGNAL_SHIFT = 1, 2, 2  # a checkpoint is due; time is over; above them the signal
# what an evaluation's figures depend on, beside the weights
EVALUATION_FLAGS = ["Top_N", "distance", "limit_db", "limit_query", "input_size", "validate"]
EVALUATION_FLAGS += ["dataset", "protocol", "split_seed"]


class TrainingStopped(Exception):
    """Training ended before its time; the message says why and how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


Views = tuple[Tensor, ...]


class Batches(Protocol):
    """Where a Trainer's images come from, `data.batches.ViewBatches` for one."""

    images: int  # that all ranks together look at in a step

    def __len__(self) -> int:
        """Batches in an epoch."""

    def batch(self, step: int) -> Views:
        """This rank's views of the batch at `step`, counted from 0 over the whole training; the
        same ones whenever it is asked.

        Where they depend on more than `step`, methods `state()` and `restore(state)` keep that in
        the checkpoint.
        """


class Trainer:
    """Trains one model by one loss; knows nothing of the method.

    Args:
        args: flags of the run, with `amp` resolved; never changed.
        method: name that checkpoints carry, "SPQ".
        model: on the device. Its state_dict is what checkpoints hold.
        embed: (model, views) -> tensors with a row for each image of the batch.
        loss_of: those tensors, of the whole batch -> scalar loss, or its terms by name, which are
            added up and logged as they are, weights included.
        batches: source of the views.
        evaluate: model -> list of metric dicts, the headline first; None where there is nothing to
            evaluate with.
        ranks: this process among the others.
        checkpoint: state to go on from, as `utils.checkpoint.load_checkpoint` returns it.
        second_stage: the step at which a second stage begins, with a learning rate of its own; None
            without one.
    """

    def __init__(
        self,
        args: Namespace,
        method: str,
        model: nn.Module,
        embed: Callable[[nn.Module, Views], Views],
        loss_of: Callable[..., Tensor | dict[str, Tensor]],
        batches: Batches,
        evaluate: Callable[[nn.Module], list[dict]] | None,
        ranks: Ranks,
        checkpoint: dict | None = None,
        second_stage: int | None = None,
    ) -> None:
        self.args, self.method, self.model = args, method, model
        self.embed, self.loss_of = embed, loss_of
        self.batches, self.evaluate_model, self.ranks = batches, evaluate, ranks
        self.device = next(model.parameters()).device
        self.path: Path = args.output_dir / LAST
        self.optimizers = build_optimizers(args, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.lr_at = lr_schedule(
            args.lr_schedule, args.lr, args.epochs, len(batches), args.warmup_epochs, second_stage
        )
        self.second_stage = second_stage
        self.total_steps = min(args.epochs * len(batches), args.max_steps or sys.maxsize)
        self.epoch_steps = len(batches)  # of the training: a checkpoint may be of another set
        self.step = 0
        self.step_is_known = True  # not of weights that come without the state of their training
        self.last_eval: dict | None = None  # headline metrics, with the step they belong to
        self.evaluated = 0  # step of the last evaluation in the log
        if checkpoint is not None:
            self._restore(checkpoint)
        self.log: RunLog | None = None  # opened by `fit`: an evaluation alone leaves it untouched
        self.saved = True  # whether the last checkpoint could be written
        self.wrapped = ranks.wrap(model)
        # Reading a loss is a CPU-GPU sync point: on a GPU the CPU must run ahead, to keep it busy.
        on_cpu = self.device.type == "cpu"
        self.log_every = args.log_every or (10 if on_cpu else len(batches))
        # steps and their loss, gradient norm and terms of the loss
        self._unread: list[tuple[int, Tensor]] = []
        self._terms: tuple[str, ...] = ()  # names, known from the first step on
        # a graph holds nothing that waits for the device (fp16's scaler) or for other ranks
        graphs = args.cuda_graph and not on_cpu and ranks.world_size == 1 and args.amp != "fp16"
        if args.cuda_graph and not graphs and ranks.is_main:
            print("--cuda_graph: is for one GPU and not for fp16; trained without")
        self._graph = StepGraph(self._optimise) if graphs else None
        self._signal = 0

    # --- one step ---------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        """Lower precision where --amp says so."""
        return autocast(self.args.amp, self.device)

    def train_step(self) -> None:
        """One optimisation step at `self.step`.

        Raises:
            TrainingStopped: on a CPU, if loss or gradients are not finite; the weights stay as
                they were. On a GPU `read_losses` finds it.
        """
        # every step: evaluation switches the mode (and the released code forgot to switch back)
        freeze = self.args.freeze_bn_epoch
        training = freeze is None or self.step < freeze * len(self.batches)
        self.wrapped.train(training)
        set_lr(self.optimizers, self.lr_at(self.step))
        views = self.batches.batch(self.step)
        stats = self._graph(views, training) if self._graph else self._optimise(views)
        self._unread.append((self.step, stats))
        self.step += 1

    def _optimise(self, views: Views) -> Tensor:
        """Forward, backward and update, all on the device; loss, gradient norm and the terms of the
        loss, (2 + terms,)."""
        self.model.zero_grad()
        loss, *terms = self._backward(views)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        stats = torch.stack([value.detach().float() for value in (loss, norm, *terms)])
        if self.device.type == "cpu":
            self._check_finite(self.step, *stats[:2].tolist(), "; the step was not taken")
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return stats

    def _loss(self, embedded: Views) -> tuple[Tensor, ...]:
        """Loss of the whole batch, and its terms if it has several."""
        with self.autocast():
            found = self.loss_of(*self.ranks.gather(*embedded))
        if isinstance(found, Tensor):
            return (found,)
        self._terms = tuple(found)
        return sum(found.values()), *found.values()

    def _backward(self, views: Views) -> tuple[Tensor, ...]:
        """The loss of the whole batch and its terms, its gradients in place."""
        n = self.args.accumulate
        if n == 1:
            losses = self._loss(self._embed_part(views))
            self.scaler.scale(losses[0]).backward()
            return losses
        # A contrastive loss is no sum over images, so its gradients cannot be summed over parts of
        # a batch. First the embeddings of all parts without a graph, then the loss's gradient with
        # respect to them, then each part again with a graph (Gao et al. 2021, GradCache).
        parts = list(zip(*(view.chunk(n) for view in views), strict=True))
        with torch.no_grad(), kept_statistics(self.model):
            outputs = [self._embed_part(part) for part in parts]
        leaves = [torch.cat(rows) for rows in zip(*outputs, strict=True)]
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())  # not labels
        losses = self._loss(tuple(leaves))
        self.scaler.scale(losses[0]).backward()
        grads = [None if leaf.grad is None else leaf.grad.chunk(n) for leaf in leaves]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)  # gradients of the ranks are averaged once
            with nullcontext() if last or self.wrapped is self.model else self.wrapped.no_sync():
                embedded = zip(self._embed_part(part), grads, strict=True)
                pairs = [(x, grad[i]) for x, grad in embedded if grad is not None]
                torch.autograd.backward(*zip(*pairs, strict=True))
        return losses

    def _embed_part(self, views: Views) -> Views:
        with self.autocast():
            return self.embed(self.wrapped, views)

    def read_losses(self) -> dict[str, float]:
        """Mean "loss" of the steps since the last reading, and of its terms (a CPU-GPU sync point).

        Raises:
            TrainingStopped: if a loss or a gradient was not finite.
        """
        steps, stats = zip(*self._unread, strict=True)
        self._unread = []
        values = torch.stack(stats).tolist()
        if not self.scaler.is_enabled():
            for step, (loss, norm, *_) in zip(steps, values, strict=True):
                self._check_finite(step, loss, norm, f"; the weights since step {step} are lost")
        elif self.scaler.get_scale() < LOWEST_SCALE:
            self._diverged(f"All fp16 gradients up to step {self.step} overflow")
        loss, _, *terms = (sum(column) / len(values) for column in zip(*values, strict=True))
        return {"loss": loss} | dict(zip(self._terms, terms, strict=True))

    def _check_finite(self, step: int, loss: float, norm: float, outcome: str) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(loss) else "gradient"
            self._diverged(
                f"The {what} at step {step} is not finite (loss {loss}, gradient norm {norm}, lr "
                f"{self.lr_at(step):.3g}){outcome}"
            )

    def _diverged(self, what: str) -> NoReturn:
        raise TrainingStopped(
            f"{what}. The last good checkpoint is {self.path}. Lower --lr, add --warmup_epochs, or "
            "try --amp=off, and go on with --resume=auto.",
            exit_code=1,
        )

    def _check_weights(self) -> None:
        """Weights that are not finite are neither saved nor evaluated."""
        good = [torch.isfinite(value).all() for value in self.model.state_dict().values()]
        if not torch.stack(good).all():  # a CPU-GPU sync point
            self._diverged(
                f"The weights after step {self.step} are not finite (lr "
                f"{self.lr_at(max(0, self.step - 1)):.3g}); they were not saved"
            )

    # --- the loop ---------------------------------------------------------------------------

    def fit(self) -> list[dict]:
        """Train to the end and evaluate; returns the last metrics (from the log if nothing was
        left to do; none if there is nothing to evaluate with).

        Raises:
            TrainingStopped: if it was interrupted, or the loss was not finite.
        """
        self.log = RunLog(self.args.output_dir, self.step, self.evaluated, self.ranks.is_main)
        if self.step < self.total_steps:  # a finished run keeps the account of how it was made
            self.log.write_args(self.args, self.device, self.step)
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._fit()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close()

    def _fit(self) -> list[dict]:
        epoch_steps = len(self.batches)
        if self.step == 0 and not self.save():  # before any work is done
            raise UserError(
                f"--output_dir={self.args.output_dir}: no checkpoint can be written there, so "
                "nothing was trained; make room, or choose another folder"
            )
        metrics: list[dict] = []
        # due: killed after the checkpoint and before its evaluation
        before = self.step == 0 and self.args.eval_before and self.evaluate_model is not None
        if before or self._evaluation_due():
            metrics = self.evaluate()
        started = saved = time.monotonic()
        clock, clock_step = time.perf_counter(), self.step
        with progress(self.total_steps, self.step, None, "step", shown=self.ranks.is_main) as bar:
            while self.step < self.total_steps:
                epoch = self.step // epoch_steps
                self.train_step()
                bar.update()
                done = self.step == self.total_steps
                due = self._evaluation_due()
                reads = self.step % self.log_every == 0 or self.step % epoch_steps == 0 or done
                reads = reads or self.step == self.second_stage  # whose loss has other terms
                asked = 0
                if self.ranks.world_size == 1 or reads or self.step % AGREE_STEPS == 0:
                    now = time.monotonic()
                    late = now - saved > CHECKPOINT_SECONDS
                    over = now - started > 60 * (self.args.max_minutes or math.inf)
                    asked = self._signal << SIGNAL_SHIFT | OVER * over | LATE * late
                    asked = self.ranks.max(asked)
                saves = due or asked or self.step % self.args.checkpoint_every == 0
                if reads or saves:
                    losses = self.read_losses()
                    passed = max(1e-9, time.perf_counter() - clock)
                    step_s = passed / max(1, self.step - clock_step)
                    speed = (self.step - clock_step) * self.batches.images / passed
                    clock_step = self.step
                    lr = self.lr_at(self.step - 1)
                    entry = {"kind": "train", "epoch": self.step / epoch_steps, "step": self.step}
                    self.log.write(
                        entry | losses | {"lr": lr, "images_per_s": speed, "step_s": step_s}
                    )
                    self._show(bar, epoch, losses["loss"], lr, speed)
                if asked >= OVER and not done:
                    self._stop(asked >> SIGNAL_SHIFT)
                if saves:
                    self.save()
                    saved = time.monotonic()
                if due and not done:
                    metrics = self.evaluate()
                if reads or saves:
                    clock = time.perf_counter()  # of training alone
        if self.evaluate_model is None:
            self.save()
        elif self.last_eval is None or self.last_eval["step"] != self.step:
            self.save()
            metrics = self.evaluate()
        if not self.saved:
            raise TrainingStopped(
                f"Training and evaluation are done, but the checkpoint of step {self.step} could "
                f"not be written; make room in {self.args.output_dir} and give the same command "
                "with --resume=auto (without --overwrite)",
                exit_code=1,
            )
        return metrics or ([self.last_eval] if self.last_eval else [])

    def _evaluation_due(self) -> bool:
        if self.evaluate_model is None:
            return False
        every = len(self.batches) * self.args.eval_epoch
        evaluated = self.last_eval["step"] if self.last_eval else 0
        return self.step > evaluated and self.step % every == 0

    def _show(self, bar: tqdm, epoch: int, loss: float, lr: float, speed: float) -> None:
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.2e}", "img/s": f"{speed:.0f}"}
        if self.last_eval is not None:
            name = f"mAP@{self.args.Top_N}"
            shown[name] = f"{self.last_eval[name]:.4f}"
        bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}", refresh=False)
        bar.set_postfix(shown, refresh=False)

    def evaluate(self) -> list[dict]:
        """Evaluate on the main rank, log, and remember the headline, in the checkpoint too."""
        self._check_weights()
        metrics: list[dict] = []
        if self.ranks.is_main:
            # compiled for the shapes of training alone
            with self.autocast(), torch.compiler.set_stance("force_eager"):
                found = self.evaluate_model(self.model)
            epoch = self.step / self.epoch_steps
            place = {"kind": "eval", "epoch": epoch, "step": self.step}
            if not self.step_is_known:
                place |= {"epoch": None, "step": None}
            metrics = [place | entry for entry in found]
            for i, entry in enumerate(metrics):
                entry["headline"] = i == 0
                if self.log is not None:
                    self.log.write(entry)
            self.last_eval = {k: v for k, v in metrics[0].items() if not isinstance(v, dict)}
            tqdm.write(_summary(metrics, self.args.Top_N))
        self.last_eval = self.ranks.collect(self.last_eval)[0]
        self.evaluated = self.step
        if self.log is not None:
            self.save()  # a kill after this does not evaluate again
        return metrics

    # --- state ------------------------------------------------------------------------------

    def save(self) -> bool:
        """Write checkpoint_last.pt; a full disk is reported and training goes on.

        Returns:
            Whether it was written; `self.saved` keeps it.
        Raises:
            TrainingStopped: if weights are not finite; the file stays as it was.
        """
        self._check_weights()
        problem = None
        if self.ranks.is_main:
            state = {
                "method": self.method,
                "args": plain(self.args),
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "last_eval": self.last_eval,
                "evaluated": self.evaluated,
                "epoch_steps": self.epoch_steps,
                "batches": self.batches.state() if hasattr(self.batches, "state") else None,
            }
            try:
                save_checkpoint(self.path, state)
            except OSError as error:
                problem = str(error)
                stays = ". The one before it stays." if self.path.exists() else "."
                tqdm.write(
                    f"WARNING: checkpoint not written at step {self.step}: {problem}{stays}",
                    file=sys.stderr,
                )
        self.saved = self.ranks.collect(problem)[0] is None
        return self.saved

    def _restore(self, checkpoint: dict) -> None:
        args, path = self.args, Path(checkpoint["path"])
        # older ones have no such flags
        saved = {"validate": False, "recipe": args.recipe, "views": 2, "neighbour_share": 0.0}
        saved |= {"neighbours": vars(args).get("neighbours")} | checkpoint["args"]
        if not args.eval_only:
            why = "they fix the order of the images, the state of the optimizer and what is trained"
            fixed = FIXED_ON_RESUME + [n for n in TUPLE_FLAGS + STAGE_FLAGS if n in args]
            check_same(saved, args, fixed, why, path)
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.step_is_known = checkpoint["step"] is not None
            self.step, self.last_eval = checkpoint["step"] or 0, checkpoint["last_eval"]
            before = self.last_eval["step"] if self.last_eval else 0
            self.evaluated = checkpoint.get("evaluated", before)  # older ones do not have it
            if args.eval_only:
                known = checkpoint.get("epoch_steps")
                if known is None and self.last_eval and self.last_eval["epoch"]:  # an older one
                    known = round(self.last_eval["step"] / self.last_eval["epoch"])
                self.epoch_steps = known or self.epoch_steps
                return
            if hasattr(self.batches, "restore"):
                self.batches.restore(checkpoint.get("batches"))
            states = checkpoint["optimizer"]
            states = [states] if isinstance(states, dict) else states  # as older ones have it
            for optimizer, state in zip(self.optimizers, states, strict=True):
                restore_optimizer(optimizer, state)
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(
                f"--resume={path}: is damaged, or of a model of another shape ({detail})"
            ) from error
        if any(saved.get(name) != getattr(args, name) for name in EVALUATION_FLAGS):
            self.last_eval = None  # evaluated under other flags: not this run's figure

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # the second time: at once
            raise KeyboardInterrupt
        self._signal = number

    def _stop(self, number: int) -> None:
        """Save and leave: a signal came, or (number 0) --max_minutes are over."""
        outcome = f"saved {self.path}" if self.save() else f"NOT saved, see above: {self.path}"
        why = "Interrupted" if number else f"--max_minutes={self.args.max_minutes:g} are over"
        raise TrainingStopped(
            f"{why} after step {self.step} of {self.total_steps}; {outcome}. To go on, give "
            f"the same command with --resume=auto --output_dir={self.args.output_dir} (and without "
            "--overwrite)",
            exit_code=128 + number if number else TIME_IS_OVER,
        )


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics stay as they are, whatever passes through the model."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _summary(metrics: list[dict], top_n: int | str) -> str:
    """One line a distance: what was measured and how it is defined."""
    lines = []
    for entry in metrics:
        whole = "" if top_n == "all" else f", mAP@all {entry['mAP@all']:.4f}"
        place = "weights"
        if entry["step"] is not None:
            place = f"epoch {entry['epoch']:g}, step {entry['step']}"
        lines.append(
            f"[{place}] {entry['code_bits']:g} bits, "
            f"{entry['distance']}: mAP@{top_n} {entry[f'mAP@{top_n}']:.4f} "
            f"({ap_definition(top_n)}){whole}, {entry['queries']} queries"
        )
    return "\n".join(lines)
