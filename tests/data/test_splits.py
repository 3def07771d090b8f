"""Every --dataset's split from files in its exact layout; `python -m data.splits make` and `check`.

Images are decoded in few tests only; in the others they are empty files, or not there at all.
"""

import hashlib
import os
import pickle
import runpy
import sys
from argparse import Namespace

import pytest
import small_cifar
import small_sets
import torch
from small_images import make_images

from data.lists import FLICKR_LABELS, FLICKR_RELEVANT
from data.manifest import read_split, write_split
from data.splits import PROTOCOLS, find_faults, load_split, main, with_labels
from utils.errors import UserError

ROWS = small_cifar.ROWS


def ask(dataset, folder, **changes):
    """The flags that a split depends on, as the main scripts have them."""
    unset = {"image_dir": None, "protocol": None, "split": None, "if_download": False}
    return Namespace(dataset=dataset, data_dir=folder, **({**unset, "split_seed": 0} | changes))


def names_of(split, role):
    return [split.listing.names[row] for row in split.roles[role].tolist()]


def labels_by_name(split):
    return dict(zip(split.listing.names, split.listing.labels.tolist(), strict=True))


def check_roles(split):
    """What holds for every drawn split: training images are searched among, queries are not."""
    sets = {role: set(names_of(split, role)) for role in split.roles}
    assert sets["train"] and sets["query"]
    assert sets["train"] <= sets["database"] and not sets["query"] & sets["database"]


# --- CIFAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "counts"),
    [
        ("spq", (300, 0, 60, 300)),
        ("I", (300, 0, 60, 300)),
        ("II", (30, 0, 60, 300)),
        ("59k", (30, 0, 10, 350)),
        ("gpq", (324, 30, 6, 324)),  # of 36 images a class, a twelfth is labelled
    ],
)
def test_cifar10(protocol, counts, small_set):
    split = load_split(ask("cifar10", small_set, protocol=protocol))
    assert tuple(split.counts().values()) == counts
    assert split.listing.labels.tolist() == [i % 10 for i in range(6 * ROWS)]
    assert split.listing.classes[2] == "bird"
    assert split.protocol == protocol


