"""GPQ's losses against naive double loops; gradients; bounds; symmetries; bad input."""

import math

import pytest
import torch

from losses import classification_loss, n_pair_pq_loss, prototype_logits, subspace_entropy_loss
from models.quantizer import intra_normalize

B, M, d, C = 6, 3, 2, 4
BETA = 1.5
REG = 0.25 * 0.002
SINGLE = torch.tensor([2, 0, 2, 1, 0, 2])
# two labels in common, one, none; the last image has none at all
SETS = [{0, 1}, {0, 1, 2}, {3}, {1}, {2, 3}, set()]


def rows_of(sets):
    return torch.tensor([[int(c in own) for c in range(C)] for own in sets])


MULTI = rows_of(SETS)
LABELS = pytest.mark.parametrize("labels", [SINGLE, MULTI], ids=["single", "multi"])


def draw(rows=B):
    return intra_normalize(torch.randn(rows, M * d, dtype=torch.float64), M)


@pytest.fixture
def x():
    return draw().requires_grad_()


@pytest.fixture
def z():
    return draw().requires_grad_()


@pytest.fixture
def prototypes():
    return draw(C).requires_grad_()


def sets_of(labels):
    if labels.dim() == 1:
        return [{int(label)} for label in labels]
    return [{c for c in range(C) if row[c]} for row in labels]


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def naive_n_pair(x, z, labels, reg=0.002):
    x, z, sets = x.tolist(), z.tolist(), sets_of(labels)
    n_pair = 0.0
    for i in range(len(x)):
        shared = [len(sets[i] & sets[j]) for j in range(len(x))]
        if not sets[i]:
            shared[i] = 1
        powers = [math.exp(dot(x[i], z[j])) for j in range(len(x))]
        for j in range(len(x)):
            n_pair -= shared[j] / sum(shared) * math.log(powers[j] / sum(powers))
    lengths = sum(dot(v, v) for v in [*x, *z])
    return n_pair / len(x) + 0.25 * reg * lengths / len(x)


def naive_logits(x, prototypes, beta):
    x, prototypes = x.tolist(), prototypes.tolist()
    logits = [[0.0] * len(prototypes) for _ in x]
    for n in range(len(x)):
        for c in range(len(prototypes)):
            for m in range(M):
                u, v = (
                    [beta * value for value in row[m * d : (m + 1) * d]]
                    for row in (x[n], prototypes[c])
                )
                logits[n][c] += dot(u, v) / M
    return logits


def naive_p(x, prototypes, beta):
    powers = [[math.exp(v) for v in row] for row in naive_logits(x, prototypes, beta)]
    return [[power / sum(row) for power in row] for row in powers]


def naive_classification(x, labels, prototypes, beta):
    nats = []
    for own, p in zip(sets_of(labels), naive_p(x, prototypes, beta), strict=True):
        if own:
            nats.append(-sum(math.log(p[c]) for c in own) / len(own))
    return sum(nats) / len(nats)


def naive_entropy(x, prototypes, beta):
    return sum(v * math.log(v + 1e-5) for p in naive_p(x, prototypes, beta) for v in p) / len(x)


# --- reference ------------------------------------------------------------------------------------


@LABELS
def test_n_pair_equals_naive_loop(x, z, labels):
    want = naive_n_pair(x, z, labels)
    assert n_pair_pq_loss(x, z, labels).item() == pytest.approx(want, abs=1e-12)


def test_lengths_of_both_sides_are_charged(x, z):
    x, z = 2.0 * x, 0.5 * z
    for reg in (0.0, 0.7):
        want = naive_n_pair(x, z, SINGLE, reg)
        assert n_pair_pq_loss(x, z, SINGLE, reg).item() == pytest.approx(want, abs=1e-12)


def test_logits_equal_naive_loop(x, prototypes):
    want = torch.tensor(naive_logits(x, prototypes, BETA), dtype=torch.float64)
    got = prototype_logits(x, prototypes, M, BETA).detach()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@LABELS
def test_classification_equals_naive_loop(x, prototypes, labels):
    want = naive_classification(x, labels, prototypes, BETA)
    got = classification_loss(x, labels, prototypes, M, BETA).item()
    assert got == pytest.approx(want, abs=1e-12)


def test_entropy_equals_naive_loop(x, prototypes):
    want = naive_entropy(x, prototypes, BETA)
    assert subspace_entropy_loss(x, prototypes, M, BETA).item() == pytest.approx(want, abs=1e-12)


