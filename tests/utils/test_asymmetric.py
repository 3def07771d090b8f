"""The evaluation between two networks: three sides, against a naive ranking and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

from utils.asymmetric import FLOAT_BITS, SIDES, AsymmetricEvaluation

Q, N, D, C, SIZE = 7, 30, 6, 4, 8


class Light(nn.Module):
    """A light network: a linear layer over the pixels; in training mode it gives nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, D)

    def describe(self, images):
        assert not self.training
        return F.normalize(self.linear(images.flatten(1) - 0.5), dim=1)


def draw(n, multilabel=False):
    images = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8)
    if multilabel:
        labels = (torch.rand(n, C) < 0.3).to(torch.uint8)
        labels[0] = 0  # an image without a label
        return images, labels
    return images, torch.arange(n) % C


@pytest.fixture(params=[False, True], ids=["single", "several"])
def sides(request):
    query, db = draw(Q, request.param), draw(N, request.param)
    gallery = tuple(F.normalize(torch.randn(n, D), dim=1) for n in (Q, N))
    return query, db, gallery


def naive(x, labels, items, item_labels, n):
    """Mean AP@n (found), AP@n (of all relevant), AP over everything, precision@1, by cosines."""
    figures = []
    for q in range(len(x)):
        sims = [float(x[q].double() @ item.double()) for item in items]
        order = sorted(range(len(items)), key=lambda i: -sims[i])
        alike = [
            bool((labels[q] * item_labels[i]).any())
            if labels.dim() == 2
            else bool(labels[q] == item_labels[i])
            for i in order
        ]
        ap = 0.0
        for rank, hit in enumerate(alike[:n], start=1):
            ap += hit * sum(alike[:rank]) / rank
        found, relevant = sum(alike[:n]), sum(alike)
        target = [alike[order.index(i)] for i in range(len(items))]
        whole = average_precision_score(target, sims) if relevant else 0.0
        figures.append([ap / max(1, found), ap / max(1, relevant), whole, alike[0]])
    return np.mean(figures, axis=0)


@torch.no_grad()
def embeddings(model, images):
    return F.normalize(model.linear(images.flatten(1).float() / 255 - 0.5), dim=1)


def test_each_side_is_a_ranking_by_the_cosine(sides):
    (images, labels), (db_images, db_labels), (gallery_query, gallery_db) = sides
    model = Light()
    x, items = embeddings(model, images), embeddings(model, db_images)
    pairs = {
        "query-gallery": (x, gallery_db),
        "query-query": (x, items),
        "gallery-gallery": (gallery_query, gallery_db),
    }
    found = AsymmetricEvaluation(*sides, SIZE, 10)(model)
    assert [entry["distance"] for entry in found] == list(pairs) == list(SIDES)
    seen = set()
    for entry, (query, db) in zip(found, pairs.values(), strict=True):
        want = naive(query, labels, db, db_labels, 10)
        names = ("mAP@10", "mAP@10_all_relevant", "mAP@all", "precision@1")
        assert [entry[name] for name in names] == pytest.approx(want.tolist(), abs=1e-9)
        assert entry["code_bits"] == FLOAT_BITS * D == 192
        assert entry["queries"] == Q
        seen.add(entry["mAP@all"])
    assert len(seen) == 3  # or the sides could be mixed up unseen


def test_the_whole_ranking(sides):
    ten = AsymmetricEvaluation(*sides, SIZE, 10)
    everything = AsymmetricEvaluation(*sides, SIZE, "all")
    model = Light()
    for entry, want in zip(everything(model), ten(model), strict=True):
        assert entry["mAP@all"] == want["mAP@all"]
        assert {name for name in entry if name.startswith(("mAP", "recall"))} == {"mAP@all"}
        assert entry["pr_curve"] == want["pr_curve"]
    # more than there is means the same, under its own name
    (entry, *_) = AsymmetricEvaluation(*sides, SIZE, 99)(model)
    assert entry["mAP@99"] == entry["mAP@all"]


def test_a_network_that_gives_the_gallery_s_embeddings_has_its_figures():
    model, query, db = Light(), draw(Q), draw(N)
    known = embeddings(model, query[0]), embeddings(model, db[0])
    first, *others = AsymmetricEvaluation(query, db, known, SIZE, 10)(model)
    for other in others:
        assert {**other, "distance": None} == {**first, "distance": None}


def test_embeddings_of_the_wrong_rows_would_be_seen():
    """What the test before relies on: the gallery's rows are those of the images."""
    model, query, db = Light(), draw(Q), draw(N)
    known = embeddings(model, query[0]), embeddings(model, db[0]).roll(1, 0)
    first, own, _ = AsymmetricEvaluation(query, db, known, SIZE, 10)(model)
    assert first["mAP@all"] != own["mAP@all"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(sides, training):
    model = Light().train(training)
    evaluation = AsymmetricEvaluation(*sides, SIZE, 10)
    assert evaluation.encoded is None
    evaluation(model)
    assert model.training == training
    assert [tuple(side.shape) for side in evaluation.encoded] == [(Q, D), (N, D)]

    def fail(images):
        raise ZeroDivisionError

    model.describe = fail  # which leaves it too
    with pytest.raises(ZeroDivisionError):
        evaluation(model)
    assert model.training == training


def test_the_light_network_is_encoded_anew_and_the_ceiling_stays(sides):
    evaluation = AsymmetricEvaluation(*sides, SIZE, 10)
    (one, _, ceiling), (other, _, again) = evaluation(Light()), evaluation(Light())
    assert one["mAP@all"] != other["mAP@all"]
    assert again == ceiling
    again["mAP@all"] = None  # the log adds to what it is given
    assert evaluation(Light())[2] == ceiling


def test_images_of_another_size_are_resized():
    query, db = draw(Q), draw(N)
    large = query[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    known = tuple(F.normalize(torch.randn(n, D), dim=1) for n in (Q, N))
    evaluation = AsymmetricEvaluation((large, query[1]), db, known, SIZE, 10)
    x, _ = evaluation.encode(Light())
    assert x.shape == (Q, D)


def test_examples_are_the_first_query_of_each_class_and_its_nearest_of_the_gallery():
    model, query, db = Light(), draw(Q), draw(N)
    gallery = tuple(F.normalize(torch.randn(n, D), dim=1) for n in (Q, N))
    evaluation = AsymmetricEvaluation(query, db, gallery, SIZE, 10)
    x, _ = evaluation.encode(model)
    rows, index = evaluation.examples(model, 5)
    assert rows.tolist() == [0, 1, 2, 3]
    for row, found in zip(rows.tolist(), index.tolist(), strict=True):
        sims = (gallery[1].double() @ x[row].double()).tolist()
        assert found == sorted(range(N), key=lambda i: -sims[i])[:5]
    assert evaluation.examples(model, 99)[1].shape == (4, N)


def test_examples_of_queries_without_a_label_are_none():
    (images, labels), db = draw(Q, multilabel=True), draw(N, multilabel=True)
    gallery = tuple(F.normalize(torch.randn(n, D), dim=1) for n in (Q, N))
    evaluation = AsymmetricEvaluation((images, labels * 0), db, gallery, SIZE, 10)
    model = Light()
    assert [entry["queries_without_relevant"] for entry in evaluation(model)] == [Q] * 3
    rows, index = evaluation.examples(model, 5)
    assert (len(rows), tuple(index.shape)) == (0, (0, 5))
