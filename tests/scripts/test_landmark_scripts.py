"""Shell scripts for landmarks: what they hand on, and what their dry runs tell."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from args import parse_anchors_args, parse_args, parse_extract_args, ssp_parser

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("ssp_sfm", "ssp_gldv2", "hvs_gldv2", "lce_gldv2", "aml_sfm", "aml_gldv2")
SCRIPTS = ("extract_features", "make_anchors", *TRAINING)
FEATURES = "runs/landmarks/r101-delg-{}.safetensors"


@pytest.fixture
def call(tmp_path):
    """Runs a script by a stand-in for Python that says what it is called with; `code` is that of
    the modules that it runs."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", venv / "requirements.installed")
    program = venv / "bin" / "python"

    def run(script, *flags, code=0, **places):
        lines = ['for word in "$@"; do echo "$word"; done']
        lines.append(f'case "$2" in data.*) exit {code} ;; esac')
        program.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        program.chmod(0o755)
        return subprocess.run(
            ["bash", f"scripts/{script}.sh", *flags],
            cwd=ROOT,
            env=os.environ | {"VENV": str(venv)} | places,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def words_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("name", TRAINING)
def test_training_scripts_have_the_published_settings(name, call):
    script, *words = words_of(call(name, "--num_workers=3"))
    assert script == "main_SSP.py"
    args = parse_args(ssp_parser(), words)
    method, _, dataset = name.replace("sfm", "sfm120k").partition("_")
    assert (args.method, args.dataset, args.arch) == (method, dataset, "mobilenetv2_100")
    assert args.input_size == {"sfm120k": 362, "gldv2": 512}[dataset]
    assert args.features == Path(FEATURES.format(dataset))
    wanted = {"sfm120k": (64, 10, 5), "gldv2": (128, 5, 2)}[dataset]
    if method == "aml":
        wanted = (64, 200, 5)
        assert (args.tuples, args.pool, args.negatives) == (2000, 20000, 5)
    assert (args.batch_size, args.epochs, args.warmup_epochs) == wanted
    anchors = Path(FEATURES.format("sfm120k-anchors")) if method == "ssp" else None
    assert args.anchors == anchors
    assert (args.pretrained, args.resume, args.num_workers) == (True, "auto", 3)
    assert args.output_dir == Path(f"runs/SSP_{dataset}_{method}")
    assert (args.optimizer, args.weight_decay, args.data_dir) == ("sgd", 1e-6, Path("datasets"))


def test_features_and_anchors_are_of_the_set_that_is_asked_for(call):
    for words, dataset in (([], "sfm120k"), (["gldv2"], "gldv2"), (["sfm120k"], "sfm120k")):
        script, *found = words_of(call("extract_features", *words, DATA_DIR="a", WEIGHTS="b.pth"))
        args = parse_extract_args(found)
        assert script == "extract_features.py"
        assert (args.dataset, args.data_dir, args.scales) == (dataset, Path("a"), (1,))
        assert (args.gallery, args.gallery_weights) == ("r101-delg", Path("b.pth"))
        assert args.output == Path(FEATURES.format(dataset))
        script, *found = words_of(call("make_anchors", *words, "--seed=3"))
        args = parse_anchors_args(found)
        assert script == "make_anchors.py"
        assert (args.features, args.seed) == (Path(FEATURES.format(dataset)), 3)
        assert args.output == Path(FEATURES.format(f"{dataset}-anchors"))
        assert (args.M, args.bits) == (32, 8)
    done = call("extract_features", "oxford")
    assert done.returncode == 2 and "oxford: allowed are sfm120k and gldv2" in done.stderr


def test_places_can_be_named(call):
    places = {"TRUNK": "m.safetensors", "ANCHORS_OF": "gldv2", "WORK": "w", "GALLERY": "r101-gem"}
    args = parse_args(ssp_parser(), words_of(call("ssp_sfm", **places))[1:])
    assert (args.pretrained, args.weights) == (False, Path("m.safetensors"))
    assert args.features == Path("w/r101-gem-sfm120k.safetensors")
    assert args.anchors == Path("w/r101-gem-gldv2-anchors.safetensors")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_tells_what_is_missing_and_where_it_is_to_be_had(name, call, tmp_path):
    work = tmp_path / "work"
    done = call(name, "--dry_run", WORK=str(work), WEIGHTS=str(tmp_path / "w.pth"))
    assert done.returncode == 2
    assert f"{name}.py" not in done.stdout and "main_SSP.py" not in done.stdout  # nothing was run
    dataset = "gldv2" if "gldv2" in name else "sfm120k"
    if name == "extract_features":
        assert f"missing: {tmp_path / 'w.pth'}; the weights of r101-delg" in done.stderr
    else:
        features = work / f"r101-delg-{dataset}.safetensors"
        told = f"missing: {features}; bash scripts/extract_features.sh {dataset} makes it"
        assert told in done.stderr
    anchors = work / "r101-delg-sfm120k-anchors.safetensors"
    told = f"missing: {anchors}; bash scripts/make_anchors.sh sfm120k makes it"
    assert (told in done.stderr) == (name in ("ssp_sfm", "ssp_gldv2"))
    asked = f"-m\ndata.landmark_batches\n--dataset={dataset}\n--data_dir=datasets\n"
    assert (asked in done.stdout) == (name != "make_anchors")
    # all of it there
    work.mkdir()
    for path in (tmp_path / "w.pth", anchors, work / f"r101-delg-{dataset}.safetensors"):
        path.touch()
    done = call(name, "--dry_run", WORK=str(work), WEIGHTS=str(tmp_path / "w.pth"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Everything is there.\n")


def test_a_dry_run_looks_for_every_image(call, tmp_path):
    """By `python -m data.landmark_batches`, which tests/data/test_landmark_batches.py looks at."""
    (tmp_path / "r101-delg-sfm120k.safetensors").touch()
    done = call("aml_sfm", "--dry_run", code=2, DATA_DIR="elsewhere", WORK=str(tmp_path))
    assert done.returncode == 2
    asked = "-m\ndata.landmark_batches\n--dataset=sfm120k\n--data_dir=elsewhere\n"
    assert asked in done.stdout and "Everything is there" not in done.stdout
