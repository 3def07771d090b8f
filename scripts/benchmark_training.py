"""Where the time and the memory of training go: a step's profile, whole epochs, peak memory.

    python scripts/benchmark_training.py                  # everything, minutes on two cores
    python scripts/benchmark_training.py --part=profile   # or several of profile,epoch,memory

Images are random; the network, its views and its step are those of main_SPQ.py, by a real Trainer.
That both ways of making views and both losses are equal is asserted by benchmark.py.
"""

import argparse
import gc
import itertools
import json
import re
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import (
    Part,
    Stepper,
    add_flags,
    build,
    in_own_process,
    plain_loss,
    print_found,
    run_parts,
    some_of,
    wait,
)

from args import parse_args, spq_parser
from data.augment import SimCLRAugment
from data.batches import AHEAD, DeviceBatches, ViewBatches
from main_SPQ import build_trainer
from utils.device import choose_amp, choose_kernels
from utils.distributed import Ranks
from utils.loop import Trainer
from utils.pretrained import start_model
from utils.setup import Run

EPOCH_IMAGES = 50_000
EPOCH_FLOP = 335e12  # of such an epoch, both views forward and backward, width 64, 32 pixels
# flags of main_SPQ.py, the surest variants first: what a failed one leaves behind harms no other
VARIANTS = {
    "plain": [],
    "joint_views": ["--joint_views=True"],
    "joint_views+compile": ["--joint_views=True", "--compile=True"],
    "joint_views+cuda_graph": ["--joint_views=True", "--cuda_graph=True"],
    "joint_views+compile+cuda_graph": [
        "--joint_views=True",
        "--compile=True",
        "--cuda_graph=True",
    ],
    "joint_views+compile+cuda_graph+free": [
        "--joint_views=True",
        "--compile=True",
        "--cuda_graph=True",
        "--deterministic=False",
    ],
}
RELEASED = "released"  # the variant that everything is compared with


# --- the step -----------------------------------------------------------------------------------


class Marked:
    """Batches whose making is a range in the profile."""

    def __init__(self, batches: ViewBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """As the batches have it."""
        with record_function("augmentation"):
            return self.batches.batch(step)


def random_images(n: int, size: int, device: torch.device) -> Tensor:
    """(n, 3, size, size) uint8."""
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)


def trainer_of(args: argparse.Namespace, images: Tensor, words: list[str]) -> Trainer:
    """The Trainer of main_SPQ.py, with the batched augmentation.

    Args:
        args: `width`, `batch_size`, `amp`, `size`.
        images: the training set, on the device.
        words: more flags of main_SPQ.py; they win.
    """
    common = [f"--{name}={getattr(args, name)}" for name in ("width", "batch_size", "amp")]
    common += [f"--input_size={args.size}", "--augmentation=batched"]
    flags = parse_args(spq_parser(), [*common, *words])
    flags.amp = choose_amp(flags.amp, images.device)
    choose_kernels(flags.deterministic)
    torch.manual_seed(0)
    run = Run("SPQ", flags, images.device, Ranks(), checkpoint=None)
    trainer = build_trainer(run, start_model(run), images, None)
    trainer.batches = Marked(trainer.batches)
    return trainer


def ahead(device: torch.device) -> int:
    """Batches that are augmented together: steps are timed in whole groups of these."""
    return AHEAD if device.type == "cuda" else 1


