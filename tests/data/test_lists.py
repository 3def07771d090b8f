"""Lists in the field's formats: read right, and every fault named."""

import pytest
import torch

from data.lists import (
    FLICKR_LABELS,
    FLICKR_RELEVANT,
    read_images_and_targets,
    read_label_list,
    read_mirflickr,
)
from utils.errors import UserError


def test_a_list_of_paths_and_labels(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a/im 1.jpg 0 1 1\nb/im2.jpg 0 0 0\n\n  c.jpg 1 0 0  \n")
    found = read_label_list(path)
    assert found.names == ["a/im 1.jpg", "b/im2.jpg", "c.jpg"]  # blanks belong to the path
    assert found.labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert found.labels.dtype == torch.uint8
    assert found.multilabel and len(found.classes) == 3


def test_a_list_of_paths_and_class_numbers(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a b.jpg 7\nc.jpg 0\nd.jpg\t12\n")
    found = read_label_list(path)
    assert found.names == ["a b.jpg", "c.jpg", "d.jpg"]
    assert found.labels.tolist() == [7, 0, 12]
    assert not found.multilabel and len(found.classes) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.jpg 0 1\nb.jpg 0\n", "line 2 has not 2 labels"),
        ("a.jpg 0 1\nb.jpg 0 1 1\n", "line 2 has not 2 labels"),
        ("a.jpg 0 1\nb.jpg 0 2\nc.jpg\n", r"line 2 has not 2 labels.*line 3"),
        ("a.jpg 3\nb.jpg x\n", "line 2 does not end with a class number"),
        ("a.jpg 0 1\na.jpg 1 1\n", "'a.jpg' is listed twice, with different labels"),
    ],
)
def test_faults_of_a_list_are_named(text, message, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_label_list(path)
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        read_label_list(tmp_path / "nowhere.txt")


def test_images_and_targets_side_by_side(tmp_path):
    images, targets = tmp_path / "img.txt", tmp_path / "targets.txt"
    images.write_text("mirflickr/im1.jpg\nmirflickr/im2.jpg\n")
    targets.write_text("0 1 0\n1,1,0\n")
    found = read_images_and_targets(images, targets)
    assert found.names == ["mirflickr/im1.jpg", "mirflickr/im2.jpg"]
    assert found.labels.tolist() == [[0, 1, 0], [1, 1, 0]]
    targets.write_text("0 1 0\n")
    with pytest.raises(UserError, match=r"img.txt has 2 images and targets.txt 1 lines"):
        read_images_and_targets(images, targets)
    targets.write_text("0 1 0\n0 1\n")
    with pytest.raises(UserError, match="line 2 has not 3 labels"):
        read_images_and_targets(images, targets)


def make_mirflickr(folder, n=6):
    """The authors' layout: image k has the labels whose number divides k."""
    (folder / "mirflickr").mkdir(parents=True)
    notes = folder / "mirflickr25k_annotations_v080"
    notes.mkdir()
    for number in range(1, n + 1):
        (folder / "mirflickr" / f"im{number}.jpg").write_bytes(b"")
    (folder / "mirflickr" / "doc.txt").write_text("not an image")
    (notes / "README.txt").write_text("POTENTIAL LABELS and RELEVANT LABELS")
    for i, label in enumerate(FLICKR_LABELS, start=1):
        numbers = [k for k in range(1, n + 1) if k % i == 0]
        (notes / f"{label}.txt").write_text("".join(f"{k}\r\n" for k in numbers))
    for label in FLICKR_RELEVANT:
        (notes / f"{label}_r1.txt").write_text("2\n")
    return folder


def test_mirflickr_as_its_authors_hand_it_out(tmp_path):
    found = read_mirflickr(make_mirflickr(tmp_path))
    assert found.names == [f"mirflickr/im{k}.jpg" for k in range(1, 7)]
    assert found.classes == FLICKR_LABELS
    assert len(FLICKR_LABELS) == 24 and len(FLICKR_RELEVANT) == 14
    for k, row in enumerate(found.labels.tolist(), start=1):
        assert row == [int(k % i == 0) for i in range(1, 25)]
    more = read_mirflickr(tmp_path, relevant=True)
    assert more.labels.shape == (6, 38)
    assert more.labels[:, 24:].sum(dim=1).tolist() == [0, 14, 0, 0, 0, 0]


def test_mirflickr_s_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no images im1.jpg.*mirflickr25k.zip"):
        read_mirflickr(tmp_path)
    folder = make_mirflickr(tmp_path / "set")
    notes = folder / "mirflickr25k_annotations_v080"
    (folder / "mirflickr" / "im3.jpg").unlink()
    assert "mirflickr/im3.jpg" in read_mirflickr(folder).names  # listed, so it is missed later
    (notes / "tree.txt").write_text("1\nx2\n")
    (notes / "water.txt").unlink()
    with pytest.raises(UserError, match=r"tree.txt has lines that.*water.txt is missing"):
        read_mirflickr(folder)
