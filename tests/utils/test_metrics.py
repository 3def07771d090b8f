"""Metrics: lists worked by hand, scikit-learn as oracle, ties, empty and short cases."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from models import GPQ, PrototypeQuantizer, build_trunk
from utils import retrieval
from utils.evaluation import RetrievalEvaluation
from utils.metrics import (
    ap_definition,
    average_precision,
    evaluate_rankings,
    evaluate_retrieval,
    relevance,
    tie_order,
)
from utils.retrieval import adc_distances


def rel(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_average_precision_by_hand():
    # relevant at ranks 1, 3, 4: precisions 1/1, 2/3, 3/4
    total = 1 + 2 / 3 + 3 / 4
    lists = rel([1, 0, 1, 1, 0])
    assert average_precision(lists).item() == pytest.approx(total / 3)
    assert average_precision(lists, torch.tensor([6])).item() == pytest.approx(total / 6)


def test_average_precision_of_several_lists():
    got = average_precision(rel([0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]))
    assert got.tolist() == pytest.approx([1 / 3, 1, 0, (1 / 2 + 2 / 3) / 2])


def test_average_precision_equals_scikit_learn():
    scores = torch.rand(20, 50)
    lists = torch.rand(20, 50) < 0.3
    order = scores.argsort(dim=1, descending=True)
    got = average_precision(lists.gather(1, order))
    for q in range(20):
        want = average_precision_score(lists[q].numpy(), scores[q].numpy())
        assert got[q].item() == pytest.approx(want, abs=1e-12)


def test_relevance_of_classes_and_of_shared_labels():
    assert relevance(torch.tensor([1, 2]), torch.tensor([2, 1, 1])).tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    queries = torch.tensor([[1, 0, 1], [0, 0, 0]])
    items = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 1]])
    want = [[False, True, True], [False, False, False]]
    assert relevance(queries, items).tolist() == want


def make(n_query=12, n_db=80, n_classes=4):
    codebooks = torch.randn(3, 4, 2)
    return {
        "query": torch.randn(n_query, 6),
        "query_labels": torch.randint(0, n_classes, (n_query,)),
        "db_codes": torch.randint(0, 4, (n_db, 3)),  # 64 codes for 80 items: ties
        "db_labels": torch.randint(0, n_classes, (n_db,)),
        "codebooks": codebooks,
    }


def naive_metrics(data, top_n, distance):
    """Straight from the definitions, a query at a time."""
    dist = adc_distances(data["query"], data["db_codes"], data["codebooks"], distance)
    found, relevant, whole, recall, lists = [], [], [], [], []
    for q in range(len(dist)):
        order = sorted(range(dist.shape[1]), key=lambda n: (dist[q, n].item(), n))
        good = [bool(data["db_labels"][n] == data["query_labels"][q]) for n in order]
        total = sum(good)

        def summed(n, good=good):
            return sum(sum(good[: i + 1]) / (i + 1) for i in range(n) if good[i])

        n = min(top_n, len(good))
        hits = sum(good[:n])
        found.append(summed(n) / hits if hits else 0.0)
        relevant.append(summed(n) / total if total else 0.0)
        whole.append(summed(len(good)) / total if total else 0.0)
        lists.append(good)
        recall.append(hits / total if total else 0.0)
    mean = [sum(v) / len(v) for v in (found, relevant, whole, recall)]
    names = [f"mAP@{top_n}", f"mAP@{top_n}_all_relevant", "mAP@all", f"recall@{top_n}"]
    values = dict(zip(names, mean, strict=True))
    for n in (1, 10, top_n):
        values[f"precision@{n}"] = sum(sum(good[:n]) / n for good in lists) / len(lists)
    return values, lists


@pytest.mark.parametrize("distance", ["squared_l2", "l2"])
@pytest.mark.parametrize("top_n", [15, 80])
def test_all_metrics_equal_the_definitions(distance, top_n):
    data = make()
    got = evaluate_retrieval(**data, distance=distance, top_n=top_n)
    values, lists = naive_metrics(data, top_n, distance)
    for name, value in values.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    assert got["queries"] == 12
    curve = got["pr_curve"]
    for i, n in enumerate(curve["rank"]):
        hits = [sum(good[:n]) for good in lists]
        totals = [max(1, sum(good)) for good in lists]
        shares = [h / t for h, t in zip(hits, totals, strict=True)]
        assert curve["precision"][i] == pytest.approx(sum(hits) / n / 12)
        assert curve["recall"][i] == pytest.approx(sum(shares) / 12)


def test_precision_is_given_at_ranks_that_the_database_has():
    got = evaluate_retrieval(**make(), top_n=1000)
    assert {k for k in got if k.startswith("precision@")} == {"precision@1", "precision@10"}
    one = evaluate_retrieval(**make(), top_n=25)
    assert "precision@25" in one


def test_top_n_larger_than_the_database_is_the_whole_ranking():
    got = evaluate_retrieval(**make(), top_n=1000)
    assert got["mAP@1000"] == pytest.approx(got["mAP@all"])
    assert got["mAP@1000_all_relevant"] == pytest.approx(got["mAP@all"])
    assert got["recall@1000"] == pytest.approx(1.0)


def test_queries_without_relevant_items_count_as_zero_and_are_reported():
    data = make()
    without = evaluate_retrieval(**data, top_n=20)
    data["query"] = data["query"].repeat(2, 1)
    data["query_labels"] = torch.cat([data["query_labels"], torch.full((12,), 99)])
    got = evaluate_retrieval(**data, top_n=20)
    assert got["queries_without_relevant"] == 12
    assert without["queries_without_relevant"] == 0
    for name in ("mAP@20", "mAP@20_all_relevant", "mAP@all", "recall@20"):
        assert got[name] == pytest.approx(without[name] / 2)


def test_in_batches_as_in_one(monkeypatch):
    data = make()
    whole = evaluate_retrieval(**data, top_n=15)
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", 1)
    single = evaluate_retrieval(**data, top_n=15)
    for name in ("mAP@15", "mAP@all", "precision@10"):
        assert single[name] == pytest.approx(whole[name], abs=1e-12)


def test_head_of_the_ranking_alone_gives_the_same_head_figures():
    data = make()
    whole = evaluate_retrieval(**data, top_n=15)
    head = evaluate_retrieval(**data, top_n=15, whole_ranking=False)
    assert "mAP@all" not in head
    for name in ("mAP@15", "mAP@15_all_relevant", "precision@10", "recall@15"):
        assert head[name] == pytest.approx(whole[name], abs=1e-12)


def test_multi_label_equals_single_label_on_one_hot_labels():
    data = make()
    single = evaluate_retrieval(**data, top_n=15)
    for side in ("query_labels", "db_labels"):
        data[side] = torch.nn.functional.one_hot(data[side], 4)
    multi = evaluate_retrieval(**data, top_n=15)
    assert multi["mAP@15"] == pytest.approx(single["mAP@15"])
    assert multi["mAP@all"] == pytest.approx(single["mAP@all"])
    assert multi["recall@15"] == pytest.approx(single["recall@15"])


def test_precision_recall_curve_ends_at_full_recall_and_base_rate():
    data = make()
    curve = evaluate_retrieval(**data, top_n=15)["pr_curve"]
    assert curve["rank"][0] == 1
    assert curve["rank"][-1] == 80
    assert curve["recall"][-1] == pytest.approx(1.0)
    rate = relevance(data["query_labels"], data["db_labels"]).double().mean().item()
    assert curve["precision"][-1] == pytest.approx(rate)
    assert curve["recall"] == sorted(curve["recall"])


def test_bad_input_is_named():
    data = make()
    with pytest.raises(ValueError, match="11 labels"):
        evaluate_retrieval(**data | {"query_labels": data["query_labels"][:11]})
    with pytest.raises(ValueError, match="no queries"):
        evaluate_retrieval(
            **data | {"query": data["query"][:0], "query_labels": data["query_labels"][:0]}
        )
    with pytest.raises(ValueError, match="top_n"):
        evaluate_retrieval(**data, top_n=0)
    with pytest.raises(ValueError, match="3 labels, items 4"):
        relevance(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="both be single-label"):
        relevance(torch.zeros(2), torch.zeros(5, 4))


def test_given_rankings_are_scored_as_those_that_it_ranks_itself():
    data = make()
    labels = data["query_labels"], data["db_labels"]
    dist = adc_distances(data["query"], data["db_codes"], data["codebooks"])
    order = dist.sort(dim=1, stable=True).indices
    parts = [(slice(0, 5), order[:5]), (slice(5, 12), order[5:])]
    want = evaluate_retrieval(**data, top_n=15)
    got = evaluate_rankings(parts, *labels, depth=80, top_n=15, whole_ranking=True)
    assert got == {name: value for name, value in want.items() if name != "distance"}
    heads = ((rows, index[:, :15]) for rows, index in parts)
    head = evaluate_rankings(heads, *labels, depth=15, top_n=15)
    assert head["mAP@15"] == want["mAP@15"]
    assert "mAP@all" not in head


def test_given_rankings_must_hold_every_query_and_go_far_enough():
    labels = torch.zeros(4), torch.zeros(30)
    index = torch.arange(10).repeat(4, 1)
    whole = [(slice(0, 4), index)]
    assert evaluate_rankings(whole, *labels, depth=10, top_n=10)["mAP@10"] == 1.0
    with pytest.raises(ValueError, match="rankings of 10 items are too short or too long for 30"):
        evaluate_rankings(whole, *labels, depth=10, top_n=20)
    with pytest.raises(ValueError, match="too short or too long"):
        evaluate_rankings(whole, *labels, depth=10, top_n=10, whole_ranking=True)
    with pytest.raises(ValueError, match=r"rankings of shape \(4, 9\)"):
        evaluate_rankings([(slice(0, 4), index[:, 1:])], *labels, depth=10, top_n=10)
    with pytest.raises(ValueError, match="4 queries, but rankings of 3"):
        evaluate_rankings([(slice(0, 3), index[:3])], *labels, depth=10, top_n=10)


# --- the whole ranking --------------------------------------------------------------------------


def without_ties():
    """Every code once, so that scikit-learn, which takes ties together, agrees."""
    data = make(n_db=64)
    words = torch.arange(4)
    codes = torch.cartesian_prod(words, words, words)[torch.randperm(64)]
    return data | {"db_codes": codes}


@pytest.mark.parametrize("distance", ["squared_l2", "l2"])
def test_the_whole_ranking_s_map_equals_scikit_learn(distance):
    data = without_ties()
    got = evaluate_retrieval(**data, distance=distance, top_n="all")
    dist = adc_distances(data["query"], data["db_codes"], data["codebooks"], distance)
    good = relevance(data["query_labels"], data["db_labels"]).numpy()
    want = [average_precision_score(good[q], -dist[q].numpy()) for q in range(12)]
    assert got["mAP@all"] == pytest.approx(sum(want) / 12, abs=1e-12)


@pytest.mark.parametrize("n_db", [80, 100, 10, 1])
def test_all_is_what_is_said_of_the_whole_ranking_and_nothing_else(n_db):
    data = make(n_db=n_db)
    whole, got = (evaluate_retrieval(**data, top_n=n) for n in (n_db, "all"))
    cutoffs = [n for n in (1, 10, 100) if n <= n_db]
    names = {f"precision@{n}" for n in cutoffs} | {"mAP@all", "pr_curve"}
    assert got.keys() == names | {"distance", "queries", "queries_without_relevant"}
    assert got == {name: whole[name] for name in got}
    # what is left out says the same, or is known
    assert whole[f"mAP@{n_db}"] == pytest.approx(got["mAP@all"], abs=1e-12)
    with_one = (relevance(data["query_labels"], data["db_labels"]).sum(1) > 0).double().mean()
    assert whole[f"recall@{n_db}"] == pytest.approx(with_one.item())
    assert evaluate_retrieval(**data, top_n=5, whole_ranking=True)["mAP@all"] == got["mAP@all"]
    assert evaluate_retrieval(**data, top_n="all", whole_ranking=False) == got


def test_a_figure_says_which_ap_it_is():
    assert ap_definition(1000) == "AP over the relevant images found in the top 1000"
    assert ap_definition("all") == "AP over the whole ranking"


def test_a_database_that_is_sorted_by_class_has_no_advantage():
    N, Q = 400, 100
    sides = [(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n) * 4 // n) for n in (Q, N)]
    evaluate = RetrievalEvaluation(*sides, 8, N, ["squared_l2"])
    # all items have one code: every ranking is the order of ties
    codes, codebooks = torch.zeros(N, 2, dtype=torch.uint8), torch.randn(2, 4, 3)
    (found,) = evaluate.score(torch.randn(Q, 6), codes, codebooks)
    chance = found["precision@400"]
    assert found["precision@100"] == pytest.approx(chance, abs=0.02)
    # sorted by class, the query's own class would come first, or last
    first = evaluate_retrieval(torch.randn(Q, 6), sides[0][1], codes, sides[1][1], codebooks)
    assert first["mAP@all"] > 1.5 * found["mAP@all"]


@pytest.mark.parametrize(
    "distances", [["inner_product"], ("squared_l2", "inner_product", "l2"), ("l2", "squared_l2")]
)
def test_a_model_is_scored_by_each_distance_in_their_order(distances):
    model = GPQ(build_trunk("resnet18", 4), PrototypeQuantizer(3, 4, 2, classes=3)).train()
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 3, (50,))
    sides = (images[:10], labels[:10]), (images[10:], labels[10:])
    evaluate = RetrievalEvaluation(*sides, 16, "all", distances)
    found = evaluate(model)
    assert [entry["distance"] for entry in found] == list(distances)
    assert model.training
    x, codes = evaluate.encoded
    codebooks = model.quantizer.codebooks.detach()
    order = tie_order(40)
    db = codes[order], labels[10:][order]
    for entry, distance in zip(found, distances, strict=True):
        want = evaluate_retrieval(x, labels[:10], *db, codebooks, distance, "all")
        assert entry == {"code_bits": 6.0} | want
    # codewords and sub-vectors have length 1: half of squared L2 ranks as it does, but for rounding
    if len(found) == 3:
        assert found[0]["mAP@all"] == pytest.approx(found[1]["mAP@all"], abs=1e-3)
