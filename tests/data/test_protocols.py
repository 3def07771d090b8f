"""Protocols: the counts that the papers name, what must not meet, and seeds."""

import pytest
import torch

from data.protocols import at_random, gpq, held_out, per_class, shuffled
from data.splits import split_cifar
from utils.errors import UserError


def pooled(C):
    """60,000 labels in a random order: as many of each class among the last 10,000 too."""
    torch.manual_seed(3)
    return torch.cat([(torch.arange(n) % C)[torch.randperm(n)] for n in (50_000, 10_000)])


def as_sets(roles):
    sets = {role: set(rows.tolist()) for role, rows in roles.items()}
    assert all(len(sets[role]) == len(rows) for role, rows in roles.items())  # none twice
    assert all(rows.tolist() == sorted(rows.tolist()) for rows in roles.values())
    return sets


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[role], b[role]) for role in a)


def test_a_permutation_hangs_on_the_seed_alone():
    torch.manual_seed(1)
    first = shuffled(100, 5)
    torch.manual_seed(2)
    assert torch.equal(first, shuffled(100, 5))
    assert not torch.equal(first, shuffled(100, 6))
    assert first.sort().values.tolist() == list(range(100))
    # the very draw of torch's generator: published splits must stay what they are
    assert shuffled(8, 0).tolist() == [4, 0, 7, 3, 2, 5, 1, 6]
    assert shuffled(25_000, 0)[:6].tolist() == [11044, 94, 10691, 3946, 13247, 10499]


@pytest.mark.parametrize(
    ("dataset", "protocol", "train", "query", "database"),
    [
        ("cifar10", "spq", 50_000, 10_000, 50_000),
        ("cifar10", "I", 50_000, 10_000, 50_000),
        ("cifar10", "II", 5_000, 10_000, 50_000),
        ("cifar10", "59k", 5_000, 1_000, 59_000),
        ("cifar10", "gpq", 54_000, 1_000, 54_000),
        ("cifar100", "spq", 50_000, 10_000, 50_000),
        ("cifar100", "I", 50_000, 10_000, 50_000),
        ("cifar100", "II", 5_000, 10_000, 50_000),
    ],
)
def test_cifar_s_protocols(dataset, protocol, train, query, database):
    C = {"cifar10": 10, "cifar100": 100}[dataset]
    labels = pooled(C)
    split = split_cifar(dataset, labels, protocol, seed=4)
    assert torch.equal(split.listing.labels, labels)
    assert split.listing.names[49_999] == "train/49999.png"
    assert split.listing.names[50_000] == "test/00000.png"
    assert len(split.listing.classes) == C
    sets = as_sets(split.roles)
    known = 5_000 if protocol == "gpq" else 0
    counts = {"train": train, "labelled": known, "query": query, "database": database}
    assert split.counts() == counts
    assert not sets["query"] & sets["database"]
    assert sets["train"] <= sets["database"]
    assert len(sets["query"] | sets["database"]) + known == 60_000
    for role in split.roles:
        each = len(split.roles[role]) // C
        # GPQ's counts of queries in a class are equal too: 60 divides 6,000
        assert labels[split.roles[role]].bincount().tolist() == [each] * C
    if protocol == "spq":
        assert sets["query"] == set(range(50_000, 60_000))
    drawn = protocol in ("I", "II", "59k")
    assert split.seed == (4 if drawn else None)
    assert same(split.roles, split_cifar(dataset, labels, protocol, seed=4).roles)
    assert same(split.roles, split_cifar(dataset, labels, protocol, seed=5).roles) == (not drawn)


def naive_gpq(labels, every, labelled):
    """As the paper tells it, image by image."""
    in_order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    query, known, others, seen = [], [], [], dict.fromkeys(labels, 0)
    for place, i in enumerate(in_order):
        if place % every == 0:
            query.append(i)
        elif seen[labels[i]] < labelled:
            seen[labels[i]] += 1
            known.append(i)
        else:
            others.append(i)
    return [sorted(part) for part in (query, known, others)]


@pytest.mark.parametrize(("n", "every", "labelled"), [(60_000, 60, 500), (997, 7, 20)])
def test_gpq_equals_a_loop(n, every, labelled):
    labels = torch.randint(0, 10, (n,))
    roles = gpq(labels, every, labelled)
    query, known, others = naive_gpq(labels.tolist(), every, labelled)
    assert roles["query"].tolist() == query
    assert roles["labelled"].tolist() == known
    assert roles["train"].tolist() == roles["database"].tolist() == others


