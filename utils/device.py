"""Which device, and which precision pays on it."""

import os
import platform
import time
from argparse import Namespace
from contextlib import AbstractContextManager

import torch

from utils.distributed import Ranks
from utils.errors import UserError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
BF16_MUST_GAIN = 1.3  # on a CPU bf16 has to be this much faster than float32 to be chosen


def choose_device(args: Namespace, ranks: Ranks, quiet: bool = False) -> torch.device:
    """The device that --device and --gpu_id mean; says in one line when there is no GPU.

    Args:
        args: `device` and `gpu_id`.
        ranks: this process among the others.
        quiet: do not say it.
    Raises:
        UserError: if the GPU asked for is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cpu":
        return torch.device("cpu")
    if count == 0:
        if args.device == "cuda":
            raise UserError("--device=cuda: torch sees no CUDA GPU here; allowed are auto and cpu")
        if ranks.is_main and not quiet:
            threads = torch.get_num_threads()
            print(
                f"No CUDA GPU found: --gpu_id={args.gpu_id} is ignored, computing on the CPU "
                f"({threads} threads)."
            )
        return torch.device("cpu")
    index = ranks.local_rank if ranks.world_size > 1 else args.gpu_id
    if index >= count:
        if ranks.world_size > 1:
            raise UserError(
                f"--nproc_per_node: this machine has {count} GPUs; allowed: 1 to {count}"
            )
        raise UserError(
            f"--gpu_id={index}: this machine has {count} GPUs; allowed: 0 to {count - 1}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_amp(amp: str, device: torch.device) -> str:
    """`bf16`, `fp16` or `off` from --amp; `auto` takes bf16 where the device is fast in it.

    A GPU is asked; a CPU is tried, because some have the bf16 instruction but run it no faster
    than float32. The trial takes about a tenth of a second.

    Raises:
        UserError: if fp16 is asked of a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp=fp16: needs a GPU; allowed on the CPU are auto, bf16 and off")
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "off"
    return "bf16" if _seconds(torch.float32) > BF16_MUST_GAIN * _seconds(torch.bfloat16) else "off"


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Lower precision where `amp` is not "off"."""
    dtype = AMP_DTYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error is about: torch's CPU allocator has no class of its own."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator" in str(error)


def choose_kernels(deterministic: bool) -> None:
    """cuDNN's kernels: those that give the same at every run, or the fastest of all of them."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def _seconds(dtype: torch.dtype, size: int = 768) -> float:
    """Fastest of a few matrix products, seconds."""
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def describe_hardware(device: torch.device) -> dict[str, str | int]:
    """What the log says of the machine."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        processor = names[0] if names else processor
    except OSError:
        pass  # not Linux: platform's word stands
    found: dict[str, str | int] = {
        "device": str(device),
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
