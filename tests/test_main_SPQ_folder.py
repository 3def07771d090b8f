"""Training on a folder of one's own images, and searching it."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import small_cifar
import torch
from PIL import Image
from small_images import make_images

import main_SPQ
import search
from args import parse_args, parse_search_args, spq_parser
from data.folder import load_folder
from data.images import to_array
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"{i // 10}/{i}.png" for i in range(40)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("images"), NAMES)
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def test_a_folder_is_read_whole_and_in_order(images, capsys):
    found = load_folder(images, 16)
    assert found.shape == (40, 3, 16, 16)
    for i, name in enumerate(sorted(NAMES, key=os.fsencode)):
        assert (found[i].numpy() == to_array(Image.open(images / name), 16)).all()
    out = capsys.readouterr().out
    assert "left out: 'bad.jpg' is empty (0 bytes)" in out
    assert "1 left out, 40 images to train on" in out


def test_what_is_no_folder_of_images_is_refused(tmp_path, images, monkeypatch):
    with pytest.raises(UserError, match=r"--data_dir=.*nowhere: is not a folder"):
        load_folder(tmp_path / "nowhere", 16)
    with pytest.raises(UserError, match=r"--data_dir=.*: holds no image"):
        load_folder(tmp_path, 16)
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(UserError, match="none of its images can be read"):
        load_folder(tmp_path, 16)
    monkeypatch.setattr("data.folder.MEMORY_SHARE", 1e-9)
    with pytest.raises(UserError, match=r"41 images of 16 pixels take .* lower --input_size"):
        load_folder(images, 16)


def test_train_resume_and_search(tmp_path, images, capsys):
    flags = ["--dataset=folder", "--input_size=16"]
    small_cifar.run(images, tmp_path / "run", *flags, "--max_steps=2")
    small_cifar.run(images, tmp_path / "run", *flags, "--resume=auto")
    out = capsys.readouterr().out
    assert "step 2" in out
    assert "Trained to step 4 at 16 bits; without labels there is no mAP" in out
    small_cifar.run(images, tmp_path / "once", *flags)
    states = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"]
        for name in ("run", "once")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert small_cifar.log_of(tmp_path / "run", "eval") == []
    assert (tmp_path / "run" / "learning_curve.png").exists()
    # what the report tells to type
    told = [shlex.split(line)[2:] for line in out.splitlines() if "search.py build" in line][-1]
    search.main(told)
    index = tmp_path / "run" / "index"
    capsys.readouterr()
    search.main(["query", f"--index={index}", f"--image={images / NAMES[0]}", "--json", "--k=40"])
    found = json.loads(capsys.readouterr().out)["queries"][0]["results"]
    assert sorted(hit["path"] for hit in found) == sorted(NAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_only", "--resume=auto", "--data_dir=x"], "a folder has no labels to evaluate"),
        ([], "--dataset=folder: needs --data_dir"),
    ],
)
def test_flags_that_make_no_sense_with_a_folder(flags, message, capsys):
    with pytest.raises(SystemExit):
        main_SPQ.main(["--dataset=folder", *flags])
    assert message in capsys.readouterr().err


def test_the_script_calls_three_programs_with_flags_that_they_take(tmp_path, images):
    """A stand-in for the environment's Python records what it is called with."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    program = venv / "bin" / "python"
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done; echo\n')
    program.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", venv / "requirements.installed")
    odd = shutil.copytree(images, tmp_path / 'my "odd" pictures\'')

    def call(*words):
        return subprocess.run(
            ["bash", "scripts/search_folder.sh", *words],
            cwd=ROOT,
            env=os.environ | {"VENV": str(venv)},
            capture_output=True,
            text=True,
            check=False,
        )

    lines = call(odd, odd / NAMES[0], "--epochs=3").stdout.split("\n")[:-1]
    train, build, query = [line.split("\0")[:-1] for line in lines]
    assert train[0] == "main_SPQ.py"
    args = parse_args(spq_parser(), train[1:])
    assert (args.dataset, args.data_dir, args.epochs, args.resume) == ("folder", odd, 3, "auto")
    built, asked = parse_search_args(build[1:]), parse_search_args(query[1:])
    assert (built.command, built.images, built.checkpoint) == ("build", str(odd), args.output_dir)
    assert (asked.command, asked.image) == ("query", str(odd / NAMES[0]))
    assert built.index == asked.index == args.output_dir / "index"
    assert call(odd).returncode == 2

    (ROOT / built.index).mkdir(parents=True)  # an index is there: no more training
    try:
        (ROOT / built.index / "manifest.json").touch()
        lines = call(odd, odd / NAMES[0]).stdout.split("\n")[:-1]
    finally:
        shutil.rmtree(ROOT / args.output_dir)
    add, query = [parse_search_args(line.split("\0")[1:-1]) for line in lines]
    assert (add.command, add.index, add.images) == ("add", built.index, str(odd))
    assert query.command == "query"