def seconds_a_step(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Mean time of `step`; calls before it are to have warmed it up."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - start) / steps


# --- profile ------------------------------------------------------------------------------------

# An operator belongs to the outermost of its callers, itself included, whose name (in lower case,
# without underscores) fits one of these; ranges come first, as they hold all kinds.
RANGES = {"augmentation": "^augmentation$", "optimizer": r"^optimizer\."}
GROUPS = {
    "convolution": "conv",
    "batch norm": "batchnorm",
    "linear, quantizer, loss": "mm|linear|einsum|matmul|softmax|nllloss|crossentropy|vectornorm",
    "optimizer": "foreach",  # the norm of the gradients
    "elementwise, ReLU": "relu|threshold|(add|sub|mul|div|neg|exp)(backward|$)|clamp|copy|::to$",
}


def group_of(event: FunctionEvent) -> str:
    """What part of a step an operator belongs to."""
    names = []  # innermost first
    while event is not None:
        names.append(event.name.lower().replace("_", ""))
        event = event.cpu_parent
    for table in (RANGES, GROUPS):
        for name in reversed(names):
            for group, pattern in table.items():
                if re.search(pattern, name):
                    return group
    return "other"


def account(
    events: Iterable[FunctionEvent], on_gpu: bool
) -> tuple[dict[str, float], dict[str, float], Counter]:
    """Microseconds of each group and of each operator, and how often it was called.

    On a CPU an operator's time is what it spends outside of the operators it calls; on a GPU it is
    that of the kernels it launches.
    """
    groups: dict[str, float] = dict.fromkeys([*RANGES, *GROUPS, "other"], 0.0)
    operators: dict[str, float] = defaultdict(float)
    calls: Counter = Counter()
    kernels = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:  # a range's shadow on the GPU is no kernel
                kernels += event.time_range.elapsed_us()
            continue
        if on_gpu:
            spent = sum(kernel.duration for kernel in event.kernels)
        else:
            spent = event.self_cpu_time_total
        groups[group_of(event)] += spent
        operators[event.name] += spent
        calls[event.name] += 1
    groups["other"] += max(0.0, kernels - sum(groups.values()))  # those that no operator claims
    return groups, operators, calls


def bench_profile(args: argparse.Namespace, device: torch.device) -> dict:
    """A step of ours, views included: time by groups of operators, and achieved speed.

    Wall time is taken without the profiler, which slows the CPU down. Floating-point operations
    are those of convolutions and matrix products, the crops' too.
    """
    on_gpu, steps = device.type == "cuda", ahead(device)
    images = random_images(2 * steps * args.batch_size, args.size, device)
    trainer = trainer_of(args, images, [])

    def run() -> None:
        for _ in range(steps):
            trainer.train_step()

    run()  # warm-up
    with FlopCounterMode(display=False) as counter:
        run()
    step_s = seconds_a_step(run, device, 2) / steps
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        run()
        wait(device)
    trainer.read_losses()  # finite, or an error
    gflop = counter.get_total_flops() / steps / 1e9
    found = {
        "width": args.width,
        "batch": args.batch_size,
        "size": args.size,
        "amp": trainer.args.amp,
        "step_s": step_s,
        "images_per_s": args.batch_size / step_s,
        "gflop_a_step": gflop,
        "gflop_per_s": gflop / step_s,
    }
    groups, operators, calls = account(profiler.events(), on_gpu)
    total = sum(groups.values())
    if not total:
        return found | {"error": "the profiler saw no kernels"}
    if on_gpu:
        found["kernel_s"] = total / 1e6 / steps
        found["gpu_idle_share"] = 1 - found["kernel_s"] / step_s
    costliest = sorted(operators, key=operators.get, reverse=True)[:12]
    return found | {
        "share": {name: spent / total for name, spent in groups.items()},
        "costliest": [
            {"name": name, "share": operators[name] / total, "calls_a_step": calls[name] / steps}
            for name in costliest
        ],
    }


# --- epoch --------------------------------------------------------------------------------------


def released_step(args: argparse.Namespace, images: Tensor) -> Callable[[], object]:
    """The released loop: float32, each view on its own, the loss read every step."""
    device = images.device
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False  # torch's defaults
    stepper = Stepper(build(args, device), [], plain_loss)
    augment = SimCLRAugment(args.size).to(device)
    batches = DeviceBatches(images, args.batch_size, 0, Ranks())
    steps = iter(range(sys.maxsize))

    def step() -> None:
        batch = batches.batch(next(steps))
        stepper.views = [augment(batch), augment(batch)]
        stepper.step()

    return step


def time_epoch(args: argparse.Namespace, images: Tensor, name: str) -> dict:
    """One variant: `steps` steps, scaled up to an epoch."""
    device, group = images.device, ahead(images.device)
    asked = args.steps or (20 if device.type == "cuda" else 2)
    steps = -(-asked // group) * group  # whole groups: each is augmented at its first step
    torch.manual_seed(0)
    if name == RELEASED:
        trainer, step = None, released_step(args, images)
    else:
        trainer = trainer_of(args, images, VARIANTS[name])
        step = trainer.train_step
    start = time.perf_counter()
    for _ in range(group):  # compiles, and captures a graph
        step()
    wait(device)
    warm_up_s = time.perf_counter() - start
    step_s = seconds_a_step(step, device, steps)
    if trainer is not None:
        trainer.read_losses()  # finite, or an error
    epoch_s = step_s * EPOCH_IMAGES / args.batch_size
    flop = EPOCH_FLOP * (args.width / 64) ** 2 * (args.size / 32) ** 2
    return {
        "amp": "off" if trainer is None else trainer.args.amp,
        "epoch_s": epoch_s,
        "images_per_s": args.batch_size / step_s,
        "tflop_per_s": flop / epoch_s / 1e12,
        "steps": steps,
        "warm_up_s": warm_up_s,
    }


def bench_epoch(args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds for an epoch of 50,000 images: the released loop, and ours in variants.

    A variant that fails is reported by its error. `ratio` is to the released loop.
    """
    images = random_images(EPOCH_IMAGES, args.size, device)
    found: dict = {}
    for name in args.variants.split(","):
        if "cuda_graph" in name and device.type != "cuda":
            found[name] = {"skipped": "needs a GPU"}
            continue
        try:
            found[name] = time_epoch(args, images, name)
        except Exception as error:  # whatever new hardware may say
            found[name] = told(error)
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)  # if what follows is killed
        if "compile" in name:
            torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    released = found.get(RELEASED, {}).get("epoch_s")
    for name, figures in found.items():
        if released and name != RELEASED and "epoch_s" in figures:
            figures["ratio"] = released / figures["epoch_s"]
    return {"width": args.width, "batch": args.batch_size, "size": args.size, **found}


def told(error: Exception) -> dict[str, str]:
    """What is printed in place of figures."""
    return {"error": f"{type(error).__name__}: {error}"[:1000]}


# --- memory -------------------------------------------------------------------------------------


def bench_memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Peak memory of training by batch size and --accumulate, each in a process of its own.

    Two steps unless `steps` says otherwise, as Adam's state is there from the second on. `step_MiB`
    is what they need beside the weights and the images; on a GPU that holds the views of `AHEAD`
    batches.
    """
    sizes, parts = (words.split(",") for words in (args.batch_sizes, args.accumulates))
    found = []
    for batch_size, accumulate in itertools.product(sizes, parts):
        which = {"batch": int(batch_size), "accumulate": int(accumulate)}
        if len(sizes) == len(parts) == 1:
            try:
                found.append(which | memory_of(args, device, **which))
            except Exception as error:  # out of memory, for one
                found.append(which | told(error))
        else:
            changed = {"batch_sizes": batch_size, "accumulates": accumulate}
            figures = in_own_process(args, "memory", __file__, **changed)
            found += figures if isinstance(figures, list) else [which | figures]
    return found


def memory_of(args: argparse.Namespace, device: torch.device, batch: int, accumulate: int) -> dict:
    """Peak memory of this process over its first steps."""
    images = random_images(2 * batch, args.size, device)
    words = [f"--batch_size={batch}", f"--accumulate={accumulate}"]
    trainer = trainer_of(args, images, words)
    before = memory(device, start=True)
    steps = args.steps or 2
    for _ in range(steps):
        trainer.train_step()
    trainer.read_losses()
    peak = memory(device)
    return {
        "size": args.size,
        "width": args.width,
        "amp": trainer.args.amp,
        "steps": steps,
        "before_MiB": before / 2**20,
        "step_MiB": (peak - before) / 2**20,
        "peak_MiB": peak / 2**20,
    }


def memory(device: torch.device, start: bool = False) -> int:
    """Bytes: the peak since the last call with `start`, which returns what is in use.

    On a GPU these are tensors; on a CPU they are the process's resident pages.
    """
    if device.type == "cuda":
        wait(device)
        if start:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak since the process began, in KiB or (macOS) bytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if start:
        gc.collect()
        with suppress(OSError):  # not allowed everywhere: then a peak of loading may count
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmRSS" if start else "VmHWM"].split()[0]) * 1024


PARTS: dict[str, Part] = {
    "profile": bench_profile,
    "epoch": bench_epoch,
    "memory": bench_memory,
}


def main() -> None:
    """Run the parts asked for and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, PARTS)
    flag = parser.add_argument
    flag("--size", type=int, default=32, help="of the images, pixels (default: 32)")
    flag(
        "--steps",
        type=int,
        default=0,
        help="epoch: steps timed (default: 20 on CUDA, 2 on CPU); memory: steps (default: 2)",
    )
    variants = [RELEASED, *VARIANTS]
    flag(
        "--variants",
        type=some_of(variants),
        default="all",
        help=f"epoch: all (default), or some of {','.join(variants)}",
    )
    flag("--batch_sizes", default="64,256", help="memory: images (default: 64,256)")
    flag("--accumulates", default="1,4", help="memory: parts of a batch (default: 1,4)")
    print_found(run_parts(parser.parse_args(), PARTS, __file__))


if __name__ == "__main__":
    main()
