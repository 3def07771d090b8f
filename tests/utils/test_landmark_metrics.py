"""The revisited protocol: lists worked by hand, and its definition in plain loops."""

import math

import numpy as np
import pytest
import torch

from utils.landmark_metrics import evaluate_revisited

SETUPS = ("easy", "medium", "hard")


def truth(easy=(), hard=(), junk=()):
    return {"easy": np.array(easy), "hard": np.array(hard), "junk": np.array(junk)}


def one(ranking, ks=(1, 5, 10), n_db=None, **lists):
    return evaluate_revisited(np.array([ranking]), [truth(**lists)], ks, n_db)


def test_trapezoids_by_hand():
    # positives 7 and 2 at ranks 0 and 3: (1 + 1) / 2 and (1/3 + 2/4) / 2, half of each
    got = one([7, 0, 1, 2, 3, 4, 5, 6], easy=[7, 2])
    assert got["easy"]["mAP"] == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    # not first: (0/1 + 1/2) / 2
    assert one([0, 1, 2], easy=[1])["easy"]["mAP"] == pytest.approx(1 / 4)
    assert one([0, 1, 2], easy=[2, 1, 0])["easy"]["mAP"] == 1
    # the plain average of precisions would be (1 + 2/4) / 2
    assert got["easy"]["mAP"] != pytest.approx(3 / 4)


