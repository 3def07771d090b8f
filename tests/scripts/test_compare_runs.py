"""compare_runs.py: minutes of training, means over seeds, curves, bad input."""

import json
import shutil

import pytest
from small_cifar import log_of

from scripts import compare_runs as compare
from utils.errors import UserError

BY_L2 = {"squared_l2": 0.0, "l2": 0.1}  # SPQ's distances, and how much lower their figures are
GPQ = {"quantizer": "prototype", "distance": "inner_product", "Top_N": "all", "recipe": "paper"}


def write_run(folder, values, speeds=(64.0, 32.0), distances=BY_L2, **changed):
    """A run's files: an evaluation after each ten steps at the speed given."""
    folder.mkdir(parents=True)
    args = {"batch_size": 32, "Top_N": 50, "recipe": "fast", "lr": 0.1, "validate": False}
    args |= changed
    (folder / "args.json").write_text(json.dumps({"args": args}))
    lines = []
    for i, (value, speed) in enumerate(zip(values, speeds, strict=True), start=1):
        lines.append({"kind": "train", "step": 10 * i, "epoch": i, "images_per_s": speed})
        for distance, less in distances.items():
            found = {"mAP@50": value - less, "mAP@50_all_relevant": 0.01, "mAP@all": value / 2}
            place = {"kind": "eval", "step": 10 * i, "epoch": i, "distance": distance}
            lines.append(place | found | {"code_bits": 32, "queries": 7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_minutes_are_those_of_training(tmp_path):
    _, points = compare.read_run(write_run(tmp_path / "a", [0.2, 0.3]))
    # 10 steps of 32 images at 64 a second: 5 seconds; then at 32 a second: 10 more
    assert [p.minutes for p in points] == pytest.approx([5 / 60, 15 / 60])
    assert [compare.figure_of(p, "mAP@50") for p in points] == [0.2, 0.3]
    assert compare.figure_of(points[1], "mAP@50", "l2") == pytest.approx(0.2)


def test_table_has_mean_and_deviation_of_the_seeds(tmp_path, capsys):
    a = [str(write_run(tmp_path / f"a{i}", [0.2, value])) for i, value in enumerate((0.3, 0.4))]
    b = [str(write_run(tmp_path / "b", [0.5, 0.6], speeds=(1.0, 1.0), validate=True))]
    out = tmp_path / "out"
    flags = ["--group", "one", *a, "--group", "two", *b, f"--output_dir={out}", "--at_minutes=0.1"]
    compare.main(flags)
    rows = (out / "table.md").read_text().splitlines()
    assert rows == capsys.readouterr().out.splitlines()
    one, two = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:])
    head = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    one, two = dict(zip(head, one, strict=True)), dict(zip(head, two, strict=True))
    # the deviation of 0.3 and 0.4 with n - 1: 0.1 / sqrt(2)
    assert one["mAP@50, found"] == "0.3500 ± 0.0707"
    assert (one["bits"], one["seeds"], one["epochs"]) == ("32", "2", "2")
    assert one["mAP@50, found, l2"] == "0.2500 ± 0.0707"
    assert one["mAP@50, found, at 0.1 minutes"] == "0.2000 ± 0.0000"
    assert (one["queries"], two["queries"]) == ("7", "7 held out")
    assert two["mAP@50, found"] == "0.6000"
    assert two["mAP@50, found, at 0.1 minutes"] == "none yet"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_run_s_minutes_add_up(finished):
    args, points = compare.read_run(finished)
    assert len(points) == 2
    assert 0 < points[0].minutes < points[1].minutes < 10
    assert args["batch_size"] == 20


