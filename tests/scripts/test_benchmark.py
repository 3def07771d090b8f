"""The benchmarks' equalities hold, their figures are possible, and a failure costs no others."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark
import benchmark_training

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()


def call(script, *words):
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers(found, path=""):
    """Names and values of all numbers in a nested object."""
    if isinstance(found, dict):
        found = found.items()
    elif isinstance(found, list):
        found = enumerate(found)
    else:
        return [(path, found)] if isinstance(found, int | float) else []
    return [pair for key, value in found for pair in numbers(value, f"{path}/{key}")]


def check_possible(found):
    """No number is infinite or negative; times, speeds, memory and ratios are not zero either."""
    counted = 0
    for name, value in numbers(found):
        assert math.isfinite(value) and value >= 0, name
        if name.endswith(("_s", "_MiB", "ratio", "gflop_a_step")):
            assert value > 0, name
            counted += 1
    assert counted


def test_equalities_hold_and_parts_are_timed():
    found = call(
        "benchmark.py",
        "--part=loss,augmentation,step",
        "--batch_size=8",
        "--width=4",
        "--repeats=1",
    )
    check_possible(found)
    assert found["loss"]["equality"].startswith("loss within 1e-5")
    views = found["augmentation"]
    assert views["equality"] == "same images from kornia's parameters, within 0.0001"
    assert views["largest_difference"] <= 1e-4
    step_s = found["step"]["ours_s"]
    for name in ("kornia", "batched"):
        assert views["share_of_step"][name] == pytest.approx(views[f"{name}_s"] / step_s)
    for name, limit in found["step"]["tolerance"].items():
        assert found["step"]["relative_difference"][name] <= limit


def test_profile_of_a_step():
    found = call("benchmark_training.py", "--part=profile", "--batch_size=8", "--width=4")
    found = found["profile"]
    check_possible(found)
    shares = found["share"]
    assert sum(shares.values()) == pytest.approx(1)
    for group in ("augmentation", "convolution", "batch norm", "optimizer", "elementwise, ReLU"):
        assert shares[group] > 0, group
    assert shares["other"] < 0.25
    costliest = [entry["share"] for entry in found["costliest"]]
    assert len(costliest) == 12
    assert costliest == sorted(costliest, reverse=True)
    # 335 TFLOP an epoch at width 64, which falls with the square but for the stem's (a twentieth)
    want = 335e3 * (4 / 64) ** 2 * 8 / 50_000
    assert found["gflop_a_step"] == pytest.approx(want, rel=0.15)
    assert found["gflop_per_s"] == pytest.approx(found["gflop_a_step"] / found["step_s"])
    assert ("gpu_idle_share" in found) == ON_GPU
    if ON_GPU:
        assert 0 < found["gpu_idle_share"] < 1


def test_epochs_of_the_released_loop_and_of_ours():
    found = call(
        "benchmark_training.py",
        "--part=epoch",
        "--batch_size=8",
        "--width=4",
        "--steps=1",
        "--variants=released,plain,joint_views,joint_views+cuda_graph",
    )["epoch"]
    check_possible(found)
    variants = ["released", "plain", "joint_views"]
    if ON_GPU:
        variants.append("joint_views+cuda_graph")
    else:
        assert found["joint_views+cuda_graph"] == {"skipped": "needs a GPU"}
    for name in variants:
        figures = found[name]
        assert figures["images_per_s"] == pytest.approx(50_000 / figures["epoch_s"])
        tflop = figures["tflop_per_s"] * figures["epoch_s"]
        assert tflop == pytest.approx(335 * (4 / 64) ** 2)
    ratio = found["released"]["epoch_s"] / found["plain"]["epoch_s"]
    assert found["plain"]["ratio"] == pytest.approx(ratio)


def test_accumulation_saves_memory():
    found = call(
        "benchmark_training.py",
        "--part=memory",
        "--batch_sizes=64",
        "--accumulates=1,4",
        "--width=8",
    )["memory"]
    check_possible(found)
    whole, parts = found
    assert [whole["batch"], whole["accumulate"]] == [64, 1]
    assert [parts["batch"], parts["accumulate"]] == [64, 4]
    # a quarter of the activations, and what does not depend on the batch
    assert parts["step_MiB"] < 0.7 * whole["step_MiB"]
    for figures in found:
        sum_ = figures["before_MiB"] + figures["step_MiB"]
        assert figures["peak_MiB"] == pytest.approx(sum_)


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "word", "allowed"),
    [
        (benchmark, "--part=loss,lose", "'lose': allowed are all, loss, augmentation"),
        (benchmark_training, "--part=step", "'step': allowed are all, profile, epoch, memory"),
        (benchmark_training, "--variants=fast", "'fast': allowed are all, released, plain"),
    ],
)
def test_unknown_parts_and_variants_are_named(script, word, allowed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", word])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 2
    assert allowed in " ".join(capsys.readouterr().err.split())


def test_a_variant_that_fails_costs_no_other(monkeypatch):
    def time_epoch(args, images, name):
        if name == "plain":
            raise RuntimeError("no kernel image is available")
        return {"epoch_s": 2.0 if name == "released" else 1.0}

    monkeypatch.setattr(benchmark_training, "time_epoch", time_epoch)
    monkeypatch.setattr(benchmark_training, "EPOCH_IMAGES", 8)
    args = argparse.Namespace(
        variants="released,plain,joint_views", width=4, batch_size=8, size=8, steps=1
    )
    found = benchmark_training.bench_epoch(args, torch.device("cpu"))
    assert found["plain"] == {"error": "RuntimeError: no kernel image is available"}
    assert found["joint_views"] == {"epoch_s": 1.0, "ratio": 2.0}


def test_memory_that_is_not_there_is_told(monkeypatch):
    def trainer_of(args, images, words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark_training, "trainer_of", trainer_of)
    args = argparse.Namespace(batch_sizes="8", accumulates="2", width=4, size=8)
    found = benchmark_training.bench_memory(args, torch.device("cpu"))
    told = "OutOfMemoryError: CUDA out of memory"
    assert found == [{"batch": 8, "accumulate": 2, "error": told}]


def test_a_part_that_fails_costs_no_other(monkeypatch, capsys):
    def run(command, **kwargs):
        part = command[2].removeprefix("--part=")
        if part == "first":
            return SimpleNamespace(returncode=-9, stdout="")
        return SimpleNamespace(returncode=0, stdout=json.dumps({part: {"ours_s": 1.0}}))

    monkeypatch.setattr(benchmark, "describe_hardware", lambda device: {})
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    args = argparse.Namespace(part="first,second")
    found = benchmark.run_parts(args, {"first": None, "second": None}, "script.py")
    assert found["first"] == {"error": "exit code -9"}
    assert found["second"] == {"ours_s": 1.0}
    with pytest.raises(SystemExit) as left:
        benchmark.print_found(found)
    assert left.value.code == 1
    assert json.loads(capsys.readouterr().out) == found


# --- groups of operators ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callers", "group"),
    [
        (["aten::conv2d", "aten::convolution", "aten::mkldnn_convolution"], "convolution"),
        (["autograd::engine::evaluate_function: ConvolutionBackward0"], "convolution"),
        (["aten::batch_norm", "aten::native_batch_norm", "aten::empty"], "batch norm"),
        (["autograd::engine::evaluate_function: NativeBatchNormBackward0"], "batch norm"),
        (["aten::relu_"], "elementwise, ReLU"),
        (["aten::add_"], "elementwise, ReLU"),
        (["aten::to", "aten::_to_copy", "aten::copy_"], "elementwise, ReLU"),
        (["AddmmBackward0", "aten::mm"], "linear, quantizer, loss"),
        (["aten::einsum", "aten::mul"], "linear, quantizer, loss"),
        (["aten::cross_entropy_loss", "aten::_log_softmax"], "linear, quantizer, loss"),
        (["augmentation", "aten::matmul", "aten::bmm"], "augmentation"),
        (["Optimizer.step#Adam.step", "aten::_fused_adam_"], "optimizer"),
        (["Optimizer.zero_grad#Adam.zero_grad"], "optimizer"),
        (["aten::_foreach_norm"], "optimizer"),
        (["aten::item", "aten::_local_scalar_dense"], "other"),
    ],
)
def test_operators_belong_to_the_part_that_calls_them(callers, group):
    event = None
    for name in callers:
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert benchmark_training.group_of(event) == group


def test_a_gpu_s_time_is_that_of_its_kernels():
    def kernel(duration, marker=False):
        span = SimpleNamespace(elapsed_us=lambda: duration)
        return SimpleNamespace(
            device_type=DeviceType.CUDA, is_user_annotation=marker, time_range=span
        )

    def operator(name, caller, *durations):
        return SimpleNamespace(
            device_type=DeviceType.CPU,
            name=name,
            cpu_parent=caller,
            kernels=[SimpleNamespace(duration=d) for d in durations],
            self_cpu_time_total=1000.0,  # the CPU's own time does not count
        )

    views = operator("augmentation", None)
    events = [
        views,
        operator("aten::bmm", views, 3.0, 4.0),
        operator("aten::conv2d", None, 10.0),
        operator("aten::conv2d", None, 20.0),
        *map(kernel, (3.0, 4.0, 10.0, 20.0, 5.0)),  # nobody claims the last
        kernel(7.0, marker=True),  # the range of the views, as the GPU saw it
    ]
    groups, operators, calls = benchmark_training.account(events, on_gpu=True)
    spent = {name: time for name, time in groups.items() if time}
    assert spent == {"augmentation": 7, "convolution": 30, "other": 5}
    assert operators == {"augmentation": 0, "aten::bmm": 7, "aten::conv2d": 30}
    assert calls == {"augmentation": 1, "aten::bmm": 1, "aten::conv2d": 2}
