"""Lists in the field's formats: read right, and every fault named."""

import os

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
    path.write_text("a b.jpg 7\nc.jpg 0\nd.jpg\t12\ne f.jpg\t3\n")
    found = read_label_list(path)
    assert found.names == ["a b.jpg", "c.jpg", "d.jpg", "e f.jpg"]
    assert found.labels.tolist() == [7, 0, 12, 3]
    assert not found.multilabel and len(found.classes) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.jpg 0 1\nb.jpg 0\n", "line 2 has not 2 labels"),
        ("a.jpg 0 1\nb.jpg 0 1 1\n", "line 2 has not 2 labels"),
        ("a.jpg 0 1\nb.jpg 0 2\nc.jpg\n", r"line 2 has not 2 labels.*line 3"),
        ("a.jpg 3\nb.jpg x\n", "line 2 does not end with a class number"),
        ("a.jpg 3\n\n,,,\n", "line 3 does not end with a class number"),
        ("a.jpg\n", "line 1 does not end with a class number"),
        ("path,sky,sea\na.jpg,0,1\n", "line 1 does not end with a class number"),
        ("a.jpg 100000\n", "line 1 has class 100000; allowed is 0 to 99999"),
        (f"a.jpg {'9' * 5000}\n", "line 1 has class 9{20}; allowed"),
        ("a.jpg \u0663\n", "line 1 does not end with a class number"),
        ("\na.jpg 0 1\n\nb.jpg 1\n", "line 4 has not 2 labels"),  # as an editor counts
        ("a.jpg 0 -1\n", "line 1 has '0' beside -1; allowed are 0 and 1, or -1 and 1"),
        ("a.jpg 0 1\nb.jpg -1 1\n", "line 1 has '0' beside -1"),
        ("a.jpg 0 1\n./a.jpg 1 1\n", "'a.jpg' is listed twice, with different labels"),
        ("a.jpg 3\n" + "x\n" * 5, "line 2 .*; line 3 .*; line 4 .*; 2 more"),
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


def test_lists_of_any_editor_are_the_same_list(tmp_path):
    """Line ends, byte order mark, separators and coding differ; names have commas and blanks."""
    names, labels = ["a, b/1.jpg", "c/2.JPG", "\u00fc,3.jpg"], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    path = tmp_path / "train.txt"
    for end in ("\n", "\r\n", "\r", "\n\n"):
        for gap in (" ", "\t", ",", ", ", " \t "):
            for no in ("0", "-1"):
                rows = zip(names, labels, strict=True)
                lines = [gap.join([name, *("1" if x else no for x in row)]) for name, row in rows]
                for mark in (b"", b"\xef\xbb\xbf"):
                    path.write_bytes(mark + (end.join(lines) + end).encode())
                    found = read_label_list(path)
                    assert found.names == names and found.labels.tolist() == labels
    path.write_text("a, b.jpg,7\nc.jpg, 2\n")
    found = read_label_list(path)
    assert found.names == ["a, b.jpg", "c.jpg"] and found.labels.tolist() == [7, 2]


def test_names_keep_their_bytes(tmp_path):
    """A name in Latin-1 is found as the file system has it; odd line ends belong to names."""
    path = tmp_path / "train.txt"
    path.write_bytes(b"caf\xe9.jpg 1\n" + "x\u2028y\x0bz.jpg 0\n".encode())
    names = read_label_list(path).names
    assert [os.fsencode(name) for name in names] == [b"caf\xe9.jpg", "x\u2028y\x0bz.jpg".encode()]
    path.write_text("a.jpg 1\n", encoding="utf-16")
    with pytest.raises(
        UserError, match=r"train\.txt: is no text, or in UTF-16; save it as .*UTF-8"
    ):
        read_label_list(path)


def test_paths_are_made_relative_to_the_folder_of_the_images(tmp_path):
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/set")
    path = tmp_path / "link" / "train.txt"
    absolute = [tmp_path / "link" / "1.jpg", tmp_path / "disk" / "set" / "a" / "2.jpg"]
    rest = ["./b/3.jpg", "b/../c//4.jpg", "d\\5.jpg", "e/6\\7.jpg"]
    path.write_text("".join(f"{name} 0 1\n" for name in [*absolute, *rest]))
    expected = ["1.jpg", "a/2.jpg", "b/3.jpg", "c/4.jpg", "d/5.jpg", "e/6\\7.jpg"]
    assert read_label_list(path).names == expected
    whole = read_label_list(path, root=tmp_path)
    assert whole.names[:2] == ["link/1.jpg", "disk/set/a/2.jpg"]


