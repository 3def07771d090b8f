"""SSP's loss and those it compares with: naive loops, gradients, what is held fixed, bad input."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses.arcface import arcface_logits, arcface_loss
from losses.backward_compatible import hvs_loss, lce_loss
from losses.regression import regression_loss
from losses.structure_similarity import structure_similarity_loss
from losses.tuple_contrastive import tuple_contrastive_loss

N, M, K, d, R, C = 5, 3, 4, 2, 3, 4
D = M * d
S = 2048**0.5  # default scale of the classifiers
LABELS = torch.tensor([2, 0, 3, 1, 2])


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape):
    return torch.nn.functional.normalize(draw(*shape), dim=-1)


# --- naive loops, on lists of numbers -------------------------------------------------------------


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def length(v):
    return math.sqrt(dot(v, v))


def cosine(u, v):
    return dot(u, v) / (length(u) * length(v))


def distance(u, v):
    return length([a - b for a, b in zip(u, v, strict=True)])


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def naive_structure(x_query, x_gallery, anchors, scale):
    total = 0.0
    for query, gallery in zip(x_query.tolist(), x_gallery.tolist(), strict=True):
        for m, own in enumerate(anchors.tolist()):
            part = slice(m * d, (m + 1) * d)
            p = softmax([scale * cosine(gallery[part], anchor) for anchor in own])
            q = softmax([scale * cosine(query[part], anchor) for anchor in own])
            for k in range(K):
                total += p[k] * math.log(p[k] / q[k])
    return total / (N * M)


def naive_logits(x, weight, labels, scale, margin):
    rows = []
    for row, label in zip(x.tolist(), labels.tolist(), strict=True):
        rows.append([])
        for c, w in enumerate(weight.tolist()):
            theta = math.acos(max(-1.0, min(1.0, cosine(row, w))))
            if c != label:
                value = math.cos(theta)
            elif theta + margin <= math.pi:
                value = math.cos(theta + margin)
            else:
                value = math.cos(theta) + math.cos(margin) - 1.0
            rows[-1].append(scale * value)
    return rows


def naive_arcface(x, weight, labels, scale, margin):
    rows = naive_logits(x, weight, labels, scale, margin)
    nats = [-math.log(softmax(row)[c]) for row, c in zip(rows, labels.tolist(), strict=True)]
    return sum(nats) / len(nats)


def naive_alignment(moved, old):
    total = 0.0
    for u, v in zip(moved.tolist(), old.tolist(), strict=True):
        total += distance([a / length(u) for a in u], [a / length(v) for a in v])
    return total / len(moved)


def naive_tuples(x_query, positive, negatives, margin):
    total = 0.0
    for q, p, own in zip(x_query.tolist(), positive.tolist(), negatives.tolist(), strict=True):
        total += 0.5 * distance(q, p) ** 2
        for g in own:
            total += 0.5 * max(0.0, margin - distance(q, g)) ** 2
    return total / len(x_query)


def naive_regression(x_query, x_gallery):
    pairs = zip(x_query.tolist(), x_gallery.tolist(), strict=True)
    return sum(distance(q, g) ** 2 for q, g in pairs) / len(x_query)


# --- every loss of tensors that have the batch first, and of those that have not ------------------


def structure(batch, rest):
    return structure_similarity_loss(*batch, *rest, scale=6.0)


def arcface(batch, rest):
    return arcface_loss(batch[0], *rest, batch[1], scale=5.0, margin=0.3)


def hvs(batch, rest):
    return hvs_loss(*batch, *rest, scale=5.0, new_margin=0.3, old_margin=0.4)


def lce(batch, rest):
    margins = {"new_margin": 0.3, "old_margin": 0.4}
    return lce_loss(*batch, *rest, scale=5.0, old_share=0.7, alignment=1.5, **margins)


def tuples(batch, rest):
    return tuple_contrastive_loss(*batch, margin=1.7)


def regression(batch, rest):
    return regression_loss(*batch)


def inputs_of(loss):
    """Tensors with the batch first, the others, and those of all of them that must not learn."""
    if loss is structure:
        return (draw(N, D), draw(N, D)), (unit(M, K, d),), (1, 2)
    if loss is tuples:
        return (unit(N, D), unit(N, D), unit(N, R, D)), (), (1, 2)
    if loss is regression:
        return (draw(N, D), draw(N, D)), (), (1,)
    if loss is arcface:
        return (draw(N, D), LABELS), (draw(C, D),), ()
    if loss is hvs:
        return (draw(N, D), LABELS), (draw(C, D), draw(C, D)), (3,)
    # alignment alone reaches the moved weights, arcface alone the new ones
    return (draw(N, D), draw(N, D), LABELS), (draw(C, D), draw(C, D), draw(C, D)), (5,)


ALL = pytest.mark.parametrize(
    "loss", [structure, arcface, hvs, lce, tuples, regression], ids=lambda loss: loss.__name__
)


def call(loss, tensors, batched):
    return loss(tensors[:batched], tensors[batched:])


# --- reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_structure_similarity_equals_naive_loop(scale):
    x_query, x_gallery, anchors = draw(N, D), draw(N, D), unit(M, K, d)
    want = naive_structure(x_query, x_gallery, anchors, scale)
    got = structure_similarity_loss(x_query, x_gallery, anchors, scale)
    assert got.item() == pytest.approx(want, abs=1e-12)
    # its two sides are not exchangeable
    exchanged = structure_similarity_loss(x_gallery, x_query, anchors, scale).item()
    assert exchanged != pytest.approx(want, abs=1e-6)


def test_the_published_scale_of_similarities_is_the_default():
    x_query, x_gallery, anchors = draw(N, D), draw(N, D), unit(M, K, d)
    want = naive_structure(x_query, x_gallery, anchors, 10.0)
    got = structure_similarity_loss(x_query, x_gallery, anchors).item()
    assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.15, 1.0, 2.5, math.pi])
def test_arcface_equals_naive_loop(margin):
    x, weight = draw(20, D), draw(C, D)
    labels = torch.arange(20) % C
    want = torch.tensor(naive_logits(x, weight, labels, 3.0, margin), dtype=torch.float64)
    torch.testing.assert_close(
        arcface_logits(x, weight, labels, 3.0, margin), want, atol=1e-12, rtol=0
    )
    want = naive_arcface(x, weight, labels, 3.0, margin)
    got = arcface_loss(x, weight, labels, 3.0, margin).item()
    assert got == pytest.approx(want, abs=1e-12)
    want = naive_arcface(x, weight, labels, S, 0.15)
    assert arcface_loss(x, weight, labels).item() == pytest.approx(want, abs=1e-10)


def test_hvs_equals_naive_loop():
    (x, labels), (new, old), _ = inputs_of(hvs)
    want = naive_arcface(x, new, labels, 5.0, 0.3) + naive_arcface(x, old, labels, 5.0, 0.4)
    assert hvs((x, labels), (new, old)).item() == pytest.approx(want, abs=1e-12)
    want = naive_arcface(x, new, labels, S, 0.15) + naive_arcface(x, old, labels, S, 0.15)
    assert hvs_loss(x, labels, new, old).item() == pytest.approx(want, abs=1e-10)


def test_lce_equals_naive_loop():
    (x, transformed, labels), (new, moved, old), _ = inputs_of(lce)
    want = naive_arcface(x, new, labels, 5.0, 0.3)
    want += 0.7 * naive_arcface(transformed, old, labels, 5.0, 0.4)
    want += 1.5 * naive_alignment(moved, old)
    got = lce((x, transformed, labels), (new, moved, old)).item()
    assert got == pytest.approx(want, abs=1e-12)
    want = naive_arcface(x, new, labels, S, 0.15)
    want += 0.5 * naive_arcface(transformed, old, labels, S, 0.2)
    want += 10.0 * naive_alignment(moved, old)
    got = lce_loss(x, transformed, labels, new, moved, old).item()
    assert got == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("margin", [0.7, 1.3])
def test_tuples_equal_naive_loop(margin):
    x_query, positive = unit(N, D), unit(N, D)
    # at distances of 0 to 2 of the query, within the margin and beyond it
    negatives = x_query[:, None] + torch.linspace(0.0, 2.0, N * R).view(N, R, 1) * unit(N, R, D)
    within = (negatives - x_query[:, None]).norm(dim=2) < margin
    assert 0 < within.sum() < N * R
    want = naive_tuples(x_query, positive, negatives, margin)
    got = tuple_contrastive_loss(x_query, positive, negatives, margin).item()
    assert got == pytest.approx(want, abs=1e-12)
    default = tuple_contrastive_loss(x_query, positive, negatives).item()
    assert (default == pytest.approx(want, abs=1e-12)) == (margin == 0.7)


def test_regression_equals_naive_loop():
    x_query, x_gallery = draw(N, D), draw(N, D)
    want = naive_regression(x_query, x_gallery)
    assert regression_loss(x_query, x_gallery).item() == pytest.approx(want, abs=1e-12)
    x_query, x_gallery = unit(N, D), unit(N, D)
    want = 2 - 2 * torch.nn.functional.cosine_similarity(x_query, x_gallery).mean().item()
    assert regression_loss(x_query, x_gallery).item() == pytest.approx(want, abs=1e-12)


# --- gradients and symmetries ---------------------------------------------------------------------


@ALL
def test_gradients_by_finite_differences(loss):
    batch, rest, frozen = inputs_of(loss)
    tensors = [*batch, *rest]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(tensor.is_floating_point() and i not in frozen)
    assert torch.autograd.gradcheck(lambda *given: call(loss, given, len(batch)), tensors)


@ALL
def test_gradients_end_where_the_gallery_begins(loss):
    batch, rest, frozen = inputs_of(loss)
    tensors = [*batch, *rest]
    learned = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
    for i in learned:
        tensors[i].requires_grad_()
    gradients = torch.autograd.grad(
        call(loss, tensors, len(batch)), [tensors[i] for i in learned], allow_unused=True
    )
    for i, gradient in zip(learned, gradients, strict=True):
        if i in frozen:
            assert gradient is None
        else:
            # every embedding and every class weight of its own
            assert bool((gradient.abs().sum(dim=-1) > 0).all())


@ALL
def test_permuting_the_batch_changes_nothing(loss):
    batch, rest, _ = inputs_of(loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss([t[order] for t in batch], rest), loss(batch, rest))
    # what belongs together stays together: one side alone does not move
    assert (loss([batch[0][order], *batch[1:]], rest) - loss(batch, rest)).abs() > 1e-3


@ALL
def test_a_batch_twice_is_as_good_as_once(loss):
    batch, rest, _ = inputs_of(loss)
    torch.testing.assert_close(loss([torch.cat([t, t]) for t in batch], rest), loss(batch, rest))


def test_anchors_and_subspaces_have_no_order():
    (x_query, x_gallery), (anchors,), _ = inputs_of(structure)
    want = structure((x_query, x_gallery), (anchors,))
    torch.testing.assert_close(structure((x_query, x_gallery), (anchors[:, [2, 0, 3, 1]],)), want)
    order = torch.tensor([1, 2, 0])
    moved = [x.unflatten(1, (M, d))[:, order].flatten(1) for x in (x_query, x_gallery)]
    torch.testing.assert_close(structure(moved, (anchors[order],)), want)
    # but a subspace has anchors of its own
    assert (structure((x_query, x_gallery), (anchors[order],)) - want).abs() > 1e-3


def test_negatives_have_no_order():
    (x_query, positive, negatives), _, _ = inputs_of(tuples)
    torch.testing.assert_close(
        tuples((x_query, positive, negatives[:, [1, 2, 0]]), ()),
        tuples((x_query, positive, negatives), ()),
    )


def test_lengths_of_sub_vectors_and_anchors_do_not_matter():
    (x_query, x_gallery), (anchors,), _ = inputs_of(structure)
    lengths = torch.logspace(-3, 3, N * M, dtype=torch.float64).view(N, M, 1)
    scaled = [
        (x.unflatten(1, (M, d)) * by).flatten(1)
        for x, by in ((x_query, lengths), (x_gallery, lengths.flip(0, 1)))
    ]
    want = structure((x_query, x_gallery), (anchors,))
    torch.testing.assert_close(structure(scaled, (anchors,)), want)
    stretched = anchors * torch.linspace(0.1, 9.0, M * K, dtype=torch.float64).view(M, K, 1)
    torch.testing.assert_close(structure((x_query, x_gallery), (stretched,)), want)


def test_lengths_of_embeddings_and_class_weights_do_not_matter():
    for loss in (arcface, hvs, lce):
        batch, rest, _ = inputs_of(loss)
        tall, wide = (torch.logspace(-2, 2, n, dtype=torch.float64)[:, None] for n in (N, C))
        scaled = [t * tall if t.is_floating_point() else t for t in batch]
        torch.testing.assert_close(loss(scaled, [w * wide for w in rest]), loss(batch, rest))


# --- structure similarity -------------------------------------------------------------------------


def test_structures_that_agree_cost_nothing():
    x, anchors = draw(N, D).requires_grad_(), unit(M, K, d)
    loss = structure_similarity_loss(x, x.detach().clone(), anchors)
    assert loss.item() == 0.0
    gradient = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(x), atol=1e-12, rtol=0)
    for _ in range(20):
        assert structure_similarity_loss(draw(N, D), x, anchors) > 1e-3


def test_without_scale_all_images_are_alike():
    x_query, x_gallery, anchors = draw(N, D), draw(N, D), unit(M, K, d)
    assert structure_similarity_loss(x_query, x_gallery, anchors, scale=0.0).item() == 0.0
    # and the divergence falls with the square of a small scale
    few, fewer = (structure_similarity_loss(x_query, x_gallery, anchors, s) for s in (1e-2, 1e-3))
    assert few.item() / fewer.item() == pytest.approx(100.0, rel=0.02)


def test_known_value_of_structure_similarity():
    # one subspace, two opposite anchors: p and q are logistic in twice the scaled cosine
    anchors = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    x_query = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    x_gallery = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-2 * 2.0))
    want = p * math.log(p) + (1 - p) * math.log(1 - p) + math.log(2)  # q is even
    got = structure_similarity_loss(x_query, x_gallery, anchors, scale=2.0)
    assert got.item() == pytest.approx(want, abs=1e-12)


def test_structures_stay_finite_where_probabilities_vanish():
    x = draw(N, D).float().requires_grad_()
    loss = structure_similarity_loss(x, -x.detach(), unit(M, K, d).float(), scale=1e4)
    assert 1e3 < loss.item() < 1e5  # exp(-1e4) is 0 in float32, its logarithm would be infinite
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_sub_vectors_of_zeros_resemble_all_anchors_alike():
    x, x_gallery, anchors = draw(N, D), draw(N, D), unit(M, K, d)
    x[0, :d] = 0.0
    x_gallery[1] = 0.0
    x.requires_grad_()
    loss = structure_similarity_loss(x, x_gallery, anchors)
    assert loss.isfinite()
    gradient = torch.autograd.grad(loss, x)[0]
    # the scale of 10 over a length of 1e-6, where the gradient of x / ||x|| has no end
    assert gradient.isfinite().all() and gradient.abs().max() < 1e8
    nothing = torch.zeros(N, D)
    assert structure_similarity_loss(nothing, nothing, anchors).item() == 0.0


def test_one_table_a_side_is_kept_for_the_backward_pass():
    x, x_gallery, anchors = draw(N, D).requires_grad_(), draw(N, D), unit(M, K, d)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        structure_similarity_loss(x, x_gallery, anchors)
    assert sorted(kept.values())[-2:] == [N * M * K] * 2
    assert sum(size >= N * M * K for size in kept.values()) == 2


def test_nothing_larger_than_a_table_is_made_on_the_way():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    x, x_gallery, anchors = draw(N, D).requires_grad_(), draw(N, D), unit(M, K, d)
    with Watch():
        structure_similarity_loss(x, x_gallery, anchors).backward()
    assert max(sizes) == N * M * K


# --- angles ---------------------------------------------------------------------------------------


def at_angles(theta):
    """Vectors at angles theta to (1, 0)."""
    return torch.stack([theta.cos(), theta.sin()], dim=1)


def own_logit(theta, margin, scale=1.0):
    """Of vectors at angles theta to their class."""
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=theta.dtype)
    labels = torch.zeros(len(theta), dtype=torch.int64)
    return arcface_logits(3.0 * at_angles(theta), weight, labels, scale, margin)[:, 0]


@pytest.mark.parametrize("margin", [0.15, 0.5])
def test_the_margin_is_an_angle(margin):
    theta = torch.linspace(0.0, math.pi - margin, 50, dtype=torch.float64)
    got = own_logit(theta, margin, scale=7.0)
    torch.testing.assert_close(got, 7.0 * torch.cos(theta + margin), atol=1e-12, rtol=0)


@pytest.mark.parametrize("margin", [0.15, 0.5, 2.0])
def test_logits_fall_all_the_way_to_the_opposite_side(margin):
    theta = torch.linspace(0.0, math.pi, 2001, dtype=torch.float64)
    steps = own_logit(theta, margin).diff()
    assert bool((steps < 0).all())
    assert steps.min() > -2e-3  # a step of the grid is pi / 2000, and no slope exceeds 1
    assert own_logit(theta[-1:], margin).item() == pytest.approx(math.cos(margin) - 2, abs=1e-12)


def test_only_the_own_class_has_a_margin():
    x, weight = draw(N, D), draw(C, D)
    plain, widened = (arcface_logits(x, weight, LABELS, S, margin) for margin in (0.0, 0.15))
    own = torch.nn.functional.one_hot(LABELS, C).bool()
    assert torch.equal(plain[~own], widened[~own])
    assert bool((plain[own] > widened[own]).all())
    cos = torch.nn.functional.cosine_similarity(x[:, None], weight, dim=2)
    torch.testing.assert_close(plain, S * cos, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["parallel", "opposite"])
@pytest.mark.parametrize("off", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_gradients_at_the_ends_are_those_of_an_angle(dtype, sign, off):
    scale = 10.0
    weight = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.8]], dtype=dtype), dim=1)
    aside = torch.nn.functional.normalize(torch.tensor([[0.5, 0.3, 0.0]], dtype=dtype), dim=1)
    x = (sign * weight + off * aside).requires_grad_()
    weight.requires_grad_()
    logits = arcface_logits(x, weight, torch.zeros(1, dtype=torch.int64), scale, 0.15)
    for gradient in torch.autograd.grad(logits.sum(), (x, weight)):
        assert gradient.isfinite().all()
        # |d logit / d theta| <= scale, and an angle turns by 1 / length
        assert gradient.norm() <= scale * 1.01
        if sign > 0 and off >= 1e-4:  # sin(theta + margin), well off the rounding of float32
            want = scale * math.sin(math.atan(off) + 0.15)
            assert gradient.norm().item() == pytest.approx(want, rel=2e-2)


def test_what_lies_on_its_class_is_certain():
    weight = torch.eye(2, dtype=torch.float64)
    got = arcface_loss(weight, weight, torch.arange(2), scale=3.0, margin=0.0).item()
    assert got == pytest.approx(math.log(1 + math.exp(-3.0)), abs=1e-12)
    assert arcface_loss(weight, weight, torch.arange(2)).item() < 1e-18  # default scale: 45


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_numbers_of_any_integer_type(dtype):
    x, weight = draw(N, D), draw(C, D)
    want = arcface_loss(x, weight, LABELS)
    assert torch.equal(arcface_loss(x, weight, LABELS.to(dtype)), want)


# --- compatible classifiers -----------------------------------------------------------------------


def test_each_classifier_has_its_own_embedding():
    (x, transformed, labels), (new, moved, old), _ = inputs_of(lce)
    weights = {"alignment": 0.0, "new_margin": 0.15, "old_margin": 0.2}
    args = (x, transformed, labels, new, moved, old, S)
    want = arcface_loss(x, new, labels, S, 0.15)
    torch.testing.assert_close(lce_loss(*args, **weights, old_share=0.0), want)
    want = want + 3.0 * arcface_loss(transformed, old, labels, S, 0.2)
    torch.testing.assert_close(lce_loss(*args, **weights, old_share=3.0), want)


def test_lce_without_transform_is_hvs_and_class_weights_that_agree_cost_nothing():
    x, new, old = draw(N, D).requires_grad_(), draw(C, D), draw(C, D)
    moved = (2.0 * old).requires_grad_()  # their lengths may differ
    want = hvs_loss(x, LABELS, new, old, S, 0.15, 0.2)
    got = lce_loss(x, x, LABELS, new, moved, old, old_share=1.0)
    torch.testing.assert_close(got, want)
    # at distance 0 of a distance: finite, where the root's derivative is infinite
    assert torch.autograd.grad(got, moved)[0].isfinite().all()


def test_class_weights_that_are_opposite_are_two_apart():
    x, new, old = draw(N, D), draw(C, D), draw(C, D)
    near, far = (lce_loss(x, x, LABELS, new, sign * old, old) for sign in (1.0, -1.0))
    assert (far - near).item() == pytest.approx(10.0 * 2.0, abs=1e-10)


def test_a_class_without_an_old_weight_is_no_fault():
    x, new, moved = (draw(rows, D).requires_grad_() for rows in (N, C, C))
    old = draw(C, D)
    old[1] = 0.0  # as `utils.gallery.class_means` leaves it
    loss = lce_loss(x, x, torch.tensor([0, 2, 2, 3, 0]), new, moved, old)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, new, moved)))


# --- tuples ---------------------------------------------------------------------------------------


def test_a_satisfied_tuple_costs_nothing():
    x = draw(N, D).requires_grad_()
    negatives = x.detach()[:, None] + 0.71 * unit(N, R, D)
    loss = tuple_contrastive_loss(x, x.detach().clone(), negatives)
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize(("far", "want"), [(0.0, 0.245), (0.5, 0.02), (0.7, 0.0), (50.0, 0.0)])
def test_negatives_push_within_the_margin_only(far, want):
    x = draw(1, D).requires_grad_()
    away = unit(1, D)
    negative = (x.detach() + far * away)[:, None]
    loss = tuple_contrastive_loss(x, x.detach().clone(), negative)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    gradient = torch.autograd.grad(loss, x)[0]
    # descent moves the query away from the negative, by the distance that is wanting
    pull = max(0.0, 0.7 - far) if far else 0.0
    torch.testing.assert_close(gradient, pull * away, atol=1e-12, rtol=0)


def test_the_positive_draws():
    x = draw(2, D).requires_grad_()
    away = unit(2, D)
    loss = tuple_contrastive_loss(x, x.detach() + 3.0 * away, x.detach()[:, None] + 9.0)
    assert loss.item() == pytest.approx(0.5 * 3.0**2, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], -3.0 * away / 2, atol=1e-12, rtol=0)


def test_a_tuple_without_negatives_is_half_the_regression():
    x_query, positive = draw(N, D), draw(N, D)
    torch.testing.assert_close(
        tuple_contrastive_loss(x_query, positive, draw(N, 0, D)),
        0.5 * regression_loss(x_query, positive),
    )


# --- precision and faults -------------------------------------------------------------------------


@ALL
def test_float32_under_autocast(loss):
    batch, rest, _ = inputs_of(loss)
    assert loss(batch, rest).dtype == torch.float64
    low = [t.bfloat16() if t.is_floating_point() else t for t in (*batch, *rest)]
    high = [t.float() if t.is_floating_point() else t for t in low]
    with torch.autocast("cpu", torch.bfloat16):
        from_high, from_low = (call(loss, given, len(batch)) for given in (high, low))
    assert from_high.dtype == from_low.dtype == torch.float32
    assert torch.equal(from_high, call(loss, high, len(batch)))
    assert torch.equal(from_low, from_high)  # bf16 is in float32 exactly
    # bf16 rounds inputs by 2^-9; the losses here are some ten times more sensitive at most
    torch.testing.assert_close(
        from_low.double(), loss(batch, rest), atol=1e-2, rtol=10 * 2**-9, check_dtype=False
    )


@ALL
def test_gradients_come_back_in_the_embeddings_type(loss):
    batch, rest, _ = inputs_of(loss)
    x = batch[0].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = loss((x, *batch[1:]), rest)
    gradient = torch.autograd.grad(total, x)[0]
    assert total.dtype == torch.float64  # the gallery's side is float64 here
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


def test_structures_that_do_not_fit_are_named():
    x, anchors = draw(N, D), unit(M, K, d)
    for wrong in (x[:2], x[:, :4]):
        with pytest.raises(ValueError, match=r"and x_gallery must be \(N, D\) alike; got \(5, 6\)"):
            structure_similarity_loss(x, wrong, anchors)
    with pytest.raises(ValueError, match=r"alike; got \(6,\), \(6,\)"):
        structure_similarity_loss(x[0], x[0], anchors)
    for wrong in (anchors[:2], anchors[0], anchors[:, :, :1]):
        with pytest.raises(ValueError, match=r"anchors must be \(M, K, d\) with M \* d = D = 6; g"):
            structure_similarity_loss(x, x, wrong)
    for scale in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"scale must not be negative, got {scale}"):
            structure_similarity_loss(x, x, anchors, scale)


def test_classifiers_that_do_not_fit_are_named():
    x, weight = draw(N, D), draw(C, D)
    for wrong in (weight[:, :4], weight[0]):
        with pytest.raises(ValueError, match=r"x must be \(N, D\) and weight \(C, D\); got \(5, "):
            arcface_loss(x, wrong, LABELS)
    with pytest.raises(ValueError, match="x must be"):
        arcface_loss(x[0], weight, LABELS)
    for wrong in (LABELS[:4], LABELS[None], LABELS.float(), LABELS > 0, weight):
        with pytest.raises(ValueError, match=r"5 embeddings need labels \(N,\), integers; got \("):
            arcface_loss(x, weight, wrong)
    for scale, margin in ((0.0, 0.1), (1.0, -0.1), (1.0, 3.2), (1.0, math.nan), (math.nan, 0.1)):
        with pytest.raises(ValueError, match=rf"\[0, pi\], got scale={scale}, margin={margin}"):
            arcface_logits(x, weight, LABELS, scale, margin)


def test_compatible_classifiers_that_do_not_fit_are_named():
    x, weight = draw(N, D), draw(C, D)
    with pytest.raises(ValueError, match=r"and old_weight must be \(C, D\) alike; got \(4, 6\), "):
        hvs_loss(x, LABELS, weight, weight[:3])
    with pytest.raises(ValueError, match=r"x and transformed must be \(N, D\) alike; got \(5, 6\)"):
        lce_loss(x, x[:4], LABELS, weight, weight, weight)
    for wrong in ((weight[:3], weight), (weight, weight[:, :4])):
        with pytest.raises(ValueError, match=r"weight must be \(C, D\) alike; got \(4, 6\), \("):
            lce_loss(x, x, LABELS, weight, *wrong)
    with pytest.raises(ValueError, match="need labels"):  # arguments in another order
        lce_loss(x, x, weight, weight, weight, weight)


def test_tuples_that_do_not_fit_are_named():
    x, negatives = draw(N, D), draw(N, R, D)
    wrong = [(x[:2], x, negatives), (x, x[:, :4], negatives), (x, x, negatives[:2])]
    wrong += [(x, x, x), (x, x, negatives[:, :, :4]), (x[0], x[0], negatives[0])]
    for tensors in wrong:
        with pytest.raises(ValueError, match=r"and gallery_negatives \(N, R, D\); got \("):
            tuple_contrastive_loss(*tensors)
    for margin in (0.0, -0.7, math.nan):
        with pytest.raises(ValueError, match=f"margin must be positive, got {margin}"):
            tuple_contrastive_loss(x, x, negatives, margin)


def test_features_that_do_not_fit_are_named():
    x = draw(N, D)
    for query, gallery in ((x, x[:1]), (x, x[:, :4]), (x[0], x[0])):
        with pytest.raises(ValueError, match=r"x_query and x_gallery must be \(N, D\) alike; got"):
            regression_loss(query, gallery)