def test_the_published_beta_is_the_default(x, prototypes):
    want = naive_classification(x, SINGLE, prototypes, 4.0)
    assert classification_loss(x, SINGLE, prototypes, M).item() == pytest.approx(want, abs=1e-12)
    want = naive_entropy(x, prototypes, 4.0)
    assert subspace_entropy_loss(x, prototypes, M).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_class_numbers_are_rows_with_a_single_label(x, z, prototypes, dtype):
    rows = torch.nn.functional.one_hot(SINGLE, C).to(dtype)
    for loss in (n_pair, classification):
        torch.testing.assert_close(
            loss(x, z, prototypes, rows), loss(x, z, prototypes, SINGLE), atol=1e-12, rtol=0
        )


def test_an_image_without_a_label_is_not_classified(x, prototypes):
    labelled = MULTI.sum(dim=1) > 0
    torch.testing.assert_close(
        classification_loss(x, MULTI, prototypes, M),
        classification_loss(x[labelled], MULTI[labelled], prototypes, M),
    )
    nothing = classification_loss(x, torch.zeros_like(MULTI), prototypes, M)
    assert nothing.item() == 0.0
    gradient = torch.autograd.grad(nothing, x)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))  # no NaN


def test_images_without_labels_are_each_like_themselves_alone(x, z):
    want = naive_n_pair(x, z, torch.arange(B))
    got = n_pair_pq_loss(x, z, torch.zeros(B, C)).item()
    assert got == pytest.approx(want, abs=1e-12)


# --- gradients and symmetries ---------------------------------------------------------------------


def n_pair(x, z, prototypes, labels):
    return n_pair_pq_loss(x, z, labels)


def classification(x, z, prototypes, labels):
    return classification_loss(x, labels, prototypes, M, BETA)


def entropy(x, z, prototypes, labels):
    return subspace_entropy_loss(x, prototypes, M, BETA)


ALL = pytest.mark.parametrize("loss", [n_pair, classification, entropy])


@ALL
@LABELS
def test_gradients_by_finite_differences(loss, labels, x, z, prototypes):
    assert torch.autograd.gradcheck(lambda *inputs: loss(*inputs, labels), (x, z, prototypes))


@pytest.mark.parametrize(
    ("loss", "reached"),
    [(n_pair, [True, True, False]), (classification, [True, False, True])]
    + [(entropy, [True, False, True])],
)
def test_a_loss_reaches_what_it_is_made_of(loss, reached, x, z, prototypes):
    total = loss(x, z, prototypes, SINGLE)
    gradients = torch.autograd.grad(total, (x, z, prototypes), allow_unused=True)
    for gradient, wanted in zip(gradients, reached, strict=True):
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == wanted


@ALL
@LABELS
def test_permuting_the_batch_changes_nothing(loss, labels, x, z, prototypes):
    order = torch.randperm(B)
    torch.testing.assert_close(
        loss(x, z, prototypes, labels), loss(x[order], z[order], prototypes, labels[order])
    )


@ALL
@LABELS
def test_permuting_the_classes_and_their_prototypes_changes_nothing(loss, labels, x, z, prototypes):
    order = torch.tensor([2, 0, 3, 1])  # new class i is the old order[i]
    renamed = order.argsort()[labels] if labels.dim() == 1 else labels[:, order]
    torch.testing.assert_close(
        loss(x, z, prototypes, labels), loss(x, z, prototypes[order], renamed)
    )


def test_images_change_places_with_their_labels_only(x, z, prototypes):
    order = torch.arange(B).roll(1)
    for loss in (n_pair, classification):
        gap = loss(x, z, prototypes, SINGLE) - loss(x[order], z[order], prototypes, SINGLE)
        assert gap.abs() > 1e-3


# --- bounds and known values ----------------------------------------------------------------------


