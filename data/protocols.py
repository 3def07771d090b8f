"""Protocols: which images of a set are trained on, which are queries, which the database."""

import torch
from torch import Tensor

from data.manifest import Roles
from utils.errors import UserError


def shuffled(n: int, seed: int) -> Tensor:
    """A permutation of 0 to n - 1 that depends on the seed alone (torch's Mersenne Twister)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def at_random(n: int, queries: int, trained: int, seed: int) -> Roles:
    """Random queries; all others are the database, and some of them trained on.

    SPQ on FLICKR25K: 2,000 queries, 23,000 items, 5,000 of them trained on.

    Raises:
        UserError: if there are too few images.
    """
    if n < queries + trained:
        raise UserError(f"--protocol: wants {queries + trained} images or more, and there are {n}")
    order = shuffled(n, seed)
    database = order[queries:]
    return _ascending(train=database[:trained], query=order[:queries], database=database)


def per_class(labels: Tensor, queries: float, trained: int | None, seed: int) -> Roles:
    """So many random queries of each class, so many trained on; all but queries are the database.

    In a multi-label set the classes have their turns from the rarest to the commonest, and an image
    that was taken is not taken again; those without a label are never queries.

    Args:
        labels: (N,) or (N, C).
        queries: of each class; below 1, a share of it, at least one image.
        trained: of each class, from the database; None trains on all of it.
        seed: of the choice.
    Raises:
        UserError: if a class has too few images.
    """
    multilabel = labels.dim() == 2
    sizes = (labels > 0).sum(dim=0) if multilabel else labels.bincount()
    classes = range(len(sizes)) if multilabel else labels.unique().tolist()
    free = torch.ones(len(labels), dtype=torch.bool)
    order = shuffled(len(labels), seed)
    picked: dict[str, list[Tensor]] = {"query": [], "train": []}
    for c in sorted(classes, key=sizes.tolist().__getitem__):
        member = labels[:, c] > 0 if multilabel else labels == c
        rows = order[(member & free)[order]]
        asked = int(queries) if queries >= 1 else max(1, int(queries * len(rows)))
        wanted = asked + (trained or 0)
        if len(rows) < wanted:
            left = f" that no rarer one took, of {sizes[c]}" if multilabel else ""
            raise UserError(
                f"--protocol: wants {wanted} images of each class; class {c} has {len(rows)}{left}"
            )
        picked["query"].append(rows[:asked])
        picked["train"].append(rows[asked:wanted])
        free[rows[:wanted]] = False
    query = torch.cat(picked["query"])
    others = torch.ones(len(labels), dtype=torch.bool)
    others[query] = False
    database = others.nonzero()[:, 0]
    return _ascending(
        train=database if trained is None else torch.cat(picked["train"]),
        query=query,
        database=database,
    )


def gpq(labels: Tensor, every: int = 60, labelled: int = 500) -> Roles:
    """GPQ's split of the 60,000 images of CIFAR-10, sorted by class: every 60th is a query, the
    first 500 others of each class are labelled, the rest are trained on without labels and are the
    database.
    """
    order = labels.argsort(stable=True)
    is_query = torch.zeros(len(labels), dtype=torch.bool)
    is_query[order[::every]] = True
    rest = order[~is_query[order]]
    is_labelled = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        is_labelled[rest[labels[rest] == c][:labelled]] = True
    others = (~is_query & ~is_labelled).nonzero()[:, 0]
    query, known = is_query.nonzero()[:, 0], is_labelled.nonzero()[:, 0]
    return _ascending(train=others, labelled=known, query=query, database=others)


def semi_supervised(
    roles: Roles, labels: Tensor, labels_per_class: int | None, seed: int | None
) -> Roles:
    """Which images' labels a semi-supervised method sees, and which it trains on without labels.

    Labelled are those of the role `labelled`, or where no image has it those of `train`; or so many
    of each class of these. Trained on without labels are all others of `train`, `labelled` and
    `database`, as in GPQ, or where there are none the labelled ones themselves. Queries are
    neither.

    Args:
        roles: of the split.
        labels: (N,) or (N, C).
        labels_per_class: labelled images of each class (default: all). In a multi-label set the
            classes have their turns from the rarest to the commonest, and an image that was taken
            is not taken again.
        seed: of which ones; None takes the first.
    Returns:
        The roles with `train` and `labelled` so.
    Raises:
        UserError: if a class has too few images, or no image is left.
    """
    free = torch.zeros(len(labels), dtype=torch.bool)
    free[roles["labelled" if "labelled" in roles else "train"]] = True
    asked = torch.zeros_like(free)
    if "query" in roles:
        asked[roles["query"]] = True
    free &= ~asked
    pool = free.nonzero()[:, 0]
    if not len(pool):
        raise UserError("--split: has no image to take labels from that is not a query")
    known = pool
    if labels_per_class is not None:
        multilabel = labels.dim() == 2
        sizes = (labels[pool] > 0).sum(dim=0) if multilabel else labels[pool].bincount()
        order = pool if seed is None else pool[shuffled(len(pool), seed)]
        picked = []
        for c in sizes.argsort(stable=True).tolist():
            member = labels[order, c] > 0 if multilabel else labels[order] == c
            rows = order[member & free[order]]
            if len(rows) < labels_per_class and sizes[c]:
                left = " that no rarer one took" if multilabel else ""
                raise UserError(
                    f"--labels_per_class={labels_per_class}: class {c} has {len(rows)} images to "
                    f"take labels from{left}; allowed are fewer labels a class, or all (leave the "
                    "flag away)"
                )
            picked.append(rows[:labels_per_class])
            free[picked[-1]] = False
        known = torch.cat(picked)
    others = torch.zeros_like(free)
    for role in ("train", "labelled", "database"):
        if role in roles:
            others[roles[role]] = True
    others[known] = False
    others &= ~asked
    train = others.nonzero()[:, 0] if others.any() else known
    return _ascending(**{**roles, "train": train, "labelled": known})


def held_out(roles: Roles, labels: Tensor, seed: int | None) -> Roles:
    """A tenth of the training images as queries instead, and out of the database (`--validate`).

    In a split that has the role `labelled`, images without a label are not drawn; where no others
    are trained on without labels, a tenth of the labelled ones are the queries.

    Args:
        roles: of the split.
        labels: (N,) or (N, C).
        seed: of a random tenth; None takes the last one, for sets whose order is random already.
    Raises:
        UserError: if there are less than two such images.
    """
    pool = roles["train"]
    if "labelled" in roles:
        pool = _known(pool, labels)
        pool = pool if len(pool) > 1 else _known(roles["labelled"], labels)
    if len(pool) < 2:
        raise UserError(f"--validate: wants 2 training images or more, and there are {len(pool)}")
    order = pool if seed is None else pool[shuffled(len(pool), seed)]
    query = order[len(order) * 9 // 10 :]
    found = {**roles, "query": query}
    for role in ("train", "labelled", "database"):
        if role in roles:
            found[role] = roles[role][~torch.isin(roles[role], query)]
    return _ascending(**found)


def _known(rows: Tensor, labels: Tensor) -> Tensor:
    """Those that have a label."""
    return rows if labels.dim() == 1 else rows[(labels[rows] > 0).any(dim=1)]


def _ascending(**roles: Tensor) -> Roles:
    return {role: rows.sort().values for role, rows in roles.items()}
