"""Protocols: the counts that the papers name, what must not meet, and seeds."""

import pytest
import torch

from data.protocols import at_random, gpq, held_out, per_class, semi_supervised, shuffled
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


ONE = torch.zeros(200, dtype=torch.int64)  # all of one class


def test_a_tenth_is_held_out_for_validation():
    roles = {"train": torch.arange(0, 100, 2), "query": torch.arange(100, 110)}
    roles["database"] = torch.arange(100)
    fixed, drawn = held_out(roles, ONE, None), held_out(roles, ONE, 0)
    assert fixed["query"].tolist() == [90, 92, 94, 96, 98]
    for found in (fixed, drawn):
        sets = as_sets(found)
        assert len(sets["query"]) == 5 and sets["query"] < set(range(0, 100, 2))
        assert sets["train"] == set(range(0, 100, 2)) - sets["query"]
        assert sets["database"] == set(range(100)) - sets["query"]
    assert not torch.equal(fixed["query"], drawn["query"])
    assert same(drawn, held_out(roles, ONE, 0))
    assert not same(drawn, held_out(roles, ONE, 1))
    assert len(roles["database"]) == 100  # the split itself stays as it is
    with pytest.raises(UserError, match="--validate: wants 2 training images"):
        held_out(roles | {"train": torch.tensor([3])}, ONE, 0)


def test_what_is_labelled_stays_so_when_a_tenth_is_held_out():
    roles = gpq(torch.arange(1000) % 10, every=10, labelled=20)
    found = held_out(roles, torch.arange(1000) % 10, 0)
    assert torch.equal(found["labelled"], roles["labelled"])
    assert not set(found["query"].tolist()) & set(found["labelled"].tolist())


def test_a_query_that_was_labelled_is_so_no_more():
    """Where all is labelled the images trained on without labels are the labelled ones."""
    labels = torch.arange(200) % 4
    train = torch.arange(0, 200, 2)
    roles = semi_supervised({"train": train, "database": train}, labels, None, None)
    assert torch.equal(roles["labelled"], roles["train"])
    for seed in (None, 0):
        sets = as_sets(held_out(roles, labels, seed))
        assert len(sets["query"]) == 10
        assert not sets["query"] & (sets["labelled"] | sets["train"] | sets["database"])
        assert sets["labelled"] == set(train.tolist()) - sets["query"]
    half = {**roles, "labelled": train[:95]}  # five of the last ten are
    assert held_out(half, labels, None)["labelled"].tolist() == train[:90].tolist()


def test_images_of_no_class_are_not_asked_for():
    """Of a folder with `unlabelled`: rows 0 to 39 have a class, 40 to 99 none."""
    labels = torch.zeros(100, 2, dtype=torch.uint8)
    labels[torch.arange(40), torch.arange(40) % 2] = 1
    known, unknown = torch.arange(40), torch.arange(40, 100)
    roles = {"train": unknown, "labelled": known, "database": known}
    found = as_sets(held_out(roles, labels, 0))
    assert len(found["query"]) == 4 and found["query"] < set(range(40))
    assert found["labelled"] == found["database"] == set(range(40)) - found["query"]
    assert found["train"] == set(range(40, 100))
    # where some of the images that are trained on without labels have one, these are asked
    some = {**roles, "train": torch.arange(20, 100), "labelled": torch.arange(20)}
    found = as_sets(held_out(some, labels, 0))
    assert len(found["query"]) == 2 and found["query"] < set(range(20, 40))
    assert found["labelled"] == set(range(20))


# --- semi-supervised ----------------------------------------------------------------------------


def naive_semi(roles, member, n, seed):
    """Labelled images, and those trained on without labels, image by image."""
    roles = {role: rows.tolist() for role, rows in roles.items()}
    asked = roles.get("query", [])
    known = pool = [i for i in roles.get("labelled", roles["train"]) if i not in asked]
    if n is not None:
        order = pool if seed is None else [pool[i] for i in shuffled(len(pool), seed).tolist()]
        sizes = [sum(member[i][c] for i in pool) for c in range(len(member[0]))]
        known = []
        for c in sorted(range(len(sizes)), key=lambda c: (sizes[c], c)):
            known += [i for i in order if member[i][c] and i not in known][:n]
    every = {i for role in ("train", "labelled", "database") for i in roles.get(role, [])}
    others = sorted(every - set(known) - set(asked))
    return sorted(known), others or sorted(known)


