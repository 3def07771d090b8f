"""Checkpoint files: whole or not at all; nothing but data is read."""

import os
import pickle
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from utils.checkpoint import (
    KEYS,
    LAST,
    check_same,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from utils.errors import UserError

STATE = dict.fromkeys(KEYS - {"format", "version"}) | {
    "step": 7,
    "args": {},
    "model": {"w": torch.ones(3)},
}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / LAST, STATE)
    state = load_checkpoint(tmp_path / LAST)
    assert state["step"] == 7
    assert torch.equal(state["model"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [LAST]


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match=r"--resume=.*x\.pt: no such file"):
        load_checkpoint(path)
    for content in (b"", b"hello", os.urandom(5000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    save_checkpoint(path, STATE | {"version": 99})
    with pytest.raises(UserError, match="version 99"):
        load_checkpoint(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / LAST
    save_checkpoint(path, STATE | {"model": {"w": torch.randn(5000)}})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_a_cut_off_file_is_named(tmp_path):
    path = tmp_path / LAST
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a checkpoint"):
            load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo reached",))


def test_a_file_cannot_run_code(tmp_path, capfd):
    path = tmp_path / "evil.pt"
    torch.save({"format": Evil()}, path)
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(path)
    assert "reached" not in capfd.readouterr().out


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / LAST
    save_checkpoint(path, STATE)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, STATE | {"step": 8})
    assert load_checkpoint(path)["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == [LAST]


WRITER = """
import sys; sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from utils.checkpoint import KEYS, save_checkpoint
state = dict.fromkeys(KEYS - {{"format", "version"}}) | {{"args": {{}}}}
step = 0
while True:
    step += 1
    state |= {{"step": step, "model": {{"w": torch.full((300_000,), float(step))}}}}
    save_checkpoint(Path({path!r}), state)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / LAST
    root = str(Path(__file__).resolve().parents[2])
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER.format(root=root, path=str(path))],
            stdout=subprocess.PIPE,
        )
        writer.stdout.readline()  # the first one is written
        time.sleep(0.11 + 0.053 * attempt)
        writer.kill()
        writer.wait()
        state = load_checkpoint(path)
        assert torch.equal(state["model"]["w"], torch.full((300_000,), float(state["step"])))


def test_auto_finds_the_newest(tmp_path):
    assert find_checkpoint("auto", tmp_path / "absent") is None
    assert find_checkpoint("auto", tmp_path) is None
    for age, name in enumerate(["new.pt", "old.pt", "older.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert find_checkpoint("auto", tmp_path) == tmp_path / "new.pt"
    assert find_checkpoint(str(tmp_path), tmp_path) == tmp_path / LAST
    assert find_checkpoint("a/b.pt", tmp_path) == Path("a/b.pt")


def test_differing_flags_are_named():
    args = Namespace(N_books=4, N_words=16, arch="resnet18")
    saved = {"N_books": 8, "N_words": 16, "arch": "resnet18"}
    with pytest.raises(UserError, match=r"--N_books=4: .* made with --N_books=8; does not fit"):
        check_same(saved, args, ["N_books", "N_words", "arch"], "does not fit", Path("c.pt"))
    check_same(saved, args, ["N_words", "arch"], "does not fit", Path("c.pt"))
