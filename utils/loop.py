"""The training loop that every main script shares: step, progress, checkpoint, evaluation."""

import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint import LAST, check_same, save_checkpoint
from utils.device import AMP_DTYPES
from utils.distributed import Ranks
from utils.errors import UserError
from utils.logging import RunLog, plain
from utils.schedule import lr_schedule

CHECKPOINT_SECONDS = 600  # a checkpoint at least this often, beside --checkpoint_every
LOWEST_SCALE = 2.0**-24  # of fp16 gradients: below it every step so far has overflowed
# a resumed run draws the same images in the same order only if these are as they were
FIXED_ON_RESUME = ["batch_size", "seed", "limit_train", "optimizer"]
# what an evaluation's figures depend on, beside the weights
EVALUATION_FLAGS = ["Top_N", "distance", "limit_db", "limit_query", "input_size"]


class TrainingStopped(Exception):
    """Training ended before its time; the message says why and how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """--optimizer over all parameters."""
    parameters, decay = list(model.parameters()), args.weight_decay
    if args.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=True
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(parameters, lr=args.lr, weight_decay=decay, fused=True)


class Batches(Protocol):
    """Where a Trainer's images come from, `data.batches.DeviceBatches` for one."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def batch(self, step: int) -> Tensor:
        """This rank's images of the batch at `step`, counted from 0 over the whole training."""