def ends(labels):
    """All sub-vectors (1, 0) for class 0 and (-1, 0) for class 1."""
    signs = 1.0 - 2.0 * labels.double()
    return signs[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(M)


def test_n_pair_is_least_where_two_classes_are_opposite():
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    x = ends(labels)
    # sim is M among the n of a class and -M to the others, which is as far as it goes
    least = sum(math.log(n + (B - n) * math.exp(-2 * M)) for n in (2, 2, 4, 4, 4, 4)) / B
    least += REG * 2 * M  # the length of a descriptor is that of M units
    assert n_pair_pq_loss(x, x, labels).item() == pytest.approx(least, abs=1e-12)
    for _ in range(20):
        assert n_pair_pq_loss(draw(), draw(), labels) > least
        other = intra_normalize(x + 0.1 * torch.randn_like(x), M)
        assert n_pair_pq_loss(x, other, labels) > least
        assert n_pair_pq_loss(other, x, labels) > least


def test_n_pair_is_the_logarithm_of_the_batch_where_all_look_alike(x):
    same = x[:1].expand(B, -1)
    want = math.log(B) + REG * 2 * M
    for labels in (SINGLE, MULTI):
        assert n_pair_pq_loss(same, same, labels).item() == pytest.approx(want, abs=1e-12)


def test_known_values_of_the_classifier():
    labels = torch.tensor([0, 1, 1])
    x, prototypes = ends(labels), ends(torch.arange(2))
    logits = prototype_logits(x, prototypes, M, BETA)
    want = BETA**2 * torch.tensor([[1, -1], [-1, 1], [-1, 1]], dtype=torch.float64)
    torch.testing.assert_close(logits, want, atol=1e-12, rtol=0)
    least, most = (math.log(1 + math.exp(sign * 2 * BETA**2)) for sign in (-1, 1))
    for given, value in ((labels, least), (1 - labels, most)):
        got = classification_loss(x, given, prototypes, M, BETA).item()
        assert got == pytest.approx(value, abs=1e-12)


def test_entropy_is_within_its_bounds(prototypes):
    for beta in (0.1, 1.0, 4.0, 50.0):
        loss = subspace_entropy_loss(draw(200), prototypes, M, beta).item()
        # log(p + e) is above log p by at most e / p, so p log(p + e) by at most e for each class
        assert -math.log(C) < loss < 1e-5 * C


def test_entropy_reaches_its_bounds(prototypes):
    even = subspace_entropy_loss(torch.zeros(2, M * d), prototypes.float(), M).item()
    assert even == pytest.approx(math.log(1 / C + 1e-5), abs=1e-6)  # float32
    sure = subspace_entropy_loss(prototypes, prototypes, M, beta=100.0).item()
    assert sure == pytest.approx(0.0, abs=1e-4)


# --- precision and faults -------------------------------------------------------------------------


@ALL
@LABELS
def test_float32_under_autocast(loss, labels, x, z, prototypes):
    single = [v.detach().float() for v in (x, z, prototypes)]
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(*single, labels)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(*single, labels))


def test_shapes_that_do_not_fit_are_named(x, z, prototypes):
    for wrong in (z[:2], z[:, :4]):
        with pytest.raises(ValueError, match=r"x and z must be \(B, D\) alike; got \(6, 6\), \("):
            n_pair_pq_loss(x, wrong, SINGLE)
    with pytest.raises(ValueError, match="x and z must be"):
        n_pair_pq_loss(x[0], z[0], SINGLE)
    for labels in (SINGLE[:5], MULTI[:5], MULTI[None]):
        with pytest.raises(ValueError, match=r"6 images need labels \(B,\) or \(B, C\); got \("):
            n_pair_pq_loss(x, z, labels)
    for labels in (SINGLE[:5], MULTI[:5], MULTI[:, :3]):
        with pytest.raises(ValueError, match=r"labels must be \(N,\) or \(N, C\) = \(6, 4\); got"):
            classification_loss(x, labels, prototypes, M)


def test_numbers_that_do_not_fit_are_named(x, prototypes):
    for loss in (
        lambda *rest: classification_loss(x, SINGLE, *rest),
        lambda *rest: subspace_entropy_loss(x, *rest),
        lambda *rest: prototype_logits(x, *rest),
    ):
        with pytest.raises(ValueError, match=r"prototypes \(C, D\); got \(6, 6\) and \(4, 4\)"):
            loss(prototypes[:, :4], M, BETA)
        with pytest.raises(ValueError, match="x must be"):
            loss(prototypes[0], M, BETA)
        with pytest.raises(ValueError, match=r"positive, got M=0, beta=1\.5"):
            loss(prototypes, 0, BETA)
        with pytest.raises(ValueError, match=r"positive, got M=3, beta=0"):
            loss(prototypes, M, 0.0)
