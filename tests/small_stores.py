"""Work in processes that are killed before a chosen change of the file system."""

import contextlib
import io
import os
import signal
from collections.abc import Callable

import small_images
import torch

CHANGES = ("replace", "fsync")  # by which stores and their marks get to the disk


def _child(function: Callable, args: tuple, die_at: int | None, tell) -> None:
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    if die_at is not None:
        left = [die_at]

        def deadly(change):
            def called(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return called

        for name in CHANGES:
            setattr(os, name, deadly(getattr(os, name)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function(*args)
    tell.send("done")


def start(function: Callable, *args, die_at: int | None = None):
    """`function(*args)` in a process of its own; `die_at`: killed before that change of the file
    system, counted from 0."""
    listen, tell = small_images._server.Pipe(duplex=False)
    process = small_images._server.Process(target=_child, args=(function, args, die_at, tell))
    process.start()
    tell.close()
    process.said = listen.recv
    return process


def finish(function: Callable, *args, die_at: int | None = None) -> int:
    """As `start`; waits for its end and returns the exit code."""
    process = start(function, *args, die_at=die_at)
    process.join()
    return process.exitcode