class Trainer:
    """Trains one model by one loss; knows nothing of the method.

    Args:
        args: flags of the run, with `amp` resolved; never changed.
        method: name that checkpoints carry, "SPQ".
        model: on the device. Its state_dict is what checkpoints hold.
        loss_of: (model, images) -> scalar loss of a batch of uint8 images.
        batches: source of the images.
        evaluate: model -> list of metric dicts, the headline first; None where there is nothing to
            evaluate with.
        ranks: this process among the others.
        checkpoint: state to go on from, as `utils.checkpoint.load_checkpoint` returns it.
    """

    def __init__(
        self,
        args: Namespace,
        method: str,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Tensor], Tensor],
        batches: Batches,
        evaluate: Callable[[nn.Module], list[dict]] | None,
        ranks: Ranks,
        checkpoint: dict | None = None,
    ) -> None:
        self.args, self.method, self.model, self.loss_of = args, method, model, loss_of
        self.batches, self.evaluate_model, self.ranks = batches, evaluate, ranks
        self.device = next(model.parameters()).device
        self.path: Path = args.output_dir / LAST
        self.optimizer = build_optimizer(args, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.lr_at = lr_schedule(
            args.lr_schedule, args.lr, args.epochs, len(batches), args.warmup_epochs
        )
        self.total_steps = min(args.epochs * len(batches), args.max_steps or sys.maxsize)
        self.step = 0
        self.last_eval: dict | None = None  # headline metrics, with the step they belong to
        self.evaluated = 0  # step of the last evaluation in the log
        torch.manual_seed(args.seed + ranks.rank)  # of the augmentation, another on each rank
        if checkpoint is not None:
            self._restore(checkpoint)
        self.log: RunLog | None = None  # opened by `fit`: an evaluation alone leaves it untouched
        self.saved = True  # whether the last checkpoint could be written
        self.wrapped = ranks.wrap(model)
        self._signal = 0

    # --- one step ---------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        """Lower precision where --amp says so."""
        dtype = AMP_DTYPES[self.args.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def train_step(self) -> float:
        """One optimisation step at `self.step`; returns its loss.

        Raises:
            TrainingStopped: if loss or gradients are not finite; the weights stay as they were.
        """
        self.wrapped.train()  # every step: evaluation switches the mode
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step)
        images = self.batches.batch(self.step)
        with self.autocast():
            loss = self.loss_of(self.wrapped, images)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        value, norm = self._loss_and_norm(loss)
        if not math.isfinite(value) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(value) else "gradient"
            self._diverged(
                f"The {what} at step {self.step} is not finite (loss {value}, gradient norm "
                f"{norm}, lr {self.lr_at(self.step):.3g}); the step was not taken"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < LOWEST_SCALE:
            self._diverged(f"All fp16 gradients up to step {self.step} overflow")
        self.step += 1
        return value

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

    def _loss_and_norm(self, loss: Tensor) -> tuple[float, float]:
        """Loss and gradient norm, in one transfer (a CPU-GPU sync point)."""
        if self.scaler.is_enabled():
            return loss.item(), 0.0  # the scaler itself skips steps whose gradients overflowed
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        value, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
        return value, norm

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
        if self._evaluation_due():  # killed after the checkpoint and before its evaluation
            metrics = self.evaluate()
        saved, clock, images = time.monotonic(), time.perf_counter(), 0
        with tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar:
            while self.step < self.total_steps:
                epoch = self.step // epoch_steps
                loss = self.train_step()
                images += self.args.batch_size
                done = self.step == self.total_steps
                if self.step % self.args.log_every == 0 or self.step % epoch_steps == 0 or done:
                    speed = images / max(1e-9, time.perf_counter() - clock)
                    lr = self.optimizer.param_groups[0]["lr"]
                    self.log.write(
                        {
                            "kind": "train",
                            "epoch": self.step / epoch_steps,
                            "step": self.step,
                            "loss": loss,
                            "lr": lr,
                            "images_per_s": speed,
                        }
                    )
                    self._show(bar, epoch, loss, lr, speed)
                    clock, images = time.perf_counter(), 0
                bar.update()
                # one number for all ranks: the signal above, whether a checkpoint is late below
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                agreed = self.ranks.max(self._signal << 1 | late, self.device)
                if agreed > 1:
                    self._stop(agreed >> 1)
                due = self._evaluation_due()
                if due or agreed or self.step % self.args.checkpoint_every == 0:
                    self.save()
                    saved = time.monotonic()
                if due and not done:
                    metrics = self.evaluate()
                    clock, images = time.perf_counter(), 0
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
            with self.autocast():
                found = self.evaluate_model(self.model)
            epoch = self.step / len(self.batches)
            place = {"kind": "eval", "epoch": epoch, "step": self.step}
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
        rng = self.ranks.collect(_random_state(self.device))
        problem = None
        if self.ranks.is_main:
            state = {
                "method": self.method,
                "args": plain(self.args),
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng,
                "last_eval": self.last_eval,
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
        args, saved, path = self.args, checkpoint["args"], Path(checkpoint["path"])
        if not args.eval_only:
            why = "they fix the order of the images and the state of the optimizer"
            check_same(saved, args, FIXED_ON_RESUME, why, path)
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.step, self.last_eval = checkpoint["step"], checkpoint["last_eval"]
            self.evaluated = self.last_eval["step"] if self.last_eval else 0
            if args.eval_only:
                return
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            self._restore_random_state(checkpoint["rng"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(
                f"--resume={path}: is damaged, or of a model of another shape ({detail})"
            ) from error
        if any(saved.get(name) != getattr(args, name) for name in EVALUATION_FLAGS):
            self.last_eval = None  # evaluated under other flags: not this run's figure

    def _restore_random_state(self, states: list[dict[str, Tensor]]) -> None:
        if len(states) == self.ranks.world_size:
            _set_random_state(states[self.ranks.rank], self.device)
        elif self.ranks.is_main:
            print(
                f"The checkpoint is of {len(states)} processes, this run has "
                f"{self.ranks.world_size}: augmentation starts from other random numbers."
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # the second time: at once
            raise KeyboardInterrupt
        self._signal = number

    def _stop(self, number: int) -> None:
        outcome = f"saved {self.path}" if self.save() else f"NOT saved, see above: {self.path}"
        raise TrainingStopped(
            f"Interrupted after step {self.step} of {self.total_steps}; {outcome}. To go on, give "
            f"the same command with --resume=auto --output_dir={self.args.output_dir} (and without "
            "--overwrite)",
            exit_code=128 + number,
        )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _summary(metrics: list[dict], top_n: int) -> str:
    """One line a distance: what was measured and how it is defined."""
    lines = []
    for entry in metrics:
        lines.append(
            f"[epoch {entry['epoch']:g}, step {entry['step']}] {entry['code_bits']:g} bits, "
            f"{entry['distance']}: mAP@{top_n} {entry[f'mAP@{top_n}']:.4f} "
            f"(AP over relevant found in the top {top_n}), mAP@all {entry['mAP@all']:.4f}, "
            f"{entry['queries']} queries"
        )
    return "\n".join(lines)
