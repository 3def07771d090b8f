"""main_GPQ.py from end to end on small sets, and search.py with what it trained."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import small_cifar
import torch
from PIL import Image
from small_cifar import log_of, run_gpq
from small_images import make_images
from small_sets import make_nuswide

import data.splits
import main_GPQ
import search
from data.images import to_array
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError
from utils.retrieval import lookup_tables
from utils.search.index import open_index
from utils.trained import build_from_flags, load_trained, save_trained

ROOT = Path(__file__).resolve().parent.parent
STEPS = 18  # of the six epochs of FAST_GPQ
ONE_QUERY = "--limit_query=1"  # a picture of one row: pictures take most of a short run's time
TERMS = ("n_pair", "classification", "entropy")


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr("utils.figures.PNG_DPI", 50)  # test_run_figures.py looks at the pixels


def command(data_dir, output_dir, *flags):
    """What starts main_GPQ.py in a process of its own."""
    places = ["--data_dir", str(data_dir), f"--output_dir={output_dir}"]
    return ["tests/small_cifar.py", "--method=GPQ", *places, *small_cifar.FAST_GPQ, *flags]


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(log_of(folder, "train")) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"no step {step}: {process.communicate()}")


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
    return build_from_flags("GPQ", args).state_dict()


def losses(folder):
    return [e["loss"] for e in log_of(folder, "train")]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_checkpoint_split_and_pictures(finished_gpq):
    train, evals = log_of(finished_gpq, "train"), log_of(finished_gpq, "eval")
    assert [e["step"] for e in train] == list(range(1, STEPS + 1))
    assert set(train[0]) == {
        "kind",
        "epoch",
        "step",
        "loss",
        *TERMS,
        "lr",
        "images_per_s",
        "step_s",
    }
    for entry in train:
        # a sum of three float32 terms of about 1, taken there in float32 and here in float64
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in TERMS), abs=1e-6)
        assert entry["n_pair"] > 0 and entry["classification"] > 0
        assert -0.1 * math.log(10) <= entry["entropy"] <= 0  # 0.1 times minus an entropy
        assert entry["lr"] == 2e-3  # the first stair has 100 steps
    places = [(e["epoch"], e["step"], e["distance"], e["queries"]) for e in evals]
    assert places == [(3, 9, "inner_product", 6), (6, STEPS, "inner_product", 6)]
    assert {e["code_bits"] for e in evals} == {12}
    assert "mAP@all" in evals[0]
    head = json.loads((finished_gpq / "split.json").read_text())
    assert (head["protocol"], len(head["classes"])) == ("gpq", 10)
    assert [head[r] for r in ("train", "labelled", "query", "database")] == [324, 30, 6, 324]
    state = load_checkpoint(finished_gpq / LAST)
    assert (state["method"], state["step"], state["args"]["n_classes"]) == ("GPQ", STEPS, 10)
    assert state["model"]["quantizer.prototypes"].shape == (10, 12)
    for picture in ("learning_curve.png", "retrieval.png"):
        assert (finished_gpq / picture).read_bytes().startswith(b"\x89PNG")


def test_training_learns(finished_gpq):
    found = losses(finished_gpq)
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    # a random order gives 0.1, the network of one step 0.26
    assert log_of(finished_gpq, "eval")[-1]["mAP@all"] > 0.5


def test_a_finished_run_is_not_run_again_and_says_its_result(finished_gpq, small_set, capsys):
    before = (finished_gpq / "metrics.jsonl").read_text()
    run_gpq(small_set, finished_gpq, "--resume=auto", "--eval_epoch=3")
    assert (finished_gpq / "metrics.jsonl").read_text() == before
    found = log_of(finished_gpq, "eval")[-1]["mAP@all"]
    out = capsys.readouterr().out
    assert f"Result of the last epoch: mAP@all = {found:.4f} at 12 bits (inner_product" in out
    for name in (LAST, "metrics.jsonl", "learning_curve.png", "retrieval.png"):
        assert str(finished_gpq / name) in out


def test_an_evaluation_in_the_middle_does_not_change_the_training(
    finished_gpq, small_set, tmp_path
):
    run_gpq(small_set, tmp_path, "--eval_epoch=6", ONE_QUERY)
    assert [e["step"] for e in log_of(tmp_path, "eval")] == [STEPS]
    assert_same_weights(finished_gpq, tmp_path)


def test_a_resumed_run_ends_bit_equal(finished_gpq, small_set, tmp_path):
    run_gpq(small_set, tmp_path, "--max_steps=4", "--eval_epoch=3", ONE_QUERY)
    assert load_checkpoint(tmp_path / LAST)["step"] == 4
    run_gpq(small_set, tmp_path, "--resume=auto", "--max_steps=11", "--eval_epoch=3", ONE_QUERY)
    run_gpq(small_set, tmp_path, f"--resume={tmp_path / LAST}", "--eval_epoch=3", ONE_QUERY)
    assert_same_weights(finished_gpq, tmp_path)
    want, got = log_of(finished_gpq, "train"), log_of(tmp_path, "train")
    speed = {"images_per_s": None, "step_s": None}
    assert [e | speed for e in got] == [e | speed for e in want]
    assert [e["step"] for e in log_of(tmp_path, "eval")] == [4, 9, 11, STEPS]


def test_a_killed_run_resumes_bit_equal(finished_gpq, small_files, small_set, tmp_path):
    # evaluations keep it busy for a while longer; they do not change the training
    words = command(small_files, tmp_path, "--checkpoint_every=1", "--eval_epoch=1")
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path, 4, process)
    process.kill()
    process.communicate()
    assert 0 < load_checkpoint(tmp_path / LAST)["step"] < STEPS
    run_gpq(small_set, tmp_path, "--resume=auto", "--eval_epoch=6", ONE_QUERY)
    assert_same_weights(finished_gpq, tmp_path)
    assert [e["step"] for e in log_of(tmp_path, "train")] == list(range(1, STEPS + 1))
    assert losses(tmp_path) == losses(finished_gpq)


# --- evaluation alone, and what a resume refuses --------------------------------------------------


def test_eval_only_gives_the_logged_figure_and_touches_nothing(finished_gpq, small_set, tmp_path):
    before = {p.name: p.read_bytes() for p in finished_gpq.iterdir() if p.is_file()}
    # no flag of the model or the training: the checkpoint says them
    flags = ["--eval_only", "--device=cpu", f"--data_dir={small_set}", f"--output_dir={tmp_path}"]
    main_GPQ.main([*flags, f"--resume={finished_gpq}"])
    (got,) = json.loads((tmp_path / "eval_only.json").read_text())
    want = log_of(finished_gpq, "eval")[-1]
    assert {name: got[name] for name in want} == want
    assert {p.name: p.read_bytes() for p in finished_gpq.iterdir() if p.is_file()} == before


def test_weights_alone_are_evaluated_as_the_checkpoint_that_they_are_of(
    finished_gpq, small_set, tmp_path, capsys
):
    want = log_of(finished_gpq, "eval")[-1]["mAP@all"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    file = tmp_path / "whole" / "model.pt"
    save_trained(file, load_trained(finished_gpq))
    content = file.read_bytes()
    for i, part in enumerate((content[:5000], content[5000:])):
        (tmp_path / "parts" / f"model.pt.part0{i}").write_bytes(part)
    for given in (file, file.parent, tmp_path / "parts"):
        output = tmp_path / "evaluated"
        flags = ["--eval_only", "--device=cpu", f"--data_dir={small_set}"]
        main_GPQ.main([*flags, f"--output_dir={output}", f"--resume={given}"])
        (got,) = json.loads((output / "eval_only.json").read_text())
        assert (got["mAP@all"], got["step"], got["epoch"]) == (want, None, None)
        printed = capsys.readouterr().out
        assert f"Result of the weights: mAP@all = {want:.4f}" in printed
        assert "weights of a step that is not told" in printed
        assert not {path.name for path in output.iterdir()} & {LAST, "metrics.jsonl"}
    with pytest.raises(UserError, match=r"which cannot be gone on with; .*--eval_only.*--weights"):
        run_gpq(small_set, tmp_path / "other", f"--resume={file}")
    for given in (file.parent, tmp_path / "parts"):
        with pytest.raises(UserError, match=r"cannot be gone on with; .*--eval_only"):
            run_gpq(small_set, tmp_path / "other", f"--resume={given}")
    with pytest.raises(UserError, match=r"no such file; .* checkpoint_last\.pt or model\.pt"):
        main_GPQ.main([*flags, f"--output_dir={output}", f"--resume={small_set}"])
    # and of the run's own folder
    main_GPQ.main([*flags, f"--output_dir={tmp_path / 'parts'}", "--resume=auto"])
    assert f"Result of the weights: mAP@all = {want:.4f}" in capsys.readouterr().out


def test_an_older_checkpoint_says_that_its_views_were_others(small_set, tmp_path, capsys):
    run_gpq(small_set, tmp_path, "--max_steps=2", ONE_QUERY)
    state = torch.load(tmp_path / LAST, weights_only=True)
    for name in ("augmentation", "crop_min_area", "jitter_strength"):
        del state["args"][name]
    torch.save(state, tmp_path / LAST)
    capsys.readouterr()
    flags = ["--resume=auto", "--max_steps=3", ONE_QUERY]
    run_gpq(small_set, tmp_path, *flags, "--augmentation=batched", "--jitter_strength=2")
    printed = capsys.readouterr().out
    assert "--augmentation=batched (was crop-flip)" in printed
    assert "--jitter_strength=2.0 (was 1.0)" in printed
    run_gpq(small_set, tmp_path, "--resume=auto", "--max_steps=4", ONE_QUERY)  # and back
    assert "--augmentation=crop-flip (was batched)" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [3, 8])  # the crops grow after 9 of 18 steps
def test_growing_crops_are_those_of_an_undisturbed_run_after_a_resume(stop, small_set, tmp_path):
    grow = ["--recipe=fast", "--early_crop_size=16", "--early_share=0.5", ONE_QUERY]
    for name, stops in (("whole", [STEPS]), ("parts", [stop, STEPS])):
        for steps in stops:
            more = [f"--max_steps={steps}", "--resume=auto"]
            run_gpq(small_set, tmp_path / name, *grow, *more)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (log_of(tmp_path / name, "train") for name in ("whole", "parts"))
    assert [e["loss"] for e in whole] == [e["loss"] for e in parts]


def test_eval_only_takes_labels_classes_and_alpha_from_the_checkpoint(small_set, tmp_path, capsys):
    model = ["--labels_per_class=2", "--soft_quantization_scale=3"]
    run_gpq(small_set, tmp_path, *model, "--max_steps=2", ONE_QUERY)
    logged = log_of(tmp_path, "eval")[-1]["mAP@all"]
    assert weights(tmp_path)["quantizer.prototypes"].shape == (10, 12)
    capsys.readouterr()
    flags = ["--eval_only", "--resume=auto", "--device=cpu", ONE_QUERY]
    flags += [f"--data_dir={small_set}", f"--output_dir={tmp_path}"]

    def evaluated(*more):
        main_GPQ.main([*flags, *more])
        return json.loads((tmp_path / "eval_only.json").read_text())[0]["mAP@all"]

    assert evaluated() == logged
    out = capsys.readouterr().out
    # the ten images of the third label a class are without labels now
    assert "334 train, 20 labelled, 6 query, 324 database" in out
    assert "another split" not in out
    told = {"labels_per_class=2", "n_classes=10", "soft_quantization_scale=3.0"}
    assert told <= set(out.split())
    # which is not for nothing: the codebooks depend on alpha, and the split on the labels
    assert evaluated("--soft_quantization_scale=20") != logged
    evaluated("--labels_per_class=1")
    out = capsys.readouterr().out
    assert "344 train, 10 labelled" in out
    assert "This is another split than the one that the model was trained by" in out


def test_another_number_of_labels_is_refused_on_resume(finished_gpq, small_set, tmp_path):
    again = [f"--resume={finished_gpq}", ONE_QUERY, f"--max_steps={STEPS}"]
    with pytest.raises(UserError, match=r"its split is .*, and the run that --resume=.* began"):
        run_gpq(small_set, tmp_path, *again, "--labels_per_class=2")
    # three of each class are all there are: the same labels
    run_gpq(small_set, tmp_path, *again, "--labels_per_class=3")
    with pytest.raises(UserError, match=r"--labels_per_class=4: class 0 has 3 images to take"):
        run_gpq(small_set, tmp_path / "other", "--labels_per_class=4")


def test_methods_do_not_go_on_with_each_other_s_checkpoints(
    finished, finished_gpq, small_set, tmp_path
):
    with pytest.raises(UserError, match=r"--resume=.*: is a checkpoint of SPQ, not of GPQ"):
        run_gpq(small_set, tmp_path, f"--resume={finished}")
    with pytest.raises(UserError, match=r"--resume=.*: is a checkpoint of GPQ, not of SPQ"):
        small_cifar.run(small_set, tmp_path, f"--resume={finished_gpq}")


# --- the losses -----------------------------------------------------------------------------------


def test_flags_reach_the_terms_that_they_are_for(finished_gpq, small_set, tmp_path):
    first = log_of(finished_gpq, "train")[0]
    flags = ["--n_pair_weight=2", "--classification_weight=0.4", "--entropy_weight=0.3"]
    run_gpq(small_set, tmp_path / "weights", *flags, "--max_steps=1", ONE_QUERY)
    (entry,) = log_of(tmp_path / "weights", "train")
    # one float32 factor in place of another
    for name, factor in (("n_pair", 2), ("classification", 4), ("entropy", 3)):
        assert entry[name] == pytest.approx(factor * first[name], rel=1e-6)
    # beta sharpens the classes' probabilities and does not enter the N-pair loss
    run_gpq(small_set, tmp_path / "beta", "--classification_scale=1", "--max_steps=1", ONE_QUERY)
    (entry,) = log_of(tmp_path / "beta", "train")
    assert entry["n_pair"] == first["n_pair"]
    assert entry["entropy"] < first["entropy"]  # nearer to minus the largest entropy, 0.1 log 10
    assert abs(entry["classification"] - 0.1 * math.log(10)) < abs(
        first["classification"] - 0.1 * math.log(10)
    )


@pytest.mark.parametrize("without", TERMS)
def test_each_loss_can_be_left_away(without, finished_gpq, small_set, tmp_path):
    run_gpq(small_set, tmp_path, f"--{without}_weight=0", "--max_steps=2", ONE_QUERY)
    first, entry = log_of(tmp_path, "train")
    others = [name for name in TERMS if name != without]
    assert entry.get(without, 0) == 0
    assert ("entropy" in entry) == (without != "entropy")
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in others), abs=1e-6)
    # the others begin as they do beside it, and then go another way
    beside = log_of(finished_gpq, "train")
    assert [first[name] for name in others] == [beside[0][name] for name in others]
    assert [entry[name] for name in others] != [beside[1][name] for name in others]


def test_without_entropy_no_unlabelled_image_has_an_influence(finished_gpq, small_set, tmp_path):
    for name, flags in (
        ("30", ["--entropy_weight=0", "--limit_train=30", "--max_steps=2"]),
        ("40", ["--entropy_weight=0", "--limit_train=40", "--max_steps=2"]),
        ("with", ["--limit_train=30", "--max_steps=1"]),
    ):
        run_gpq(small_set, tmp_path / name, *flags, ONE_QUERY)
    assert_same_weights(tmp_path / "30", tmp_path / "40")
    # which are not the same images
    first = [log_of(f, "train")[0]["entropy"] for f in (tmp_path / "with", finished_gpq)]
    assert first[0] != first[1]

    def passed(folder):  # what batch norm has seen: of each side a batch for itself
        found = weights(folder).items()
        return {int(value) for key, value in found if key.endswith("num_batches_tracked")}

    assert passed(tmp_path / "30") == {2}
    assert passed(finished_gpq) == {2 * STEPS}


def test_prototypes_raise_the_entropy_that_the_network_lowers(small_set, tmp_path):
    alone = ["--n_pair_weight=0", "--classification_weight=0", "--entropy_weight=1"]
    found = {}
    for name, flag in (("none", "--reversal_weight=0"), ("strong", "--reversal_weight=1")):
        run_gpq(small_set, tmp_path / name, *alone, flag, "--max_steps=9", ONE_QUERY)
        found[name] = [e["entropy"] for e in log_of(tmp_path / name, "train")]
    assert found["none"][0] == found["strong"][0]
    # minus the entropy, of batches that differ a little: 9 steps move it by far more
    assert found["none"][-1] < found["none"][0] - 0.1
    assert found["strong"][-1] > found["strong"][0] + 0.1
    # without a reversal nothing but the prototypes learns
    start, end = first_weights(tmp_path / "none"), weights(tmp_path / "none")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert {name for name in moved if not name.endswith(statistics)} == {"quantizer.prototypes"}


def test_the_reversal_warms_up(small_set, tmp_path):
    alone = ["--n_pair_weight=0", "--classification_weight=0", "--optimizer=sgd", "--max_steps=1"]
    for name, flag in (
        ("warm", "--reversal_warmup_epochs=3"),
        ("ninth", f"--reversal_weight={1 / 9}"),  # the first of its nine steps
    ):
        run_gpq(small_set, tmp_path / name, *alone, flag, ONE_QUERY)
    assert_same_weights(tmp_path / "warm", tmp_path / "ninth")


# --- batches in parts, processes ------------------------------------------------------------------


# Batch norm is frozen where a batch goes through in parts, which have statistics of their own; sgd,
# because Adam turns the rounding of small gradients into whole steps of either sign.
IN_PARTS = ["--accumulate=2", "--freeze_bn_epoch=0", "--optimizer=sgd", "--lr=0.02"]


def test_a_batch_in_parts_gives_the_losses_of_the_whole(small_set, tmp_path):
    for name, flags in (("whole", ["--accumulate=1"]), ("parts", [])):
        run_gpq(small_set, tmp_path / name, *IN_PARTS, *flags, "--max_steps=3", ONE_QUERY)
    whole, parts = (log_of(tmp_path / name, "train") for name in ("whole", "parts"))
    for entry, want in zip(parts, whole, strict=True):
        for name in TERMS:  # float32 sums in another order
            assert entry[name] == pytest.approx(want[name], rel=1e-4)
    assert abs(whole[0]["loss"] - whole[1]["loss"]) > 0.005  # gradients have been at work


BY_TWO = {
    "whole": ["--batch_size=20", "--optimizer=sgd", "--lr=0.003", "--max_steps=3", ONE_QUERY],
    "parts": ["--batch_size=20", *IN_PARTS, "--max_steps=3", ONE_QUERY],
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, small_files):
    """A folder with the runs of BY_TWO, of two processes each."""
    folder = tmp_path_factory.mktemp("two")
    first = command(small_files, folder / "whole", "--views=same", *BY_TWO["whole"])
    _, *second = command(small_files, folder / "parts", *BY_TWO["parts"])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [*first, "--then", *(word for word in second if word != "--method=GPQ")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result at step 3") == 2
    return folder


@pytest.mark.parametrize("kind", BY_TWO)
def test_two_processes_equal_one_on_the_same_global_batch(
    kind, two_processes, small_set, tmp_path, monkeypatch
):
    # whole images, because random views are each rank's own
    monkeypatch.setattr("data.views.CropFlip", small_cifar.WholeViews)
    run_gpq(small_set, tmp_path, *BY_TWO[kind])
    logs = [log_of(folder, "train") for folder in (two_processes / kind, tmp_path)]
    for got, want in zip(*logs, strict=True):
        for name in TERMS:
            assert got[name] == pytest.approx(want[name], rel=1e-4)  # float32
    start, one, two = first_weights(tmp_path), weights(tmp_path), weights(two_processes / kind)
    for name in ("quantizer.prototypes", "quantizer.words", "head.weight"):
        moved = (one[name] - start[name]).abs().max()
        assert moved > 1e-3
        # rounding of three steps; a part of the gradient left away would be a part of the way
        assert (one[name] - two[name]).abs().max() < 0.02 * moved


# --- variants and other sets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe=fast", "--accumulate=2"],
        ["--augmentation=kornia", "--crop_size=16", "--crop_min_area=0.5"],
        ["--amp=bf16", "--optimizer=adamw", "--lr_schedule=cosine", "--warmup_epochs=0.5"],
        ["--arch=test_efficientnet", "--width=64", "--optimizer=muon"],
        ["--input_size=16", "--batch_size=64", "--limit_train=9", "--freeze_bn_epoch=0.5"],
        ["--validate", "--protocol=59k", "--num_cls=11", "--N_words=256", "--N_books=1"],
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_every_variant_runs(flags, small_set, tmp_path):
    run_gpq(small_set, tmp_path, *flags, "--max_steps=2", ONE_QUERY)
    (entry,) = log_of(tmp_path, "eval")
    assert (entry["queries"], entry["distance"]) == (1, "inner_product")
    assert entry["code_bits"] == (8 if "--N_books=1" in flags else 12)


def test_a_trunk_starts_from_an_spq_checkpoint(finished, small_set, tmp_path, capsys):
    flags = ["--arch=resnet18", f"--weights={finished / LAST}", "--freeze_trunk", ONE_QUERY]
    run_gpq(small_set, tmp_path / "run", *flags, "--cached_views=2", "--epochs=2")
    assert f"trunk starts from {finished / LAST}" in capsys.readouterr().out
    taken, given = weights(tmp_path / "run"), weights(finished)
    names = [name for name in given if name.startswith("trunk.")]
    assert names == [name for name in taken if name.startswith("trunk.")]
    assert all(torch.equal(taken[name], given[name]) for name in names)  # frozen, so it stays
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    with pytest.raises(UserError, match=r"does not fit --arch=cifar_vgg"):
        run_gpq(small_set, tmp_path / "other", f"--weights={finished / LAST}")


def test_lists_with_several_labels_train_and_evaluate(tmp_path, capsys):
    """NUS-WIDE's layout, 21 labels."""
    folder = tmp_path / "set"
    labels = make_nuswide(folder, 140)
    flags = ["--dataset=nuswide", "--input_size=16"]
    run_gpq(folder, tmp_path / "run", *flags, "--epochs=6")
    # listed for training: 56 of the database's 112; the other half has no labels
    assert "56 train, 56 labelled, 28 query, 112 database" in capsys.readouterr().out
    entry = log_of(tmp_path / "run", "eval")[-1]
    shared = (labels[::5] @ labels[np.arange(140) % 5 > 0].T > 0).mean()  # of query and item
    assert shared < 0.13  # what a random order gives
    assert entry["queries"] == 28
    assert entry["mAP@all"] > 0.3
    assert weights(tmp_path / "run")["quantizer.prototypes"].shape == (21, 12)
    few = [*flags, "--labels_per_class=1", "--max_steps=1", ONE_QUERY]
    run_gpq(folder, tmp_path / "few", *few)
    assert "91 train, 21 labelled" in capsys.readouterr().out
    run_gpq(folder, tmp_path / "few", *flags, ONE_QUERY, "--eval_only", "--resume=auto")
    again = json.loads((tmp_path / "few" / "eval_only.json").read_text())[0]
    assert again["mAP@all"] == log_of(tmp_path / "few", "eval")[-1]["mAP@all"]


