"""main_SPQ.py on FLICKR25K, NUS-WIDE and lists, in their exact layouts, from files to mAP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_cifar
import small_sets
import torch

import data.splits
import search
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--input_size=16", "--crop_size=16", "--batch_size=20"]


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flickr")
    small_sets.make_mirflickr(folder, 150)
    return folder


@pytest.fixture
def nuswide(tmp_path):
    """Two images missing, one cut off."""
    folder = tmp_path / "nuswide"
    small_sets.make_nuswide(folder, 140)
    found = sorted(folder.glob("Flickr/*/*.jpg"))
    for path in found[3:5]:
        path.unlink()
    found[10].write_bytes(found[10].read_bytes()[:300])
    return folder


def test_flickr25k_from_its_own_files(flickr, tmp_path, capsys):
    flags = [*SMALL, "--dataset=flickr25k", "--epochs=60", "--lr=2e-3", "--Top_N=40"]
    flags += ["--jitter_strength=0", "--eval_epoch=20"]  # colours are what tells the labels
    small_cifar.run(flickr, tmp_path / "run", *flags)
    out = capsys.readouterr().out
    assert "flickr25k, protocol spq-in-proportion, seed 0: 30 train, 12 query, 138 database" in out
    assert "24 labels" in out
    first, last = (small_cifar.log_of(tmp_path / "run", "eval")[i] for i in (0, -1))
    assert first["queries"] == last["queries"] == 12
    assert 0.35 < last["mAP@40"] <= 1  # random rankings give .13
    for name in ("retrieval.png", "learning_curve.png", "split.json", "checkpoint_last.pt"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    head = json.loads((tmp_path / "run" / "split.json").read_text())
    made = tmp_path / "flickr.split"
    assert (
        data.splits.main(
            ["make", "--dataset=flickr25k", f"--data_dir={flickr}", f"--output={made}"]
        )
        == 0
    )
    assert head["sha256"] in made.read_text()
    # the very split as a file gives the very run
    small_cifar.run(flickr, tmp_path / "again", *flags, f"--split={made}")
    again = small_cifar.log_of(tmp_path / "again", "eval")[-1]
    assert again["mAP@40"] == last["mAP@40"]


def test_another_seed_draws_another_split_and_is_refused_on_resume(flickr, tmp_path):
    flags = [*SMALL, "--dataset=flickr25k", "--max_steps=1", "--Top_N=40"]
    small_cifar.run(flickr, tmp_path / "run", *flags)
    with pytest.raises(UserError, match=r"its split is .*, and the run that"):
        small_cifar.run(flickr, tmp_path / "run", *flags, "--split_seed=1", "--resume=auto")
    # also where the run goes on in another folder
    elsewhere = ["--split_seed=1", f"--resume={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"its split is .*, and the run that --resume"):
        small_cifar.run(flickr, tmp_path / "elsewhere", *flags, *elsewhere)


def test_an_evaluation_alone_takes_the_split_of_the_run(flickr, tmp_path, capsys):
    made = tmp_path / "seven.split"
    words = ["make", "--dataset=flickr25k", f"--data_dir={flickr}", "--split_seed=7"]
    assert data.splits.main([*words, f"--output={made}"]) == 0
    flags = [*SMALL, "--dataset=flickr25k", "--max_steps=3", "--Top_N=40"]
    small_cifar.run(flickr, tmp_path / "run", *flags, f"--split={made}")
    want = small_cifar.log_of(tmp_path / "run", "eval")[-1]
    alone = ["--eval_only", "--resume=auto"]
    small_cifar.run(flickr, tmp_path / "run", *flags, *alone)
    assert "another split" not in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "eval_only.json").read_text())[0]
    assert found["mAP@40"] == want["mAP@40"]
    small_cifar.run(flickr, tmp_path / "run", *flags, *alone, "--split_seed=8")
    assert "This is another split than the one" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--dataset=cifar10: .* was trained on flickr25k"):
        small_cifar.run(flickr, tmp_path / "run", *alone)


def test_nuswide_stops_at_missing_files_and_goes_on_when_told(nuswide, tmp_path, capsys):
    flags = [*SMALL, "--dataset=nuswide", "--max_steps=2", "--Top_N=40"]
    with pytest.raises(UserError) as stop:
        small_cifar.run(nuswide, tmp_path / "run", *flags)
    message = str(stop.value)
    assert "3 of 140 images cannot be read" in message
    assert message.count("No such file or directory") == 2
    assert "--skip_missing goes on without them" in message
    small_cifar.run(nuswide, tmp_path / "run", *flags, "--skip_missing")
    out = capsys.readouterr().out
    assert "images left out that could not be read: 3" in out
    head = json.loads((tmp_path / "run" / "split.json").read_text())
    assert head["left_out"] == 3
    assert (head["train"], head["query"], head["database"]) == (56, 28, 112)  # what was asked for
    assert head["used_sha256"] != head["sha256"]
    bad = {"Flickr/concept0/0063_506816.jpg", "Flickr/concept0/0084_673115.jpg"}
    bad |= {"Flickr/concept1/0044_356355.jpg"}
    lines = (nuswide / "test.txt").read_text().splitlines()
    left = [line for line in lines if line.split()[0] not in bad]
    evals = small_cifar.log_of(tmp_path / "run", "eval")
    assert evals[-1]["queries"] == len(left)


def test_the_shell_scripts_train_on_fabricated_sets(flickr, nuswide, tmp_path):
    """As a user calls them, with a few flags that make it small."""
    small = [*SMALL, "--max_steps=2", "--device=cpu", "--arch=test_efficientnet", "--skip_missing"]
    small += [f"--cache_dir={tmp_path / 'cache'}"]
    for name, folder in (("flickr25k", flickr), ("nuswide", nuswide)):
        run = tmp_path / name
        done = subprocess.run(
            ["bash", f"scripts/train_{name}_16bits.sh", *small]
            + [f"--data_dir={folder}", f"--output_dir={run}"],
            cwd=ROOT,
            env=os.environ | {"VENV": sys.prefix},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "mAP@5000 = " in done.stdout
        entry = small_cifar.log_of(run, "eval")[-1]
        assert entry["code_bits"] == 16
    # what was trained can be searched with
    search.main(
        ["build", f"--checkpoint={run}", f"--images={nuswide / 'Flickr'}"]
        + [f"--index={tmp_path / 'index'}"]
    )


def test_lists_with_classes_and_a_pretrained_frozen_trunk(tmp_path, capsys):
    """`path class` lines; features of views kept, used, and used again on a resume."""
    labels = small_sets.make_nuswide(tmp_path / "set", 90)
    for name in ("train", "test", "database"):
        path = tmp_path / "set" / f"{name}.txt"
        rows = [line.split() for line in path.read_text().splitlines()]
        path.write_text("".join(f"{row[0]} {row[1:].index('1')}\n" for row in rows))
    assert len(labels) == 90
    import timm

    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    flags = [*SMALL, "--dataset=lists", "--arch=test_efficientnet", "--width=64", "--freeze_trunk"]
    flags += [f"--weights={weights}", "--cached_views=3", "--joint_views", "--epochs=3"]
    small_cifar.run(tmp_path / "set", tmp_path / "once", *flags)
    assert "21 classes" in capsys.readouterr().out
    small_cifar.run(tmp_path / "set", tmp_path / "run", *flags, "--max_steps=2")
    err = capsys.readouterr().err
    assert "features of" not in err  # they were there
    small_cifar.run(tmp_path / "set", tmp_path / "run", *flags, "--resume=auto")
    models = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"]
        for name in ("once", "run")
    ]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    published = torch.load(weights, weights_only=True)
    for key, value in published.items():
        if not key.startswith("classifier."):
            assert torch.equal(models[0][f"trunk.net.{key}"], value)
    once, run = (small_cifar.log_of(tmp_path / name, "eval")[-1] for name in ("once", "run"))
    assert once["mAP@50"] == run["mAP@50"]
    # and the images themselves through the whole network give the same, but for float16 features
    small_cifar.run(
        tmp_path / "set",
        tmp_path / "run",
        *[flag for flag in flags if "cached" not in flag],
        "--eval_only",
        "--resume=auto",
    )
    whole = json.loads((tmp_path / "run" / "eval_only.json").read_text())[0]
    assert whole["mAP@50"] == pytest.approx(run["mAP@50"], abs=0.02)
