"""The three commands of SSP from end to end on small sets: features, anchors, training."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import small_cifar
import torch
from safetensors.torch import save_file
from small_cifar import FAST_AML, log_of, run_ssp
from small_images import make_images
from small_sets import make_nuswide
from torch.nn import functional as F

import extract_features
import main_SSP
import make_anchors
from args import SSP_METHODS, parse_extract_args
from data.datasets import load_all
from models import OwnGallery, build_pooled
from models.trunks import load_weights
from utils.asymmetric import SIDES
from utils.checkpoint import LAST, load_checkpoint, save_checkpoint
from utils.distributed import Ranks
from utils.embedders import load_network
from utils.errors import UserError
from utils.gallery import Gallery, read_anchors, read_gallery, write_gallery
from utils.loop import TrainingStopped
from utils.pretrained import published_weights, read_weights
from utils.setup import Run
from utils.trained import build_from_flags, load_trained

ROOT = Path(__file__).resolve().parent.parent
STEPS, AML_STEPS = 30, 6  # of the two epochs of FAST_SSP, and with FAST_AML
FEW = ["--limit_query=10", "--limit_db=30"]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr("utils.figures.PNG_DPI", 50)  # test_run_figures.py looks at the pixels


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of a short run's time."""
    monkeypatch.setattr("main_SSP.report", lambda *args: None)


@pytest.fixture
def no_grid(monkeypatch):
    """The report without its larger picture."""
    monkeypatch.setattr("utils.report._draw_retrieval", lambda *args: None)


@pytest.fixture(scope="module")
def features(gallery):
    return gallery / "features.safetensors"


@pytest.fixture(scope="module")
def anchors(gallery):
    return f"--anchors={gallery / 'anchors.safetensors'}"


def flags_of(method, anchors):
    return {"ssp": [anchors], "aml": FAST_AML}.get(method, [f"--method={method}"])


def weights(folder):
    return load_checkpoint(folder / LAST)["model"]


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def first_weights(folder):
    """Those that a run began with: its seed alone decides them."""
    args = load_checkpoint(folder / LAST)["args"]
    torch.manual_seed(args["seed"])
    return build_from_flags("SSP", args).state_dict()


def untrained_of(folder):
    """A checkpoint beside that of the run, of what it began with."""
    state = load_checkpoint(folder / LAST)
    del state["path"]
    save_checkpoint(folder / "untrained.pt", state | {"model": first_weights(folder)})
    return folder / "untrained.pt"


def evaluated(data_dir, output, features, resume, *more):
    """The figures of --eval_only, which takes what the network is from the checkpoint."""
    flags = ["--eval_only", "--device=cpu", f"--data_dir={data_dir}", f"--output_dir={output}"]
    main_SSP.main([*flags, f"--features={features}", f"--resume={resume}", *more])
    return json.loads((output / "eval_only.json").read_text())


def without_speed(entries):
    return [e | {"images_per_s": None, "step_s": None} for e in entries]


# --- features and anchors -------------------------------------------------------------------------


def test_features_are_the_gallery_network_s_descriptors(gallery, finished_gpq, small_set):
    found = read_gallery(gallery / "features.safetensors")
    trained = load_trained(finished_gpq)
    assert found.features.shape == (360, 12)
    assert found.network == f"GPQ cifar_vgg {trained.identity[:16]}"
    assert found.dataset == "cifar10"
    # in the order of the files: the first five of training, the last of the test
    rows = np.fromfile(small_set / "cifar-10-batches-bin" / "data_batch_2.bin", dtype=np.uint8)
    images = rows.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32)
    x = OwnGallery(trained.model).describe(torch.from_numpy(images).float() / 255)
    # batches of another size, float32
    torch.testing.assert_close(found.features[60:120], x, rtol=0, atol=1e-5)


def test_features_in_lower_precision_are_nearly_the_same(
    gallery, finished_gpq, small_set, tmp_path
):
    words = [f"--gallery={finished_gpq}", f"--data_dir={small_set}", "--device=cpu"]
    extract_features.main([*words, f"--output={tmp_path / 'x.safetensors'}", "--amp=bf16"])
    lower = read_gallery(tmp_path / "x.safetensors").features
    whole = read_gallery(gallery / "features.safetensors").features
    assert lower.dtype == torch.float32
    assert not torch.equal(lower, whole)
    assert F.cosine_similarity(lower, whole).min() > 0.99