def test_bad_input_is_told(tmp_path, capsys):
    with pytest.raises(UserError, match="nowhere: is not the folder of a run"):
        compare.read_run(tmp_path / "nowhere")
    empty = write_run(tmp_path / "empty", [], speeds=())
    with pytest.raises(UserError, match="empty: no evaluation"):
        compare.read_run(empty)
    with pytest.raises(SystemExit):
        compare.main(["--group", "alone", f"--output_dir={tmp_path}"])
    assert "--group alone: has a name and no folder" in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    one, two, three, four = (
        str(write_run(tmp_path / name, [0.2, 0.3], **changed))
        for name, changed in (
            ("1", {"seed": 1}),
            ("2", {"seed": 2, "output_dir": "elsewhere"}),
            ("3", {"seed": 3, "lr": 0.2}),
            ("4", {"Top_N": 60}),
        )
    )
    out = f"--output_dir={tmp_path / 'out'}"
    compare.main(["--group", "a", one, two, "--group", "b", three, out])
    with pytest.raises(UserError, match=r"--group a: its runs differ in lr$"):
        compare.main(["--group", "a", one, two, three, out])
    with pytest.raises(UserError, match="different --Top_N"):
        compare.main(["--group", "a", one, "--group", "b", four, out])
    few = str(write_run(tmp_path / "5", [0.2, 0.3], limit_db=1000))
    with pytest.raises(UserError, match=r"different --limit_db \(1000 and None\)"):
        compare.main(["--group", "a", one, few, out])


def test_gpq_s_table_has_one_figure_of_the_whole_ranking(tmp_path):
    found = [("a0", 0.3), ("a1", 0.5), ("b", 0.9)]
    a0, a1, b = (
        str(write_run(tmp_path / name, [0.2, value], distances={"inner_product": 0.0}, **GPQ))
        for name, value in found
    )
    out = tmp_path / "out"
    compare.main(["--group", "one", a0, a1, "--group", "two", b, f"--output_dir={out}"])
    rows = (out / "table.md").read_text().splitlines()
    head, _, one, two = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert head[-2:] == ["queries", "mAP@all"]
    # write_run's mAP@all is half of what it is given; 0.15 and 0.25 deviate by 0.1 / sqrt(2)
    assert one[-2:] == ["7", "0.2000 ± 0.0707"]
    assert two[-2:] == ["7", "0.4500"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_two_methods_are_not_mixed(finished, finished_gpq, tmp_path):
    out = f"--output_dir={tmp_path / 'out'}"
    with pytest.raises(UserError, match="runs of SPQ and of GPQ have no figures in common"):
        compare.main(["--group", "a", str(finished), "--group", "b", str(finished_gpq), out])
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    shutil.copytree(finished_gpq, other)
    account = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(
        json.dumps(account | {"args": account["args"] | {"seed": 1, "labels_per_class": 2}})
    )
    compare.main(["--group", "a", str(finished_gpq), "--group", "b", str(other), out])
    value = log_of(finished_gpq, "eval")[-1]["mAP@all"]
    assert "| 12 | paper | 1 | 6 |" in (tmp_path / "out" / "table.md").read_text()
    assert f"| 6 | {value:.4f} |" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match=r"--group a: its runs differ in labels_per_class$"):
        compare.main(["--group", "a", str(finished_gpq), str(other), out])


def test_query_networks_have_a_script_of_their_own(finished_ssp, tmp_path):
    with pytest.raises(UserError, match=r"of main_SSP\.py; scripts/compare_asymmetric\.py"):
        compare.main(["--group", "one", str(finished_ssp), f"--output_dir={tmp_path}"])


def test_runs_of_older_code_and_resumed_ones_are_known_by_what_they_did(tmp_path):
    new, old, frozen, resumed = (
        write_run(tmp_path / name, [0.2, 0.3], **changed)
        for name, changed in (
            ("new", {"freeze_bn_epoch": None, "joint_views": False}),
            ("old", {"freeze_bn": False, "eval_epoch": 5}),  # does not know --joint_views
            ("frozen", {"freeze_bn": True, "eval_epoch": 5}),
            ("resumed", {}),
        )
    )
    out = f"--output_dir={tmp_path / 'out'}"
    for pair in ((new, old), (old, new)):  # whichever comes first
        compare.main(["--group", "a", *map(str, pair), out])
    with pytest.raises(UserError, match=r"differ in freeze_bn_epoch$"):
        compare.main(["--group", "a", str(new), str(frozen), out])
    account = json.loads((resumed / "args.json").read_text())
    account["resumed"] = [{"step": 10, "args": account["args"] | {"lr": 0.01}}]
    (resumed / "args.json").write_text(json.dumps(account))
    with pytest.raises(UserError, match=r"differ in lr$"):
        compare.main(["--group", "a", str(new), str(resumed), out])