def test_cifar100(tmp_path, monkeypatch):
    source = "data.cifar100.CIFAR100"
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, n in (("train", 1000), ("test", 200)):
        held = {"data": torch.zeros(n, 3072, dtype=torch.uint8).numpy()}
        held["fine_labels"] = [i % 100 for i in range(n)]
        (folder / name).write_bytes(pickle.dumps(held))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["x"] * 100}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(f"{source}.train_list", [["train", sums["train"]]])
    monkeypatch.setattr(f"{source}.test_list", [["test", sums["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(f"{source}.meta", meta)
    split = load_split(ask("cifar100", tmp_path))
    assert split.summary() == (
        "cifar100, protocol spq: 1000 train, 200 query, 1000 database; 100 classes"
    )
    drawn = load_split(ask("cifar100", tmp_path, protocol="II"))
    assert tuple(drawn.counts().values()) == (100, 0, 200, 1000)


# --- FLICKR25K ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    """150 real images; not to be changed."""
    folder = tmp_path_factory.mktemp("flickr")
    return folder, small_sets.make_mirflickr(folder, 150)


def test_mirflickr(flickr):
    folder, labels = flickr
    split = load_split(ask("flickr25k", folder))
    assert split.summary() == (
        "flickr25k, protocol spq-in-proportion, seed 0: 30 train, 12 query, 138 database; 24 labels"
    )
    assert split.listing.names == [f"mirflickr/im{i}.jpg" for i in range(1, 151)]
    assert split.listing.classes == FLICKR_LABELS
    assert split.listing.labels.tolist() == labels.tolist()
    check_roles(split)
    assert split.sha256 == load_split(ask("flickr25k", folder)).sha256
    assert split.sha256 != load_split(ask("flickr25k", folder, split_seed=1)).sha256
    more = load_split(ask("flickr25k", folder, protocol="38-labels"))
    assert more.listing.labels.shape == (150, 38)
    baby = FLICKR_LABELS.index("baby")
    members = labels[:, baby].nonzero()[0]
    assert FLICKR_RELEVANT[0] == "baby"  # every second of them is relevant
    assert more.listing.labels[:, 24].nonzero()[:, 0].tolist() == members[::2].tolist()
    assert more.roles["query"].tolist() == split.roles["query"].tolist()


def write_targets(folder, labels, name="mirflickr/im{}.jpg"):
    folder.mkdir(exist_ok=True)
    N = len(labels)
    (folder / "img.txt").write_text("".join(f"{name.format(i)}\n" for i in range(1, N + 1)))
    lines = [" ".join(map(str, row)) + "\n" for row in labels.tolist()]
    (folder / "targets.txt").write_text("".join(lines))


def test_flickr25k_has_the_papers_counts_when_it_is_whole(tmp_path):
    labels = torch.zeros(25_000, 24, dtype=torch.uint8)
    labels[torch.arange(25_000), torch.arange(25_000) % 24] = 1
    write_targets(tmp_path, labels)
    split = load_split(ask("flickr25k", tmp_path))
    assert split.protocol == "spq"
    assert tuple(split.counts().values()) == (5000, 0, 2000, 23_000)
    assert torch.equal(split.listing.labels, labels)
    check_roles(split)
    write_targets(tmp_path, labels[:20_015])  # cleaned, as other papers have it
    counts = load_split(ask("flickr25k", tmp_path)).counts()
    assert tuple(counts.values()) == (5000, 0, 2000, 18_015)


def test_38_labels_need_the_annotation_files(tmp_path):
    write_targets(tmp_path, torch.ones(20, 24, dtype=torch.uint8))
    wanted = ask("flickr25k", tmp_path, protocol="38-labels")
    with pytest.raises(UserError, match=r"38-labels: needs MIRFLICKR's annotation.* has img\.txt"):
        load_split(wanted)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("a.jpg 0 1\n")
    with pytest.raises(UserError, match=r"38-labels: needs MIRFLICKR's annotation.*train\.txt"):
        load_split(wanted)


def test_a_handful_of_images_still_has_queries(tmp_path):
    write_targets(tmp_path, torch.ones(3, 24, dtype=torch.uint8))
    counts = load_split(ask("flickr25k", tmp_path)).counts()
    assert tuple(counts.values()) == (1, 0, 1, 2)
    write_targets(tmp_path, torch.ones(1, 24, dtype=torch.uint8))
    with pytest.raises(UserError, match="wants 2 images or more, and there are 1"):
        load_split(ask("flickr25k", tmp_path))


def test_queries_without_any_label_are_refused(tmp_path):
    write_targets(tmp_path, torch.zeros(30, 24, dtype=torch.uint8))
    with pytest.raises(UserError, match="all labels of the 2 queries are 0"):
        load_split(ask("flickr25k", tmp_path))


# --- NUS-WIDE -----------------------------------------------------------------------------------


def test_nuswide_s_three_lists(tmp_path):
    labels = small_sets.make_nuswide(tmp_path, 40)
    split = load_split(ask("nuswide", tmp_path))
    assert split.summary() == "nuswide, protocol lists: 16 train, 8 query, 32 database; 21 labels"
    check_roles(split)
    number = {name: int(name.split("/")[-1].split("_")[0]) for name in split.listing.names}
    assert sorted(number.values()) == list(range(40))
    assert all(row == labels[number[name]].tolist() for name, row in labels_by_name(split).items())
    assert {number[name] for name in names_of(split, "query")} == set(range(0, 40, 5))
    assert {number[name] for name in names_of(split, "train")} == {
        i for i in range(1, 40, 2) if i % 5
    }


def test_nuswide_drawn_from_images_and_targets(tmp_path):
    """100 queries and 500 trained on for each label; an image counts for one."""
    torch.manual_seed(0)
    C, N = 3, 4000
    labels = (torch.rand(N, C) < torch.tensor([0.3, 0.6, 0.5])).to(torch.uint8)
    write_targets(tmp_path, labels)
    split = load_split(ask("nuswide", tmp_path))
    assert (split.protocol, split.seed) == ("100-500", 0)
    some = int(labels.any(dim=1).sum())
    assert some < N  # those without a label are no part of the set
    assert tuple(split.counts().values()) == (1500, 0, 300, some - 300)
    check_roles(split)
    found = split.listing.labels
    assert found.any(dim=1).all()
    for c in range(C):
        assert found[split.roles["query"], c].sum() >= 100
        assert found[split.roles["train"], c].sum() >= 500
    write_targets(tmp_path, labels[:1500])
    with pytest.raises(UserError, match=r"wants 600 images of each class; class 0 has \d+"):
        load_split(ask("nuswide", tmp_path))


def test_nuswide_without_any_list(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg 0 1\n")  # alone it says nothing
    with pytest.raises(UserError, match=r"has neither train\.txt, test\.txt .* nor img\.txt"):
        load_split(ask("nuswide", tmp_path))


# --- lists --------------------------------------------------------------------------------------


def write_lists(folder, **lists):
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def test_lists_with_classes(tmp_path):
    write_lists(
        tmp_path,
        train=["a 1.jpg 2", "b.jpg 0"],
        test=["q.jpg 11", "p.jpg 2"],
        database=["z.jpg 0", "b.jpg 0", "./a 1.jpg 2"],
    )
    split = load_split(ask("lists", tmp_path))
    assert split.summary() == "lists, protocol lists: 2 train, 2 query, 3 database; 12 classes"
    assert names_of(split, "train") == ["a 1.jpg", "b.jpg"]
    assert names_of(split, "query") == ["q.jpg", "p.jpg"]
    assert set(names_of(split, "database")) == {"z.jpg", "b.jpg", "a 1.jpg"}
    expected = {"a 1.jpg": 2, "b.jpg": 0, "q.jpg": 11, "p.jpg": 2, "z.jpg": 0}
    assert labels_by_name(split) == expected
    (tmp_path / "database.txt").unlink()  # what is trained on is searched among
    less = load_split(ask("lists", tmp_path))
    assert torch.equal(less.roles["database"], less.roles["train"])
    assert len(less.listing.names) == 4


def test_lists_with_labels_one_coded_otherwise(tmp_path):
    write_lists(tmp_path, train=["a.jpg 0 1", "b.jpg 1 1"], test=["c.jpg -1 1", "b.jpg 1 1"])
    split = load_split(ask("lists", tmp_path))
    assert labels_by_name(split) == {"a.jpg": [0, 1], "b.jpg": [1, 1], "c.jpg": [0, 1]}
    assert "queries also in the database: 1; queries also trained on: 1" in split.summary()


def test_absolute_paths_in_lists_are_relative_to_the_folder_of_the_images(tmp_path):
    lists, pictures = tmp_path / "lists", tmp_path / "pictures"
    lists.mkdir()
    write_lists(lists, train=[f"{pictures}/x/a.jpg 1"], test=["b.jpg 1"])
    split = load_split(ask("lists", lists, image_dir=pictures))
    assert split.listing.names == ["x/a.jpg", "b.jpg"]
    with pytest.raises(UserError, match=r"train\.txt: 1 of its paths do not lie below .*/lists,"):
        load_split(ask("lists", lists))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": ["a.jpg 0 1"], "test": ["b.jpg 0 1 1"]}, r"different labels \(train: 2.*: 3"),
        ({"train": ["a.jpg 0 1"], "test": ["b.jpg 3"]}, r"different labels .*query: a class"),
        ({"train": ["a.jpg 0 1"], "test": ["a.jpg 1 1"]}, r"'a\.jpg' has two different sets"),
        ({"train": ["a.jpg 4"], "test": ["./a.jpg 5"]}, r"'a\.jpg' has two different sets"),
        ({"train": ["a.jpg 4"], "test": []}, r"test\.txt: is empty"),
        ({"train": ["a.jpg 0 1"], "test": ["b.jpg 0 0"]}, "all labels of the 1 queries are 0"),
        ({"train": ["a.jpg 4"]}, r"needs train\.txt, test\.txt \(the queries\) and"),
        ({"train": ["a.jpg 4"], "test": ["b.jpg"]}, r"test\.txt: line 1 does not end with"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists, message, tmp_path):
    write_lists(tmp_path, **lists)
    with pytest.raises(UserError, match=rf"--data_dir=.*{message}"):
        load_split(ask("lists", tmp_path))


@pytest.mark.parametrize("dataset", ["flickr25k", "nuswide", "lists", "folder"])
def test_a_folder_that_is_not_there(dataset, tmp_path):
    with pytest.raises(UserError, match=r"--data_dir=.*nowhere: is not a folder"):
        load_split(ask(dataset, tmp_path / "nowhere"))


# --- folder -------------------------------------------------------------------------------------


def touch(folder, names):
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()


def test_a_folder_is_trained_on_whole(tmp_path):
    names = ["a.jpg", "b/c d.PNG", "b/\u00fc.webp", "b/caf\udce9.JpEg", "z/y/x.tiff"]
    touch(tmp_path, [*names, "notes.txt", ".hidden.jpg"])
    split = load_split(ask("folder", tmp_path))
    assert sorted(split.listing.names) == sorted(names)
    assert split.roles.keys() == {"train"}
    assert split.roles["train"].tolist() == list(range(5))
    assert (split.protocol, split.seed) == ("all", None)


def test_class_folders(tmp_path):
    names = [f"dog/{i}.jpg" for i in range(40)] + [f"cat/x/{i}.png" for i in range(20)]
    touch(tmp_path, [*names, "emu/1.jpg", "emu/2.jpg"])
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    assert split.listing.classes == ("cat", "dog", "emu")
    check_roles(split)
    for name, label in labels_by_name(split).items():
        assert name.startswith(split.listing.classes[label])
    assert split.listing.labels[split.roles["query"]].bincount().tolist() == [2, 4, 1]
    assert torch.equal(split.roles["train"], split.roles["database"])
    other = load_split(ask("folder", tmp_path, protocol="class-folders", split_seed=1))
    assert other.sha256 != split.sha256


def test_train_and_test_above_class_folders_are_roles(tmp_path):
    names = [f"{part}/{name}/{i}.jpg" for part in ("train", "test") for name in "ab" for i in "123"]
    touch(tmp_path, names)
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    assert split.listing.classes == ("a", "b")
    assert split.seed is None
    for name, label in labels_by_name(split).items():
        assert name.split("/")[1] == split.listing.classes[label]
    query = {split.listing.names[row] for row in split.roles["query"].tolist()}
    assert query == {name for name in names if name.startswith("test/")}
    assert torch.equal(split.roles["train"], split.roles["database"])
    check_roles(split)
    # `val` is what is asked where there is no `test`, and has no role beside it
    (tmp_path / "test").rename(tmp_path / "val")
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    found = [split.listing.names[row] for row in split.roles["query"].tolist()]
    assert len(found) == 6
    assert all(name.startswith("val/") for name in found)
    touch(tmp_path, ["test/a/9.jpg"])
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    found = [split.listing.names[row] for row in split.roles["query"].tolist()]
    assert found == ["test/a/9.jpg"]
    assert len(split.roles["train"]) == 6
    touch(tmp_path, ["test/loose.jpg"])
    with pytest.raises(UserError, match=r"1 images lie in no class folder, 'test/loose\.jpg'"):
        load_split(ask("folder", tmp_path, protocol="class-folders"))


def test_what_lies_in_unlabelled_is_trained_on_and_nothing_else(tmp_path):
    known = [f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(20)]
    unknown = [f"unlabelled/{i}.jpg" for i in range(15)]
    touch(tmp_path, known + unknown)
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    assert split.listing.classes == ("cat", "dog")
    labels = labels_by_name(split)
    assert [labels[name] for name in known] == [[1, 0]] * 20 + [[0, 1]] * 20
    assert not any(any(labels[name]) for name in unknown)
    rows = {role: set(names_of(split, role)) for role in split.roles}
    assert len(rows["query"]) == 4 and rows["query"] <= set(known)
    assert rows["database"] == rows["labelled"] == set(known) - rows["query"]
    assert rows["train"] == {*known, *unknown} - rows["query"]
    semi = with_labels(split, None, 0).roles
    assert {split.listing.names[i] for i in semi["train"]} == set(unknown)
    few = with_labels(split, 3, 0).roles
    assert len(few["labelled"]) == 6
    assert len(few["train"]) == 15 + 36 - 6


def test_unlabelled_beside_train_and_test(tmp_path):
    names = [f"{part}/{name}/1.jpg" for part in ("train", "test") for name in "ab"]
    touch(tmp_path, [*names, "train/unlabeled/1.jpg"])
    split = load_split(ask("folder", tmp_path, protocol="class-folders"))
    assert {k: len(v) for k, v in split.roles.items()} == {
        "train": 3,
        "labelled": 2,
        "query": 2,
        "database": 2,
    }
    assert split.listing.classes == ("a", "b")


def test_class_folders_that_cannot_be_classes(tmp_path):
    wanted = ask("folder", tmp_path, protocol="class-folders")
    touch(tmp_path, ["dog/1.jpg", "dog/2.jpg"])
    with pytest.raises(UserError, match="all images lie in 'dog', and needed are two classes"):
        load_split(wanted)
    touch(tmp_path, ["cat/1.jpg"])
    with pytest.raises(UserError, match="class 'cat' has one image; needed are two"):
        load_split(wanted)
    touch(tmp_path, ["loose.jpg"])
    with pytest.raises(UserError, match=r"1 images lie in no class folder, 'loose\.jpg' for one"):
        load_split(wanted)


def test_a_folder_that_cannot_be_searched_whole_is_no_set(tmp_path, monkeypatch):
    touch(tmp_path, ["a/1.jpg", "b/2.jpg"])
    scandir = os.scandir

    def refuse(place):  # as for another user: root may enter every folder
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"1 folders cannot be read, 'b' for one \(Permission"):
        load_split(ask("folder", tmp_path))


# --- --split ------------------------------------------------------------------------------------


def test_a_split_file_stands_for_its_protocol(flickr, tmp_path):
    made = load_split(ask("flickr25k", flickr[0], split_seed=5))
    path = tmp_path / "my.split"
    words = [f"--data_dir={flickr[0]}", "--split_seed=5", f"--output={path}"]
    assert main(["make", "--dataset=flickr25k", *words]) == 0
    found = load_split(ask("flickr25k", tmp_path / "nowhere", split=path))
    assert found.sha256 == made.sha256 and found.seed == 5
    with pytest.raises(UserError, match=r"is of flickr25k; allowed is --dataset=flickr25k"):
        load_split(ask("nuswide", flickr[0], split=path))


# --- python -m data.splits ----------------------------------------------------------------------


def make(folder, output, dataset, *words):
    return main(
        ["make", f"--dataset={dataset}", f"--data_dir={folder}", f"--output={output}", *words]
    )


def check(folder, file, *words):
    return main(["check", str(file), f"--data_dir={folder}", *words])


def test_make_and_check_print_what_the_split_is(flickr, tmp_path, capsys):
    path = tmp_path / "my.split"
    assert make(flickr[0], path, "flickr25k", "--split_seed=3") == 0
    split = read_split(path)
    summary = (
        "flickr25k, protocol spq-in-proportion, seed 3: 30 train, 12 query, 138 database; 24 labels"
    )
    assert capsys.readouterr().out == f"{summary}\nsha256 {split.sha256}\nwrote {path}\n"
    for words, told in (((), "there"), (("--decode",), "read whole")):
        assert check(flickr[0], path, *words) == 0
        assert capsys.readouterr().out == (
            f"{summary}\nsha256 {split.sha256}, as its lines have it\n150 of 150 images {told}\n"
        )


def test_check_names_and_counts_what_is_missing_or_damaged(tmp_path, capsys):
    names = [f"{i}.png" for i in range(12)]
    pictures = make_images(tmp_path / "pictures", names)
    path = tmp_path / "my.split"
    assert make(pictures, path, "folder") == 0
    damaged = pictures / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (pictures / "8.png").write_bytes(b"")
    (pictures / "3.png").unlink()
    capsys.readouterr()
    assert check(pictures, path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["11 of 12 images there", "  '3.png' is missing"]
    assert check(pictures, path, "--decode") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["9 of 12 images read whole", "  '3.png' is missing"]
    assert lines[4].startswith("  '7.png' ") and "truncated" in lines[4]
    assert lines[5:] == ["  '8.png' is empty (0 bytes)"]
    for i in range(9):
        (pictures / f"{i}.png").unlink(missing_ok=True)
    assert check(pictures, path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "3 of 12 images there"
    assert len(lines) == 3 + 5 + 1 and lines[-1] == "  and 4 more"
    assert len(find_faults(read_split(path), pictures, decode=False)) == 9


def test_check_looks_where_image_dir_says(tmp_path, capsys):
    names = ["x/a.png", "b.png"]
    pictures = make_images(tmp_path / "pictures", names)
    lists = tmp_path / "lists"
    lists.mkdir()
    write_lists(lists, train=[f"{pictures}/x/a.png 0"], test=["b.png 0"])
    path = tmp_path / "my.split"
    assert make(lists, path, "lists", f"--image_dir={pictures}") == 0
    assert check(lists, path) == 1
    assert "0 of 2 images there" in capsys.readouterr().out
    assert check(lists, path, f"--image_dir={pictures}") == 0
    with pytest.raises(UserError, match=r"--data_dir=.*nowhere: is not a folder"):
        check(tmp_path / "nowhere", path)
    with pytest.raises(UserError, match=r"--image_dir=.*nowhere: is not a folder"):
        check(lists, path, f"--image_dir={tmp_path / 'nowhere'}")


def test_cifar_is_checked_by_its_labels(small_set, tmp_path, capsys):
    path = tmp_path / "my.split"
    assert make(small_set, path, "cifar10", "--protocol=59k") == 0
    assert check(small_set, path) == 0
    assert capsys.readouterr().out.endswith("360 images, by hash\n")
    split = read_split(path)
    split.listing.labels[5] += 1
    write_split(path, split)
    assert check(small_set, path) == 1
    out = capsys.readouterr().out
    assert out.endswith("360 images, but not the labels of cifar10; make another split\n")
    with pytest.raises(UserError, match=r"CIFAR-10 is not there .*--if_download"):
        check(tmp_path, path)


def test_cifar_is_fetched_when_asked(tmp_path, monkeypatch):
    """`--if_download`, which the message names, is a flag of both commands."""
    asked = []

    def load(folder, download):
        asked.append(download)
        raise UserError("enough")

    monkeypatch.setattr("data.splits.load_cifar10", load)
    for words in ([], ["--if_download"]):
        with pytest.raises(UserError, match="enough"):
            make(tmp_path, tmp_path / "s", "cifar10", *words)
    assert asked == [False, True]


@pytest.mark.parametrize("dataset", PROTOCOLS)
def test_a_protocol_of_another_name_is_refused(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make(tmp_path, tmp_path / "s", dataset, "--protocol=III")
    assert stop.value.code == 2
    known = ", ".join(PROTOCOLS[dataset])
    assert f"--protocol=III: {dataset} has {known}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**31), "x"])
def test_a_seed_that_is_none_is_refused(seed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make(tmp_path, tmp_path / "s", "lists", f"--split_seed={seed}")
    assert stop.value.code == 2
    assert "--split_seed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_faults_end_in_a_sentence_and_code_2(tmp_path, monkeypatch, capsys):
    """As `python -m data.splits`; 1 is kept for images that `check` did not find."""
    (tmp_path / "my.split").write_text("a.jpg 0 1\n")
    words = ["check", str(tmp_path / "my.split"), f"--data_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["data.splits", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("data.splits", run_name="__main__")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: split=") and "is no split" in err and err.count("\n") == 1
