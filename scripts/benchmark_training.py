"""Where the time and the memory of training go: a step's profile, whole epochs, peak memory.

    python scripts/benchmark_training.py                  # everything, minutes on two cores
    python scripts/benchmark_training.py --part=profile   # or several of profile,epoch,memory

Images are random; the network, its views and its step are those of main_SPQ.py, by a real Trainer.
That both ways of making views and both losses are equal is asserted by benchmark.py.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import parse_args, spq_parser
from benchmark import Part, Stepper, add_flags, build, in_own_process, plain_loss, run_parts, wait
from data.augment import AUGMENTATIONS, SimCLRAugment
from data.batches import DeviceBatches, ViewBatches
from main_SPQ import AHEAD, LOSSES
from models import build_spq
from utils.device import choose_amp
from utils.distributed import Ranks
from utils.loop import Trainer

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


def build_trainer(args: argparse.Namespace, images: Tensor, words: list[str]) -> Trainer:
    """A Trainer as main_SPQ.py makes it, with the batched augmentation.

    Args:
        args: `width`, `batch_size`, `amp`, `size`.
        images: the training set, on the device.
        words: more flags of main_SPQ.py.
    """
    device = images.device
    common = [f"--{name}={getattr(args, name)}" for name in ("width", "batch_size", "amp")]
    common += [f"--input_size={args.size}", "--augmentation=batched"]
    flags = parse_args(spq_parser(), [*common, *words])
    flags.amp = choose_amp(flags.amp, device)
    torch.backends.cudnn.deterministic = True  # as main_SPQ.py
    torch.manual_seed(0)
    augment = AUGMENTATIONS[flags.augmentation](
        flags.crop_size, flags.crop_min_area, flags.jitter_strength
    )
    batches = ViewBatches(
        DeviceBatches(images, flags.batch_size, flags.seed, Ranks()),
        lambda step: [augment, augment],
        flags.seed,
        ahead=ahead(device),
    )
    layout = torch.channels_last if flags.width % 8 == 0 else torch.contiguous_format
    model = build_spq("resnet18", flags.width, "soft", M=8, K=16, d=16)
    model = model.to(device, memory_format=layout)
    if flags.compile:
        model.trunk.compile()
    criterion = LOSSES[flags.loss]

    def embed(model: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if flags.joint_views:
            x, z = model(torch.cat(views))
            return *x.chunk(2), *z.chunk(2)
        (x_a, z_a), (x_b, z_b) = (model(view) for view in views)
        return x_a, x_b, z_a, z_b

    def loss_of(*embedded: Tensor) -> Tensor:
        return criterion(*embedded, tau=flags.contrastive_temperature)

    return Trainer(flags, "SPQ", model, embed, loss_of, Marked(batches), None, Ranks())


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

# An operator belongs to the outermost of its callers, itself included, that a fragment of these
# fits, letters in lower case and underscores left out. Ranges come first: they hold all kinds.
RANGES = {"augmentation": ["augmentation"], "optimizer": ["optimizer.step#", "optimizer.zerograd#"]}
GROUPS = {
    "convolution": ["conv"],
    "batch norm": ["batchnorm"],
    "linear, quantizer, loss": [
        *("mm", "linear", "einsum", "matmul", "softmax", "nllloss", "crossentropy", "vectornorm"),
    ],
    "optimizer": ["foreach"],  # the norm of the gradients
    "elementwise, ReLU": [
        *(
            "relu",
            "threshold",
            "::add",
            "::sub",
            "::mul",
            "::div",
            "clamp",
            "where",
            "::to",
            "copy",
        ),
        *("addbackward", "subbackward", "mulbackward", "divbackward", "::neg", "::exp", "::rsqrt"),
    ],
}


def group_of(event: FunctionEvent) -> str:
    """What part of a step an operator belongs to."""
    names = []  # innermost first
    while event is not None:
        names.append(event.name.lower().replace("_", ""))
        event = event.cpu_parent
    for table in (RANGES, GROUPS):
        for name in reversed(names):
            for group, fragments in table.items():
                if any(fragment in name for fragment in fragments):
                    return group
    return "other"


def bench_profile(args: argparse.Namespace, device: torch.device) -> dict:
    """A step of ours, views included, by groups of operators.

    On a CPU an operator's time is what it spends outside of the operators it calls; on a GPU it is
    that of its kernels. Wall time is taken without the profiler, which slows the CPU down.
    """
    trainer = build_trainer(args, random_images(2 * args.batch_size, args.size, device), [])
    group = ahead(device)
    for _ in range(group):
        trainer.train_step()
    with FlopCounterMode(display=False) as counter:
        for _ in range(group):
            trainer.train_step()
    step_s = seconds_a_step(trainer.train_step, device, max(2, group))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(group):
            trainer.train_step()
        wait(device)
    trainer.read_losses()  # finite, or an error

    shares: dict[str, float] = dict.fromkeys([*RANGES, *GROUPS, "other"], 0.0)
    operators: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    kernels = 0.0  # microseconds
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:  # a range's shadow on the GPU is no kernel
                kernels += event.time_range.elapsed_us()
            continue
        spent = event.self_cpu_time_total
        if on_gpu:
            spent = sum(kernel.duration for kernel in event.kernels)
        shares[group_of(event)] += spent
        operators[event.name] += spent
        calls[event.name] += 1
    total = sum(shares.values())
    if on_gpu:  # kernels that no operator claims
        shares["other"] += max(0.0, kernels - total)
        total = max(kernels, total)
    costliest = sorted(operators, key=operators.get, reverse=True)[:12]
    gflop = counter.get_total_flops() / group / 1e9
    found = {
        "width": args.width,
        "batch": args.batch_size,
        "amp": trainer.args.amp,
        "step_s": step_s,
        "images_per_s": args.batch_size / step_s,
        "gflop_a_step": gflop,
        "gflop_per_s": gflop / step_s,
        "share": {name: spent / total for name, spent in shares.items()},
        "costliest": [
            {"name": name, "share": operators[name] / total, "calls_a_step": calls[name] / group}
            for name in costliest
        ],
    }
    if on_gpu:
        found["kernel_s"] = kernels / 1e6 / group
        found["gpu_idle_share"] = 1 - found["kernel_s"] / step_s
    return found


# --- epoch --------------------------------------------------------------------------------------


def released_step(args: argparse.Namespace, images: Tensor) -> Callable[[], object]:
    """The released loop: float32, each view on its own, the loss read every step."""
    device = images.device
    torch.backends.cudnn.deterministic = False
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
    device = images.device
    group = ahead(device)
    steps = -(-args.steps // group) * group  # whole groups: each is augmented at its first step
    torch.manual_seed(0)
    if name == RELEASED:
        trainer, step = None, released_step(args, images)
    else:
        trainer = build_trainer(args, images, VARIANTS[name])
        step = trainer.train_step
    start = time.perf_counter()
    for _ in range(group):  # a graph is captured within these
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

    A variant that fails is reported by its error.
    """
    names = [RELEASED, *VARIANTS] if args.variants == "all" else args.variants.split(",")
    if unknown := [name for name in names if name not in (RELEASED, *VARIANTS)]:
        sys.exit(f"--variants={unknown[0]}: allowed are {', '.join([RELEASED, *VARIANTS])}")
    images = random_images(EPOCH_IMAGES, args.size, device)
    args.steps = args.steps or (20 if device.type == "cuda" else 2)
    found: dict = {"width": args.width, "batch": args.batch_size}
    for name in names:
        if "cuda_graph" in name and device.type != "cuda":
            found[name] = {"skipped": "needs a GPU"}
            continue
        try:
            found[name] = time_epoch(args, images, name)
        except Exception as error:  # whatever new hardware may say
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    released = found.get(RELEASED, {}).get("epoch_s")
    for name in VARIANTS:
        if released and "epoch_s" in found.get(name, {}):
            found[name]["ratio"] = released / found[name]["epoch_s"]
    return found


