"""The campaign at tiny scale, by real trainings: cut, resumed, failing; what it writes down."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_cifar
import torch
from small_cifar import log_of

from scripts import reproduce_cifar10 as campaign
from utils.checkpoint import LAST, load_checkpoint
from utils.embedders import load_network
from utils.errors import UserError
from utils.loop import TIME_IS_OVER, TrainingStopped
from utils.trained import load_trained

TINY = [*small_cifar.FAST, "--warmup_epochs=0", "--early_share=0", "--checkpoint_every=1"]
TINY = [f for f in TINY if not f.startswith(("--loss", "--epochs", "--device", "--log_every"))]


@pytest.fixture
def call(small_files, tmp_path):
    """One call of the campaign; its exit code."""

    def call(*flags, minutes=3.0, main=()):
        words = [f"--state_dir={tmp_path / 'state'}", f"--output_dir={tmp_path / 'out'}"]
        words += [f"--data_dir={small_files}", "--device=cpu", f"--minutes={minutes}"]
        words += ["--margin_seconds=1", "--start_seconds=1", f"--extra={' '.join(TINY)}"]
        tiny = "--width=4 --batch_size=8 --size=8 --steps=1 --variants=plain"
        words += [f"--benchmark={tiny} --batch_sizes=8", *flags]
        try:
            campaign.main(words, main or [sys.executable, "tests/small_cifar.py"])
        except TrainingStopped as stop:
            return stop.exit_code
        return 0

    return call


def begin(tmp_path, **known):
    """A campaign that has done its benchmarks, and what else is known."""
    (tmp_path / "state").mkdir()
    state = {"used_s": 0.0, "runs": {}, "speed": {}}
    state |= {"benchmark": {part: {} for part in campaign.BENCHMARKS}} | known
    (tmp_path / "state" / "campaign.json").write_text(json.dumps(state))


SPEED = {"": {"epoch_s": 5.0, "start_s": 4.0, "steps": 15, "loss": 3.0}}


def state_of(tmp_path):
    return json.loads((tmp_path / "state" / "campaign.json").read_text())


def test_a_campaign_in_pieces_ends_with_a_table_curves_and_weights(call, tmp_path):
    flags = ("--only=32bits", "--total_minutes=0.8")
    codes = [call(*flags, minutes=0.5)]  # of half a minute each: the training is cut
    while codes[-1] == TIME_IS_OVER and len(codes) < 15:
        codes.append(call(*flags, minutes=0.5))
    assert codes[-1] == 0
    state = state_of(tmp_path)
    assert TIME_IS_OVER in codes  # it did take several
    table = (tmp_path / "out" / "table.md").read_text()
    name = "32bits"
    run, folder = state["runs"][name], tmp_path / "out" / name
    assert run["status"] == "done"
    assert "--recipe=fast" in run["flags"]
    evals = [e for e in log_of(folder, "eval") if e["distance"] == "squared_l2"]
    assert f"{evals[-1]['mAP@50']:.4f}" in table
    assert f"--epochs={evals[-1]['epoch']:g}" in run["flags"]
    assert f"python main_SPQ.py {' '.join(run['flags'])}" in table
    assert "Result of the last epoch" in (folder / "console.log").read_text()
    kept = load_trained(folder / "model.pt").model.state_dict()
    whole = load_checkpoint(tmp_path / "state" / name / LAST)["model"]
    assert torch.equal(kept["quantizer.codebooks"], whole["quantizer.codebooks"])
    for key, value in whole.items():  # bfloat16 keeps 8 bits of each number
        torch.testing.assert_close(kept[key], value, rtol=2**-8, atol=0)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    benchmark = json.loads((tmp_path / "out" / "benchmark.json").read_text())["benchmark"]
    assert benchmark["epoch"]["plain"]["epoch_s"] > 0
    assert benchmark["profile"]["step_s"] > 0
    assert benchmark["memory"][0]["peak_MiB"] > 0
    before = (tmp_path / "state" / "32bits" / "metrics.jsonl").read_text()
    assert call(*flags) == 0  # nothing left to do
    assert (tmp_path / "state" / "32bits" / "metrics.jsonl").read_text() == before


def test_a_failing_run_is_written_down_and_the_next_has_its_turn(call, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(Path('tests').resolve())!r})\n"
        "if any(word.endswith('/32bits') for word in sys.argv):\n"
        "    sys.exit('out of luck')\n"
        f"runpy.run_path({str(Path('tests/small_cifar.py').resolve())!r}, run_name='__main__')\n"
    )
    begin(tmp_path, speed={"fast": SPEED, "released": SPEED})
    flags = ("--only=32bits,released", "--total_minutes=1.2")
    assert call(*flags, main=[sys.executable, str(script)]) == 1
    runs = state_of(tmp_path)["runs"]
    assert runs["32bits"]["status"] == "failed"
    assert "out of luck" in runs["32bits"]["error"]
    assert runs["released"]["status"] == "done"
    assert "32bits failed: exit code 1: " in (tmp_path / "out" / "table.md").read_text()
    assert call(*flags) == 1  # it waits to be asked for
    assert call(*flags, "--retry") == 0
    assert state_of(tmp_path)["runs"]["32bits"]["status"] == "done"


SLOW_TO_COMPILE = """
import json, sys
from pathlib import Path
words = [w.removeprefix("--").partition("=")[::2] for w in sys.argv[1:]]
flags = dict(words)
assert flags["early_share"] == "0.5" and int(flags["epochs"]) == 4
folder = Path(flags["output_dir"])
folder.mkdir(exist_ok=True)
(folder / "args.json").write_text(json.dumps({"args": {"batch_size": 10}}))
seconds = {1: 50, 2: 2, 3: 50, 4: 4}  # of 20 images each; shapes compile in the first and third
if "cuda_graph" in flags:
    seconds[2] = seconds[4] = 1