def test_there_is_a_prototype_for_each_label_whatever_num_cls_allows(tmp_path):
    make_nuswide(tmp_path / "set", 140)
    flags = ["--dataset=nuswide", "--input_size=16", "--num_cls=25", "--max_steps=1", ONE_QUERY]
    run_gpq(tmp_path / "set", tmp_path / "run", *flags)
    assert weights(tmp_path / "run")["quantizer.prototypes"].shape == (21, 12)


def test_class_folders_are_labels_of_which_some_are_seen(tmp_path, capsys):
    images = make_images(tmp_path / "images", [f"{c}/{i}.png" for c in "abc" for i in range(12)])
    flags = ["--dataset=folder", "--input_size=16"]
    run_gpq(images, tmp_path / "all", *flags, "--epochs=1")
    assert "protocol class-folders, seed 0: 33 train, 33 labelled" in capsys.readouterr().out
    assert log_of(tmp_path / "all", "eval")[-1]["queries"] == 3
    some = [*flags, "--labels_per_class=4", "--max_steps=1", ONE_QUERY]
    run_gpq(images, tmp_path / "some", *some)
    assert "21 train, 12 labelled, 3 query, 33 database" in capsys.readouterr().out
    # which ones are seen is drawn
    drawn = [*some, "--split_seed=5", f"--resume={tmp_path / 'some'}"]
    with pytest.raises(UserError, match=r"its split is .*, and the run that --resume"):
        run_gpq(images, tmp_path / "other", *drawn)


