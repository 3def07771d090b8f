"""Two CPU processes (gloo) against one: loss, gradients, batch norm, a whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_cifar
import torch
import torch.multiprocessing as mp

import main_SPQ
from losses import cqc_loss
from models import SPQ, build_quantizer, build_trunk
from utils.checkpoint import LAST, load_checkpoint
from utils.distributed import GlobalBatchNorm2d, Ranks
from utils.loop import AGREE_STEPS

ROOT = Path(__file__).resolve().parents[2]
B = 8  # images of the global batch


def build():
    torch.manual_seed(0)
    return SPQ(build_trunk("resnet18", 8), build_quantizer("soft", 4, 8, 4)).double().train()


def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(B, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def one_step(ranks, variant):
    """Loss, gradients and running statistics of one step on this rank's share."""
    model = build()
    wrapped = ranks.wrap(model)
    share = B // ranks.world_size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    x_a, z_a = wrapped(views()[0][mine])
    x_b, z_b = wrapped(views()[1][mine])
    loss = cqc_loss(*ranks.gather(x_a, x_b, z_a, z_b), tau=0.5, variant=variant)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), grads, dict(model.named_buffers())


def child(rank, folder, port, variant):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    ranks.connect(torch.device("cpu"))
    torch.save(one_step(ranks, variant), f"{folder}/{rank}.pt")
    assert ranks.max(rank) == 1
    assert ranks.collect(rank * 10) == [0, 10]
    ranks.disconnect()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path, variant):
    loss, grads, buffers = one_step(Ranks(), variant)
    mp.spawn(child, args=(str(tmp_path), free_port(), variant), nprocs=2)
    for rank in range(2):
        got_loss, got_grads, got_buffers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # float64 throughout; sums in another order cost some units in the last place
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        assert got_grads.keys() == grads.keys()
        for name in grads:
            scale = grads[name].abs().max().item()
            torch.testing.assert_close(got_grads[name], grads[name], rtol=0, atol=1e-9 * scale)
        for name in buffers:
            torch.testing.assert_close(got_buffers[name], buffers[name], rtol=1e-10, atol=1e-12)


def test_one_process_is_left_alone():
    model = build()
    assert Ranks().wrap(model) is model
    x = torch.ones(2, 3)
    assert Ranks().gather(x)[0] is x
    assert Ranks().max(3) == 3
    assert Ranks().collect("a") == ["a"]


def test_global_batch_norm_evaluates_as_batch_norm():
    plain, synced = torch.nn.BatchNorm2d(3), GlobalBatchNorm2d(3)
    plain(torch.randn(4, 3, 5, 5))
    synced.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(plain.eval()(x), synced.eval()(x))


def torchrun(small_files, output_dir, *flags):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        "tests/small_cifar.py",
        "--data_dir",
        str(small_files),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *small_cifar.FAST, f"--output_dir={output_dir}", *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_main_s_own_step_equals_that_of_one_process(parts, small_files, small_set, tmp_path):
    # --views=same takes the augmentation out: its random numbers are each rank's own
    # sgd, because Adam turns the rounding of small gradients into whole steps of either sign;
    # batch norm frozen where a batch goes through in parts, which have statistics of their own
    sgd = ["--max_steps=2", "--optimizer=sgd", "--lr=0.003"]
    sgd += ["--freeze_bn_epoch=0"] if parts > 1 else []
    two = torchrun(small_files, tmp_path / "two", *sgd, "--views=same", f"--accumulate={parts}")
    assert two.returncode == 0, two.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(main_SPQ.AUGMENTATIONS, "kornia", small_cifar.SameViews)
        flags = [f"--data_dir={small_files}", f"--output_dir={tmp_path / 'one'}", *sgd]
        main_SPQ.main([*small_cifar.FAST, *flags])
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        losses.append([e["loss"] for e in entries if e["kind"] == "train"])
    # float32; without the other rank's negatives the loss would be lower by log 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[0][0] - losses[0][1]) > 0.005  # gradients have been at work


def test_torchrun_heeds_time_and_signals_within_an_epoch(small_files, tmp_path):
    flags = ["--batch_size=4", "--log_every=1000", "--max_minutes=0.0001"]  # 75 steps an epoch
    done = torchrun(small_files, tmp_path, *flags)
    assert done.returncode == 1  # torchrun's own, whatever its processes end with
    assert f"--max_minutes=0.0001 are over after step {AGREE_STEPS} of 150; saved" in done.stderr
    assert load_checkpoint(tmp_path / LAST)["step"] == AGREE_STEPS


def test_torchrun_trains_evaluates_and_resumes_with_one_writer(small_files, tmp_path):
    first = torchrun(small_files, tmp_path, "--max_steps=3")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Result at step 3") == 1
    state = load_checkpoint(tmp_path / LAST)
    assert state["step"] == 3
    assert "Warning" not in first.stderr
    second = torchrun(small_files, tmp_path, "--max_steps=5", "--resume=auto")
    assert second.returncode == 0, second.stderr
    assert load_checkpoint(tmp_path / LAST)["step"] == 5