if "compile" in flags:
    seconds[4] = 0.1
loss = 9.0 if "compile" in flags else 3.0
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, 9):  # two steps an epoch, a line each
        epoch = (step + 1) // 2
        line = {"kind": "train", "step": step, "epoch": step / 2, "loss": loss}
        print(json.dumps(line | {"images_per_s": 20 / seconds[epoch]}), file=file)
"""


def test_speed_is_that_of_both_crops_without_what_compiles(call, tmp_path):
    """On a stand-in for main_SPQ.py, whose log is known."""
    script = tmp_path / "main.py"
    script.write_text(SLOW_TO_COMPILE)
    begin(tmp_path, runs={"32bits": {"status": "failed", "error": "", "flags": []}})
    flags = ("--only=32bits", "--device=cuda", "--extra=--early_share=0.6")
    assert call(*flags, main=[sys.executable, str(script)]) == 1
    plain, free, graph, wrong = state_of(tmp_path)["speed"]["fast"].values()
    # 0.6 of the steps take 2 s for 20 images, 0.4 take 4 s
    assert plain["epoch_s"] == free["epoch_s"] == pytest.approx(0.6 * 2 + 0.4 * 4)
    assert plain["start_s"] == 0.0  # the log claims more time than has passed
    assert (plain["steps"], plain["loss"]) == (2, 3.0)
    assert graph["epoch_s"] == pytest.approx(1)
    assert wrong == {"error": "loss 9.0 and not 3.0"}  # fast, but it trains something else


PLAN = {"32bits": 8.0, "16bits": 4.5, "64bits": 4.5, "released": None}


@pytest.mark.parametrize(
    ("used_min", "begun", "name", "minutes"),
    [
        (4, [], "32bits", 8),
        (4, [], "released", 21),
        (16.5, [], "32bits", 4),  # 8.5 minutes are left for 17: half of each
        (16.5, ["32bits"], "16bits", 4.25),  # 8.5 for 9
        (24, [], "32bits", 4),  # never less than half
        (24, ["32bits", "16bits", "64bits"], "released", 1),
    ],
)
def test_runs_share_what_measuring_has_left_of_the_minutes(
    used_min, begun, name, minutes, tmp_path
):
    begin(tmp_path, used_s=60 * used_min, runs={n: {"status": "done"} for n in begun})
    args = campaign.parse([f"--state_dir={tmp_path / 'state'}"])
    found = campaign.Campaign(args, PLAN, [], time.monotonic()).seconds_of(name)
    assert found == pytest.approx(60 * minutes, abs=0.5)


def test_a_run_is_as_long_as_its_minutes_without_its_start(call, tmp_path, monkeypatch):
    begin(tmp_path, speed={"fast": {"": {"epoch_s": 5.0, "start_s": 60.0, "steps": 9}}})
    asked = []
    monkeypatch.setattr(campaign.Campaign, "call", lambda self, *_: asked.append(self) or (1, ""))
    assert call("--only=16bits", "--total_minutes=25") == 1
    flags = state_of(tmp_path)["runs"]["16bits"]["flags"]
    # 0.9 of 4.5 minutes without one, 5 s each: 37.8
    assert "--epochs=37" in flags
    assert "--eval_epoch=7" in flags
    assert len(asked) == 1


def test_a_failed_part_of_the_benchmark_is_tried_again_when_asked(call, tmp_path, monkeypatch):
    parts = {"epoch": {"error": "too slow"}, "profile": {"step_s": 1.0}, "memory": []}
    runs = {"32bits": {"status": "done", "flags": []}}
    begin(tmp_path, speed={"fast": SPEED}, benchmark=parts, runs=runs)
    tried = []

    def fake(self, command, log, seconds):
        tried.append(command[2])
        log.write_text('\n{\n  "epoch": {"plain": 1}\n}\n')
        return 0, ""

    monkeypatch.setattr(campaign.Campaign, "call", fake)
    assert call("--only=32bits") == 0
    assert tried == []
    assert call("--only=32bits", "--retry") == 0
    assert tried == ["--part=epoch"]
    assert state_of(tmp_path)["benchmark"]["epoch"] == {"plain": 1}


def test_what_never_ends_in_a_call_is_an_error_and_time_has_an_end(call, tmp_path, capsys):
    script = tmp_path / "main.py"
    script.write_text("import time; time.sleep(60)")
    begin(tmp_path)
    with pytest.raises(UserError, match="fast: no short training worked"):
        call("--only=32bits", minutes=0.05, main=[sys.executable, str(script)])
    known = state_of(tmp_path) | {"speed": {"fast": SPEED, "released": SPEED}, "used_s": 9e9}
    (tmp_path / "state" / "campaign.json").write_text(json.dumps(known))
    assert call("--only=released") == 0
    assert "released: --total_minutes=25 are used up" in capsys.readouterr().out


def running(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_campaign_that_is_asked_to_leave_takes_its_training_along(small_files, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"file = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "file.with_name('new').write_text(f'{os.getpid()} {helper.pid} {os.getpgrp()}')\n"
        "file.with_name('new').rename(file)\n"
        "time.sleep(60)"
    )
    begin(tmp_path, speed={"fast": SPEED})
    code = (
        "import sys; from scripts.reproduce_cifar10 import main\n"
        f"main(sys.argv[1:], [sys.executable, {str(script)!r}])"
    )
    words = [f"--state_dir={tmp_path / 'state'}", f"--output_dir={tmp_path / 'out'}"]
    words += ["--only=32bits", "--device=cpu", f"--data_dir={small_files}"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.1)
    with pytest.raises(UserError, match="another campaign works there"):
        campaign.main(words)
    process.terminate()
    assert process.wait(60) == 143
    training, helper, group = map(int, (tmp_path / "pid").read_text().split())
    assert group == training  # its own: Ctrl-C on the campaign does not reach it twice
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)
    assert not running(helper)
    assert state_of(tmp_path)["runs"]["32bits"]["status"] == "begun"  # to be gone on with


def test_large_weights_come_in_parts_that_are_read_as_one(finished, tmp_path, monkeypatch):
    campaign.keep_weights(finished, tmp_path)
    whole = (tmp_path / "model.pt").read_bytes()
    monkeypatch.setattr(campaign, "PART_BYTES", 100_000)
    campaign.keep_weights(finished, tmp_path)
    assert not (tmp_path / "model.pt").exists()
    parts = sorted(tmp_path.glob("model.pt.part*"))
    assert len(parts) == -(-len(whole) // 100_000) > 1
    assert len(b"".join(part.read_bytes() for part in parts)) == len(whole)
    for place in (tmp_path, tmp_path / "model.pt"):
        assert load_trained(place).identity
    (second := parts[1]).rename(tmp_path / "aside")
    with pytest.raises(UserError, match="damaged"):
        load_trained(tmp_path)
    (tmp_path / "aside").rename(second)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8).float() / 255
    kept, original = (load_trained(f).model.encode(images) for f in (tmp_path, finished))
    assert (kept == original).float().mean() > 0.9  # near-ties between codewords may turn


def test_kept_weights_of_a_query_network_answer_nearly_as_it_does(finished_ssp, tmp_path):
    campaign.keep_weights(finished_ssp, tmp_path)
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept, original = (
            load_network(str(f), None, "--query").model.describe(images)
            for f in (tmp_path, finished_ssp)
        )
    assert not torch.equal(kept, original)  # bfloat16
    assert (kept * original).sum(dim=1).min() > 0.999


def test_the_plan_and_bad_input(call, tmp_path, capsys):
    assert call("--dry_run") == 0
    plan = capsys.readouterr().out
    assert "32bits: 8 minutes, python main_SPQ.py --recipe=fast" in plan
    assert not (tmp_path / "state").exists()
    for flags, message in (
        (["--only=8bits"], "--only=8bits: allowed are 32bits"),
        (["--minutes=0.01"], "--minutes=0.01: must be more than"),
        (["--frobnicate"], "--frobnicate"),
    ):
        with pytest.raises(SystemExit):
            call(*flags)
        assert message in capsys.readouterr().err