# --- memory -------------------------------------------------------------------------------------


def bench_memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Peak memory of training by batch size and --accumulate, each in a process of its own.

    Two steps, as Adam's state is there from the second on. `step_MiB` is what they need beside the
    weights and the images.
    """
    pairs = [(int(b), int(n)) for b in split(args.batch_sizes) for n in split(args.accumulates)]
    if len(pairs) == 1:
        return [memory_of(args, device, *pairs[0])]
    found = []
    for batch_size, accumulate in pairs:
        changed = {"batch_sizes": batch_size, "accumulates": accumulate}
        try:
            found += in_own_process(args, "memory", __file__, **changed)
        except subprocess.CalledProcessError as error:  # out of memory, for one
            last = error.stderr.strip().splitlines()[-1:]
            failed = {"batch": batch_size, "accumulate": accumulate}
            found.append(failed | {"error": "".join(last) or f"exit code {error.returncode}"})
    return found


def split(words: str) -> list[str]:
    """Comma-separated words."""
    return words.split(",")


def memory_of(
    args: argparse.Namespace, device: torch.device, batch_size: int, accumulate: int
) -> dict:
    """Peak memory of this process over its first two steps."""
    args.batch_size = batch_size
    images = random_images(2 * batch_size, args.size, device)
    trainer = build_trainer(args, images, [f"--accumulate={accumulate}"])
    before = memory(device, start=True)
    for _ in range(2):
        trainer.train_step()
    trainer.read_losses()
    peak = memory(device)
    return {
        "batch": batch_size,
        "accumulate": accumulate,
        "size": args.size,
        "width": args.width,
        "amp": trainer.args.amp,
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
    flag("--steps", type=int, default=0, help="epoch: steps timed (default: 20 on CUDA, 2 on CPU)")
    flag("--variants", default="all", help=f"epoch: of {','.join([RELEASED, *VARIANTS])}")
    flag("--batch_sizes", default="64,256", help="memory: images (default: 64,256)")
    flag("--accumulates", default="1,4", help="memory: parts of a batch (default: 1,4)")
    found = run_parts(parser.parse_args(), PARTS, __file__)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