def test_features_of_any_network_of_timm(small_set, tmp_path):
    """With weights of a file, and with those that its authors published."""
    model, size, _ = build_pooled("tf_efficientnet_lite0")
    assert size == 224
    load_weights(model.trunk, published_weights("tf_efficientnet_lite0", "", "")[1])
    weights, out = tmp_path / "trunk.safetensors", tmp_path / "x.safetensors"
    save_file(model.trunk.net.state_dict(), weights)
    words = ["--gallery=tf_efficientnet_lite0", f"--data_dir={small_set}", f"--output={out}"]
    words += ["--device=cpu", "--input_size=32"]
    extract_features.main([*words, f"--gallery_weights={weights}"])
    found = read_gallery(out)
    assert found.network.startswith("tf_efficientnet_lite0 ")
    assert found.features.shape == (360, 1280)
    images, _, _ = load_all(parse_extract_args([*words, "--pretrained"]))
    want = model.eval().describe(images[:5].float() / 255)
    torch.testing.assert_close(found.features[:5], want, rtol=0, atol=1e-5)
    extract_features.main([*words, "--pretrained"])
    again = read_gallery(out)
    assert again.network == found.network and torch.equal(again.features, found.features)
    # who does not say how large: as the weights learned
    assert load_network("tf_efficientnet_lite0", weights, "--gallery").usual == 224


def test_embeddings_that_are_not_finite_are_told(finished_gpq, small_set, tmp_path, monkeypatch):
    def describe(self, images):
        x = torch.ones(len(images), 12)
        x[3] = torch.nan
        return x

    monkeypatch.setattr(OwnGallery, "describe", describe)
    words = [f"--gallery={finished_gpq}", f"--data_dir={small_set}", "--device=cpu"]
    with pytest.raises(
        UserError, match=r": GPQ .* gives train/00003.png an embedding that is not finite$"
    ):
        extract_features.main([*words, f"--output={tmp_path / 'x.safetensors'}"])
    assert not (tmp_path / "x.safetensors").exists()


def test_no_hours_are_spent_on_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for place in (tmp_path / "file" / "x.safetensors", tmp_path / "folder.safetensors"):
        # nothing else of this is there: the first thing that is looked at is the place
        with pytest.raises(UserError, match=rf"--output={place}: cannot be written: "):
            extract_features.main([f"--gallery={tmp_path / 'no.pt'}", f"--output={place}"])
        with pytest.raises(UserError, match=rf"--output={place}: cannot be written: "):
            make_anchors.main([f"--features={tmp_path / 'no.npy'}", f"--output={place}"])


def test_anchors_are_of_those_features(gallery):
    found = read_anchors(gallery / "anchors.safetensors", 12)
    assert found.shape == (3, 16, 4)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(3, 16))
    # k-means found where the features are: each has an anchor that is nearer than most anchors are
    x = F.normalize(read_gallery(gallery / "features.safetensors").features.view(-1, 3, 4), dim=2)
    sim = torch.einsum("nmd,mkd->nmk", x, found)
    assert sim.amax(dim=2).mean() > 0.95
    assert sim.mean() < 0.7


def test_codebooks_of_a_model_are_anchors_of_unit_length(finished_gpq, tiny_model, tmp_path):
    for model in (finished_gpq, tiny_model):
        path = tmp_path / "a.safetensors"
        make_anchors.main([f"--codebooks_of={model}", f"--output={path}"])
        words = load_trained(model).model.quantizer.codebooks.detach()
        M, _, d = words.shape
        assert torch.equal(read_anchors(path, M * d), F.normalize(words, dim=2))


def test_features_and_anchors_name_what_is_wrong(gallery, finished_ssp, small_set, tmp_path):
    out = f"--output={tmp_path / 'x.safetensors'}"
    source = f"--features={gallery / 'features.safetensors'}"
    with pytest.raises(UserError, match=r"--M=5: does not divide the features' 12 dimensions"):
        make_anchors.main([source, out, "--M=5"])
    with pytest.raises(UserError, match=r"--bits=9: 512 anchors .* there are 360; .* 8 bits"):
        make_anchors.main([source, out, "--M=3", "--bits=9"])
    # a query network is no gallery
    message = r"=.*: is a model of SSP; allowed are SPQ and GPQ$"
    with pytest.raises(UserError, match=f"^--codebooks_of{message}"):
        make_anchors.main([f"--codebooks_of={finished_ssp}", out])
    with pytest.raises(UserError, match=f"^--gallery{message}"):
        extract_features.main([f"--gallery={finished_ssp}", out, f"--data_dir={small_set}"])
    with pytest.raises(UserError, match=f"^--checkpoint{message}"):
        load_trained(finished_ssp)
    assert not list(tmp_path.iterdir())


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_checkpoint_split_and_pictures(finished_ssp):
    train, evals = log_of(finished_ssp, "train"), log_of(finished_ssp, "eval")
    assert [e["step"] for e in train] == list(range(1, STEPS + 1))
    assert all(0 < e["loss"] < 20 for e in train)  # the divergence of cosines times 10
    places = [(e["step"], e["distance"], e["headline"], e["queries"]) for e in evals]
    sides = [(name, name == "query-gallery", 60) for name in SIDES]
    assert places == [(step, *side) for step in (15, STEPS) for side in sides]
    assert {e["code_bits"] for e in evals} == {32 * 12}
    first, second = (e for e in evals if e["distance"] == "gallery-gallery")
    assert {**first, "epoch": 0, "step": 0} == {**second, "epoch": 0, "step": 0}
    head = json.loads((finished_ssp / "split.json").read_text())
    assert [head[r] for r in ("train", "query", "database")] == [300, 60, 300]
    state = load_checkpoint(finished_ssp / LAST)
    assert (state["method"], state["step"]) == ("SSP", STEPS)
    assert (state["args"]["embedding_dim"], state["args"]["n_classes"]) == (12, 0)
    assert state["last_eval"]["distance"] == "query-gallery"
    for picture in ("learning_curve.png", "retrieval.png"):
        assert (finished_ssp / picture).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def finished_methods(tmp_path_factory, small_files, gallery, finished_ssp):
    """A run of each method, by its name."""
    found = {"ssp": finished_ssp}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.cifar10.BIN_SHA256", small_cifar.hashes(small_files))
        patch.setattr("data.cifar10.ROWS", small_cifar.ROWS)
        patch.setattr("main_SSP.report", lambda *args: None)
        for method in SSP_METHODS[1:]:
            found[method] = tmp_path_factory.mktemp(method)
            flags = flags_of(method, None)
            run_ssp(small_files, found[method], gallery / "features.safetensors", *flags)
    return found


