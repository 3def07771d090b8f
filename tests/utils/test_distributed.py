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
from timm.layers import BatchNormAct2d
from torch import nn

import main_SPQ
from data.augment import AUGMENTATIONS
from losses import cqc_loss
from models import SPQ, build_quantizer, build_trunk
from utils.checkpoint import LAST, load_checkpoint
from utils.distributed import GlobalBatchNorm, Ranks, _globalised, _replace_norms, _synchronised
from utils.loop import AGREE_STEPS

ROOT = Path(__file__).resolve().parents[2]
B = 8  # images of the global batch
KINDS = ("own", "timm", "frozen", "rows")


class Rows(nn.Module):
    """A trunk with a norm over rows, as some transformers have them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.BatchNorm1d(24))
        self.feature_dim = 24

    def forward(self, images):
        return self.net(images).sin()


def build(kind="own"):
    torch.manual_seed(0)
    if kind == "rows":
        trunk = Rows()
    elif kind == "own":
        trunk = build_trunk("resnet18", 8)
    else:  # its norms have the activation in them
        trunk = build_trunk("test_efficientnet", input_size=16)
    model = SPQ(trunk, build_quantizer("soft", 4, 8, 4)).double().train()
    if kind == "frozen":
        model.trunk(views()[0])  # statistics of its own
        model.freeze_trunk()
    return model


def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(B, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def one_step(ranks, variant, kind="own"):
    """Loss, gradients and running statistics of one step on this rank's share."""
    model = build(kind)
    wrapped = ranks.wrap(model)
    share = B // ranks.world_size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    x_a, z_a = wrapped(views()[0][mine])
    x_b, z_b = wrapped(views()[1][mine])
    loss = cqc_loss(*ranks.gather(x_a, x_b, z_a, z_b), tau=0.5, variant=variant)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
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
    for kind in KINDS:
        torch.save(one_step(ranks, variant, kind), f"{folder}/{kind}{rank}.pt")
    assert ranks.max(rank) == 1
    assert ranks.collect(rank * 10) == [0, 10]
    ranks.disconnect()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=["released", "paper"])
def two_processes(request, tmp_path_factory):
    """The loss's variant, and the folder with what each process found with each network."""
    folder = tmp_path_factory.mktemp(request.param)
    mp.spawn(child, args=(str(folder), free_port(), request.param), nprocs=2)
    return request.param, folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_on_the_same_global_batch(two_processes, kind):
    variant, folder = two_processes
    loss, grads, buffers = one_step(Ranks(), variant, kind)
    for rank in range(2):
        found = torch.load(folder / f"{kind}{rank}.pt", weights_only=True)
        got_loss, got_grads, got_buffers = found
        # float64 throughout; sums in another order cost some units in the last place
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        assert got_grads.keys() == grads.keys()
        largest = max(grad.abs().max().item() for grad in grads.values())
        for name in grads:
            # what the next norm takes out again has no gradient but rounding
            scale = max(grads[name].abs().max().item(), 1e-6 * largest)
            torch.testing.assert_close(got_grads[name], grads[name], rtol=0, atol=1e-9 * scale)
        assert got_buffers.keys() == buffers.keys()
        for name in buffers:
            torch.testing.assert_close(got_buffers[name], buffers[name], rtol=1e-10, atol=1e-12)
    start = dict(build(kind).named_buffers())
    moved = [name for name in buffers if not torch.equal(buffers[name], start[name])]
    assert bool(moved) == (kind != "frozen")
    assert any(name.startswith("trunk.") for name in grads) == (kind != "frozen")


def test_one_process_is_left_alone():
    model = build()
    assert Ranks().wrap(model) is model
    x = torch.ones(2, 3)
    assert Ranks().gather(x)[0] is x
    assert Ranks().max(3) == 3
    assert Ranks().collect("a") == ["a"]


@pytest.mark.parametrize("plain", [nn.BatchNorm2d, nn.BatchNorm1d])
def test_global_batch_norm_evaluates_as_batch_norm(plain):
    plain, synced = plain(3), GlobalBatchNorm(3)
    shape = (3, 5, 5) if isinstance(plain, nn.BatchNorm2d) else (3,)
    plain(torch.randn(4, *shape))
    synced.load_state_dict(plain.state_dict())
    x = torch.randn(2, *shape)
    assert torch.equal(plain.eval()(x), synced.eval()(x))


REPLACEMENTS = {"cpu": _globalised, "gpu": _synchronised}
CLASSES = {"cpu": GlobalBatchNorm, "gpu": nn.SyncBatchNorm}


@pytest.mark.parametrize("device", REPLACEMENTS)
@pytest.mark.parametrize("kind", ["own", "timm", "rows"])
def test_replaced_norms_evaluate_as_before_under_their_names(device, kind):
    model = build(kind)
    model(views()[0])
    want = model.eval()(views()[1])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: id(p) for name, p in model.named_parameters()}
    _replace_norms(model, REPLACEMENTS[device])
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, CLASSES[device]) for norm in norms)
    assert not any(norm.training for norm in norms)
    for a, b in zip(model(views()[1]), want, strict=True):
        assert torch.equal(a, b)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert {name: id(p) for name, p in model.named_parameters()} == held  # an optimizer's too


@pytest.mark.parametrize("device", REPLACEMENTS)
def test_activation_and_dropout_of_a_norm_stay(device):
    norm = BatchNormAct2d(3, act_layer=nn.PReLU, drop_layer=nn.Dropout)
    model = nn.Sequential(norm)
    names = list(model.state_dict())
    assert "0.act.weight" in names
    _replace_norms(model, REPLACEMENTS[device])
    assert model[0] is not norm
    assert model[0].act is norm.act
    assert model[0].drop is norm.drop
    assert list(model.state_dict()) == names
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), norm.eval()(x))


@pytest.mark.parametrize("device", REPLACEMENTS)
def test_a_frozen_trunk_s_norms_stay_as_they_are(device):
    model = build("frozen")
    before = list(model.trunk.modules())
    _replace_norms(model, REPLACEMENTS[device])
    after = list(model.trunk.modules())
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not any(module.training for module in after)


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


# the second stage with batch norm frozen: statistics of a few images amplify float32's rounding
@pytest.mark.parametrize(("parts", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_main_s_own_step_equals_that_of_one_process(parts, stage, small_files, small_set, tmp_path):
    # --views=same takes the augmentation out: its random numbers are each rank's own
    # sgd, because Adam turns the rounding of small gradients into whole steps of either sign;
    # batch norm frozen where a batch goes through in parts, which have statistics of their own
    # float32, because --amp=auto goes by the clock and may find one dtype here, another there
    sgd = ["--max_steps=2", "--optimizer=sgd", "--lr=0.003", "--amp=off"]
    sgd += ["--freeze_bn_epoch=0"] if parts > 1 else []
    # one neighbour, because each rank draws among several by itself
    sgd += ["--neighbour_share=1", "--neighbours=1"] if stage == 2 else []
    two = torchrun(small_files, tmp_path / "two", *sgd, "--views=same", f"--accumulate={parts}")
    assert two.returncode == 0, two.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUGMENTATIONS, "kornia", small_cifar.SameViews)
        flags = [f"--data_dir={small_files}", f"--output_dir={tmp_path / 'one'}", *sgd]
        main_SPQ.main([*small_cifar.FAST, *flags])
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        losses.append([e["loss"] for e in entries if e["kind"] == "train"])
    # float32; without the other rank's negatives the loss would be lower by log 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[0][0] - losses[0][1]) > 0.002  # gradients have been at work


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
