"""scripts/baselines.py: rows, resuming, tables, and what it says to bad input."""

import json
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from args import flags_of_run
from data.cifar10 import load_cifar10
from data.datasets import load_dataset
from models import build_gpq, build_spq
from utils.errors import UserError
from utils.evaluation import RetrievalEvaluation, describe_images
from utils.trained import Trained, load_trained, save_trained

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import baselines

SHAPE = {"arch": "resnet18", "width": 8, "quantizer": "soft", "N_words": 16, "L_word": 4}
ARGS = {**SHAPE, "N_books": 4, "soft_quantization_scale": 5.0, "input_size": 32}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """FAISS's threads wait for one another by spinning: on small data that is all they do."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def make_run(folder, M=4, K=16):
    """A model of M codebooks with the weights that it starts with."""
    torch.manual_seed(M)
    model = build_spq("resnet18", 8, "soft", M=M, K=K, d=4, alpha=5.0).eval()
    folder.mkdir()
    args = ARGS | {"N_books": M, "N_words": K}
    save_trained(folder / "model.pt", Trained(model, "SPQ", args, ""))
    return folder


@pytest.fixture(scope="module")
def run16(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run16")


@pytest.fixture
def call(small_set, run16, tmp_path):
    """The command on the small set; what its JSON file holds afterwards."""

    def run(*flags, runs=(run16,), output=tmp_path / "out"):
        words = [*map(str, runs), f"--data_dir={small_set}", f"--output={output}", *flags]
        baselines.main(words)
        return json.loads((output / "baselines.json").read_text())

    return run


@pytest.fixture
def watched(monkeypatch):
    """What the methods are fitted on, in the order of fitting."""
    seen, fit = [], baselines.fit

    def watching(method, space, bits, seed):
        seen.append((method, space.db, bits, seed))
        return fit(method, space, bits, seed)

    monkeypatch.setattr(baselines, "fit", watching)
    return seen


def test_every_method_on_every_feature(call, run16, watched, small_set, tmp_path, capsys):
    found = call("--bits=16")
    names = {(row["features"], row["method"]) for row in found["rows"]}
    wanted = {(f, m) for f in baselines.FEATURES for m in baselines.METHODS}
    assert names == wanted - {("unit", "cosine"), ("pooled_unit", "cosine")} | {
        ("descriptors", "spq")
    }
    for row in found["rows"]:
        uncompressed = row["method"] in ("exact", "cosine")
        assert row["code_bits"] == (32 * row["dimensions"] if uncompressed else 16)
        # classes of one colour each: pixels tell them apart, and so do the features of a network
        # that was never trained; only its codebooks lie where no descriptor is (chance is .1)
        assert row["mAP@1000"] > (0.1 if row["method"] == "spq" else 0.4), row
        assert (row["queries"], row["queries_without_relevant"]) == (60, 0)
    assert found["versions"]["faiss-cpu"]

    # fitted on the database alone: never a query among the items
    (db, _), (query, _) = load_cifar10(small_set)
    model = load_trained(run16).model
    features = {
        3072: [images.flatten(1).numpy() / 255 for images in (db, query)],
        16: [describe_images(model, images, 32).numpy() for images in (db, query)],
    }
    checked = 0
    for _, space, bits, _ in watched:
        assert (len(space), bits) == (300, 16)
        if space.shape[1] in features and not np.allclose(np.linalg.norm(space, axis=1), 1):
            np.testing.assert_allclose(space, features[space.shape[1]][0], atol=1e-5)
            checked += 1
    assert checked == 8 + 8

    table = (tmp_path / "out" / "table.md").read_text()
    printed = capsys.readouterr().out
    spq = next(row["mAP@1000"] for row in found["rows"] if row["method"] == "spq")
    for text in (table, printed):
        assert "| features | method | ranked by | 16 bits |\n" in text
        assert f"| descriptors | SPQ | asymmetric L2 | {f'{spq:.4f}'[1:]} |\n" in text
    one = next(row["mAP@1000"] for row in found["rows"] if row["bits"] is None)
    assert f"| pixels | uncompressed | L2 |{f' {one:.4f} |'.replace('0.', '.')}\n" in table
    assert "mAP@all" not in table


def test_spq_is_scored_as_its_own_evaluation_scores_it(call, run16, small_set):
    row = call("--methods=spq", "--features=descriptors", "--bits=16")["rows"][0]
    train, test = load_cifar10(small_set)
    evaluation = RetrievalEvaluation(test, train, 32, 1000, ["squared_l2"])
    want = evaluation(load_trained(run16).model)[0]
    for name in ("mAP@1000", "mAP@1000_all_relevant", "precision@10", "precision@100"):
        assert row[name] == pytest.approx(want[name], abs=1e-9), name


def test_a_killed_run_goes_on_where_it_was(call, watched, tmp_path):
    flags = ("--methods=spq,lsh,pq", "--features=descriptors", "--bits=16")
    whole = call(*flags)
    path = tmp_path / "out" / "baselines.json"
    path.write_text(json.dumps(whole | {"rows": whole["rows"][:-1]}))
    watched.clear()
    again = call(*flags)
    assert [method for method, *_ in watched] == ["pq"]  # the last row; the others are kept
    assert again["rows"][:-1] == whole["rows"][:-1]
    assert again["rows"][-1]["mAP@1000"] == whole["rows"][-1]["mAP@1000"]
    watched.clear()
    more = call(*flags, "--seeds=2")  # adds the second seed of the random ones
    assert [(method, seed) for method, _, _, seed in watched] == [("lsh", 1), ("pq", 1)]
    assert len(more["rows"]) == 5
    watched.clear()
    call(*flags, "--overwrite")
    assert len(watched) == 2


def test_rows_of_other_limits_or_models_are_not_mixed(call, tmp_path):
    flags = ("--methods=pq", "--features=descriptors", "--bits=16")
    call(*flags, "--limit_db=200", "--limit_query=20")
    with pytest.raises(UserError, match=r"rows of limit_db=200, limit_query=20; take another"):
        call(*flags)
    assert call(*flags, "--overwrite")["rows"][0]["queries"] == 60
    other = make_run(tmp_path / "other")
    state = torch.load(other / "model.pt")
    state["model"]["quantizer.codebooks"] += 1
    torch.save(state, other / "model.pt")
    with pytest.raises(UserError, match="rows of another 16-bit model"):
        call(*flags, runs=(other,))
    (tmp_path / "out" / "baselines.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged; --overwrite begins anew"):
        call(*flags)


def test_limits_cut_database_and_queries(call, watched):
    row = call("--methods=pq", "--features=pixels", "--limit_db=150", "--limit_query=30",
               "--bits=16")["rows"][0]  # fmt: skip
    assert row["queries"] == 30
    assert len(watched[0][1]) == 150


def test_table_has_mean_and_deviation_over_seeds():
    row = {"features": "pixels", "method": "lsh", "bits": 16}
    rows = [row | {"seed": seed, "mAP@1000": value} for seed, value in ((0, 0.2), (1, 0.3))]
    assert baselines.cell(rows, "mAP@1000") == ".2500 ± .0707"
    assert baselines.cell(rows[:1], "mAP@1000") == ".2000"
    assert baselines.cell([], "mAP@1000") == ""


def test_table_has_a_column_for_each_length():
    row = {"features": "pixels", "method": "pq", "name": "PQ", "distance": "L2", "seed": 0}
    rows = [row | {"bits": bits, "mAP@1000": bits / 100} for bits in (32, 12)]
    whole = row | {"method": "exact", "name": "uncompressed", "bits": None, "mAP@1000": 0.5}
    assert baselines.headline([*rows, whole]).splitlines() == [
        "| features | method | ranked by | 12 bits | 32 bits |",
        "|---|---|---|---|---|",
        # pixels have no bits when they are not compressed: one measurement, in every column
        "| pixels | uncompressed | L2 | .5000 | .5000 |",
        "| pixels | PQ | L2 | .1200 | .3200 |",
    ]
    alone = baselines.headline([whole]).splitlines()[0]
    assert alone.endswith("| 16 bits | 32 bits | 64 bits |")
    ranked = [entry | {"mAP@all": 0.25} for entry in rows]
    assert baselines.headline(ranked).splitlines()[-1] == "| pixels | PQ | L2 | .2500 | .2500 |"
    assert baselines.definition(ranked) == "mAP@all, AP over the whole ranking"
    assert baselines.definition(rows) == "mAP@1000, AP over the relevant images found"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--methods=pq,hnsw", "unknown method 'hnsw'; known: spq, gpq, exact, cosine, lsh"),
        ("--features=gist", "unknown features 'gist'; known: pixels, descriptors"),
        ("--bits=40", "unknown bits '40'; known: 12, 16, 24, 32, 48, 64"),
        ("--limit_db=5", "must be a whole number at least 128"),
    ],
)
def test_bad_flags_are_named_in_one_line(flag, message, capsys):
    with pytest.raises(SystemExit) as stop:
        baselines.main([flag])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_run_folders_are_named(call, run16, tmp_path):
    with pytest.raises(UserError, match="nowhere: is no folder"):
        call(runs=(tmp_path / "nowhere",))
    shutil.copytree(run16, tmp_path / "copy")
    with pytest.raises(UserError, match="a second model of 16 bits"):
        call(runs=(run16, tmp_path / "copy"))
    with pytest.raises(UserError, match="no RUN_DIR has a model of 32, 64 bits"):
        call("--bits=16,32,64")
    four = make_run(tmp_path / "four", M=8, K=4)
    with pytest.raises(UserError, match="has 16 bits of K = 4 codewords"):
        call("--bits=16", runs=(four,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="RUN_DIR"):
        call(runs=(tmp_path / "empty",))


# --- a run of GPQ -------------------------------------------------------------------------------


@pytest.fixture
def gpq12(small_set, tmp_path):
    """A GPQ network of 12 bits, as it was drawn, of a run with --validate: a tenth of the images
    without labels are its queries."""
    torch.manual_seed(0)
    model = build_gpq("resnet18", 8, M=3, K=16, d=4, classes=10).eval()
    args = ARGS | {"N_books": 3, "quantizer": "prototype", "stem": "cifar", "n_classes": 10}
    args |= {"dataset": "cifar10", "protocol": "gpq", "data_dir": str(small_set)}
    args |= {"validate": True, "labels_per_class": 2}
    (tmp_path / "gpq12").mkdir()
    save_trained(tmp_path / "gpq12" / "model.pt", Trained(model, "GPQ", args, ""))
    return tmp_path / "gpq12"


def test_gpq_is_scored_as_its_own_evaluation_scores_it(call, gpq12, watched, capsys):
    found = call("--features=descriptors", "--methods=spq,gpq,exact,pq", runs=(gpq12,))
    assert [row["method"] for row in found["rows"]] == ["gpq", "exact", "pq"]
    assert {row["bits"] for row in found["rows"]} == {12}  # the run's, without a word
    row = found["rows"][0]
    trained = load_trained(gpq12)
    data = load_dataset(flags_of_run("GPQ", trained.args), torch.device("cpu"), semi=True)
    assert row["queries"] == 34  # of 324 + 10 images
    evaluate = RetrievalEvaluation(data.query, data.db, 32, "all", ["inner_product"])
    want = evaluate(trained.model)[0]
    for name in ("mAP@all", "precision@10", "precision@100"):
        # half of squared L2 is rounded otherwise: what is as near may change places
        assert row[name] == pytest.approx(want[name], abs=1e-3), name
    # the others are given the descriptors that GPQ quantizes, of sub-vectors of length 1
    lengths = np.linalg.norm(watched[-1][1].reshape(-1, 3, 4), axis=2)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    figure = f"{want['mAP@all']:.4f}".removeprefix("0")
    assert f"| descriptors | GPQ | asymmetric L2 | {figure} |" in capsys.readouterr().out


def test_a_run_of_gpq_is_measured_alone(call, gpq12, run16, capsys):
    with pytest.raises(UserError, match="RUN_DIR: one of them is of GPQ; name that one alone"):
        call("--features=descriptors", runs=(run16, gpq12))
    with pytest.raises(UserError, match="--features: the pixels of this run's images"):
        call(runs=(gpq12,))
    call("--features=descriptors", "--methods=lsh,cosine", runs=(gpq12,))
    assert "left out: lsh at 12 bits, whose codes are whole bytes" in capsys.readouterr().out
