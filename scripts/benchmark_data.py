"""From JPEG files to training: images/s of each part, and the memory that a large set takes.

    python scripts/benchmark_data.py --folder=DIR --images=100000 --side=224

Generates images once (noise over soft colours, so that they compress as photographs do), times
decoding, the store and an epoch of main_SPQ.py on them, and on the way kills the making of the
store, goes on with it, and changes a file, which has to be refused. Needs about
images * (4 * side^2) bytes of disk below DIR.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data.images
from data.images import Files, find_images, load_square
from data.store import ROWS, STATE, RowStore
from utils.device import describe_hardware

ROOT = Path(__file__).resolve().parent.parent
TIMED_IMAGES, BATCH, BATCHES = 2000, 256, 20


def generate(folder: Path, images: int, side: int) -> None:
    """`images` JPEG files of side x side pixels, a thousand a folder; those there stay."""
    base = np.random.default_rng(0).normal(0, 10, (64, side, side, 3)).astype(np.float32)

    def make(i: int) -> None:
        path = folder / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        if path.exists():
            return
        rng = np.random.default_rng(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        soft = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(soft + base[i % len(base)], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=85)

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(make, range(images)), total=images, unit="image", desc="generating"))


def decoding(folder: Path, side: int) -> dict[str, float]:
    """Images/s of decoding and resizing, one thread and all, by Pillow and by torchvision."""
    names = find_images(folder).names[:TIMED_IMAGES]
    source = Files(folder, names, [], 0)
    fast, rates = data.images.decode_jpeg, {}
    for name, decoder in (("pillow", None), ("torchvision", fast)):
        data.images.decode_jpeg = decoder
        for threads in sorted({1, os.cpu_count() or 1}):
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                found = list(pool.map(lambda name: load_square(source, name, side), names))
                rates[f"{name}, {threads} threads"] = len(names) / (time.perf_counter() - start)
            assert not any(isinstance(image, str) for image in found)
    data.images.decode_jpeg = fast
    return rates


def reading(cache: Path, images: int, side: int) -> dict[str, float]:
    """Images/s of random batches out of the store."""
    place = next(cache.glob("images-*"))
    store = RowStore(place / ROWS, (3, side, side), torch.uint8, torch.arange(images))
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    batches = min(BATCHES, images // BATCH)
    start = time.perf_counter()
    for i in range(batches):
        store[order[i * BATCH : (i + 1) * BATCH]]
    return {"store, batches in random order": batches * BATCH / (time.perf_counter() - start)}


class Watched:
    """A program, its output, and the most memory that it held, MiB.

    anonymous: memory of its own; all: with pages of files that are mapped, libraries among them.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        self.words, self.log = words, log
        self.peak = {"anonymous": 0.0, "all": 0.0}
        self.seconds = 0.0

    def run(self, kill_when=None) -> int:  # noqa: ANN001 (a condition without arguments)
        """Its exit code; killed as soon as `kill_when()` holds."""
        start = time.perf_counter()
        with self.log.open("ab") as log:
            child = subprocess.Popen(self.words, cwd=ROOT, stdout=log, stderr=log)
            while child.poll() is None:
                self._look(child.pid)
                if kill_when is not None and kill_when():
                    child.send_signal(signal.SIGKILL)
                time.sleep(0.05)
        self.seconds = time.perf_counter() - start
        return child.returncode

    def _look(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return  # it has just ended
        found = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", status))
        for name, key in (("anonymous", "RssAnon"), ("all", "VmRSS")):
            self.peak[name] = max(self.peak[name], int(found.get(key, 0)) / 1024)


def made(cache: Path) -> int:
    """Images in the store so far."""
    try:
        return json.loads(next(cache.glob("images-*")).joinpath(STATE).read_text())["done"]
    except (StopIteration, OSError, ValueError):
        return 0


def epoch(args: argparse.Namespace) -> dict:
    """Train an epoch, the store's making killed half-way; then change a file."""
    pictures, cache, run = (args.folder / name for name in ("pictures", "cache", "run"))
    log = args.folder / "log.txt"
    words = [sys.executable, "main_SPQ.py", "--dataset=folder", f"--data_dir={pictures}"]
    words += [f"--cache_dir={cache}", f"--output_dir={run}", f"--input_size={args.side}"]
    words += ["--epochs=1", "--loss=cqc", "--augmentation=batched", "--resume=auto", *args.flags]
    first = Watched(words, log)
    killed = first.run(lambda: made(cache) >= args.images // 2) == -signal.SIGKILL
    kept = made(cache)
    second = Watched(words, log)
    code = second.run()
    if code:
        sys.exit(f"error: main_SPQ.py ended with {code}, see {log}")
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [entry["images_per_s"] for entry in entries if entry["kind"] == "train"]
    later = Path(find_images(pictures).root, find_images(pictures).names[args.images // 3])
    found = later.stat()
    os.utime(later, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
    before = log.stat().st_size
    third = Watched(words, log)
    refused = third.run() == 2 and b"have changed since" in log.read_bytes()[before:]
    os.utime(later, ns=(found.st_atime_ns, found.st_mtime_ns))
    return {
        "command": " ".join(["python", *words[1:]]).replace(str(args.folder), "DIR"),
        "store_killed": killed,
        "images_stored_before_the_kill": kept,
        "images_per_s_storing_before_the_kill": kept / first.seconds,
        "images_per_s_training": float(np.median(speeds)),
        "minutes_from_the_second_start": second.seconds / 60,
        "peak_mib_own": max(first.peak["anonymous"], second.peak["anonymous"]),
        "peak_mib_with_libraries": max(first.peak["all"], second.peak["all"]),
        "set_mib_as_pixels": args.images * 3 * args.side**2 / 2**20,
        "changed_file_refused": refused,
    }


def main() -> None:
    """Generate, time, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--folder", type=Path, required=True, metavar="DIR", help="where all of it goes")
    flag("--images", type=int, default=100_000, metavar="N")
    flag("--side", type=int, default=224, metavar="PIXELS")
    flag("--output", type=Path, help="JSON file of the figures (default: DIR/figures.json)")
    flag("flags", nargs="*", help="of main_SPQ.py, after --, a small network for one")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    for name in ("cache", "run"):  # figures of an earlier call would be taken for new ones
        if (args.folder / name).exists():
            sys.exit(f"error: {args.folder / name} is there already; delete it first")
    generate(args.folder / "pictures", args.images, args.side)
    found = {"images": args.images, "side": args.side}
    found |= {"images_per_s": decoding(args.folder / "pictures", args.side)}
    found["epoch"] = epoch(args)
    found["images_per_s"] |= reading(args.folder / "cache", args.images, args.side)
    found["hardware"] = describe_hardware(torch.device("cpu"))
    text = json.dumps(found, indent=2)
    print(text)
    (args.output or args.folder / "figures.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
