"""SSP on landmarks from end to end: features, anchors, training by each kind of method, scoring."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_landmarks
import torch
from safetensors.torch import save_file
from small_cifar import log_of
from small_landmarks import FAST

import extract_features
import main_GPQ
import main_SPQ
import main_SSP
import make_anchors
from args import parse_args, parse_extract_args, ssp_parser
from data.landmark_images import read_landmark
from data.landmarks import read_sfm
from models import build_embedding
from utils import landmark_features
from utils.checkpoint import LAST, load_checkpoint
from utils.embedders import load_network
from utils.errors import UserError
from utils.gallery import read_gallery
from utils.multiscale import multiscale_features

TINY, D = "test_efficientnet", 24
AML = ["--method=aml", "--tuples=12", "--pool=40", "--negatives=2", "--batch_size=4"]


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch):
    monkeypatch.setattr("utils.report.learning_curve", lambda *args: None)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Both sets; not to be changed."""
    root = tmp_path_factory.mktemp("sets")
    small_landmarks.make_sfm(root)
    return small_landmarks.make_gldv2(root)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A gallery network's, as they are published."""
    torch.manual_seed(1)
    model = build_embedding("gem", TINY, D=D)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    named = model.state_dict().items()
    kept = {
        n.removeprefix("trunk.net."): v for n, v in named if n[:9] not in ("trunk.mea", "trunk.std")
    }
    save_file(kept, path)
    return path


def extract(sets, weights, output, *flags, dataset="sfm120k"):
    words = [f"--dataset={dataset}", f"--data_dir={sets}", f"--gallery={TINY}"]
    words += [f"--gallery_weights={weights}", f"--output={output}", "--device=cpu", "--amp=off"]
    extract_features.main([*words, "--longest=64", *flags])


@pytest.fixture(scope="module")
def made(sets, weights, tmp_path_factory):
    """A folder with the features of both sets, and anchors."""
    folder = tmp_path_factory.mktemp("made")
    for dataset in ("sfm120k", "gldv2"):
        extract(sets, weights, folder / f"{dataset}.safetensors", dataset=dataset)
    words = [f"--features={folder / 'sfm120k.safetensors'}", "--M=4", "--bits=3"]
    make_anchors.main([*words, f"--output={folder / 'anchors.safetensors'}"])
    return folder


def train(sets, made, output, dataset, *flags):
    words = [f"--dataset={dataset}", f"--data_dir={sets}", f"--output_dir={output}"]
    if not any(flag.startswith("--method") for flag in flags):
        words.append(f"--anchors={made / 'anchors.safetensors'}")
    main_SSP.main([*FAST, *words, f"--features={made / dataset}.safetensors", *flags])


def assert_same_weights(one, two):
    one, two = (load_checkpoint(folder / LAST)["model"] for folder in (one, two))
    for name in one:
        assert torch.equal(one[name], two[name]), name


# --- features -------------------------------------------------------------------------------------


def test_features_are_those_of_each_image_in_the_list_s_order(sets, weights, made):
    found = read_gallery(made / "gldv2.safetensors")
    network = load_network(TINY, weights, "--gallery")
    assert (found.network, found.dataset) == (network.told, "gldv2")
    assert sorted(path.name for path in made.iterdir()) == [
        *("anchors.safetensors", "gldv2.safetensors", "sfm120k.safetensors")
    ]  # no pieces are left
    first = (sets / "gldv2" / "train_clean.csv").read_text().split("\n")[1].split(",")[1].split()
    for row, name in enumerate(first):
        path = sets / "gldv2" / "train" / name[0] / name[1] / name[2] / f"{name}.jpg"
        x = multiscale_features(network.model, read_landmark(path, 64).float() / 255, (1.0,))
        torch.testing.assert_close(found.features[row], x, rtol=0, atol=1e-6)