@pytest.mark.parametrize(
    "name",
    ["/elsewhere/b.jpg", "../b.jpg", "a/../../b.jpg", "C:\\pictures\\b.jpg", "{}-2/b.jpg", "."],
)
def test_paths_that_lead_elsewhere_are_refused(name, tmp_path):
    """`{}-2`: a folder that only begins like the right one."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_text(f"a.jpg 3\n{name.format(folder)} 4\n")
    with pytest.raises(
        UserError, match=r"1 of its paths do not lie below .*/set, '.*' for one; .*--image_dir"
    ):
        read_label_list(folder / "train.txt")
    (folder / "img.txt").write_text(f"{name.format(folder)}\n")
    (folder / "targets.txt").write_text("1 0\n")
    with pytest.raises(UserError, match=r"img\.txt: 1 of its paths do not lie below"):
        read_images_and_targets(folder / "img.txt", folder / "targets.txt")


def test_an_image_that_is_listed_again_with_its_labels_counts_once(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a.jpg 0 1\nb.jpg 1 1\n./a.jpg 0 1\n")
    found = read_label_list(path)
    assert found.names == ["a.jpg", "b.jpg"] and found.labels.tolist() == [[0, 1], [1, 1]]


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


def test_an_empty_line_does_not_shift_labels(tmp_path):
    images, targets = tmp_path / "img.txt", tmp_path / "targets.txt"
    images.write_text("1.jpg\n\n2.jpg\n3.jpg\n\n")
    targets.write_bytes(b"0,1\r\n\r\n1,0\r\n1,1,\r\n")
    found = read_images_and_targets(images, targets)
    assert found.labels.tolist() == [[0, 1], [1, 0], [1, 1]]
    targets.write_text("0 1\n1 0\n\n1 1\n")  # as many, and the second is none of 2.jpg's
    with pytest.raises(UserError, match=r"'2.jpg' is line 3 of img.txt, and its labels line 2 of"):
        read_images_and_targets(images, targets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 -1\n-1 -1\n", None),
        ("1 0\n1 -1\n", r"targets\.txt: line 1 has '0' beside -1"),
        ("1 0\n1 5\n", r"targets\.txt: line 2 has '5'; allowed are 0 and 1, or -1 and 1"),
        ("1.0 0.0\n1.0 1.0\n", r"line 1 has '1\.0'; allowed are 0 and 1"),
        (",\n,\n", "line 1 has not 1 labels"),
        ("", "img.txt has 2 images and targets.txt 0 lines"),
    ],
)
def test_codings_of_targets(text, message, tmp_path):
    images, targets = tmp_path / "img.txt", tmp_path / "targets.txt"
    images.write_text("1.jpg\n2.jpg\n")
    targets.write_text(text)
    if message is None:
        assert read_images_and_targets(images, targets).labels.tolist() == [[1, 0], [0, 0]]
        return
    with pytest.raises(UserError, match=message):
        read_images_and_targets(images, targets)
    images.write_text("\n")
    targets.write_text("")
    with pytest.raises(UserError, match=r"img\.txt: is empty"):
        read_images_and_targets(images, targets)
    targets.unlink()
    with pytest.raises(UserError, match=r"targets\.txt: cannot be read: No such file"):
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


def test_mirflickr_elsewhere_and_with_other_endings(tmp_path):
    folder = make_mirflickr(tmp_path / "set")
    plain = read_mirflickr(folder)
    (folder / "mirflickr" / "im3.jpg").rename(folder / "mirflickr" / "im3.JPG")
    (folder / "mirflickr" / "im4.JPG").write_bytes(b"")  # beside im4.jpg
    (folder / "mirflickr" / "im0.jpg").write_bytes(b"")
    found = read_mirflickr(folder)
    assert found.names == [name.replace("im3.jpg", "im3.JPG") for name in plain.names]
    (folder / "mirflickr").rename(tmp_path / "mirflickr")
    with pytest.raises(UserError, match=r"/set: has no images im1\.jpg"):
        read_mirflickr(folder)
    assert read_mirflickr(folder, root=tmp_path).names == found.names
    # all in one folder, beside pictures of other names
    for path in [*(tmp_path / "mirflickr").iterdir(), *folder.glob("*/*.txt")]:
        path.rename(folder / path.name)
    (folder / "images").mkdir()
    (folder / "images" / "image_of_mine.jpg").write_bytes(b"")
    loose = read_mirflickr(folder)
    assert loose.names == [name.removeprefix("mirflickr/") for name in found.names]
    assert torch.equal(loose.labels, plain.labels)


def test_mirflickr_s_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no images im1.jpg.*mirflickr25k.zip"):
        read_mirflickr(tmp_path)
    folder = make_mirflickr(tmp_path / "set")
    notes = folder / "mirflickr25k_annotations_v080"
    (folder / "mirflickr" / "im3.jpg").unlink()
    assert "mirflickr/im3.jpg" in read_mirflickr(folder).names  # listed, so it is missed later
    (notes / "bird_r1.txt").unlink()
    with pytest.raises(UserError, match=r"annotations_v080: bird_r1\.txt is missing"):
        read_mirflickr(folder, relevant=True)
    for wrong in ("0", "1000001", "9" * 5000, "-1"):
        (notes / "tree.txt").write_text(f"1\n{wrong}\n")
        with pytest.raises(UserError, match=f"no image number of 1 to 1000000, '{wrong[:20]}'"):
            read_mirflickr(folder)
    (notes / "tree.txt").write_text("1\nx2\n")
    (notes / "water.txt").unlink()
    with pytest.raises(UserError, match=r"tree.txt has lines that.*water.txt is missing"):
        read_mirflickr(folder)