def test_images_without_labels_are_refused_with_a_way_out(tmp_path):
    images = make_images(tmp_path / "images", [f"{c}/{i}.png" for c in "ab" for i in range(12)])
    flags = ["--dataset=folder", "--input_size=16"]
    way_out = r"has no labels, .* allowed are --protocol=class-folders"
    with pytest.raises(UserError, match=way_out):
        run_gpq(images, tmp_path / "run", *flags, "--protocol=all")
    made = tmp_path / "my.split"
    words = ["make", "--dataset=folder", f"--data_dir={images}", f"--output={made}"]
    assert data.splits.main(words) == 0
    with pytest.raises(UserError, match=way_out):
        run_gpq(images, tmp_path / "run", *flags, f"--split={made}")
    loose = make_images(tmp_path / "loose", [f"{i}.png" for i in range(12)])
    with pytest.raises(UserError, match=r"12 images lie in no class folder.*move them into one"):
        run_gpq(loose, tmp_path / "run", *flags)


def test_rankings_are_float32_where_the_trunk_is_not(finished_gpq):
    """Evaluations run under autocast."""
    codebooks = load_trained(finished_gpq).model.quantizer.codebooks.detach()
    query = codebooks[:, :8].transpose(0, 1).flatten(1).contiguous()  # (8, M * d)
    want = lookup_tables(query, codebooks, "inner_product")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lookup_tables(query, codebooks, "inner_product")
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


