"""Split files: what is written is read again, and whatever is wrong with one is named."""

import dataclasses
import hashlib
import json

import pytest
import torch

from data.lists import Listing
from data.manifest import Split, read_split, write_split
from utils.errors import UserError

NAMES = ["a/1.jpg", "a/ü 2,3.jpg", "caf\udce9.jpg", "b\n.jpg", "5.JPG"]  # \udce9: not UTF-8


def rows(*numbers):
    return torch.tensor(numbers)


def make_single():
    roles = {"train": rows(0, 1), "query": rows(4), "database": rows(0, 1, 2, 3)}
    listing = Listing(list(NAMES), rows(1, 0, 1, 2, 0), ("cat", "dog", "cöw"))
    return Split("lists", "lists", None, listing, roles)


def make_multi():
    labels = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]])
    roles = {"train": rows(0, 2), "labelled": rows(1), "query": rows(4), "database": rows(0, 2, 3)}
    listing = Listing(list(NAMES), labels.to(torch.uint8), ("sky", "sea", "sun"))
    return Split("flickr25k", "spq", 7, listing, roles)


@pytest.fixture(params=[make_single, make_multi])
def split(request):
    return request.param()


def test_what_is_written_is_read_again(split, tmp_path):
    path = tmp_path / "new folder" / "my.split"
    write_split(path, split)
    found = read_split(path)
    assert (found.dataset, found.protocol, found.seed) == (
        split.dataset,
        split.protocol,
        split.seed,
    )
    assert found.listing.names == NAMES
    assert found.listing.classes == split.listing.classes
    assert found.listing.multilabel == split.listing.multilabel
    assert found.listing.labels.dtype == split.listing.labels.dtype
    assert torch.equal(found.listing.labels, split.listing.labels)
    assert found.roles.keys() == split.roles.keys()
    assert all(torch.equal(found.roles[role], split.roles[role]) for role in split.roles)
    assert found.head() == split.head() and found.summary() == split.summary()
    assert [file.name for file in path.parent.iterdir()] == ["my.split"]


def test_the_lines_are_as_the_format_says(tmp_path):
    write_split(tmp_path / "s", make_multi())
    first, rest = (tmp_path / "s").read_bytes().split(b"\n", 1)
    assert rest.decode("ascii").splitlines() == [
        '[["train","database"],[1,2],"a/1.jpg"]',
        '[["labelled"],[0],"a/\\u00fc 2,3.jpg"]',
        '[["train","database"],[],"caf\\udce9.jpg"]',
        '[["database"],[0,1,2],"b\\n.jpg"]',
        '[["query"],[2],"5.JPG"]',
    ]
    assert json.loads(first) == {
        "format": "product-quantization-split",
        "version": 1,
        "dataset": "flickr25k",
        "protocol": "spq",
        "seed": 7,
        "multilabel": True,
        "classes": ["sky", "sea", "sun"],
        "images": 5,
        "train": 2,
        "labelled": 1,
        "query": 1,
        "database": 3,
        "sha256": hashlib.sha256(rest).hexdigest(),
    }


def test_a_set_without_queries_is_read_as_it_was_made(tmp_path):
    """A role that no image has is not there, however often the split is written."""
    listing = Listing(["1.jpg", "2.jpg"], rows(0, 0), ("image",))
    split = Split("folder", "all", None, listing, {"train": rows(0, 1)})
    write_split(tmp_path / "s", split)
    assert read_split(tmp_path / "s").roles.keys() == {"train"}


def test_the_hash_is_of_names_labels_and_roles(split):
    assert split.sha256 == dataclasses.replace(split).sha256
    listing, roles = split.listing, split.roles
    labels = listing.labels.clone()
    labels[0] = labels[1]
    turned = list(range(5))[::-1]
    others = [
        {"roles": roles | {"train": rows(0, 3)}},
        {"roles": roles | {"labelled": rows(0)}},
        {"roles": {role: found for role, found in roles.items() if role != "query"}},
        {"listing": dataclasses.replace(listing, labels=labels)},
        {"listing": dataclasses.replace(listing, names=[*NAMES[:4], "6.jpg"])},
        {"listing": Listing([NAMES[i] for i in turned], listing.labels[turned], listing.classes)},
    ]
    hashes = {dataclasses.replace(split, **change).sha256 for change in others}
    assert len(hashes | {split.sha256}) == 1 + len(others)
    # the same images for the same purpose: the same split, whatever it is called
    assert dataclasses.replace(split, seed=8, protocol="other").sha256 == split.sha256


def test_the_summary_counts_roles_and_tells_of_queries_that_are_elsewhere():
    split = make_multi()
    text = "flickr25k, protocol spq, seed 7: 2 train, 1 labelled, 1 query, 3 database; 3 labels"
    assert split.summary() == text
    mixed = dataclasses.replace(split, roles=split.roles | {"query": rows(0, 1, 3, 4)})
    assert mixed.summary() == (
        text.replace("1 query", "4 query")
        + "; queries also in the database: 2; queries also trained on: 1"
    )
    assert (
        make_single().summary() == "lists, protocol lists: 2 train, 1 query, 4 database; 3 classes"
    )


