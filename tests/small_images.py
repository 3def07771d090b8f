"""Small things for the tests of search: a network, folders of images, and search.py run at will."""

import contextlib
import io
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import build_spq
from utils.search.index import open_index
from utils.trained import Trained, identify, save_trained

ARGS = {
    "arch": "resnet18",
    "width": 8,
    "quantizer": "soft",
    "N_books": 4,
    "N_words": 16,
    "L_word": 4,
    "soft_quantization_scale": 5.0,
    "input_size": 16,
}


def save_model(path: Path, seed: int, **changes) -> Path:
    """Weights of an untrained network: their codes differ from image to image all the same."""
    args = ARGS | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_spq(
            args["arch"],
            args["width"],
            args["quantizer"],
            M=args["N_books"],
            K=args["N_words"],
            d=args["L_word"],
        ).eval()
        # untrained descriptors are close together: codewords go where they are
        with torch.no_grad():
            x = model.describe(torch.rand(200, 3, 16, 16) * torch.rand(200, 3, 1, 1))
            words = x[: args["N_words"]].reshape(args["N_words"], args["N_books"], -1)
            model.quantizer.codebooks.copy_(words.transpose(0, 1))
    save_trained(path, Trained(model, "SPQ", args, identify("SPQ", args, model)))
    return path


def make_images(folder: Path, names: list[str], seed: int = 0) -> Path:
    """An image of a colour of its own under each name."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 256, 3)
        pixels = np.clip(colour + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def files_of(index: Path) -> tuple[bytes, list[str]]:
    """Codes and paths."""
    found = open_index(index)
    return found.packed.tobytes(), list(found.paths)


# --- search.py in processes that are killed -----------------------------------------------------

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["search", "small_images"])


def _child(words: list[str], flush: float, limit: int | None, die_at: int | None, tell) -> None:
    import resource
    import signal

    import search
    import utils.search.build
    from utils.cli import run_main

    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    utils.search.build.FLUSH_SECONDS = flush
    if limit is not None:  # bytes that a file may have, like a disk that is full from there on
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if die_at is not None:
        left = [die_at]

        def deadly(function):
            def called(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return called

        for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
    said = io.StringIO()  # not into files, which the limit would stop too
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_main(lambda: search.main(words))
    finally:
        tell.send(said.getvalue())


def start(*words: str, flush: float = 0.0, limit: int | None = None, die_at: int | None = None):
    """search.py in a process of its own, ready within a moment.

    Args:
        words: its command line.
        flush: seconds between shards.
        limit: bytes that a file may have.
        die_at: kill it before this change of the file system, counted from 0.
    """
    words = [str(word) for word in words]
    listen, tell = _server.Pipe(duplex=False)
    process = _server.Process(target=_child, args=(words, flush, limit, die_at, tell))
    process.start()
    tell.close()
    process.said = listen.recv  # what it printed; waits for its end, EOFError if it was killed
    return process


def finish(*words: str, **how) -> int:
    """As `start`; waits for its end and returns the exit code."""
    process = start(*words, **how)
    process.join()
    return process.exitcode