# --- one codebook ---------------------------------------------------------------------------------

NAMES = [f"{c}/{i}.png" for c in "ab" for i in range(13)]


def call(*words):
    search.main([str(word) for word in words])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), NAMES)


@pytest.fixture(scope="module")
def index(tmp_path_factory, images, finished_gpq):
    folder = tmp_path_factory.mktemp("built") / "index"
    words = [f"--checkpoint={finished_gpq}", f"--images={images}", f"--index={folder}"]
    call("build", *words, "--device=cpu", "--num_workers=2")
    return folder


def as_batch(images, names):
    return torch.from_numpy(np.stack([to_array(Image.open(images / n), 32) for n in names])) / 255


def test_index_export_and_model_have_one_codebook(index, images, finished_gpq, tmp_path):
    found, model = open_index(index), load_trained(finished_gpq).model
    words = model.quantizer.codebooks.detach().numpy()
    assert words.shape == (3, 16, 4)
    assert (found.codebooks == words).all()
    call("export", f"--index={index}", "--to=faiss", f"--output={tmp_path / 'x.faiss'}")
    exported = faiss.read_index(str(tmp_path / "x.faiss"))
    assert (faiss.vector_to_array(exported.pq.centroids) == words.ravel()).all()

    # as training builds it from words and prototypes, written out
    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    z = model.quantizer.words.detach().numpy().astype(np.float64)  # (M, K, d)
    p = model.quantizer.prototypes.detach().numpy().astype(np.float64).reshape(10, 3, 4)
    for m in range(3):
        sim = np.exp(20 * z[m] @ unit(p[:, m]).T)  # (K, classes)
        built = unit(sim / sim.sum(axis=1, keepdims=True) @ unit(p[:, m]))
        assert built == pytest.approx(words[m], abs=1e-5)  # float32, exponents up to 20

    codes = model.encode(as_batch(images, found.paths)).numpy()
    assert (found.codes() == codes).all()
    x = model.describe(as_batch(images, found.paths)).detach().reshape(-1, 3, 4)
    sim = torch.einsum("nmd,mkd->nmk", x, torch.from_numpy(words))
    assert (sim.argmax(dim=2).numpy() == codes).all()
    assert len(np.unique(codes, axis=0)) > 5  # or this test would say little
    assert (faiss.vector_to_array(exported.codes).reshape(found.packed.shape) == found.packed).all()


