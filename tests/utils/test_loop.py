"""The shared training loop by itself: a batch in parts, frozen batch norm, a time limit."""

from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from data.batches import DeviceBatches, SemiSupervisedBatches, ViewBatches
from losses import classification_loss, cqc_loss, n_pair_pq_loss, subspace_entropy_loss
from models import build_gpq, build_spq
from utils.checkpoint import LAST, load_checkpoint
from utils.distributed import Ranks
from utils.logging import read_metrics
from utils.loop import TIME_IS_OVER, Trainer, TrainingStopped, kept_statistics

B = 8


def flags(folder, **changed):
    default = {
        "output_dir": folder,
        "recipe": "paper",
        "batch_size": B,
        "seed": 0,
        "epochs": 3,
        "max_steps": None,
        "max_minutes": None,
        "optimizer": "sgd",
        "lr": 0.1,
        "muon_lr": 0.1,
        "beta1": 0.9,
        "weight_decay": 1e-4,
        "lr_schedule": "constant",
        "warmup_epochs": 0.0,
        "amp": "off",
        "accumulate": 1,
        "freeze_bn_epoch": None,
        "cuda_graph": False,
        "eval_epoch": 1,
        "eval_before": False,
        "eval_only": False,
        "log_every": 2,
        "checkpoint_every": 100,
        "limit_train": None,
        "limit_db": None,
        "limit_query": None,
        "input_size": 12,
        "validate": False,
        "Top_N": 5,
        "distance": "l2",
    }
    assert changed.keys() <= default.keys()
    default |= {"dataset": "cifar10", "protocol": "spq", "split_seed": 0}
    default |= {"freeze_trunk": False, "cached_views": 0}
    return Namespace(**(default | changed))


