"""make_figures.py on a real small run: every picture, its numbers, its faults."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image
from small_cifar import log_of

from data.cifar10 import load_cifar10
from scripts import make_figures
from utils.analysis import codeword_usage, perplexity
from utils.checkpoint import LAST
from utils.cli import run_main
from utils.errors import UserError
from utils.evaluation import encode_images
from utils.trained import load_trained, save_trained


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr("utils.figures.PNG_DPI", 50)  # test_run_figures.py looks at the pixels


def make(run_dir, small_set, output_dir, *flags):
    make_figures.main(
        [str(run_dir), f"--data_dir={small_set}", f"--output_dir={output_dir}", *flags]
    )
    return json.loads((output_dir / "figures.json").read_text())


def test_every_picture_in_both_formats_with_the_numbers_of_the_run(
    finished, small_set, tmp_path, monkeypatch, capsys
):
    embedded = []
    real = make_figures.embed

    def embed(x, seed):
        embedded.append(x)
        return real(x, seed)

    monkeypatch.setattr(make_figures, "embed", embed)
    found = make(finished, small_set, tmp_path, "--points=40", "--pairs=5000")

    pictures = {f"{name}.{kind}" for name in make_figures.PICTURES for kind in ("png", "svg")}
    assert {p.name for p in tmp_path.iterdir()} == pictures | {"figures.json"}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
    said = capsys.readouterr().out
    assert all(f"{tmp_path / name}" in said for name in pictures)

    for logged in log_of(finished, "eval")[-2:]:  # of either distance, as the training scored it
        drawn = found["precision_recall"][logged["distance"]]
        for name in ("mAP@all", "mAP@50", "mAP@50_all_relevant", "pr_curve"):
            assert drawn[name] == logged[name]
        curve = found["precision_at_n"][logged["distance"]]
        assert (curve["rank"][-1], curve["precision"][-1]) == (50, logged["precision@50"])
        assert curve["precision"][curve["rank"].index(10)] == logged["precision@10"]
    assert found["precision_at_n"]["chance"] == pytest.approx(0.1)
    assert [e["step"] for e in found["learning_curve"]["mAP@50"]] == [15, 30]

    model = load_trained(finished).model
    db = load_cifar10(small_set)[0]
    codes = encode_images(model, db.images, 32)
    want = perplexity(codeword_usage(codes, 16)).tolist()
    assert found["codeword_usage"]["perplexity"] == pytest.approx(want)
    assert found["codeword_usage"]["items"] == 300
    by_class = torch.tensor(found["codeword_classes"]["codebook_1"])
    assert by_class.sum(dim=1).tolist() == codes[:, 0].long().bincount(minlength=16).tolist()
    assert by_class.sum(dim=0).tolist() == 10 * [30]
    assert " ".join(f"{p:.2f}" for p in want) in said

    # what the second map shows is the nearest codeword of each slice of what the first shows
    x, z = embedded
    assert x.shape == z.shape == (40, 16)
    words = model.quantizer.codebooks.detach()  # (M, K, d)
    for m, part in enumerate(x.reshape(40, 4, 4).unbind(dim=1)):
        nearest = torch.cdist(part.double(), words[m].double()).argmin(dim=1)
        assert torch.equal(z.reshape(40, 4, 4)[:, m], words[m][nearest])

    pairs = found["distance_histogram"]
    assert pairs["relevant"]["pairs"] + pairs["irrelevant"]["pairs"] == 5000
    assert len(found["retrieval"]["queries"]) == 10
    assert all(len(row) == 10 for row in found["retrieval"]["items"])


def test_a_gpq_run_is_drawn_on_its_own_split(finished_gpq, small_set, tmp_path, monkeypatch):
    embedded = []
    real = make_figures.embed

    def embed(x, seed):
        embedded.append(x)
        return real(x, seed)

    monkeypatch.setattr(make_figures, "embed", embed)
    found = make(finished_gpq, small_set, tmp_path, "--pairs=500")
    for name in make_figures.PICTURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
        ElementTree.parse(tmp_path / f"{name}.svg")

    # GPQ's protocol by hand: by class and then by position every 60th of 360 is a query, the first
    # three others of a class are labelled, and the rest is the database
    pool = [pair for part in load_cifar10(small_set) for pair in zip(*part, strict=True)]
    order = sorted(range(360), key=lambda i: (int(pool[i][1]), i))
    queries = set(order[::60])
    roles = {c: [i for i in order if pool[i][1] == c and i not in queries] for c in range(10)}
    db = sorted(i for rows in roles.values() for i in rows[3:])
    queries = sorted(queries)
    model = load_trained(finished_gpq).model
    x = model.describe(torch.stack([pool[i][0] for i in queries]) / 255).detach()
    codes = encode_images(model, torch.stack([pool[i][0] for i in db]), 32).long()
    words = model.quantizer.codebooks.detach()  # (M, K, d)

    assert found["tsne"]["points"] == 6
    drawn, quantized = embedded
    # in an order of their own; float32 of a network on a batch of another layout
    gap = torch.cdist(drawn.double(), x.double())
    assert sorted(gap.argmin(dim=1).tolist()) == list(range(6))
    assert gap.min(dim=1).values.max() < 1e-4
    for m, part in enumerate(drawn.reshape(6, 3, 4).unbind(dim=1)):
        nearest = (part @ words[m].T).argmax(dim=1)  # of largest inner product
        assert torch.equal(quantized.reshape(6, 3, 4)[:, m], words[m][nearest])

    # the six queries are of six classes
    shown = found["retrieval"]
    assert len({int(pool[i][1]) for i in queries}) == 6
    assert sorted(shown["queries"]) == list(range(6))
    z = words[torch.arange(3), codes]  # (N, M, d)
    for q, items, right in zip(shown["queries"], shown["items"], shown["right"], strict=True):
        dist = (1 - torch.einsum("md,nmd->nm", x[q].reshape(3, 4), z)).sum(dim=1)
        assert len(items) == 10
        assert dist[items].tolist() == pytest.approx(dist.sort().values[:10].tolist(), abs=1e-5)
        label = pool[queries[q]][1]
        assert right == sum(int(pool[db[i]][1] == label) for i in items)
    assert found["codeword_usage"]["items"] == len(db) == 324
    (logged,) = log_of(finished_gpq, "eval")[-1:]
    drawn = found["precision_recall"]["inner_product"]
    assert drawn["mAP@all"] == logged["mAP@all"]
    assert found["learning_curve"]["distance"] == "inner_product"
    assert [e["step"] for e in found["learning_curve"]["mAP@all"]] == [9, 18]
    assert set(found["precision_at_n"]) == {"inner_product", "chance"}


def test_weights_alone_give_the_same_pictures_and_no_log_no_learning_curve(
    finished, small_set, tmp_path, capsys
):
    bare = tmp_path / "bare"
    bare.mkdir()
    save_trained(bare / "model.pt", load_trained(finished))
    names = ["codeword_usage", "precision_at_n"]
    flag = f"--only=learning_curve,{','.join(names)}"
    want = make(finished, small_set, tmp_path / "whole", flag)
    capsys.readouterr()
    got = make(bare, small_set, tmp_path / "figures", flag)
    assert "learning_curve: left out" in capsys.readouterr().out
    assert not list((tmp_path / "figures").glob("learning_curve*"))
    assert want.pop("learning_curve")
    assert got == want
    for name in names:
        for kind in ("png", "svg"):
            file = f"{name}.{kind}"
            whole, alone = tmp_path / "whole" / file, tmp_path / "figures" / file
            assert whole.read_bytes() == alone.read_bytes()


def test_only_adds_to_the_numbers_unless_they_are_of_other_images(finished, small_set, tmp_path):
    make(finished, small_set, tmp_path, "--only=codeword_usage")
    both = make(finished, small_set, tmp_path, "--only=distance_histogram", "--pairs=100")
    assert {"codeword_usage", "distance_histogram"} <= both.keys()
    few = make(finished, small_set, tmp_path, "--only=codeword_usage", "--limit_db=20")
    assert few.keys() == {"source", "codeword_usage"}
    assert few["codeword_usage"]["items"] == 20
    (tmp_path / "figures.json").write_text("[1, 2")  # cut off
    again = make(finished, small_set, tmp_path, "--only=codeword_usage", "--limit_db=20")
    assert again == few


def test_the_learning_curve_needs_no_images_and_goes_beside_the_run(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    make_figures.main([str(run), "--only=learning_curve", "--data_dir=/no/such/folder"])
    assert (run / "figures" / "learning_curve.svg").is_file()


def test_top_n_is_the_run_s_unless_given(finished, small_set, tmp_path):
    found = make(finished, small_set, tmp_path, "--only=precision_at_n", "--Top_N=20")
    assert found["precision_at_n"]["l2"]["rank"][-1] == 20


def test_one_query_among_few_items(finished, small_set, tmp_path):
    # one relevant item or none, no second vector for a map
    found = make(finished, small_set, tmp_path, "--limit_query=1", "--limit_db=3", "--pairs=50")
    assert found["tsne"]["points"] == 1
    assert set(make_figures.PICTURES) <= found.keys()
    json.loads(json.dumps(found, allow_nan=False))


def test_a_missing_run_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: make_figures.main(["runs/nowhere"]))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "RUN_DIR=runs/nowhere: no such folder; allowed is" in said


def test_a_file_an_empty_folder_and_a_damaged_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"RUN_DIR=.*holds neither checkpoint_last\.pt nor"):
        make_figures.main([str(tmp_path)])
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(UserError, match=r"RUN_DIR=.*checkpoint_last.pt: is not a checkpoint, or"):
        make_figures.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"RUN_DIR=.*: is a file; allowed is"):
        make_figures.main([str(tmp_path / LAST)])


def test_a_missing_data_set_and_an_output_that_is_a_file_are_named(finished, tmp_path):
    output = f"--output_dir={tmp_path / 'figures'}"
    with pytest.raises(UserError, match=r"--data_dir=.*CIFAR-10 is not there.*--if_download"):
        make_figures.main([str(finished), f"--data_dir={tmp_path}", output, "--only=tsne"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir=.*file: cannot be made"):
        make_figures.main([str(finished), f"--output_dir={tmp_path / 'file'}"])


@pytest.mark.parametrize("names", ["tsn", "tsne,", "tsne,histogram"])
def test_only_refuses_a_name_it_does_not_know(names, capsys):
    with pytest.raises(SystemExit) as stop:
        make_figures.main(["runs/any", f"--only={names}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "no such picture; allowed are learning_curve, precision_recall" in said


@pytest.mark.parametrize("flag", ["--points=0", "--pairs=x", "--seed=-1", "--Top_N=0"])
def test_numbers_are_checked(flag):
    with pytest.raises(SystemExit) as stop:
        make_figures.main(["runs/any", flag])
    assert stop.value.code == 2