@pytest.mark.parametrize("method", SSP_METHODS)
def test_every_method_trains_and_is_measured_from_all_sides(method, finished_methods):
    folder = finished_methods[method]
    train, evals = log_of(folder, "train"), log_of(folder, "eval")[-3:]
    steps = AML_STEPS if method == "aml" else STEPS
    assert [e["step"] for e in train] == list(range(1, steps + 1))
    assert [e["distance"] for e in evals] == list(SIDES)
    assert {e["step"] for e in evals} == {steps}
    for entry in evals:
        assert 0 <= entry["mAP@50"] <= 1
        assert 0 <= entry["mAP@all"] <= 1
    losses = [e["loss"] for e in train]
    assert all(map(math.isfinite, losses))
    third = steps // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third])
    terms = {"contrastive", "regression"} if method == "aml" else set()
    assert train[0].keys() & {"contrastive", "regression"} == terms
    if terms:
        for entry in train:  # float32 and float64
            assert entry["loss"] == pytest.approx(sum(entry[n] for n in terms), abs=1e-6)
    state = load_checkpoint(folder / LAST)
    assert state["args"]["method"] == method
    assert ("classifier.weight" in state["model"]) == (method in ("hvs", "lce"))
    assert any(name.startswith("transform.") for name in state["model"]) == (method == "lce")
    moved = {n for n, v in first_weights(folder).items() if not torch.equal(v, state["model"][n])}
    assert moved == set(state["model"]) - {"trunk.mean", "trunk.std"}  # of the pixels


@pytest.mark.parametrize("method", ["ssp", "regression"])
def test_training_brings_queries_into_the_gallery_s_space(
    method, finished_methods, features, small_set, tmp_path, no_grid
):
    folder = finished_methods[method]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before, *_ = evaluated(small_set, tmp_path, features, untrained_of(tmp_path), "--Top_N=50")
    after, _, ceiling = log_of(folder, "eval")[-3:]
    assert before["distance"] == after["distance"] == "query-gallery"
    assert before["mAP@all"] < 0.25  # a random order gives about 0.12
    assert before["mAP@all"] + 0.25 < after["mAP@all"] < ceiling["mAP@all"]


