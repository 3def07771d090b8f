"""main_SPQ.py from end to end on a small set: logs, resume, kill, signals, faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_cifar
import torch
from small_cifar import log_of, run

import main_SPQ
from data.cifar10 import load_cifar10
from models import ProductQuantizer
from utils.checkpoint import LAST, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.loop import Trainer, TrainingStopped
from utils.schedule import lr_schedule

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2 * (5 * small_cifar.ROWS // 20)  # of the two epochs of FAST


def start(data_dir, output_dir, *flags):
    """main_SPQ.py in a process of its own."""
    command = [sys.executable, "tests/small_cifar.py", "--data_dir", str(data_dir)]
    return subprocess.Popen(
        [*command, *small_cifar.FAST, f"--output_dir={output_dir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(folder):
    return load_checkpoint(folder / LAST)["model"]


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    train, evals = log_of(finished, "train"), log_of(finished, "eval")
    assert [e["step"] for e in train] == list(range(1, STEPS + 1))
    assert set(train[0]) == {"kind", "epoch", "step", "loss", "lr", "images_per_s", "step_s"}
    assert [(e["epoch"], e["step"], e["distance"]) for e in evals] == [
        (1, STEPS // 2, "squared_l2"),
        (1, STEPS // 2, "l2"),
        (2, STEPS, "squared_l2"),
        (2, STEPS, "l2"),
    ]
    assert evals[0]["code_bits"] == 16
    assert {"mAP@50", "mAP@50_all_relevant", "mAP@all", "queries"} <= set(evals[0])
    args = json.loads((finished / "args.json").read_text())
    assert args["args"]["N_books"] == 4
    assert {"torch", "kornia"} <= set(args["versions"])
    assert args["hardware"]["cores"] == os.cpu_count()
    assert args["commit"] is None or re.match(r"[0-9a-f]{40}", args["commit"])
    assert any((finished / "tensorboard").iterdir())
    for picture in ("learning_curve.png", "retrieval.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


def test_training_learns(finished):
    losses = [e["loss"] for e in log_of(finished, "train")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    # classes differ by colour alone; chance is the base rate of 0.1
    assert log_of(finished, "eval")[-2]["mAP@all"] > 0.3


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(finished, small_set, tmp_path):
    run(small_set, tmp_path / "again", "--eval_epoch=1")
    assert_same_weights(finished, tmp_path / "again")
    losses = [[e["loss"] for e in log_of(f, "train")] for f in (finished, tmp_path / "again")]
    assert losses[0] == losses[1]
    run(small_set, tmp_path / "other", "--seed=1", "--max_steps=2")
    assert [e["loss"] for e in log_of(tmp_path / "other", "train")] != losses[0][:2]


def test_a_resumed_run_ends_bit_equal(finished, small_set, tmp_path):
    run(small_set, tmp_path, "--max_steps=7", "--eval_epoch=1")
    assert load_checkpoint(tmp_path / LAST)["step"] == 7
    run(small_set, tmp_path, "--resume=auto", "--max_steps=19", "--eval_epoch=1")
    run(small_set, tmp_path, f"--resume={tmp_path / LAST}", "--eval_epoch=1")
    assert_same_weights(finished, tmp_path)
    assert [e["step"] for e in log_of(tmp_path, "train")] == list(range(1, STEPS + 1))
    final = [log_of(f, "eval")[-1]["mAP@all"] for f in (finished, tmp_path)]
    assert final[0] == final[1]


def test_a_killed_run_resumes_bit_equal(finished, small_files, small_set, tmp_path):
    process = start(small_files, tmp_path, "--eval_epoch=1", "--checkpoint_every=1")
    wait_for_step(tmp_path, 4, process)
    process.kill()
    process.communicate()
    killed_at = load_checkpoint(tmp_path / LAST)["step"]
    assert 0 < killed_at < STEPS
    run(small_set, tmp_path, "--resume=auto", "--eval_epoch=1")
    assert_same_weights(finished, tmp_path)
    # steps logged after the last checkpoint stand once
    assert [e["step"] for e in log_of(tmp_path, "train")] == list(range(1, STEPS + 1))


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(log_of(folder, "train")) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"no step {step}: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    number, finished, small_files, small_set, tmp_path
):
    process = start(small_files, tmp_path, "--eval_epoch=1")
    wait_for_step(tmp_path, 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "--resume=auto" in err
    assert "Traceback" not in err
    assert load_checkpoint(tmp_path / LAST)["step"] >= 2
    run(small_set, tmp_path, "--resume=auto", "--eval_epoch=1")
    assert_same_weights(finished, tmp_path)


def test_a_finished_run_is_not_run_again(finished, small_set, capsys):
    before = (finished / "metrics.jsonl").read_text()
    run(small_set, finished, "--resume=auto", "--eval_epoch=1")
    assert (finished / "metrics.jsonl").read_text() == before
    assert "Result of the last epoch: mAP@50" in capsys.readouterr().out


def test_eval_only_gives_the_logged_figures_and_touches_nothing(finished, small_set, tmp_path):
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    # no flag of the model or the training: the checkpoint says them
    flags = ["--eval_only", "--Top_N=50", "--device=cpu", f"--data_dir={small_set}"]
    main_SPQ.main([*flags, f"--resume={finished}", f"--output_dir={tmp_path}", "--batch_size=7"])
    got = json.loads((tmp_path / "eval_only.json").read_text())
    want = log_of(finished, "eval")[-2:]
    assert [e["mAP@50"] for e in got] == [e["mAP@50"] for e in want]
    main_SPQ.main([*flags, "--resume=auto", f"--output_dir={finished}", "--batch_size=7"])
    after = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {"eval_only.json", "eval_only_retrieval.png"}
    for name in after.keys() - before.keys():
        (finished / name).unlink()


def test_evaluation_restores_training_mode(small_set, tmp_path, monkeypatch):
    modes = []
    step = Trainer.train_step

    def spy(self):
        loss = step(self)
        modes.append((self.step, self.model.training))
        return loss

    evaluate = Trainer.evaluate

    def watched(self):
        was = self.model.training
        result = evaluate(self)
        modes.append(("evaluated", self.model.training == was))
        return result

    monkeypatch.setattr(Trainer, "train_step", spy)
    monkeypatch.setattr(Trainer, "evaluate", watched)
    run(small_set, tmp_path, "--eval_epoch=1", "--limit_db=40", "--limit_query=10")
    assert len(modes) == STEPS + 2
    assert all(mode for _, mode in modes)


def test_a_loss_that_is_not_finite_stops_before_the_step(small_set, tmp_path, monkeypatch):
    real = main_SPQ.LOSSES["cqc"]
    calls = []

    def breaks(*views, tau):
        calls.append(1)
        return real(*views, tau=tau) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setitem(main_SPQ.LOSSES, "cqc", breaks)
    with pytest.raises(TrainingStopped, match=r"loss at step 3 is not finite.*--lr") as stop:
        run(small_set, tmp_path, "--checkpoint_every=1")
    assert stop.value.exit_code == 1
    state = load_checkpoint(tmp_path / LAST)
    assert state["step"] == 3
    assert all(torch.isfinite(w).all() for w in state["model"].values())


def test_gradients_that_are_not_finite_stop_before_the_step(small_set, tmp_path, monkeypatch):
    def breaks(*views, tau):
        return torch.nan_to_num(torch.sqrt(views[0].sum() * 0.0))  # value 0, gradient nan

    monkeypatch.setitem(main_SPQ.LOSSES, "cqc", breaks)
    with pytest.raises(TrainingStopped, match="gradient at step 0 is not finite"):
        run(small_set, tmp_path)
    state = load_checkpoint(tmp_path / LAST)
    assert all(torch.isfinite(w).all() for w in state["model"].values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantizer=hard"],
        ["--quantizer=vq", "--N_words=64"],
        ["--loss=contrastive"],
        ["--loss=cqc-paper", "--lr_schedule=released", "--optimizer=sgd"],
        ["--amp=bf16", "--optimizer=adamw", "--warmup_epochs=0.5"],
        ["--input_size=24", "--distance=l2", "--crop_size=24", "--width=6"],
        ["--augmentation=batched", "--crop_min_area=0.2", "--jitter_strength=0.5"],
        ["--joint_views", "--optimizer=muon", "--views=3"],
        ["--neighbour_share=1", "--joint_views", "--accumulate=2"],
        ["--neighbour_share=1", "--quantizer=hard", "--views=4"],
        ["--accumulate=2", "--cuda_graph=False"],
        ["--recipe=released", "--epochs=2"],
        ["--recipe=fast", "--epochs=2"],
    ],
    ids=" ".join,
)
def test_every_variant_runs(flags, small_set, tmp_path):
    run(small_set, tmp_path, *flags, "--max_steps=2", "--limit_db=60", "--limit_query=10")
    evals = log_of(tmp_path, "eval")
    assert [e["queries"] for e in evals] == [10, 10]
    by_l2 = {"--distance=l2", "--recipe=released"} & set(flags)
    assert evals[0]["distance"] == ("l2" if by_l2 else "squared_l2")


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("cosine", 0.0), ("cosine", 0.5), ("constant", 0.2), ("released", 0.0)]
)
def test_the_learning_rate_follows_the_schedule(schedule, warmup, small_set, tmp_path):
    flags = [f"--lr_schedule={schedule}", f"--warmup_epochs={warmup}", "--epochs=12"]
    run(small_set, tmp_path, *flags, "--limit_train=20", "--limit_db=20", "--limit_query=5")
    lr_at = lr_schedule(schedule, 1e-3, 12, 1, warmup)  # 20 images: one step an epoch
    assert [e["lr"] for e in log_of(tmp_path, "train")] == [lr_at(step) for step in range(12)]


def test_flags_reach_what_they_are_for(small_set, tmp_path, monkeypatch):
    seen = {}
    real_loss, real_soft = main_SPQ.LOSSES["cqc"], ProductQuantizer.soft

    def loss(*views, tau):
        seen.update(tau=tau, dtypes={v.dtype for v in views})
        return real_loss(*views, tau=tau)

    def soft(self, x, alpha):
        seen.update(alpha=alpha, features=x.shape)
        return real_soft(self, x, alpha)

    def see(trainer):
        seen.update(decay=trainer.optimizers[0].param_groups[0]["weight_decay"])
        conv = trainer.model.trunk.stages[0].conv1

        def hook(module, inputs, output):
            seen.update(trunk=output.dtype)

        conv.register_forward_hook(hook)
        return fit(trainer)

    fit = Trainer.fit
    monkeypatch.setitem(main_SPQ.LOSSES, "cqc", loss)
    monkeypatch.setattr(ProductQuantizer, "soft", soft)
    monkeypatch.setattr(Trainer, "fit", see)
    flags = ["--soft_quantization_scale=7", "--contrastive_temperature=0.3", "--weight_decay=0.02"]
    run(small_set, tmp_path, *flags, "--amp=bf16", "--max_steps=1")
    assert (seen["alpha"], seen["tau"], seen["decay"]) == (7, 0.3, 0.02)
    assert seen["features"] == (20, 16)
    assert seen["trunk"] == torch.bfloat16
    assert seen["dtypes"] == {torch.float32}


def test_weights_that_are_not_finite_are_not_saved(small_set, tmp_path):
    with pytest.raises(TrainingStopped, match="weights after step 1 are not finite"):
        run(small_set, tmp_path, "--lr=1e39", "--checkpoint_every=1", "--lr_schedule=constant")
    state = load_checkpoint(tmp_path / LAST)
    assert state["step"] == 0
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    run(small_set, tmp_path, "--resume=auto", "--max_steps=2")  # as the message advises


def test_another_top_n_or_distance_evaluates_again_and_draws(small_set, tmp_path, capsys):
    run(small_set, tmp_path, "--max_steps=2")
    run(small_set, tmp_path, "--max_steps=2", "--resume=auto", "--Top_N=20", "--distance=l2")
    assert "mAP@20 = " in capsys.readouterr().out
    evals = log_of(tmp_path, "eval")
    assert [(e["distance"], "mAP@20" in e) for e in evals] == [
        ("squared_l2", False),
        ("l2", False),
        ("l2", True),
        ("squared_l2", True),
    ]


def test_an_evaluation_the_checkpoint_does_not_know_of_stands_once(finished, small_set, tmp_path):
    run(small_set, tmp_path, "--max_steps=15", "--eval_epoch=1")
    path = tmp_path / LAST
    state = load_checkpoint(path)
    del state["path"]
    # as if killed before it was saved
    save_checkpoint(path, state | {"last_eval": None, "evaluated": 0})
    run(small_set, tmp_path, "--resume=auto", "--eval_epoch=1")
    assert [e["step"] for e in log_of(tmp_path, "eval")] == [15, 15, 30, 30]
    assert_same_weights(finished, tmp_path)


def test_args_of_every_part_of_a_run_are_kept(small_set, tmp_path):
    run(small_set, tmp_path, "--max_steps=1")
    run(small_set, tmp_path, "--max_steps=2", "--resume=auto", "--lr=5e-4")
    found = json.loads((tmp_path / "args.json").read_text())
    assert found["args"]["lr"] == 1e-3
    assert [(part["step"], part["args"]["lr"]) for part in found["resumed"]] == [(1, 5e-4)]


def test_codes_in_the_log_have_m_log2_k_bits(small_set, tmp_path):
    run(small_set, tmp_path, "--N_books=2", "--N_words=256", "--max_steps=1")
    assert log_of(tmp_path, "eval")[0]["code_bits"] == ProductQuantizer(2, 256, 4).code_bits == 16


def test_compiled_training(small_set, tmp_path):
    if not any(os.access(Path(p) / "g++", os.X_OK) for p in os.environ["PATH"].split(":")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    run(small_set, tmp_path / "compiled", "--compile", "--max_steps=3")
    run(small_set, tmp_path / "plain", "--max_steps=3")
    losses = [[e["loss"] for e in log_of(tmp_path / f, "train")] for f in ("compiled", "plain")]
    # Fused kernels round otherwise. Adam divides by the size of a gradient, so that its first
    # steps turn the rounding of small ones into whole steps of either sign.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()


def test_validate_asks_held_out_training_images(small_set, tmp_path, monkeypatch):
    seen = {}
    fit = Trainer.fit

    def see(trainer):
        seen.update(evaluate=trainer.evaluate_model, batches=trainer.batches.batches.rows)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", see)
    run(small_set, tmp_path, "--validate", "--max_steps=1")
    train, _ = load_cifar10(small_set)
    assert torch.equal(seen["evaluate"].query[0], train.images[270:])
    assert torch.equal(seen["evaluate"].query[1], train.labels[270:])
    assert torch.equal(seen["evaluate"].db[0], train.images[:270])
    assert torch.equal(seen["batches"], train.images[:270])
    evaluated = log_of(tmp_path, "eval")[0]
    assert evaluated["queries"] == 30
    assert seen["evaluate"].diagnosis.items() <= evaluated.items()
    names = {"neighbour_purity@20", "knn_accuracy", "codeword_purity"}
    assert seen["evaluate"].diagnosis.keys() == names
    with pytest.raises(UserError, match=r"--validate=False: .* made with --validate=True"):
        run(small_set, tmp_path, "--resume=auto")
    # an evaluation of its own asks the same images, unless told otherwise
    again = ["--eval_only", "--resume=auto", "--Top_N=50", "--device=cpu"]
    again += [f"--data_dir={small_set}", f"--output_dir={tmp_path}"]
    for more, queries in (([], 30), (["--validate=False"], 60)):
        main_SPQ.main([*again, *more])
        assert json.loads((tmp_path / "eval_only.json").read_text())[0]["queries"] == queries


def test_max_minutes_leaves_with_code_75_and_resumes_bit_equal(
    finished, small_files, small_set, tmp_path
):
    for _ in range(2):
        process = start(
            small_files, tmp_path, "--eval_epoch=1", "--resume=auto", "--max_minutes=0.005"
        )
        _, err = process.communicate(timeout=120)
        assert process.returncode == 75, err
        assert "--max_minutes=0.005 are over" in err
        assert "Traceback" not in err
    assert 2 <= load_checkpoint(tmp_path / LAST)["step"] < STEPS
    run(small_set, tmp_path, "--resume=auto", "--eval_epoch=1")
    assert_same_weights(finished, tmp_path)


def test_early_crops_are_small_and_a_resume_does_not_change_them(small_set, tmp_path, monkeypatch):
    sides = {}
    step = Trainer.train_step

    def watched(self):
        sides[self.step] = [view.shape[-1] for view in self.batches.batch(self.step)]
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", watched)
    flags = ["--early_crop_size=8", "--early_share=0.2", "--limit_db=60", "--limit_query=10"]
    run(small_set, tmp_path, *flags, "--max_steps=3")
    run(small_set, tmp_path, *flags, "--max_steps=8", "--resume=auto")
    assert sides == {s: [8, 8] if s < 6 else [16, 16] for s in range(8)}  # 6 of 30 steps


def test_a_resumed_run_with_two_optimizers_ends_bit_equal(small_set, tmp_path):
    flags = ["--optimizer=muon", "--limit_db=60", "--limit_query=10", "--epochs=1"]
    run(small_set, tmp_path / "whole", *flags)
    run(small_set, tmp_path / "cut", *flags, "--max_steps=7")
    run(small_set, tmp_path / "cut", *flags, "--resume=auto")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_second_stage_resumes_bit_equal(small_set, tmp_path):
    flags = ["--neighbour_share=0.5", "--neighbours=5", "--views=3", "--lr=0.01", "--log_every=10"]
    flags += ["--limit_db=60", "--limit_query=10"]
    run(small_set, tmp_path / "whole", *flags)
    start = STEPS // 2
    for cut in (start, start + 4):  # before the neighbours are mined, and with them
        run(small_set, tmp_path / "cut", *flags, f"--max_steps={cut}", "--resume=auto")
    state = load_checkpoint(tmp_path / "cut" / LAST)["batches"]
    assert state["start"] == start
    assert state["neighbours"].shape == (5 * small_cifar.ROWS, 5)
    run(small_set, tmp_path / "cut", *flags, "--resume=auto")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    train = log_of(tmp_path / "cut", "train")
    assert {e["step"] for e in train if "neighbour" not in e} == {10, start}  # start is logged too
    assert {e["step"] for e in train if "neighbour" in e} == {19, 20, STEPS}
    assert train[-1]["loss"] == pytest.approx(train[-1]["cqc"] + train[-1]["neighbour"], abs=1e-5)
    with pytest.raises(UserError, match=r"--neighbours=6: .* was made with --neighbours=5"):
        run(small_set, tmp_path / "cut", *flags, "--neighbours=6", "--resume=auto")
