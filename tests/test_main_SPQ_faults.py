"""main_SPQ.py on bad input, full disks and damaged files: one sentence, and nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_cifar import log_of, run

from utils.checkpoint import LAST, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.loop import TrainingStopped

ROOT = Path(__file__).resolve().parent.parent

FAULTS = [
    (["--batch_size=301"], r"--batch_size=301: is larger than the training set; .* 300"),
    (["--limit_train=10"], r"--batch_size=20: is larger .* 10"),
    (["--data_dir=/nowhere"], r"--data_dir=/nowhere: CIFAR-10 is not there"),
    (["--resume=/nowhere/c.pt"], r"--resume=/nowhere/c\.pt: no such file"),
    (["--arch=vgg11", "--width=64", "--stem=cifar"], r"--arch=vgg11: .*no CIFAR stem"),
    (["--num_cls=5"], r"--num_cls=5: the data set has 10 classes; allowed is 10"),
    (["--eval_only", "--resume=auto"], r"no checkpoint in --output_dir"),
    (["--output_dir=/proc/x"], r"--output_dir=/proc/x: cannot be made"),
    (["--amp=fp16"], r"--amp=fp16: needs a GPU"),
    ([f"--resume={'x' * 300}"], r"--resume=x+: cannot be read"),
    ([f"--data_dir={'x' * 300}"], r"--data_dir=x+: cannot be read"),
]


@pytest.mark.parametrize(
    ("flags", "message"), FAULTS, ids=lambda v: v[0] if type(v) is list else ""
)
def test_faults_are_told_in_a_sentence(flags, message, small_set, tmp_path):
    with pytest.raises(UserError, match=message):
        run(small_set, tmp_path, *flags)


@pytest.mark.parametrize(
    ("flag", "old"),
    [
        ("N_books=8", 4),
        ("N_words=32", 16),
        ("L_word=8", 4),
        ("width=16", 8),
        ("quantizer=vq", "soft"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(flag, old, finished, small_set, tmp_path):
    name = flag.split("=")[0]
    with pytest.raises(UserError, match=rf"--{flag}: .* made with --{name}={old}; .*shape"):
        run(small_set, tmp_path, f"--{flag}", f"--resume={finished}")


def test_what_is_no_checkpoint_is_refused(small_set, tmp_path):
    (tmp_path / "x.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        run(small_set, tmp_path / "out", f"--resume={tmp_path / 'x.pt'}")


@pytest.mark.parametrize("broken", ["model", "optimizer", "last_eval", "args"])
def test_a_checkpoint_with_damaged_parts_is_refused(broken, finished, small_set, tmp_path):
    state = load_checkpoint(finished / LAST)
    del state["path"]
    save_checkpoint(tmp_path / "x.pt", state | {broken: {"wrong": 1}})
    with pytest.raises(UserError, match=r"(--resume=|the checkpoint ).*x\.pt"):
        run(small_set, tmp_path / "out", f"--resume={tmp_path / 'x.pt'}")


def test_another_order_of_images_is_refused_on_resume(finished, small_set, tmp_path):
    with pytest.raises(UserError, match=r"--batch_size=10 --seed=5: .*--batch_size=20 --seed=0"):
        run(small_set, tmp_path, "--batch_size=10", "--seed=5", f"--resume={finished}")
    with pytest.raises(UserError, match=r"--recipe=released: .*was made with --recipe=paper"):
        run(small_set, tmp_path, "--recipe=released", f"--resume={finished}")


def test_a_run_in_the_way_is_not_lost(finished, small_set, tmp_path):
    run(small_set, tmp_path, "--max_steps=1")
    with pytest.raises(UserError, match=r"holds a run already .*--resume=auto.*--overwrite"):
        run(small_set, tmp_path, "--max_steps=1")
    with pytest.raises(UserError, match="holds a run already"):  # another run's checkpoint
        run(small_set, tmp_path, "--max_steps=1", f"--resume={finished}")
    run(small_set, tmp_path, "--max_steps=2", "--overwrite")
    assert [e["step"] for e in log_of(tmp_path, "train")] == [1, 2]


def test_a_run_that_cannot_save_does_not_begin(small_set, tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.loop.save_checkpoint", full)
    with pytest.raises(UserError, match=r"--output_dir=.*nothing was trained"):
        run(small_set, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_reported_and_training_goes_on(small_set, tmp_path, monkeypatch, capsys):
    run(small_set, tmp_path, "--max_steps=1")
    (tmp_path / (LAST + ".tmp")).symlink_to("/dev/full")  # every byte written there fails

    def keep(self, missing_ok=False):
        assert self.name == LAST + ".tmp"

    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises(TrainingStopped, match="checkpoint of step 3 could not be written"):
        run(small_set, tmp_path, "--max_steps=3", "--resume=auto", "--checkpoint_every=1")
    assert "WARNING: checkpoint not written at step 2" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / LAST)["step"] == 1
    assert [e["step"] for e in log_of(tmp_path, "train")] == [1, 2, 3]


@pytest.mark.parametrize(
    "flags", [["--N_words=12"], ["--data_dir=/nowhere"], ["--frobnicate"], ["--batch_size=-1"]]
)
def test_the_script_itself_exits_with_2_and_one_line(flags, tmp_path):
    done = subprocess.run(
        [sys.executable, "main_SPQ.py", "--device=cpu", *flags, f"--output_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    for part in flags[0].split("="):  # the flag and its value
        assert part in errors[0]
    assert "Traceback" not in done.stderr


def test_without_a_gpu_one_line_says_so(small_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(small_set, tmp_path, "--device=auto", "--gpu_id=0", "--max_steps=1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "No CUDA GPU found" in line]
    assert len(lines) == 1
    assert "--gpu_id=0 is ignored" in lines[0]
    with pytest.raises(UserError, match="--device=cuda"):
        run(small_set, tmp_path / "other", "--device=cuda")