def test_ssp_learns_the_similarities_to_the_anchors(finished_ssp):
    losses = [e["loss"] for e in log_of(finished_ssp, "train")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("method", SSP_METHODS)
def test_what_is_held_against_what(
    method, features, gallery, anchors, small_set, tmp_path, monkeypatch
):
    """The loss of each method, of tensors that are made up, as its equation has it."""
    taken = {}

    class Told(Exception):
        pass

    def trainer(args, name, model, embed, loss_of, *rest):
        taken.update(args=args, model=model, embed=embed, loss_of=loss_of)
        raise Told

    monkeypatch.setattr("main_SSP.Trainer", trainer)
    with pytest.raises(Told):
        # all negatives are within a margin of 3
        flags = ["--contrastive_margin=3"] if method == "aml" else []
        run_ssp(small_set, tmp_path, features, *flags_of(method, anchors), *flags)
    model, loss_of = taken["model"], taken["loss_of"]
    known = read_gallery(features).features[:300]  # those trained on; image i has label i % 10
    if method == "aml":
        images = torch.rand(4, 5, 3, 32, 32)
        x, g = taken["embed"](model.eval(), (images, known[:20].view(4, 5, 12)))
        torch.testing.assert_close(x[3, 2], model(images[3])[2])
        assert torch.equal(g, known[:20].view(4, 5, 12))
        x = F.normalize(torch.randn(4, 5, 12), dim=2)
        far = (x[:, :1] - g[:, 2:]).norm(dim=2)  # negatives of the queries
        near = (x[:, 0] - g[:, 1]).square().sum(dim=1)
        contrastive = (near / 2 + ((3 - far) ** 2 / 2).sum(dim=1)).mean()
        regression = (x - g).square().sum(dim=2).mean()
        want = {"contrastive": contrastive, "regression": regression}
        torch.testing.assert_close(loss_of(x, g), want)
        return
    rows = torch.arange(50, 70)
    x, g, labels = F.normalize(torch.randn(20, 12), dim=1), known[rows], rows % 10
    if method == "regression":
        torch.testing.assert_close(loss_of(x, g), (x - g).square().sum(dim=1).mean())
        return
    if method == "ssp":
        words = read_anchors(gallery / "anchors.safetensors", 12)

        def log_p(y):
            y = F.normalize(y.view(-1, 3, 4), dim=2)
            return (10 * torch.einsum("nmd,mkd->nmk", y, words)).log_softmax(dim=2)

        want = F.kl_div(log_p(x), log_p(g), reduction="none", log_target=True).sum(dim=2).mean()
        torch.testing.assert_close(loss_of(x, g), want)
        return
    old = torch.stack([known[c::10].mean(dim=0) for c in range(10)])  # of the features of a class
    old, new = F.normalize(old, dim=1), F.normalize(model.classifier.weight, dim=1)

    def classified(y, weight, margin):
        cos = F.normalize(y, dim=1) @ weight.T
        own = F.one_hot(labels, 10)
        return F.cross_entropy(45.2548 * (cos.acos() + margin * own).cos(), labels)

    if method == "hvs":
        want = classified(x, new, 0.15) + classified(x, old, 0.15)
    else:
        model.eval()  # batch norm
        moved = F.normalize(model.transform(model.classifier.weight), dim=1)
        want = classified(x, new, 0.15) + 0.5 * classified(model.transform(x), old, 0.2)
        want = want + 10 * (moved - old).norm(dim=1).mean()
    torch.testing.assert_close(loss_of(x, g, labels), want, rtol=1e-4, atol=1e-4)


def test_class_weights_do_not_move_the_statistics_of_embeddings(
    features, small_set, tmp_path, monkeypatch
):
    class Told(Exception):
        pass

    def trainer(args, name, model, embed, loss_of, *rest):
        raise Told(model, loss_of)

    monkeypatch.setattr("main_SSP.Trainer", trainer)
    with pytest.raises(Told) as told:
        run_ssp(small_set, tmp_path, features, "--method=lce")
    model, loss_of = told.value.args
    alone = copy.deepcopy(model.train())
    x, g = (F.normalize(torch.randn(20, 12), dim=1) for _ in range(2))
    loss_of(x, g, torch.arange(20) % 10)
    alone.transform(x)
    want = alone.transform.state_dict()
    moved = {n: v for n, v in model.transform.state_dict().items() if "running" in n}
    assert len(moved) == 4
    for name, value in moved.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("method", ["hvs", "lce"])
def test_what_learns_in_the_loss_takes_no_parts_in_several_processes(method):
    args = Namespace(method=method, accumulate=2)
    message = rf"--accumulate=2: --method={method} .* 2 processes .*; allowed is --accumulate=1,"
    with pytest.raises(UserError, match=message):
        main_SSP.build_trainer(
            Run("SSP", args, torch.device("cpu"), Ranks(0, 2), None), *5 * [None]
        )
    for fine in (Namespace(method=method, accumulate=1), Namespace(method="ssp", accumulate=2)):
        main_SSP.check_parts(fine, Ranks(0, 2))
    main_SSP.check_parts(args, Ranks())


def test_flags_reach_the_losses_that_they_are_for(
    finished_methods, features, anchors, small_set, tmp_path, no_pictures
):
    first = {method: log_of(folder, "train")[0] for method, folder in finished_methods.items()}
    changed = {
        "ssp": "--similarity_scale=1",
        "hvs": "--classification_scale=10",
        "lce": "--old_margin=0.9",
        "aml": "--contrastive_margin=1.8",
    }
    for method, flag in changed.items():
        flags = [*flags_of(method, anchors), flag, "--max_steps=1", *FEW]
        run_ssp(small_set, tmp_path / method, features, *flags)
        (entry,) = log_of(tmp_path / method, "train")
        if method in ("lce", "aml"):
            assert entry["loss"] > 1.05 * first[method]["loss"]
        else:
            assert entry["loss"] < 0.9 * first[method]["loss"]
        if method == "aml":
            assert entry["regression"] == first["aml"]["regression"]
    # scale 1 makes the divergence smaller by about its square
    (entry,) = log_of(tmp_path / "ssp", "train")
    assert entry["loss"] < 0.1 * first["ssp"]["loss"]
    # and the margins have their method's defaults
    margins = [load_checkpoint(finished_methods[m] / LAST)["args"]["old_margin"] for m in first]
    assert dict(zip(first, margins, strict=True)) == {
        "ssp": None,
        "regression": None,
        "aml": None,
        "hvs": 0.15,
        "lce": 0.2,
    }


def test_the_first_figures_are_of_the_untrained_network(
    finished_ssp, features, anchors, small_set, tmp_path, no_grid
):
    flags = [anchors, "--eval_before", "--eval_epoch=2"]
    run_ssp(small_set, tmp_path, features, *flags, "--max_steps=7")
    run_ssp(small_set, tmp_path, features, *flags, "--resume=auto")
    entries = log_of(tmp_path, "eval")
    assert [e["step"] for e in entries[::3]] == [0, 7, 30]
    figures = evaluated(small_set, tmp_path, features, untrained_of(tmp_path), "--Top_N=50")
    assert entries[:3] == [e | {"epoch": 0.0, "step": 0} for e in figures]
    assert_same_weights(finished_ssp, tmp_path)  # to evaluate first changes nothing


# --- going on -------------------------------------------------------------------------------------


def test_a_resumed_run_ends_bit_equal(
    finished_ssp, features, anchors, small_set, tmp_path, no_pictures
):
    for flags in (["--max_steps=7"], ["--resume=auto"]):
        run_ssp(small_set, tmp_path, features, anchors, "--eval_epoch=2", *flags, *FEW)
    assert_same_weights(finished_ssp, tmp_path)
    logs = [log_of(folder, "train") for folder in (finished_ssp, tmp_path)]
    assert without_speed(logs[0]) == without_speed(logs[1])


def test_aml_goes_on_within_an_epoch_with_the_tuples_that_it_had(
    finished_methods, features, small_set, tmp_path, monkeypatch, no_pictures
):
    aml = [*FAST_AML, "--eval_epoch=2", "--checkpoint_every=1", *FEW]

    with monkeypatch.context() as patch:
        patch.setattr("utils.loop.Trainer.read_losses", killed_at(5))
        with pytest.raises(KeyboardInterrupt):
            run_ssp(small_set, tmp_path, features, *aml)
    state = load_checkpoint(tmp_path / LAST)
    assert (state["step"], state["batches"]["epoch"]) == (4, 1)  # of 3 steps an epoch
    assert state["batches"]["rows"].shape == (60, 5)
    run_ssp(small_set, tmp_path, features, *aml, "--resume=auto")
    assert_same_weights(finished_methods["aml"], tmp_path)
    logs = [log_of(folder, "train") for folder in (finished_methods["aml"], tmp_path)]
    assert without_speed(logs[0]) == without_speed(logs[1])
    for flag in ("--negatives=4", "--tuples=40", "--pool=200"):
        with pytest.raises(UserError, match=rf"{flag}: the checkpoint .* was made with"):
            run_ssp(small_set, tmp_path, features, *aml, flag, "--resume=auto")


def killed_at(step):
    """In place of `Trainer.read_losses`: a kill after that step, before anything is saved."""
    from utils.loop import Trainer

    read = Trainer.read_losses

    def read_losses(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        return read(trainer)

    return read_losses


@pytest.mark.parametrize("method", ["ssp", "aml", "lce"])
def test_eval_only_gives_the_logged_figures_and_touches_nothing(
    method, finished_methods, features, small_set, tmp_path, monkeypatch
):
    if method != "ssp":
        monkeypatch.setattr("utils.report._draw_retrieval", lambda *args: None)
    folder = finished_methods[method]
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    found = evaluated(small_set, tmp_path, features, folder, "--Top_N=50")
    wanted = log_of(folder, "eval")[-3:]
    for got, want in zip(found, wanted, strict=True):
        assert {name: got[name] for name in want} == want  # the epoch too, which aml counts anew
    assert (tmp_path / "eval_only_retrieval.png").exists() == (method == "ssp")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_another_method_is_refused_on_a_resume(finished_ssp, features, small_set, tmp_path):
    flags = ["--method=regression", f"--resume={finished_ssp}"]
    with pytest.raises(UserError, match=r"--method=regression: .* was made with --method=ssp; a "):
        run_ssp(small_set, tmp_path, features, *flags)


def test_other_methods_do_not_go_on_with_it(
    finished_ssp, finished_gpq, features, small_set, tmp_path
):
    with pytest.raises(UserError, match=r"is a checkpoint of SSP, not of GPQ"):
        small_cifar.run_gpq(small_set, tmp_path, f"--resume={finished_ssp}")
    with pytest.raises(UserError, match=r"is a checkpoint of GPQ, not of SSP"):
        flags = ["--method=regression", f"--resume={finished_gpq}"]
        run_ssp(small_set, tmp_path, features, *flags)


def test_a_training_keeps_its_gallery(
    finished_ssp, features, anchors, small_set, tmp_path, no_grid, capsys
):
    known = read_gallery(features)
    other = Gallery(known.features.roll(1, 1), known.names_sha256, "GPQ another", "cifar10")
    write_gallery(tmp_path / "other.safetensors", other)
    wanted = re.escape(known.network)
    message = rf"are by GPQ another, and the run that --resume=.* learns those by {wanted};"
    with pytest.raises(UserError, match=message):
        resumed = [anchors, f"--resume={finished_ssp}"]
        run_ssp(small_set, tmp_path / "run", tmp_path / "other.safetensors", *resumed)
    # what it is searched with may be asked all the same
    capsys.readouterr()
    found = evaluated(small_set, tmp_path, tmp_path / "other.safetensors", finished_ssp)
    assert found[0]["mAP@all"] < log_of(finished_ssp, "eval")[-3]["mAP@all"]
    said = f"features are by GPQ another, and the network learned from those by {known.network}."
    assert said in capsys.readouterr().out
    wide = Gallery(torch.randn(360, 16), known.names_sha256, "GPQ another", "cifar10")
    write_gallery(tmp_path / "wide.safetensors", wide)
    message = rf"^--features=.*: have 16 dimensions, and the network of .* gives 12; .* by {wanted}"
    with pytest.raises(UserError, match=message):
        evaluated(small_set, tmp_path, tmp_path / "wide.safetensors", finished_ssp)


def test_a_training_keeps_its_array_whatever_its_name(features, small_set, tmp_path, no_pictures):
    x = read_gallery(features).features.numpy()
    flags = ["--method=regression", *FEW]
    np.save(tmp_path / "x.npy", x)
    run_ssp(small_set, tmp_path / "run", tmp_path / "x.npy", *flags, "--max_steps=1")
    np.save(tmp_path / "x.npy", x[::-1].copy())
    with pytest.raises(UserError, match=r"are by x\.npy .* learns those by x\.npy "):
        run_ssp(small_set, tmp_path / "run", tmp_path / "x.npy", *flags, "--resume=auto")
    np.save(tmp_path / "y.npy", x)
    more = [*flags, "--resume=auto", "--max_steps=2"]
    run_ssp(small_set, tmp_path / "run", tmp_path / "y.npy", *more)
    assert [e["step"] for e in log_of(tmp_path / "run", "train")] == [1, 2]


def test_a_query_network_s_trunk_starts_another(
    finished_ssp, features, small_set, tmp_path, no_pictures
):
    found = read_weights(finished_ssp / LAST)
    assert found
    assert all(name.startswith("trunk.") for name in found)
    flags = ["--method=regression", f"--weights={finished_ssp / LAST}", "--lr=1e-12"]
    run_ssp(small_set, tmp_path, features, *flags, "--max_steps=1", *FEW)
    taken = weights(tmp_path)
    for name, value in found.items():
        if value.is_floating_point() and "running" not in name:
            torch.testing.assert_close(taken[name], value, rtol=0, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


def test_features_of_another_set_are_refused(features, small_set, tmp_path):
    images = make_images(tmp_path / "images", [f"{c}/{i}.png" for c in "ab" for i in range(180)])
    flags = ["--dataset=folder", "--protocol=class-folders", "--input_size=16"]
    message = r"--features=.*: is of 360 other images of cifar10; this set has 360\. Make"
    with pytest.raises(UserError, match=message):
        run_ssp(images, tmp_path / "run", features, *flags, "--method=regression")
    few = tmp_path / "few.npy"
    np.save(few, np.ones((300, 12)))
    with pytest.raises(UserError, match=r"few\.npy: is of 300 other images; this set has 360"):
        run_ssp(small_set, tmp_path / "run", few, "--method=regression")


def test_anchors_for_other_features_are_refused(features, tiny_model, small_set, tmp_path):
    made = tmp_path / "a.safetensors"
    make_anchors.main([f"--codebooks_of={tiny_model}", f"--output={made}"])
    with pytest.raises(
        UserError, match=r"4 codebooks of 4 dimensions are for features of 16, and "
    ):
        run_ssp(small_set, tmp_path / "run", features, f"--anchors={made}")


def test_anchors_of_another_gallery_are_refused(
    features, gallery, anchors, finished_gpq, small_set, tmp_path, no_pictures
):
    known = read_gallery(features)
    other = Gallery(known.features, known.names_sha256, "GPQ a 0123456789abcdef", "cifar10")
    write_gallery(tmp_path / "other.safetensors", other)
    made = tmp_path / "codebooks.safetensors"
    make_anchors.main([f"--codebooks_of={finished_gpq}", f"--output={made}"])
    for flag in (anchors, f"--anchors={made}"):
        message = rf"are in the space of {known.network}, and the features are by GPQ a 0123"
        with pytest.raises(UserError, match=message):
            run_ssp(small_set, tmp_path / "run", tmp_path / "other.safetensors", flag)
    # an array does not tell
    np.save(tmp_path / "x.npy", known.features.numpy())
    run_ssp(small_set, tmp_path / "run", tmp_path / "x.npy", anchors, "--max_steps=1", *FEW)


def test_images_that_cannot_be_read_have_no_features(finished_gpq, tmp_path, capsys, no_pictures):
    images = make_images(tmp_path / "images", [f"{i}.png" for i in range(24)])
    (images / "5.png").write_bytes(b"no image")
    out, where = tmp_path / "f.safetensors", ["--dataset=folder", "--input_size=32"]
    where += [f"--cache_dir={tmp_path / 'cache'}", "--device=cpu", "--skip_missing"]
    words = [f"--gallery={finished_gpq}", f"--output={out}", f"--data_dir={images}"]
    extract_features.main([*words, *where])
    x = read_gallery(out, rows="known").features
    names = sorted(path.name for path in images.iterdir())
    assert x.isnan().any(dim=1).nonzero()[:, 0].tolist() == [names.index("5.png")]
    flags = [*where, "--method=regression", "--max_steps=1"]
    run_ssp(images, tmp_path / "run", out, *flags)
    assert math.isfinite(log_of(tmp_path / "run", "train")[0]["loss"])
    # and of an image that is there again
    shutil.copy(images / "4.png", images / "5.png")
    with pytest.raises(UserError, match=r"'5\.png', has a feature that is not finite"):
        run_ssp(images, tmp_path / "again", out, *flags, f"--cache_dir={tmp_path / 'new'}")


def test_labels_are_for_the_methods_that_need_them(finished_gpq, tmp_path, capsys):
    """A folder without labels: what it trains and what it does not."""
    images = make_images(tmp_path / "images", [f"{i}.png" for i in range(24)])
    out, where = tmp_path / "f.safetensors", ["--dataset=folder", "--input_size=32"]
    cache = f"--cache_dir={tmp_path / 'cache'}"
    words = [f"--gallery={finished_gpq}", f"--output={out}", f"--data_dir={images}", cache]
    extract_features.main([*words, *where, "--device=cpu"])
    assert read_gallery(out).features.shape == (24, 12)
    for method in ("aml", "hvs", "lce"):
        message = rf"--method={method}: needs one label for each image; allowed without are ssp and"
        message += r" regression, or --protocol=class-folders"
        with pytest.raises(UserError, match=message):
            run_ssp(images, tmp_path / "no", out, *where, *flags_of(method, None))
    capsys.readouterr()
    run_ssp(images, tmp_path / "run", out, *where, "--method=regression", "--max_steps=1")
    said = capsys.readouterr().out
    assert "Trained to step 1; without labels there is no mAP." in said
    assert "search.py" not in said  # it takes no query network
    assert log_of(tmp_path / "run", "eval") == []
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_several_labels_are_evaluated_but_teach_no_classifier(tmp_path, no_pictures):
    folder = tmp_path / "set"
    make_nuswide(folder, 50)
    x = tmp_path / "x.npy"
    np.save(x, np.random.default_rng(0).normal(size=(50, 8)))
    flags = ["--dataset=nuswide", "--input_size=16", "--max_steps=1", "--Top_N=all"]
    with pytest.raises(UserError, match=r"--method=hvs: needs one label for each image"):
        run_ssp(folder, tmp_path / "no", x, *flags, "--method=hvs")
    run_ssp(folder, tmp_path / "run", x, *flags, "--method=regression")
    evals = log_of(tmp_path / "run", "eval")
    assert [(e["distance"], e["queries"]) for e in evals] == [(side, 10) for side in SIDES]
    assert "mAP@50" not in evals[0]
    assert load_checkpoint(tmp_path / "run" / LAST)["args"]["gallery"].startswith("x.npy ")


@pytest.mark.parametrize("method", ["hvs", "lce", "aml"])
def test_what_learned_from_classes_is_evaluated_on_other_ones(method, finished_methods, tmp_path):
    """On a set of several labels, which could not have taught it, and with other classes."""
    folder, features = tmp_path / "set", tmp_path / "x.npy"
    make_nuswide(folder, 50)
    np.save(features, np.random.default_rng(0).normal(size=(50, 12)))
    flags = ["--dataset=nuswide", "--protocol=100-500", f"--cache_dir={tmp_path}", "--Top_N=all"]
    trained = log_of(finished_methods[method], "eval")[-1]
    flags.append("--batch_size=200")  # of which none is drawn
    figures = evaluated(folder, tmp_path, features, finished_methods[method], *flags)
    assert (figures[0]["epoch"], figures[0]["step"]) == (trained["epoch"], trained["step"])
    assert [entry["distance"] for entry in figures] == list(SIDES)
    assert figures[0]["queries"] == 10


# --- batches in parts, processes, other networks --------------------------------------------------

# as test_main_GPQ.py has them
IN_PARTS = ["--freeze_bn_epoch=0", "--optimizer=sgd", "--lr=0.02", "--max_steps=3", *FEW]


@pytest.mark.parametrize("method", SSP_METHODS)
def test_a_batch_in_parts_gives_the_losses_of_the_whole(
    method, features, anchors, small_set, tmp_path, no_pictures
):
    for name, flag in (("whole", "--accumulate=1"), ("parts", "--accumulate=2")):
        flags = [*flags_of(method, anchors), *IN_PARTS, flag]
        run_ssp(small_set, tmp_path / name, features, *flags)
    whole, parts = (log_of(tmp_path / name, "train") for name in ("whole", "parts"))
    for entry, want in zip(parts, whole, strict=True):
        assert entry["loss"] == pytest.approx(want["loss"], rel=1e-4)  # sums in another order
    start, one, two = (
        first_weights(tmp_path / "whole"),
        *(weights(tmp_path / n) for n in ("whole", "parts")),
    )
    learned = [n for n, v in one.items() if v.is_floating_point() and not torch.equal(v, start[n])]
    assert "whiten.weight" in learned
    assert ("classifier.weight" in learned) == (method in ("hvs", "lce"))
    for name in learned:
        moved = (one[name] - start[name]).abs().max()
        assert (one[name] - two[name]).abs().max() < 0.02 * moved + 1e-7, name


SHORT = ["--optimizer=sgd", "--max_steps=3", "--limit_query=1"]  # a picture of one row
TWO = {
    "ssp": ["--lr=0.02", *SHORT],
    "aml": [*FAST_AML, "--lr=0.005", *SHORT],
    # which learns by more than what goes through the network
    "lce": ["--method=lce", "--lr=5e-5", *SHORT],
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, small_files, features, anchors):
    """A folder with the runs of TWO, of two processes each."""
    folder = tmp_path_factory.mktemp("two")
    words = ["tests/small_cifar.py", "--method=SSP", "--views=same"]
    for i, (name, flags) in enumerate(TWO.items()):
        places = ["--data_dir", str(small_files), f"--output_dir={folder / name}"]
        places += [f"--features={features}", *([anchors] if name == "ssp" else [])]
        words += [*(["--then"] if i else []), *places, *small_cifar.FAST_SSP, *flags]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result at step 3") == len(TWO)
    return folder


@pytest.mark.parametrize("method", TWO)
def test_two_processes_equal_one_on_the_same_global_batch(
    method, two_processes, features, anchors, small_set, tmp_path, monkeypatch, no_pictures
):
    # whole images, because random views are each rank's own
    monkeypatch.setattr("data.views.CropFlip", small_cifar.WholeViews)
    run_ssp(small_set, tmp_path, features, *flags_of(method, anchors), *TWO[method])
    logs = [log_of(folder, "train") for folder in (two_processes / method, tmp_path)]
    for got, want in zip(*logs, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)  # float32
    start, one, two = first_weights(tmp_path), weights(tmp_path), weights(two_processes / method)
    names = ["whiten.weight"]
    if method == "lce":
        names += [
            "classifier.weight",
            "transform.transform.0.weight",
            "transform.transform.2.weight",
        ]
    for name in names:
        moved = (one[name] - start[name]).abs().max()
        assert moved > 1e-4
        # rounding of three steps; a part of the gradient left away would be a part of the way
        assert (one[name] - two[name]).abs().max() < 0.02 * moved


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe=fast", "--batch_size=20", "--amp=bf16", "--Top_N=all"],
        ["--arch=mobilenetv2_035", "--width=64", "--trainable_p", "--gem_p=2"],
        ["--augmentation=batched", "--early_crop_size=16", "--early_share=0.05", *FAST_AML],
        ["--validate", "--limit_train=40", "--optimizer=sgd"],
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_every_variant_runs(flags, features, small_set, tmp_path, no_pictures):
    method = [] if "--method=aml" in flags else ["--method=regression"]
    run_ssp(small_set, tmp_path, features, *method, *flags, "--max_steps=1", *FEW)
    evals = log_of(tmp_path, "eval")
    assert [e["distance"] for e in evals] == list(SIDES)
    assert all(0 <= e["mAP@all"] <= 1 for e in evals)


def test_a_loss_that_is_not_finite_stops_the_training(features, small_set, tmp_path, monkeypatch):
    loss = main_SSP.regression_loss
    monkeypatch.setattr("main_SSP.regression_loss", lambda x, gallery: loss(x, gallery) * math.nan)
    with pytest.raises(TrainingStopped, match="loss at step 0 is not finite"):
        run_ssp(small_set, tmp_path, features, "--method=regression", *FEW)