def test_a_query_ranks_by_inner_product(index, images, finished_gpq, capsys):
    model, found = load_trained(finished_gpq).model, open_index(index)
    x = model.describe(as_batch(images, NAMES[:1])).detach().double().reshape(3, 4)
    words, codes = found.codebooks.astype(np.float64), found.codes()
    by_hand = {
        path: sum(1 - float(x[m].numpy() @ words[m, codes[i, m]]) for m in range(3))
        for i, path in enumerate(found.paths)
    }
    capsys.readouterr()
    ask = ["query", f"--index={index}", f"--image={images / NAMES[0]}", "--json", "--device=cpu"]
    for flags, engine in (
        ([], "FAISS IndexPQ, exact inner product"),
        (["--engine=own"], "own exact search, inner_product"),
        (["--distance=squared_l2"], "FAISS IndexPQ, exact squared L2"),
    ):
        call(*ask, "--k=100", *flags)
        answer = json.loads(capsys.readouterr().out)
        twice = "--distance=squared_l2" in flags  # ||x - c||^2 = 2 (1 - <x, c>) at length 1
        assert answer["distance"] == ("squared_l2" if twice else "inner_product")
        assert answer["engine"].startswith(engine)
        results = answer["queries"][0]["results"]
        assert sorted(hit["path"] for hit in results) == sorted(NAMES)
        for hit in results:
            # float32 of sums of 12 products
            want = by_hand[hit["path"]] * (2 if twice else 1)
            assert hit["distance"] == pytest.approx(want, abs=1e-5)
        assert [hit["distance"] for hit in results] == sorted(hit["distance"] for hit in results)


def test_info_verify_and_export_know_gpq(index, finished_gpq, tmp_path, capsys):
    identity = load_trained(finished_gpq).identity
    call("info", f"--index={index}")
    out = capsys.readouterr().out
    assert "12 bits: M=3 codebooks, K=16 words, d=4" in out
    assert f"GPQ {identity[:16]}, images of 32 pixels" in out
    call("verify", f"--index={index}")
    assert f"is whole: {len(NAMES)} images" in capsys.readouterr().out
    call("export", f"--index={index}", "--to=faiss-ivfpq", f"--output={tmp_path / 'x'}")
    assert "codewords have length 1" in capsys.readouterr().out


def test_an_index_is_of_one_model(index, images, finished, finished_gpq):
    ask = ["query", f"--index={index}", f"--image={images / NAMES[0]}", "--device=cpu"]
    call(*ask, f"--checkpoint={finished_gpq}")
    with pytest.raises(UserError, match=r"--checkpoint: .*codes of one model mean nothing to anot"):
        call(*ask, f"--checkpoint={finished}")
