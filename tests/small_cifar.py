"""A small set in CIFAR-10's exact binary layout, whose classes can be told apart.

The published hashes fit only the published files, so tests put the small set's own in their
place; everything else is the real code. As a script it runs main_SPQ.py on a small set, or
main_GPQ.py or main_SSP.py:

    python tests/small_cifar.py --data_dir DIR [--method=GPQ] [--views=same] [flags of that script]

`--then` and other flags make another run in the same process.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROWS = 60  # images in each of the six files
ROW_BYTES = 3073

# flags that make a run of a few seconds
FAST = [
    "--loss=cqc",
    "--width=8",
    "--crop_size=16",
    "--batch_size=20",
    "--N_books=4",
    "--L_word=4",
    "--epochs=2",
    "--device=cpu",
    "--amp=off",  # auto goes by the clock, and processors differ
    "--lr=1e-3",
    "--log_every=1",
    "--Top_N=50",
]

# the same for main_GPQ.py: 30 labelled images, 3 steps an epoch
FAST_GPQ = [
    "--width=8",
    "--batch_size=10",
    "--N_books=3",
    "--L_word=4",
    "--epochs=6",
    "--device=cpu",
    "--amp=off",
    "--lr=2e-3",
    "--log_every=1",
]

# the same for main_SSP.py: 300 images, 15 steps an epoch
FAST_SSP = [
    "--arch=cifar_vgg",
    "--width=8",
    "--batch_size=20",
    "--epochs=2",
    "--device=cpu",
    "--amp=off",
    "--optimizer=adam",
    "--lr=5e-3",
    "--warmup_epochs=0",
    "--log_every=1",
    "--Top_N=50",
]
# and what --method=aml needs beside them: 3 steps an epoch
FAST_AML = ["--method=aml", "--tuples=60", "--pool=100", "--negatives=3"]


def make(data_dir: Path, seed: int = 0) -> Path:
    """Write the six binary files; each class has a colour of its own, with noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 215, size=(10, 3))
    folder = data_dir / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        labels = np.arange(ROWS) % 10
        noise = rng.normal(0, 25, size=(ROWS, 3, 1024))
        planes = np.clip(colours[labels][:, :, None] + noise, 0, 255).astype(np.uint8)
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes.reshape(ROWS, -1)], axis=1)
        rows.tofile(folder / name)
    return data_dir


def hashes(data_dir: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    folder = data_dir / "cifar-10-batches-bin"
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}


def run(data_dir, output_dir, *flags):
    """main_SPQ.py in this process."""
    import main_SPQ

    main_SPQ.main([*FAST, *_places(data_dir, output_dir), *flags])


def run_gpq(data_dir, output_dir, *flags):
    """main_GPQ.py in this process."""
    import main_GPQ

    main_GPQ.main([*FAST_GPQ, *_places(data_dir, output_dir), *flags])


def run_ssp(data_dir, output_dir, features, *flags):
    """main_SSP.py in this process."""
    import main_SSP

    words = [*FAST_SSP, *_places(data_dir, output_dir), f"--features={features}", *flags]
    main_SSP.main(words)


def _places(data_dir, output_dir):
    cache = Path(output_dir).parent / "cache"
    return [f"--data_dir={data_dir}", f"--output_dir={output_dir}", f"--cache_dir={cache}"]


def log_of(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


class SameViews(torch.nn.Module):
    """In place of the augmentation: a crop, the first time from the left, the next the right."""

    def __init__(self, crop_size: int, min_area: float, strength: float) -> None:
        super().__init__()
        self.size, self.calls = crop_size, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        left = slice(0, self.size) if self.calls % 2 else slice(-self.size, None)
        return images[:, :, : self.size, left].float() / 255.0


class WholeViews(torch.nn.Module):
    """In place of the augmentation of GPQ and SSP: the images as they are."""

    def __init__(self, side: int, colour: list[float]) -> None:
        super().__init__()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() / 255.0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import data.augment
    import data.cifar10
    import data.views
    from utils.cli import run_main

    place = Path(sys.argv[sys.argv.index("--data_dir") + 1])
    data.cifar10.BIN_SHA256 = hashes(place)
    data.cifar10.ROWS = ROWS
    if "--views=same" in sys.argv:
        sys.argv.remove("--views=same")
        data.augment.AUGMENTATIONS["kornia"] = SameViews
        data.views.CropFlip = WholeViews
    if "--method=GPQ" in sys.argv:
        sys.argv.remove("--method=GPQ")
        from main_GPQ import main
    elif "--method=SSP" in sys.argv:
        sys.argv.remove("--method=SSP")
        from main_SSP import main
    else:
        from main_SPQ import main
    groups = itertools.groupby(sys.argv[1:], "--then".__eq__)
    runs = [list(words) for is_then, words in groups if not is_then]
    run_main(lambda: [main(words) for words in runs])