def make(folder, evaluate=None, **changed):
    """A trainer of a tiny SPQ in float64 on random images; views are crops, left and right."""
    args = flags(folder, **changed)
    torch.manual_seed(0)
    model = build_spq("resnet18", 4, "soft", M=2, K=4, d=4).double()
    images = torch.randint(0, 256, (4 * B, 3, 12, 16), dtype=torch.uint8)
    crops = [
        lambda images: images[..., :12].double() / 255,
        lambda images: images[..., 4:].double() / 255,
    ]
    batches = ViewBatches(DeviceBatches(images, B, 0, Ranks()), lambda step: crops, 0)

    def embed(model, views):
        (x_a, z_a), (x_b, z_b) = (model(view) for view in views)
        return x_a, x_b, z_a, z_b

    def loss_of(*embeddings):
        return cqc_loss(*embeddings, tau=0.5)

    return Trainer(args, "SPQ", model, embed, loss_of, batches, evaluate, Ranks())


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(parts, tmp_path):
    # batch norm by its running statistics, so that parts of a batch do not see each other
    trainers = [make(tmp_path, accumulate=n, freeze_bn_epoch=0) for n in (1, parts)]
    grads = []
    for trainer in trainers:
        trainer.train_step()
        grads.append({name: p.grad for name, p in trainer.model.named_parameters()})
    # float64; sums in another order
    losses = [trainer.read_losses()["loss"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, want in grads[0].items():
        assert want.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], want, rtol=1e-8, atol=1e-12)
    # the sum of the parts' own losses would be another thing: fewer negatives
    apart = make(tmp_path)
    views = [view[: B // parts] for view in apart.batches.batch(0)]
    part = apart.loss_of(*apart.embed(apart.model.eval(), views))
    assert abs(part.item() - losses[0]) > 0.1


def test_gradients_of_parts_with_statistics_of_their_own(tmp_path):
    trainer, plain = make(tmp_path, accumulate=2), make(tmp_path)
    trainer.train_step()
    # all parts in one graph
    parts = zip(*(view.chunk(2) for view in plain.batches.batch(0)), strict=True)
    rows = [plain.embed(plain.model.train(), part) for part in parts]
    loss = plain.loss_of(*(torch.cat(row) for row in zip(*rows, strict=True)))
    loss.backward()
    # logged in float32
    assert trainer.read_losses() == pytest.approx({"loss": loss.item()}, rel=1e-6)
    for (name, p), q in zip(
        plain.model.named_parameters(), trainer.model.parameters(), strict=True
    ):
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-12)


def test_statistics_of_a_batch_in_parts_are_updated_once_a_part(tmp_path):
    trainer = make(tmp_path, accumulate=2)
    norm = trainer.model.trunk.stem[1]
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    trainer.train_step()
    parts = seen[4:]  # after the pass without a graph: two parts of two views
    mean = torch.zeros(4, dtype=torch.float64)
    for x in parts:
        mean.lerp_(x.mean(dim=(0, 2, 3)), norm.momentum)
    torch.testing.assert_close(norm.running_mean, mean)


def test_kept_statistics_gives_the_momenta_back():
    norm = nn.BatchNorm2d(3, momentum=0.3)
    with kept_statistics(nn.Sequential(norm)):
        norm(torch.randn(4, 3, 2, 2))
    assert norm.momentum == 0.3
    assert torch.equal(norm.running_mean, torch.zeros(3))


def evaluation(model):
    model.eval(), model.train()
    return [{"code_bits": 4, "distance": "l2", "mAP@5": 0.5, "mAP@all": 0.1, "queries": 1}]


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_freezes_at_its_epoch(frozen, tmp_path):
    trainer = make(tmp_path, evaluation, freeze_bn_epoch=1 if frozen else None)
    means, norm = [], trainer.model.trunk.stem[1]
    step = trainer.train_step

    def watched():
        step()
        means.append((norm.training, norm.running_mean.clone(), norm.weight.detach().clone()))

    trainer.train_step = watched
    trainer.fit()  # 3 epochs of 4 steps, evaluated after each
    assert [training for training, *_ in means] == [True] * 4 + [not frozen] * 8
    assert not torch.equal(means[2][1], means[3][1])
    assert torch.equal(means[3][1], means[11][1]) == frozen
    assert not torch.equal(means[10][2], means[11][2])  # scale and shift learn on


def test_frozen_batch_norm_stays_so_after_a_resume(tmp_path):
    make(tmp_path, evaluation, freeze_bn_epoch=1, max_steps=6).fit()
    state = load_checkpoint(tmp_path / LAST)
    again = make(tmp_path, evaluation, freeze_bn_epoch=1)
    again._restore(state)
    again.train_step()
    assert not again.model.training
    assert torch.equal(
        again.model.trunk.stem[1].running_mean, state["model"]["trunk.stem.1.running_mean"]
    )


def test_what_was_evaluated_under_other_flags_stays_in_the_log(tmp_path):
    make(tmp_path, evaluation, max_steps=4).fit()
    for steps in (6, 7):  # the second one knows it from the first one's checkpoint only
        state = load_checkpoint(tmp_path / LAST)
        again = make(tmp_path, evaluation, max_steps=steps, distance="squared_l2", eval_epoch=9)
        again._restore(state)
        assert again.last_eval is None
        again.evaluate_model = None  # killed before it evaluates
        again.fit()
    kept = [e["step"] for e in read_metrics(tmp_path) if e["kind"] == "eval"]
    assert kept == [4]


def test_max_minutes_saves_and_leaves(tmp_path):
    trainer = make(tmp_path, max_minutes=1e-9)
    with pytest.raises(TrainingStopped, match=r"--max_minutes=1e-09 are over .*--resume=auto") as e:
        trainer.fit()
    assert e.value.exit_code == TIME_IS_OVER == 75
    state = load_checkpoint(tmp_path / LAST)
    assert state["step"] == 1
    assert "max_minutes" in state["args"]


def test_the_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    every, second = make(tmp_path / "1", log_every=1), make(tmp_path / "2", log_every=2)
    for trainer in (every, second):
        trainer.args.output_dir.mkdir()
        trainer.fit()
    losses = [[e["loss"] for e in read_metrics(tmp_path / name)] for name in ("1", "2")]
    pairs = [(a + b) / 2 for a, b in zip(losses[0][::2], losses[0][1::2], strict=True)]
    assert losses[1] == pytest.approx(pairs, rel=1e-12)


def test_a_resumed_optimizer_has_this_run_s_settings(tmp_path):
    make(tmp_path, max_steps=2).fit()
    again = make(tmp_path, weight_decay=0.5, lr=0.3)
    again._restore(load_checkpoint(tmp_path / LAST))
    assert again.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    momenta = [s["momentum_buffer"] for s in again.optimizers[0].state.values()]
    assert len(momenta) == len(list(again.model.parameters()))


# --- several losses, labels among the embeddings ------------------------------------------------

TERMS = ("n_pair", "classification", "entropy")
U = 12  # images without labels, beside B labelled ones


def make_gpq(folder, evaluate=None, multilabel=False, **changed):
    """A trainer of a tiny GPQ in float64 on random images, as main_GPQ.py builds it."""
    args = flags(folder, **({"freeze_bn_epoch": 0} | changed))
    torch.manual_seed(0)
    model = build_gpq("cifar_vgg", 4, M=2, K=4, d=4, classes=5).double()
    sides = []
    for seed, size in ((0, B), (1, U)):
        images = torch.randint(0, 256, (4 * size, 3, 12, 12), dtype=torch.uint8)
        batches = DeviceBatches(images, size, seed, Ranks())
        sides.append(ViewBatches(batches, lambda step: [lambda x: x.double() / 255], seed))
    # where batch norm is frozen from the start, by statistics of such images
    update_bn([images.double() / 255], model.trunk)
    labels = torch.randint(0, 5, (4 * B,))
    if multilabel:
        labels = (torch.rand(4 * B, 5) < 0.4).to(torch.uint8)
    batches = SemiSupervisedBatches(sides[0], labels, sides[1], lambda step: 0.5 + step)

    def embed(model, views):
        labelled, labels, unlabelled, reversal = views
        return *model(labelled), labels, *model(unlabelled, reversal)

    def loss_of(x, z, labels, x_u, z_u):
        assert not labels.is_floating_point()
        assert (len(x), len(x_u)) == (B, U)
        p = model.quantizer.unit_prototypes()
        return {
            "n_pair": n_pair_pq_loss(x, z, labels),
            "classification": 0.3 * classification_loss(x, labels, p, M=2),
            "entropy": 0.2 * subspace_entropy_loss(x_u, p, M=2),  # z_u has no part in it
        }

    return Trainer(args, "GPQ", model, embed, loss_of, batches, evaluate, Ranks())


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_with_labels_in_parts_has_the_gradients_of_the_whole(parts, multilabel, tmp_path):
    trainer = make_gpq(tmp_path, multilabel=multilabel, accumulate=parts)
    plain = make_gpq(tmp_path, multilabel=multilabel)
    trainer.step = 1  # of another strength than 1
    trainer.train_step()
    embedded = plain.embed(plain.model.eval(), plain.batches.batch(1))
    terms = plain.loss_of(*embedded)
    sum(terms.values()).backward()
    # logged in float32
    want = {"loss": sum(terms.values()).item()} | {k: v.item() for k, v in terms.items()}
    assert trainer.read_losses() == pytest.approx(want, rel=1e-6)
    for (name, p), q in zip(
        plain.model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert p.grad.abs().max() > 1e-6, name
        # float64; sums in another order
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-8, atol=1e-12)


def test_named_terms_are_logged_and_add_up_to_the_loss(tmp_path):
    entries = []
    for every in (1, 2):
        folder = tmp_path / str(every)
        folder.mkdir()
        make_gpq(folder, log_every=every, max_steps=6, lr=0.01, freeze_bn_epoch=None).fit()
        entries.append([e for e in read_metrics(folder) if e["kind"] == "train"])
    for entry in entries[0] + entries[1]:
        # each is a float32
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in TERMS), rel=1e-6)
        assert entry["n_pair"] > 0 > entry["entropy"]
    assert [e["step"] for e in entries[1]] == [2, 4, 6]
    for name in ("loss", *TERMS):
        each, pairs = ([e[name] for e in found] for found in entries)
        means = [(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)]
        assert pairs == pytest.approx(means, rel=1e-12)
        assert len(set(each)) == 6
    # a loss without names has no terms
    make(tmp_path / "1", max_steps=2).fit()
    spq = [e for e in read_metrics(tmp_path / "1") if e["kind"] == "train"]
    assert entries[0][0].keys() - spq[-1].keys() == set(TERMS)
    assert spq[-1].keys() <= entries[0][0].keys()


def test_a_term_that_is_not_finite_stops_the_training(tmp_path):
    trainer = make_gpq(tmp_path)
    good = trainer.loss_of
    trainer.loss_of = lambda *rows: good(*rows) | {"entropy": torch.tensor(float("nan"))}
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainingStopped, match="The loss at step 0 is not finite"):
        trainer.train_step()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_figures_of_the_whole_ranking_are_told_once(tmp_path, capsys):
    def whole(model):
        figures = {"code_bits": 4, "distance": "inner_product", "mAP@all": 0.125, "queries": 7}
        return [figures]

    trainer = make_gpq(tmp_path, whole, Top_N="all", max_steps=5)
    assert trainer.fit()[0]["mAP@all"] == 0.125
    told = [line for line in capsys.readouterr().out.splitlines() if "mAP@all" in line]
    assert [line.partition("] ")[2] for line in told] == [
        "4 bits, inner_product: mAP@all 0.1250 (AP over the whole ranking), 7 queries"
    ] * 2
    make(tmp_path, evaluation, max_steps=4).fit()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mAP@all" in line]
    assert line.endswith(
        "mAP@5 0.5000 (AP over the relevant images found in the top 5), mAP@all 0.1000, 1 queries"
    )