@pytest.mark.parametrize("n", [None, 1, 5])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("given", ["labelled", "train", "no database"])
def test_semi_supervised_equals_a_loop(given, multilabel, seed, n):
    if multilabel:
        # the rarest label is neither the first nor the last
        labels = (torch.rand(300, 4) < torch.tensor([0.9, 0.3, 0.5, 0.4])).to(torch.uint8)
        member = labels.tolist()
    else:
        labels = torch.randint(0, 4, (300,))
        member = torch.nn.functional.one_hot(labels).tolist()
    order = torch.randperm(300)
    roles = {"train": order[:150], "query": order[100:180], "database": order[140:260]}
    if given == "labelled":
        roles["labelled"] = order[80:290]  # some of them trained on, some queries, some neither
    elif given == "no database":
        del roles["database"]
    roles = {role: rows.sort().values for role, rows in roles.items()}
    before = {role: rows.clone() for role, rows in roles.items()}
    found = semi_supervised(roles, labels, n, seed)
    known, others = naive_semi(roles, member, n, seed)
    assert found["labelled"].tolist() == known
    assert found["train"].tolist() == others
    sets = as_sets(found)
    assert not sets["query"] & (sets["labelled"] | sets["train"])
    if n is not None:
        assert len(known) == 4 * n
        assert not sets["labelled"] & sets["train"]
    assert same(roles, before)  # the split itself stays as it is
    untouched = roles.keys() - {"train", "labelled"}
    assert all(torch.equal(found[role], roles[role]) for role in untouched)
    assert found.keys() == roles.keys() | {"labelled"}


def test_the_first_images_of_a_class_or_some_by_seed():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    roles = {"train": torch.arange(1, 10), "query": torch.tensor([2])}
    assert semi_supervised(roles, labels, 2, None)["labelled"].tolist() == [1, 3, 4, 6]
    drawn = [semi_supervised(roles, labels, 2, seed)["labelled"] for seed in range(20)]
    assert torch.equal(drawn[7], semi_supervised(roles, labels, 2, 7)["labelled"])
    assert all(labels[rows].tolist().count(0) == 2 for rows in drawn)
    # every image that may be labelled is at some time: one is missed with a probability of 2e-4
    assert set(torch.cat(drawn).tolist()) == {1, 3, 4, 5, 6, 7, 8, 9}


def test_the_rarest_label_has_the_first_turn():
    labels = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.uint8)
    found = semi_supervised({"train": torch.arange(5)}, labels, 2, None)
    # label 1 takes 0 and 3, and label 0 the first ones that are left
    assert found["labelled"].tolist() == [0, 1, 2, 3]
    with pytest.raises(
        UserError,
        match=r"--labels_per_class=3: class 0 has 2 images to take labels from that no rarer one "
        r"took; allowed are fewer labels a class, or all",
    ):
        semi_supervised({"train": torch.arange(5)}, labels, 3, None)


def test_gpq_s_own_counts_on_cifar10():
    """1,000 queries, 5,000 labelled, 54,000 trained on without labels and searched among."""
    labels = pooled(10)
    roles = split_cifar("cifar10", labels, "gpq", seed=4).roles
    whole = semi_supervised(roles, labels, None, None)
    assert {role: len(rows) for role, rows in as_sets(whole).items()} == {
        "query": 1_000,
        "labelled": 5_000,
        "train": 54_000,
        "database": 54_000,
    }
    assert same(whole, roles)
    assert same(whole, semi_supervised(roles, labels, 500, None))
    # of fewer labels the others are trained on without theirs, and the database stays
    few = semi_supervised(roles, labels, 100, None)
    sets = as_sets(few)
    assert labels[few["labelled"]].bincount().tolist() == 10 * [100]
    for c in range(10):
        mine = [rows[labels[rows] == c] for rows in (few["labelled"], roles["labelled"])]
        assert torch.equal(mine[0], mine[1][:100])
    assert torch.equal(few["database"], roles["database"])
    assert len(sets["train"]) == 58_000
    assert sets["train"] | sets["labelled"] | sets["query"] == set(range(60_000))
    with pytest.raises(UserError, match="--labels_per_class=501: class 0 has 500 images to take"):
        semi_supervised(roles, labels, 501, None)


@pytest.mark.parametrize(
    ("protocol", "n", "labelled", "train"),
    [
        ("spq", 500, 5_000, 45_000),
        ("spq", None, 50_000, 50_000),  # nothing is left without labels
        ("II", None, 5_000, 45_000),
        ("59k", None, 5_000, 54_000),
    ],
)
def test_labels_on_the_other_protocols_of_cifar10(protocol, n, labelled, train):
    labels = pooled(10)
    roles = split_cifar("cifar10", labels, protocol, seed=4).roles
    found = semi_supervised(roles, labels, n, 0)
    assert (len(found["labelled"]), len(found["train"])) == (labelled, train)
    sets = as_sets(found)
    assert sets["labelled"] <= set(roles["train"].tolist())
    assert sets["labelled"] | sets["train"] == sets["database"]
    assert torch.equal(found["query"], roles["query"])


def test_too_few_images_to_label_are_told():
    labels = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    roles = {"train": torch.arange(7), "query": torch.tensor([0])}
    with pytest.raises(
        UserError,
        match=r"^--labels_per_class=3: class 0 has 2 images to take labels from; allowed are",
    ):
        semi_supervised(roles, labels, 3, None)
    # of a class that has none, or none but queries, no labels are taken
    labels, roles = torch.tensor([0, 0, 0, 2, 2, 2, 2, 1]), {"train": torch.arange(8)}
    found = semi_supervised({**roles, "query": torch.tensor([0, 7])}, labels, 2, None)
    assert found["labelled"].tolist() == [1, 2, 3, 4]
    roles = {"train": torch.arange(3), "query": torch.arange(5)}
    with pytest.raises(UserError, match="--split: has no image to take labels from that is not a"):
        semi_supervised(roles, labels, None, None)