def test_at_random_draws_queries_and_trains_on_some_of_the_others():
    roles = at_random(25_000, 2_000, 5_000, seed=0)
    sets = as_sets(roles)
    assert [len(sets[role]) for role in ("train", "query", "database")] == [5_000, 2_000, 23_000]
    assert sets["train"] < sets["database"]
    assert sets["query"] | sets["database"] == set(range(25_000))
    assert not sets["query"] & sets["database"]
    assert same(roles, at_random(25_000, 2_000, 5_000, seed=0))
    assert not same(roles, at_random(25_000, 2_000, 5_000, seed=1))
    # random: neither the first images nor the last
    assert abs(roles["query"].double().mean() / 12_500 - 1) < 0.05  # 5 sigma are 0.065 of it
    at_random(7, 3, 4, seed=0)
    with pytest.raises(UserError, match="wants 7 images or more, and there are 6"):
        at_random(6, 3, 4, seed=0)


def naive_per_class(member, queries, trained, seed):
    """Rarest class first; an image that was taken is not taken again."""
    order = shuffled(len(member), seed).tolist()
    sizes = [sum(row[c] for row in member) for c in range(len(member[0]))]
    taken, query, train = set(), [], []
    for c in sorted(range(len(sizes)), key=lambda c: (sizes[c], c)):
        rows = [i for i in order if member[i][c] and i not in taken]
        asked = queries if queries >= 1 else max(1, int(queries * len(rows)))
        query += rows[:asked]
        train += rows[asked : asked + (trained or 0)]
        taken |= set(rows[: asked + (trained or 0)])
    database = [i for i in range(len(member)) if i not in query]
    return sorted(train) if trained else database, sorted(query), database


@pytest.mark.parametrize(("queries", "trained"), [(5, 12), (5, None), (0.1, 12), (0.1, None)])
@pytest.mark.parametrize("multilabel", [True, False])
def test_per_class_equals_a_loop(multilabel, queries, trained):
    if multilabel:
        labels = (torch.rand(300, 5) < torch.tensor([0.5, 0.2, 0.9, 0.3, 0.4])).to(torch.uint8)
        labels[:10] = 0
        member = labels.tolist()
    else:
        labels = torch.tensor([2, 3, 3, 7, 7, 7, 9, 9, 9, 9] * 25)  # numbers with gaps between
        member = [[int(label == c) for c in (2, 3, 7, 9)] for label in labels.tolist()]
    roles = per_class(labels, queries, trained, seed=3)
    train, query, database = naive_per_class(member, queries, trained, seed=3)
    assert roles["query"].tolist() == query
    assert roles["train"].tolist() == train
    assert roles["database"].tolist() == database
    as_sets(roles)
    assert same(roles, per_class(labels, queries, trained, seed=3))
    assert not same(roles, per_class(labels, queries, trained, seed=4))


def test_images_without_a_label_are_never_queries():
    labels = torch.zeros(200, 2, dtype=torch.uint8)
    labels[::20] = 1
    for seed in range(5):
        roles = per_class(labels, 2, 3, seed)
        assert labels[roles["query"]].all() and len(roles["query"]) == 4
        assert labels[roles["train"]].all() and len(roles["train"]) == 6
        assert len(roles["database"]) == 196


def test_a_share_of_a_class_is_at_least_one_image():
    labels = torch.tensor([0] * 4 + [1] * 25 + [2] * 2)
    query = labels[per_class(labels, 0.1, None, 0)["query"]]
    assert query.bincount().tolist() == [1, 2, 1]


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(UserError, match=r"wants 6 images of each class; class 8 has 5$"):
        per_class(torch.tensor([3] * 9 + [8] * 5), 2, 4, 0)
    labels = torch.zeros(20, 2, dtype=torch.uint8)
    labels[:8, 0] = 1
    labels[:9, 1] = 1
    with pytest.raises(UserError, match="class 1 has 3 that no rarer one took, of 9"):
        per_class(labels, 2, 4, 0)


def test_a_tenth_is_held_out_for_validation():
    roles = {"train": torch.arange(0, 100, 2), "query": torch.arange(100, 110)}
    roles["database"] = torch.arange(100)
    fixed, drawn = held_out(roles, None), held_out(roles, 0)
    assert fixed["query"].tolist() == [90, 92, 94, 96, 98]
    for found in (fixed, drawn):
        sets = as_sets(found)
        assert len(sets["query"]) == 5 and sets["query"] < set(range(0, 100, 2))
        assert sets["train"] == set(range(0, 100, 2)) - sets["query"]
        assert sets["database"] == set(range(100)) - sets["query"]
    assert not torch.equal(fixed["query"], drawn["query"])
    assert same(drawn, held_out(roles, 0))
    assert not same(drawn, held_out(roles, 1))
    assert len(roles["database"]) == 100  # the split itself stays as it is
    with pytest.raises(UserError, match="--validate: wants 2 training images"):
        held_out(roles | {"train": torch.tensor([3])}, 0)


def test_what_is_labelled_stays_so_when_a_tenth_is_held_out():
    roles = gpq(torch.arange(1000) % 10, every=10, labelled=20)
    found = held_out(roles, 0)
    assert torch.equal(found["labelled"], roles["labelled"])
    assert not set(found["query"].tolist()) & set(found["labelled"].tolist())
