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
from small_images import make_images

import main_SPQ
import search
from args import parse_args, parse_search_args, spq_parser
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"{i // 10}/{i}.png" for i in range(40)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("images"), NAMES)
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def test_a_folder_with_a_damaged_image_stops_the_run_unless_told_otherwise(tmp_path, images):
    with pytest.raises(
        UserError, match=r"1 of 41 images.*\n.*'bad.jpg' is empty.*\n--skip_missing"
    ):
        small_cifar.run(images, tmp_path / "run", "--dataset=folder", "--max_steps=1")


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--data_dir=.*nowhere: is not a folder"):
        small_cifar.run(tmp_path / "nowhere", tmp_path / "run", "--dataset=folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"--data_dir=.*: holds no image"):
        small_cifar.run(empty, tmp_path / "run", "--dataset=folder")
    (empty / "x.png").write_text("no")
    with pytest.raises(UserError, match="no image is left for the role train"):
        small_cifar.run(empty, tmp_path / "run", "--dataset=folder", "--skip_missing")


def test_class_folders_are_labels(tmp_path, images, capsys):
    flags = ["--dataset=folder", "--protocol=class-folders", "--input_size=16", "--skip_missing"]
    good = shutil.copytree(images, tmp_path / "good", ignore=shutil.ignore_patterns("bad.jpg"))
    small_cifar.run(good, tmp_path / "run", *flags)
    assert "36 train, 4 query, 36 database; 4 classes" in capsys.readouterr().out
    found = small_cifar.log_of(tmp_path / "run", "eval")[-1]
    assert found["queries"] == 4
    small_cifar.run(good, tmp_path / "run", *flags, "--eval_only", "--resume=auto")
    again = json.loads((tmp_path / "run" / "eval_only.json").read_text())[0]
    assert again["mAP@50"] == found["mAP@50"]
    with pytest.raises(UserError, match=r"1 images lie in no class folder, 'bad.jpg'"):
        small_cifar.run(images, tmp_path / "other", *flags)


def test_train_resume_and_search(tmp_path, images, capsys):
    flags = ["--dataset=folder", "--input_size=16", "--skip_missing"]
    small_cifar.run(images, tmp_path / "run", *flags, "--max_steps=2")
    small_cifar.run(images, tmp_path / "run", *flags, "--resume=auto")
    out = capsys.readouterr().out
    assert "step 2" in out
    assert "Trained to step 4 at 16 bits; without labels there is no mAP, images left out" in out
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


def test_flags_that_make_no_sense_with_a_folder(capsys, images, tmp_path):
    for flags, message in (
        (["--validate", "--data_dir=x"], "a folder has no labels to score with"),
        (["--image_dir=x", "--data_dir=x"], "--image_dir: --dataset=folder has no lists of paths"),
        ([], "--dataset=folder: needs --data_dir"),
    ):
        with pytest.raises(SystemExit):
            main_SPQ.main(["--dataset=folder", *flags])
        assert message in capsys.readouterr().err
    flags = ["--dataset=folder", "--input_size=16", "--skip_missing", "--max_steps=1"]
    small_cifar.run(images, tmp_path / "run", *flags)
    with pytest.raises(UserError, match=r"--eval_only: this split has no labels to score with"):
        small_cifar.run(images, tmp_path / "run", *flags, "--eval_only", "--resume=auto")


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


def test_a_narrow_network_trains_on_images_of_64_pixels(tmp_path, images):
    """torch 2.15 crashes there in the layout that is used otherwise, which would end the tests."""
    flags = ["--dataset=folder", "--skip_missing", "--crop_size=64", "--max_steps=1"]
    small_cifar.run(images, tmp_path / "run", *flags)
    assert (tmp_path / "run" / "checkpoint_last.pt").exists()