def test_the_three_setups_by_hand():
    # ranks of    easy 3: 2, 5: 5   hard 1: 0   junk 0: 1, 4: 4   negative 2: 3
    got = one([1, 0, 3, 2, 4, 5], easy=[3, 5], hard=[1], junk=[0, 4])
    # easy, without 1, 0 and 4: 3, 2, 5 -> ranks 0 and 2
    assert got["easy"]["mAP"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    # medium, without 0 and 4: 1, 3, 2, 5 -> ranks 0, 1, 3
    assert got["medium"]["mAP"] == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    # hard, without junk and easy: 1, 2 -> rank 0
    assert got["hard"]["mAP"] == 1
    assert [got[setup]["mP@1"] for setup in SETUPS] == [1, 1, 1]
    # k' is the last positive's rank from 1: 3, 4, 1
    assert [got[setup]["mP@5"] for setup in SETUPS] == pytest.approx([2 / 3, 3 / 4, 1])


def test_precision_at_k_by_hand():
    # positives at ranks 1, 2 and 6, from 0
    got = one([9, 0, 1, 8, 7, 6, 2, 5, 4, 3], ks=(1, 2, 3, 6, 7, 10, 1000), easy=[0, 1, 2])["easy"]
    want = {1: 0, 2: 1 / 2, 3: 2 / 3, 6: 2 / 6, 7: 3 / 7, 10: 3 / 7, 1000: 3 / 7}
    assert {k: got[f"mP@{k}"] for k in want} == pytest.approx(want)
    assert got["P@k"].tolist() == [pytest.approx(list(want.values()))]
    # one positive, found first, is all there is to find
    assert one([2, 0, 1], easy=[2])["easy"]["mP@10"] == 1


def test_junk_leaves_no_gap():
    """A ranking with junk is worth what the ranking without it is."""
    plain = one([3, 0, 1, 2, 4], easy=[0, 2], n_db=9)["easy"]
    for ranking in ([8, 7, 6, 5, 3, 0, 1, 2, 4], [3, 8, 0, 7, 1, 6, 2, 5, 4]):
        got = one(ranking, easy=[0, 2], junk=[5, 6], hard=[7, 8])["easy"]
        assert got["mAP"] == plain["mAP"] and got["mP@5"] == plain["mP@5"]
    all_junk = one([8, 7, 6, 5, 3, 0, 1, 2, 4], easy=[0], junk=[1, 2, 3, 4, 5, 6, 7, 8])["easy"]
    assert all_junk["mAP"] == 1 and all_junk["mP@1"] == 1


def test_queries_without_positives_do_not_count():
    ranks = np.array([[0, 1, 2, 3]] * 3)
    lists = [truth(easy=[1], junk=[0]), truth(hard=[2]), truth(easy=[3], hard=[0])]
    got = evaluate_revisited(ranks, lists)
    assert np.isnan(got["easy"]["AP"]).tolist() == [False, True, False]
    assert np.isnan(got["hard"]["AP"]).tolist() == [True, False, False]
    assert np.isnan(got["easy"]["P@k"]).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert [got[setup]["queries"] for setup in SETUPS] == [2, 3, 2]
    # 1 after junk is first; 3 after hard 0 is third: (0 + 1/3) / 2
    assert got["easy"]["AP"][[0, 2]].tolist() == pytest.approx([1, 1 / 6])
    assert got["easy"]["mAP"] == pytest.approx((1 + 1 / 6) / 2)
    assert got["easy"]["mP@1"] == pytest.approx(1 / 2)
    nothing = evaluate_revisited(ranks[:1], [truth(junk=[1])])
    assert all(nothing[s]["queries"] == 0 and math.isnan(nothing[s]["mAP"]) for s in SETUPS)
    assert math.isnan(nothing["hard"]["mP@5"])


# --- against the definition -----------------------------------------------------------------------


def by_the_definition(ranking, lists, setup, ks):
    """(AP, [P@k]) of one whole ranking, an image at a time."""
    wanted = {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}[setup]
    positives = {i for name in wanted for i in lists[name].tolist()}
    ignored = {i for name in lists for i in lists[name].tolist()} - positives
    kept = [i for i in ranking.tolist() if i not in ignored]
    if not positives:
        return math.nan, [math.nan] * len(ks)
    area, hits, recall, precision = 0.0, 0, 0.0, 1.0
    for n, image in enumerate(kept, start=1):
        if image in positives:
            before = hits / (n - 1) if n > 1 else 1.0
            hits += 1
            precision = hits / n
            area += (hits / len(positives) - recall) * (before + precision) / 2
            recall = hits / len(positives)
    last = max(n for n, image in enumerate(kept, start=1) if image in positives)
    at = []
    for k in ks:
        k = min(k, last)
        at.append(sum(image in positives for image in kept[:k]) / k)
    return area, at


def random_lists(rng, n_db, Q):
    """Rankings and lists; some lists are empty, and positives tend to the front."""
    rankings, lists = [], []
    for _ in range(Q):
        sizes = rng.integers(0, 5, size=3) * rng.integers(0, 2, size=3)
        graded = np.split(rng.permutation(n_db)[: sizes.sum()], np.cumsum(sizes)[:2])
        lists.append(dict(zip(("easy", "hard", "junk"), graded, strict=True)))
        score = rng.random(n_db)
        score[np.concatenate(graded)] += rng.random() * 0.5
        rankings.append(np.argsort(-score))
    return np.array(rankings), lists


@pytest.mark.parametrize("n_db", [13, 14, 40, 200])
def test_random_lists_equal_the_definition(n_db):
    rng, ks = np.random.default_rng(n_db), (1, 2, 5, 10, 100)
    ranks, lists = random_lists(rng, n_db, 60)
    got = evaluate_revisited(ranks, lists, ks)
    for setup in SETUPS:
        want = [by_the_definition(r, t, setup, ks) for r, t in zip(ranks, lists, strict=True)]
        AP, at = (np.array(values) for values in zip(*want, strict=True))
        assert got[setup]["AP"] == pytest.approx(AP, abs=1e-12, nan_ok=True)
        assert got[setup]["P@k"] == pytest.approx(at, abs=1e-12, nan_ok=True)
        assert got[setup]["mAP"] == pytest.approx(np.nanmean(AP), abs=1e-12)
        for j, k in enumerate(ks):
            assert got[setup][f"mP@{k}"] == pytest.approx(np.nanmean(at[:, j]), abs=1e-12)
        counted = int((~np.isnan(AP)).sum())
        assert got[setup]["queries"] == counted and 0 < counted < 60


def test_tensors_and_other_integers_are_the_same():
    ranks, lists = random_lists(np.random.default_rng(0), 30, 10)
    want = evaluate_revisited(ranks, lists)
    plain = [{name: a.tolist() for name, a in t.items()} for t in lists]
    for given in (torch.from_numpy(ranks), ranks.astype(np.uint8), ranks.astype(np.int32)):
        got = evaluate_revisited(given, plain)
        for setup in SETUPS:
            assert np.array_equal(got[setup]["AP"], want[setup]["AP"], equal_nan=True)


# --- the head of a ranking ------------------------------------------------------------------------


def test_a_head_counts_what_it_does_not_hold_as_not_found():
    # the whole ranking has its positives at ranks 0 and 5
    whole = one([0, 2, 3, 4, 5, 1], ks=(1, 3), easy=[0, 1])["easy"]
    head = one([0, 2, 3], ks=(1, 3, 5), n_db=6, easy=[0, 1])["easy"]
    assert head["mAP"] == pytest.approx(1 / 2) and head["mAP"] < whole["mAP"]
    # not 1 / 1, though the last positive that was found is first
    assert head["mP@3"] == pytest.approx(1 / 3) == whole["mP@3"]
    assert head["mP@5"] == pytest.approx(1 / 5)
    none = one([2, 3], n_db=6, easy=[0, 1])["easy"]
    assert none["mAP"] == 0 and none["mP@1"] == 0 and none["queries"] == 1
    assert one([2, 3], n_db=6, easy=[0], junk=[2, 3])["easy"]["mAP"] == 0


def test_heads_are_lower_bounds_and_exact_where_it_is_said():
    ks = (1, 2, 5, 10)
    ranks, lists = random_lists(np.random.default_rng(5), 60, 80)
    whole = evaluate_revisited(ranks, lists, ks)
    for n in (0, 1, 8, 20, 59, 60):
        head = evaluate_revisited(ranks[:, :n], lists, ks, n_db=60)
        for setup in SETUPS:
            counted = ~np.isnan(whole[setup]["AP"])
            assert (head[setup]["AP"] <= whole[setup]["AP"] + 1e-12)[counted].all()
            assert (head[setup]["P@k"] <= whole[setup]["P@k"] + 1e-12)[counted].all()
            exact = np.array(ks) <= n - 12  # at most 12 images of a query are listed
            assert np.array_equal(
                head[setup]["P@k"][:, exact], whole[setup]["P@k"][:, exact], equal_nan=True
            )
    assert np.array_equal(head["easy"]["AP"], whole["easy"]["AP"], equal_nan=True)


def test_distractors_are_negatives():
    lists = {"easy": [0, 1], "hard": [2], "junk": [3]}
    # images 4 to 7 of the set, 8 and 9 are distractors
    got = one([8, 0, 3, 9, 1, 2, 4, 5, 6, 7], **lists)["medium"]
    # without 3: 8, 0, 9, 1, 2 -> ranks 1, 3, 4
    want = ((0 + 1 / 2) + (1 / 3 + 2 / 4) + (2 / 4 + 3 / 5)) / 6
    assert got["mAP"] == pytest.approx(want)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([0, 1, 1], r"ranks\[0\] has image 1 more than once"),
        ([0, 1, 3], r"ranks\[0\] has numbers from 0 to 3; allowed is 0 to 2\. .*n_db must be told"),
        ([0, 1, -1], r"ranks\[0\] has numbers from -1 to 1; allowed is 0 to 2"),
        ([0.0, 1.0, 2.0], r"must be \(Q, n\) integers, got \(1, 3\) of float64"),
        ([[0, 1, 2]], r"must be \(Q, n\) integers, got \(1, 1, 3\)"),
    ],
)
def test_bad_rankings_are_named(ranking, message):
    with pytest.raises(ValueError, match=message):
        one(ranking, easy=[0])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"easy": [3]}, r"ground_truth\[0\]\['easy'\] has numbers from 3 to 3; allowed is 0 to 2"),
        ({"junk": [-1]}, r"ground_truth\[0\]\['junk'\] has numbers from -1 to -1"),
        ({"easy": [1], "hard": [1]}, r"ground_truth\[0\] lists image 1 more than once"),
        ({"easy": [1], "junk": [0, 1]}, r"ground_truth\[0\] lists image 1 more than once"),
        ({"easy": [2, 2]}, r"ground_truth\[0\] lists image 2 more than once"),
        ({"hard": [0.5]}, r"ground_truth\[0\]\['hard'\] must be 1-D integers"),
        ({"hard": [[1]]}, r"ground_truth\[0\]\['hard'\] must be 1-D integers"),
    ],
)
def test_bad_lists_are_named(lists, message):
    with pytest.raises(ValueError, match=message):
        one([0, 1, 2], **lists)


def test_other_bad_input_is_named():
    ranks = np.array([[0, 1, 2]])
    with pytest.raises(ValueError, match=r"ground_truth\[0\] has no 'junk'"):
        evaluate_revisited(ranks, [{"easy": [0], "hard": []}])
    with pytest.raises(ValueError, match="1 rankings for 2 queries"):
        evaluate_revisited(ranks, [truth(), truth()])
    with pytest.raises(ValueError, match="0 rankings for 0 queries"):
        evaluate_revisited(ranks[:0], [])
    for ks in ((), (0,), (1, 2.5), (-1,)):
        with pytest.raises(ValueError, match="ks must be integers from 1"):
            evaluate_revisited(ranks, [truth(easy=[0])], ks)
