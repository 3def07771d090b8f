"""scripts/compare_asymmetric.py: figures of runs, costs, what it refuses."""

import json
import shutil

import pytest
from small_cifar import log_of
from torch import nn

from scripts import compare_asymmetric
from utils.errors import UserError


def test_the_table_has_the_last_figures_of_all_runs(finished_ssp, finished_gpq, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished_ssp, other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        if entry["kind"] == "eval":
            entry["mAP@all"] += 0.1 if entry["distance"] == "query-gallery" else 0
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    account = json.loads((other / "args.json").read_text())
    account["args"]["seed"] = 5
    (other / "args.json").write_text(json.dumps(account))
    groups = ["--group", "two", str(finished_ssp), str(other), "--group", "one", str(other)]
    places = [f"--gallery={finished_gpq}", f"--output_dir={tmp_path}", "--rounds=2"]
    compare_asymmetric.main([*places, *groups])
    gallery, two, one = json.loads((tmp_path / "table.json").read_text())
    last = {e["distance"]: e["mAP@all"] for e in log_of(finished_ssp, "eval")[-3:]}
    assert two["runs"] == 2
    assert two["query-gallery"]["mAP@all"] == pytest.approx(last["query-gallery"] + 0.05)
    assert two["query-gallery"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert two["query-query"] == {"mAP@all": pytest.approx(last["query-query"]), "deviation": 0.0}
    assert one["query-gallery"]["mAP@all"] == pytest.approx(last["query-gallery"] + 0.1)
    assert one["query-gallery"]["deviation"] is None
    assert gallery["times_cheaper"] == 1
    assert two["macs"] > 0 and two["parameters"] > 0 and two["ms"] > 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    assert f"{last['gallery-gallery']:.4f}" in printed


def test_figures_before_the_training_stand_in_the_table(
    finished_ssp, finished_gpq, tmp_path, capsys
):
    told = tmp_path / "told"
    shutil.copytree(finished_ssp, told)
    edit(told, eval_before=True, seed=5)
    entries = [json.loads(line) for line in (told / "metrics.jsonl").read_text().splitlines()]
    first = [
        e | {"step": 0, "epoch": 0.0, "mAP@all": 0.125} for e in entries if e["kind"] == "eval"
    ][:3]
    (told / "metrics.jsonl").write_text("\n".join(map(json.dumps, first + entries)) + "\n")
    places = [f"--gallery={finished_gpq}", f"--output_dir={tmp_path}", "--rounds=1"]
    groups = ["--group", "told", str(told), "--group", "both", str(told), str(finished_ssp)]
    compare_asymmetric.main([*places, *groups])
    _, told_row, both = json.loads((tmp_path / "table.json").read_text())
    assert told_row["before"]["query-gallery"] == {"mAP@all": 0.125, "deviation": None}
    last = log_of(finished_ssp, "eval")[-3]["mAP@all"]
    assert told_row["query-gallery"]["mAP@all"] == pytest.approx(last)
    assert "before" not in both  # one of the runs does not say
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].count("0.1250") == 2 and "0.1250" not in lines[4]


def test_the_gallery_s_cost_is_that_of_the_size_its_features_were_made_at(
    finished_ssp, finished_gpq, tmp_path
):
    places = [f"--gallery={finished_gpq}", f"--output_dir={tmp_path}", "--rounds=1"]
    other = tmp_path / "other"
    shutil.copytree(finished_ssp, other)
    macs = []
    for size in (32, 64):
        edit(other, gallery_input_size=size)
        compare_asymmetric.main([*places, "--group", "one", str(other)])
        gallery, query = json.loads((tmp_path / "table.json").read_text())
        macs.append((gallery["macs"], query["macs"]))
    (small, same), (large, again) = macs
    assert 3.9 * small < large < 4.1 * small and same == again
    assert '"gallery_input_size": 32' in (finished_ssp / "args.json").read_text()
    edit(other, gallery_input_size=None, seed=5)  # an older run goes with a newer one
    compare_asymmetric.main([*places, "--group", "one", str(other), str(finished_ssp)])
    assert json.loads((tmp_path / "table.json").read_text())[0]["macs"] == small
    edit(other, gallery_input_size=64)
    with pytest.raises(UserError, match="features are of images of 32 and 64 pixels"):
        groups = ["--group", "one", str(other), "--group", "two", str(finished_ssp)]
        compare_asymmetric.main([*places, *groups])


def test_a_run_that_has_not_trained_yet_is_refused(finished_ssp, finished_gpq, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished_ssp, other)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    first = [json.dumps(line | {"step": 0}) for line in lines if line["kind"] == "eval"][:3]
    (other / "metrics.jsonl").write_text("\n".join(first) + "\n")
    places = [f"--gallery={finished_gpq}", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match="holds no evaluated run"):
        compare_asymmetric.main([*places, "--group", "x", str(other)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gallery=resnet18"], "needs --gallery_weights, a file, or --pretrained"),
        (["--gallery=r101-delg", "--pretrained"], "--gallery=r101-delg: needs --gallery_weights"),
        (["--gallery=runs/x", "--pretrained"], "--pretrained: does nothing here"),
    ],
)
def test_a_gallery_by_name_needs_weights(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_asymmetric.main([*flags, f"--output_dir={tmp_path}", "--group", "x", "y"])
    assert message in capsys.readouterr().err
    twice = ["--gallery=runs/x", "--group", "x", "y", "--group", "x", "z"]
    with pytest.raises(SystemExit):
        compare_asymmetric.main([*twice, f"--output_dir={tmp_path}"])
    assert "--group x: is there twice" in capsys.readouterr().err


def edit(folder, **flags):
    account = json.loads((folder / "args.json").read_text())
    account["args"] |= flags
    (folder / "args.json").write_text(json.dumps(account))


def test_networks_take_turns(monkeypatch):
    """A machine that slows down from one image to the next slows all alike."""
    calls, now = [], [0.0]

    class Told(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.net = name, nn.Conv2d(3, 1, 1)

        def describe(self, images):
            calls.append(self.name)
            now[0] += len(calls) / 1000  # seconds
            return self.net(images)

    monkeypatch.setattr(compare_asymmetric.time, "perf_counter", lambda: now[0])
    pair = [(Told("gallery"), 4), (Told("query"), 8)]
    gallery, query = compare_asymmetric.costs_of(pair, 20)
    timed = calls[2:]  # after the two that are counted
    assert timed == (len(timed) // 2) * ["gallery", "query"]
    assert len(timed) == 2 * 2 * (3 + 20)
    assert query["ms"] == pytest.approx(gallery["ms"] + 1)
    # of each of 64 images
    assert query["ms_together"] == pytest.approx(gallery["ms_together"] + 1 / 64)
    assert query["macs"] == 4 * gallery["macs"] == 3 * 64


def test_runs_that_differ_in_more_than_their_seed_are_refused(finished_ssp, finished_gpq, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished_ssp, other)
    saved = json.loads((other / "args.json").read_text())["args"]
    edit(other, lr=7)
    places = [f"--gallery={finished_gpq}", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"differs from .* in --lr, not only in seed"):
        compare_asymmetric.main([*places, "--group", "x", str(finished_ssp), str(other)])
    # what does not change the figures may differ, and the seed must
    free = {"overwrite": True, "num_workers": 3, "device": "cuda", "gpu_id": 1, "max_minutes": 2}
    edit(other, lr=saved["lr"], **free, max_steps=999, checkpoint_every=7)
    asked = [*places, "--rounds=1", "--group", "x", str(finished_ssp), str(other)]
    with pytest.raises(UserError, match=rf"{other}: has --seed=.* as {finished_ssp} has; allowed"):
        compare_asymmetric.main(asked)
    edit(other, seed=77)
    compare_asymmetric.main(asked)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    first = [json.dumps(line) for line in lines if line["step"] <= 15]
    (other / "metrics.jsonl").write_text("\n".join(first) + "\n")
    with pytest.raises(UserError, match=r"last evaluated after step 15, and .* after 30; train"):
        compare_asymmetric.main(asked)
    edit(other, gallery="GPQ cifar_vgg 0123456789abcdef")
    mixed = [*asked[:-1], "--group", "y", asked[-1]]
    with pytest.raises(UserError, match=r"learned from GPQ cifar_vgg 0123456789abcdef, and --gal"):
        compare_asymmetric.main(mixed)
    with pytest.raises(UserError, match=r"no evaluated run of main_SSP\.py"):
        compare_asymmetric.main([*places, "--group", "x", str(finished_gpq)])
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare_asymmetric.main([*places, "--group", "x", str(tmp_path)])