def test_line_ends_and_a_byte_order_mark_of_windows_change_nothing(split, tmp_path):
    write_split(tmp_path / "s", split)
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert read_split(tmp_path / "s").sha256 == split.sha256


def test_a_changed_line_is_refused(split, tmp_path):
    path = tmp_path / "s"
    write_split(path, split)
    content = path.read_text()
    for changed in (
        content.replace('[["query"]', '[["train"]'),
        content.replace("a/1.jpg", "a/2.jpg"),
        content + '[["train"],[0],"new.jpg"]\n',
        content[:-1],
        content[: content.rindex("[[")],
    ):
        assert changed != content
        path.write_text(changed)
        with pytest.raises(UserError, match=r"--split=.*was changed: .* make another"):
            read_split(path)


GOOD = ['[["train","database"],[0],"a.jpg"]', '[["query"],[1],"b.jpg"]']


def write_lines(path, lines, **changes):
    """A file whose hash is right, whatever its lines are."""
    rest = "".join(f"{line}\n" for line in lines)
    head = {
        "format": "product-quantization-split",
        "version": 1,
        "dataset": "lists",
        "protocol": "lists",
        "seed": None,
        "multilabel": False,
        "classes": ["x", "y"],
        "images": 2,
        "train": 1,
        "labelled": 0,
        "query": 1,
        "database": 1,
        "sha256": hashlib.sha256(rest.encode()).hexdigest(),
    }
    path.write_text(json.dumps(head | changes) + "\n" + rest)
    return path


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (GOOD[1], {"train": 2}, "counts otherwise"),
        (GOOD[1], {"images": 3}, "counts otherwise"),
        (GOOD[1], {"version": 2}, "has version 2; this code reads 1"),
        (GOOD[1], {"format": "zip"}, r"is no split; python -m data\.splits make"),
        (GOOD[1], {"classes": ["x"]}, r"labels \[1\], of 0 to 0"),
        (GOOD[1], {"classes": None}, "is damaged"),
        ('[["query"],[1],"a.jpg"]', {}, "an image that is there twice"),
        ('[["query"],[1],"../b.jpg"]', {}, "leads out of the data folder"),
        ('[["query"],[1],"c/../../b.jpg"]', {}, "leads out of the data folder"),
        ('[["query"],[1],"/etc/b.jpg"]', {}, "leads out of the data folder"),
        ('[["query"],[1],""]', {}, "a path that is no text"),
        ('[["query"],[1],5]', {}, "a path that is no text"),
        ('[["query"],[1],"b\\u0000.jpg"]', {}, "a path that is no text"),
        ('[["query"],[],"b.jpg"]', {}, "is damaged"),
        ('[["query"],[0,1],"b.jpg"]', {}, "is damaged"),
        ('[["query"],[-1],"b.jpg"]', {}, r"labels \[-1\]"),
        ('[["query"],[0.5],"b.jpg"]', {}, r"labels \[0.5\]"),
        (f'[["query"],[{10**30}],"b.jpg"]', {"multilabel": True}, r"labels \[10+\]"),
        ('[["query"],[1]]', {}, "is damaged"),
        ('[["judge"],[1],"b.jpg"]', {}, "is damaged.*judge"),
        ('[["query"], [1], "b.jpg"]', {}, "not as this code writes them"),
        ("[" * 100_000, {}, "is damaged"),
        ('[["labelled"],[1],"b.jpg"]', {"labelled": 1, "query": 0}, "queries if it has a database"),
    ],
)
def test_what_contradicts_itself_is_refused(line, changes, message, tmp_path):
    read_split(write_lines(tmp_path / "good", GOOD))
    path = write_lines(tmp_path / "bad", [GOOD[0], line], **changes)
    with pytest.raises(UserError, match=rf"(?s)--split=.*bad: .*{message}"):
        read_split(path)


def test_a_split_without_training_images_is_refused(tmp_path):
    lines = [GOOD[0].replace('"train",', ""), GOOD[1]]
    with pytest.raises(UserError, match="must have images to train on"):
        read_split(write_lines(tmp_path / "s", lines, train=0))


@pytest.mark.parametrize(
    "content", [b"", b"a.jpg 0 1\n", b"[1]\n", b"\xff\xd8\xff\0", b"[" * 10**5]
)
def test_another_file_is_no_split(content, tmp_path):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match=r"--split=.*s: is no split; python -m data\.splits make"):
        read_split(tmp_path / "s")
    with pytest.raises(UserError, match=r"split=.*nowhere: cannot be read: No such file"):
        read_split(tmp_path / "nowhere")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    split = make_single()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--output=.*cannot be written: is a folder; name a file"):
        write_split(tmp_path, split)
    with pytest.raises(UserError, match=r"--output=.*file/s: cannot be written"):
        write_split(tmp_path / "file" / "s", split)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--output=\.: cannot be written: is a folder"):
        write_split(tmp_path.__class__("."), split)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.manifest._lines", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_split(tmp_path / "file", split)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "x"  # the older one is whole