def test_a_killed_extraction_goes_on(sets, weights, made, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.landmark_features.PIECE", 16)
    real, calls = landmark_features.multiscale_features, []

    def counting(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("utils.landmark_features.multiscale_features", counting)
    output = tmp_path / "f.safetensors"
    with pytest.raises(KeyboardInterrupt):
        extract(sets, weights, output)
    assert not output.exists() and len(list(tmp_path.glob("f.safetensors.pieces/*/*"))) == 1
    extract(sets, weights, output)
    assert len(calls) == 20 + 24  # the first 16 were kept
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    found, whole = (read_gallery(path) for path in (output, made / "sfm120k.safetensors"))
    torch.testing.assert_close(found.features, whole.features)
    assert found.names_sha256 == whole.names_sha256
    # scales change features
    extract(sets, weights, output, "--scales=1,0.7071", f"--features_dir={tmp_path / 'kept'}")
    assert (read_gallery(output).features - whole.features).abs().max() > 1e-4
    assert (tmp_path / "kept").is_dir()


def test_an_image_that_is_taken_out_costs_its_part_of_the_list(
    sets, weights, made, tmp_path, monkeypatch
):
    monkeypatch.setattr("extract_features.PART", 15)
    real, calls = landmark_features.multiscale_features, []
    monkeypatch.setattr(
        "utils.landmark_features.multiscale_features", lambda *args: calls.append(1) or real(*args)
    )
    root, output, kept = tmp_path / "sets", tmp_path / "f.safetensors", tmp_path / "kept"
    shutil.copytree(sets, root)
    bad = root / read_sfm(root).paths[20]
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{bad.name} is not an image"):
        extract(root, weights, output, f"--features_dir={kept}")
    assert len(calls) == 20
    bad.unlink()
    extract(root, weights, output, f"--features_dir={kept}", "--skip_missing")
    assert len(calls) == 20 + 24  # not the first 15 again
    whole = read_gallery(made / "sfm120k.safetensors").features
    left = [row for row in range(40) if row != 20]
    torch.testing.assert_close(read_gallery(output).features, whole[left])
    bad.write_bytes(good)
    extract(root, weights, output, f"--features_dir={kept}")
    torch.testing.assert_close(read_gallery(output).features, whole)
    assert len(calls) == 44 + 15


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(sets, made, tmp_path_factory):
    """Runs that nothing disturbed: ssp on both sets, aml on sfm120k, hvs on gldv2."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.report.learning_curve", lambda *args: None)
        asked = [("sfm120k", []), ("gldv2", []), ("sfm120k", AML), ("gldv2", ["--method=hvs"])]
        for dataset, flags in asked:
            folder = tmp_path_factory.mktemp("run")
            train(sets, made, folder, dataset, *flags)
            runs[dataset, flags[0] if flags else "--method=ssp"] = folder
    return runs


def test_every_run_learns(finished):
    for (dataset, method), folder in finished.items():
        entries = log_of(folder, "train")
        steps = 6 if method == "--method=aml" else 10
        assert [entry["step"] for entry in entries] == list(range(1, steps + 1))
        losses = [entry["loss"] for entry in entries]
        assert np.isfinite(losses).all() and sum(losses[-3:]) < sum(losses[:3]), (dataset, method)
        head = json.loads((folder / "split.json").read_text())
        assert (head["dataset"], head["train"], head["query"]) == (dataset, 40, 0)
        state = load_checkpoint(folder / LAST)
        assert state["args"]["n_classes"] == (8 if method == "--method=hvs" else 0)
        assert state["args"]["jitter_strength"] == (1 if dataset == "gldv2" else 0)
        assert not log_of(folder, "eval")


def test_positives_of_aml_are_the_set_s_own(finished):
    mined = load_checkpoint(finished["sfm120k", "--method=aml"] / LAST)["batches"]
    query, positive, *negatives = mined["rows"].T
    assert len(query) == 12 and (query < 24).all() and torch.equal(positive, query + 8)
    for one in negatives:
        assert (one % 8 != query % 8).all()


@pytest.mark.parametrize(
    ("dataset", "method", "cut"),
    [("gldv2", [], 7), ("sfm120k", AML, 4)],  # AML's within its second epoch
)
def test_a_killed_run_goes_on_with_the_same_batches(
    dataset, method, cut, finished, sets, made, tmp_path
):
    whole = finished[dataset, method[0] if method else "--method=ssp"]
    train(sets, made, tmp_path, dataset, *method, f"--max_steps={cut}", "--num_workers=1")
    train(sets, made, tmp_path, dataset, *method, "--resume=auto", "--num_workers=4")
    assert_same_weights(whole, tmp_path)
    assert [e["loss"] for e in log_of(tmp_path, "train")] == [
        e["loss"] for e in log_of(whole, "train")
    ]


def test_two_processes_share_the_images_of_a_batch(sets, made, tmp_path):
    """Each decodes its own half; tuples are mined by the first for both."""
    words = [*FAST, "--dataset=sfm120k", f"--data_dir={sets}", f"--output_dir={tmp_path}", *AML]
    words += [f"--features={made / 'sfm120k.safetensors'}", "--max_steps=3", "--log_every=1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + ["main_SSP.py", *words],
        cwd=Path(main_SSP.__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = load_checkpoint(tmp_path / LAST)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3]  # of one writer
    assert state["step"] == 3
    assert state["batches"]["rows"].shape == (12, 4)
    assert done.stdout.count("evaluate_landmarks.py") == 1


def test_the_end_of_a_run_tells_what_comes_next(sets, made, tmp_path, capsys):
    train(sets, made, tmp_path, "gldv2", "--method=lce", "--max_steps=1")
    told = capsys.readouterr().out
    assert "without queries there is no mAP" in told
    command = f"python evaluate_landmarks.py .* --gallery=NETWORK --query={tmp_path}"
    assert command.replace(".*", "--dataset=roxford5k --data_dir=DIR") in told
    found = load_network(str(tmp_path), None, "--query")  # which that command takes
    assert found.learned_from == read_gallery(made / "gldv2.safetensors").network
    assert found.squeezed is None


def test_missing_images_are_left_out_on_request(sets, weights, made, finished, tmp_path, capsys):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    shutil.rmtree(next((root / "gldv2" / "train").glob("[0-9a-f]/*/*")))
    with pytest.raises(UserError, match=r"1 of 40 images are missing: gldv2/train/.*--skip_miss"):
        train(root, made, tmp_path / "run", "gldv2")
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(UserError, match="1 of 40 images are missing"):
        extract(root, weights, alone / "gldv2.safetensors", dataset="gldv2")
    extract(root, weights, alone / "gldv2.safetensors", "--skip_missing", dataset="gldv2")
    shutil.copy(made / "anchors.safetensors", alone)
    # features of all images, and those of the images that are there, are the same to it
    losses = []
    for source in (made, alone):
        output = tmp_path / f"run_{source.name}"
        train(root, source, output, "gldv2", "--skip_missing", "--max_steps=2")
        losses.append([entry["loss"] for entry in log_of(output, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((output / "split.json").read_text())["left_out"] == 1
    # a run that had them all does not go on without one
    folder = tmp_path / "resumed"
    shutil.copytree(finished["gldv2", "--method=ssp"], folder)
    with pytest.raises(UserError, match=r"its split is .* goes on with began with"):
        train(root, made, folder, "gldv2", "--skip_missing", "--resume=auto")


def test_features_of_another_set_are_refused(sets, made, tmp_path):
    shutil.copy(made / "sfm120k.safetensors", tmp_path / "gldv2.safetensors")
    with pytest.raises(UserError, match="is of 40 other images of sfm120k; this set has 40"):
        train(sets, tmp_path, tmp_path / "run", "gldv2", "--method=regression")


# --- command line ---------------------------------------------------------------------------------


def parse(*flags):
    words = ["--data_dir=x", "--features=f.npy", "--anchors=a.safetensors"]
    return parse_args(ssp_parser(), [*words, *flags])


@pytest.mark.parametrize(
    ("dataset", "size", "batch", "epochs", "warmup", "jitter"),
    [("sfm120k", 362, 64, 10, 5, 0), ("gldv2", 512, 128, 5, 2, 1)],
)
def test_each_set_has_its_published_settings(dataset, size, batch, epochs, warmup, jitter):
    args = parse(f"--dataset={dataset}")
    assert (args.input_size, args.crop_size, args.batch_size) == (size, size, batch)
    assert (args.epochs, args.warmup_epochs, args.lr) == (epochs, warmup, 1e-3 * batch / 256)
    assert (args.augmentation, args.crop_min_area) == ("crop-jitter", 0.8)
    assert args.jitter_strength == jitter
    given = ["--batch_size=32", "--epochs=3", "--input_size=96", "--warmup_epochs=1"]
    args = parse(f"--dataset={dataset}", *given, "--jitter_strength=0.5", "--crop_min_area=0.5")
    assert (args.batch_size, args.epochs, args.input_size) == (32, 3, 96)
    assert (args.warmup_epochs, args.jitter_strength, args.crop_min_area) == (1, 0.5, 0.5)
    args = parse(f"--dataset={dataset}", "--recipe=fast")
    assert (args.batch_size, args.augmentation, args.crop_min_area) == (256, "crop-jitter", 0.8)


def test_other_sets_keep_their_settings():
    args = parse("--dataset=cifar10")
    assert (args.batch_size, args.epochs, args.augmentation) == (64, 10, "crop-flip")
    args = parse("--dataset=cifar10", "--augmentation=crop-jitter")
    assert (args.crop_min_area, args.jitter_strength) == (0.8, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_only", "--resume=auto"], "--eval_only: gldv2 has no queries to score with; eval"),
        (["--validate"], "--validate: gldv2 has no queries"),
        (["--split=a"], "--split: --dataset=gldv2 is read as its authors lay it out"),
        (["--protocol=train"], "--protocol=train: gldv2 has clean, full"),
    ],
)
def test_what_has_no_meaning_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse("--dataset=gldv2", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("main", [main_SPQ.main, main_GPQ.main])
def test_other_methods_do_not_take_these_sets(main, capsys):
    for dataset in ("sfm120k", "gldv2"):
        with pytest.raises(SystemExit):
            main([f"--dataset={dataset}", "--data_dir=x"])
        assert "--dataset: invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gallery=r101-delg"], "--gallery=r101-delg: needs --gallery_weights"),
        (["--gallery=a.pt", "--input_size=64"], "--input_size: .* at their own aspect; --longest"),
        (["--gallery=a.pt", "--dataset=cifar10", "--scales=1"], "--scales: does nothing with"),
    ],
)
def test_extraction_names_what_is_wrong(flags, message, capsys):
    import re

    with pytest.raises(SystemExit):
        parse_extract_args(["--dataset=gldv2", "--data_dir=x", "--output=f.safetensors", *flags])
    assert re.search(message, capsys.readouterr().err)
