"""--dataset: images, labels and roles as the flags say; faults stop a run or are counted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import make_images
from small_sets import make_nuswide

import data.datasets
from args import gpq_parser, parse_args, spq_parser
from data.cifar10 import hold_out, load_cifar10
from data.datasets import hold, load_dataset
from data.images import read_image, to_array
from data.manifest import write_split
from data.protocols import gpq
from data.splits import load_split
from data.store import RowStore
from utils.errors import UserError

CPU = torch.device("cpu")
NAMES = [f"{'abc'[i % 3]}/{i}.png" for i in range(30)]
QUERY, TRAIN, DB = NAMES[:6], NAMES[6:20], NAMES[6:]


def multi(name):
    """Zeros and ones of four labels; no two images in a row have the same."""
    number = int(Path(name).stem)
    return [number >> bit & 1 for bit in range(4)]


def single(name):
    return int(Path(name).stem) % 3 + 2


@pytest.fixture
def lists(tmp_path):
    """A folder of images and three lists with multi-labels."""
    folder = tmp_path / "lists"
    make_images(folder, NAMES)
    write_lists(folder, multi)
    return folder


def write_lists(folder, label_of):
    for role, names in (("train", TRAIN), ("test", QUERY), ("database", DB)):
        lines = (f"{name} {' '.join(map(str, np.atleast_1d(label_of(name))))}\n" for name in names)
        (folder / f"{role}.txt").write_text("".join(lines))


def load(folder, *flags, dataset="lists", device=CPU, semi=False):
    words = [f"--dataset={dataset}", f"--data_dir={folder}", "--input_size=8", *flags]
    parser = gpq_parser() if semi else spq_parser()
    args = parse_args(parser, [*words, f"--cache_dir={folder.parent / 'cache'}"])
    return load_dataset(args, device, semi)


def pixels(folder, names):
    return torch.stack([torch.tensor(to_array(read_image(folder / name), 8)) for name in names])


def same(found, folder, names, label_of=multi):
    """Images and labels of one side are those of these names, in order."""
    images, labels = found
    assert torch.equal(images[:], pixels(folder, names))
    assert labels.tolist() == [label_of(name) for name in names]


# --- what is loaded -----------------------------------------------------------------------------


def test_multi_labels(lists):
    found = load(lists)
    assert torch.equal(found.train, pixels(lists, TRAIN))
    same(found.query, lists, QUERY)
    same(found.db, lists, DB)
    assert found.db[1].dtype == torch.uint8
    assert (len(found.classes), found.left_out) == (4, 0)


def test_single_labels(lists):
    write_lists(lists, single)
    found = load(lists)
    same(found.query, lists, QUERY, single)
    same(found.db, lists, DB, single)
    assert found.db[1].dtype == torch.int64
    assert len(found.classes) == 5


def test_images_in_another_folder(lists, tmp_path):
    for name in "abc":
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        os.rename(lists / name, tmp_path / "elsewhere" / name)
    found = load(lists, f"--image_dir={tmp_path / 'elsewhere'}")
    same(found.db, tmp_path / "elsewhere", DB)
    with pytest.raises(UserError, match=r"none of the 30 images is there.*--image_dir"):
        load(lists, "--skip_missing")


def test_a_folder_without_labels(lists):
    found = load(lists, dataset="folder")
    names = sorted(NAMES, key=os.fsencode)
    assert torch.equal(found.train, pixels(lists, names))
    assert found.query is None
    assert found.db is None


def test_a_split_file_of_a_folder_without_labels(lists, tmp_path):
    """It names roles that the set has not."""
    args = parse_args(spq_parser(), ["--dataset=folder", f"--data_dir={lists}"])
    write_split(tmp_path / "my.split", load_split(args))
    found = load(lists, f"--split={tmp_path / 'my.split'}", dataset="folder")
    assert len(found.train) == 30
    assert found.query is None


def test_limits(lists):
    found = load(lists, "--limit_train=3", "--limit_query=2", "--limit_db=5")
    assert torch.equal(found.train, pixels(lists, TRAIN[:3]))
    same(found.query, lists, QUERY[:2])
    same(found.db, lists, DB[:5])
    found = load(lists, "--limit_train=99", "--limit_query=99", "--limit_db=99")
    assert [len(x) for x in (found.train, *found.query, *found.db)] == [14, 6, 6, 24, 24]


def test_validation_leaves_the_queries_of_the_split_alone(lists):
    found = load(lists, "--validate")
    assert [len(found.train), len(found.query[0]), len(found.db[0])] == [12, 2, 22]
    kinds = [found.train, found.query[0], found.db[0]]
    train, query, db = ({image.numpy().tobytes() for image in part} for part in kinds)
    asked = {image.numpy().tobytes() for image in pixels(lists, QUERY)}
    trained = {image.numpy().tobytes() for image in pixels(lists, TRAIN)}
    assert not asked & (train | query | db)
    assert train | query == trained
    assert not train & query
    assert not query & db
    assert train < db
    other = load(lists, "--validate", "--split_seed=5")
    assert not torch.equal(other.query[0], found.query[0])  # drawn by the seed
    again = load(lists, "--validate")
    assert torch.equal(again.query[0], found.query[0])


# --- faults -------------------------------------------------------------------------------------


@pytest.fixture
def faulty(lists):
    """Two images missing and five damaged: of each role some."""
    for name in (TRAIN[0], QUERY[3]):
        (lists / name).unlink()
    for name in (TRAIN[5], DB[-1], DB[-2], DB[-3], QUERY[0]):
        (lists / name).write_bytes(b"GIF89a, no more")
    return lists


BAD = {TRAIN[0], QUERY[3], TRAIN[5], *DB[-3:], QUERY[0]}


def test_faults_stop_a_run(faulty):
    with pytest.raises(UserError) as caught:
        load(faulty)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"7 of 30 images cannot be read below {faulty}:"
    named = {line.split("'")[1] for line in lines[1:6]}
    assert len(named) == 5
    assert named < BAD
    assert any(line.endswith("No such file or directory") for line in lines)
    assert lines[6] == "  and 2 more"
    assert lines[7].startswith("--skip_missing goes on without them; once they are mended, delete ")
    store = Path(lines[7].rpartition(" ")[2])
    assert (store / "rows.bin").is_file()


def test_faults_are_left_out_when_asked(faulty, capsys):
    found = load(faulty, "--skip_missing")
    good = [[name for name in names if name not in BAD] for names in (TRAIN, QUERY, DB)]
    assert torch.equal(found.train, pixels(faulty, good[0]))
    same(found.query, faulty, good[1])
    same(found.db, faulty, good[2])
    assert found.left_out == 7
    assert found.used.counts() == {"train": 12, "labelled": 0, "query": 4, "database": 19}
    assert found.split.counts() == {"train": 14, "labelled": 0, "query": 6, "database": 24}
    out = capsys.readouterr().out
    assert out.startswith("7 of 30 images cannot be read, and are left out:\n  '")
    assert "  and 2 more\n" in out


def test_limits_and_validation_count_what_is_left(faulty):
    found = load(faulty, "--skip_missing", "--limit_train=4")
    assert torch.equal(found.train, pixels(faulty, [TRAIN[i] for i in (1, 2, 3, 4)]))
    found = load(faulty, "--skip_missing", "--validate")
    assert [len(found.train), len(found.query[0]), len(found.db[0])] == [10, 2, 17]


def test_a_role_with_nothing_left_is_told(lists):
    for name in QUERY:
        (lists / name).write_bytes(b"")
    with pytest.raises(UserError, match="no image is left for the role query"):
        load(lists, "--skip_missing")


def test_mended_images_are_taken_after_the_advice(faulty, tmp_path):
    with pytest.raises(UserError):
        load(faulty)
    for name in BAD:
        Image.new("RGB", (8, 8), "red").save(faulty / name)
    with pytest.raises(UserError, match=r"7 of the files .* have changed .*delete that folder"):
        load(faulty)
    for store in (tmp_path / "cache").glob("images-*"):
        store.rename(tmp_path / "gone")
    assert load(faulty).left_out == 0


# --- CIFAR --------------------------------------------------------------------------------------


def cifar(small_set, *flags):
    return load(small_set, "--input_size=32", *flags, dataset="cifar10")


def test_cifar10_is_as_it_always_was(small_set):
    train, test = load_cifar10(small_set)
    found = cifar(small_set)
    assert torch.equal(found.train, train.images)
    for side, want in ((found.query, test), (found.db, train)):
        assert torch.equal(side[0], want.images)
        assert torch.equal(side[1], want.labels)
    assert found.left_out == 0
    assert found.classes[0] == "airplane"
    found = cifar(small_set, "--limit_train=50", "--limit_db=70", "--limit_query=9")
    assert torch.equal(found.train, train.images[:50])
    assert torch.equal(found.db[0], train.images[:70])
    assert torch.equal(found.query[1], test.labels[:9])


def test_cifar10_is_validated_as_it_always_was(small_set):
    train, query = hold_out(load_cifar10(small_set)[0])
    found = cifar(small_set, "--validate")
    assert torch.equal(found.train, train.images)
    for side, want in ((found.query, query), (found.db, train)):
        assert torch.equal(side[0], want.images)
        assert torch.equal(side[1], want.labels)


def test_a_split_file_of_other_labels_is_refused(small_set, tmp_path):
    args = parse_args(spq_parser(), ["--dataset=cifar10", f"--data_dir={small_set}"])
    split = load_split(args)
    write_split(tmp_path / "good.split", split)
    train = load_cifar10(small_set)[0]
    assert torch.equal(cifar(small_set, f"--split={tmp_path / 'good.split'}").train, train.images)
    split.listing.labels[7] = 9 - split.listing.labels[7]
    write_split(tmp_path / "bad.split", split)
    with pytest.raises(UserError, match=r"--split=.*: its labels are not those of cifar10"):
        cifar(small_set, f"--split={tmp_path / 'bad.split'}")


# --- some of them with labels -------------------------------------------------------------------


def keys(images):
    """What tells an image from all others: its pixels."""
    return [image.numpy().tobytes() for image in images[:]]


def roles_of(found):
    """The images of each role, as sets; nothing is in a role twice, no query is trained on."""
    parts = {"train": found.train, "labelled": found.labelled[0]}
    parts |= {"query": found.query[0], "database": found.db[0]}
    sets = {role: set(keys(images)) for role, images in parts.items()}
    assert all(len(sets[role]) == len(parts[role]) for role in parts)
    assert not sets["query"] & (sets["train"] | sets["labelled"])
    return sets


@pytest.fixture
def colours(small_set):
    """Images of the small CIFAR set, and the label of each by its pixels."""
    pooled = [torch.cat(pair) for pair in zip(*load_cifar10(small_set), strict=True)]
    label_of = dict(zip(keys(pooled[0]), pooled[1].tolist(), strict=True))
    assert len(label_of) == 360
    return *pooled, label_of


def labels_belong(found, label_of):
    for images, labels in (found.labelled, found.query, found.db):
        assert labels.tolist() == [label_of[key] for key in keys(images)]


def semi_cifar(small_set, *flags):
    return load(small_set, "--input_size=32", *flags, dataset="cifar10", semi=True)


def test_gpq_s_split_of_cifar10(small_set, colours):
    images, labels, label_of = colours
    roles = gpq(labels, labelled=3)  # a twelfth of a class
    found = semi_cifar(small_set)
    assert torch.equal(found.train, images[roles["train"]])
    assert torch.equal(found.labelled[0], images[roles["labelled"]])
    assert found.labelled[1].bincount().tolist() == 10 * [3]
    assert torch.equal(found.query[0], images[roles["query"]])
    assert torch.equal(found.db[0], found.train)
    assert found.labelled[1].dtype == torch.int64
    labels_belong(found, label_of)
    assert {k: len(v) for k, v in roles_of(found).items()} == {
        "train": 324,
        "labelled": 30,
        "query": 6,
        "database": 324,
    }
    # of fewer labels the first ones, whatever the seed; the other images lose theirs
    few = semi_cifar(small_set, "--labels_per_class=2", "--split_seed=5")
    first = [roles["labelled"][labels[roles["labelled"]] == c][:2] for c in range(10)]
    assert torch.equal(few.labelled[0], images[torch.cat(first).sort().values])
    labels_belong(few, label_of)
    sets = roles_of(few)
    assert len(sets["train"]) == 324 + 10
    assert sets["train"] | sets["labelled"] | sets["query"] == set(label_of)
    assert torch.equal(few.db[0], found.db[0])
    assert (few.split.seed, few.split.counts()["labelled"]) == (None, 20)


def test_some_training_images_of_cifar10_are_labelled_at_random(small_set, colours):
    _, _, label_of = colours
    one, again, other = (
        semi_cifar(small_set, "--protocol=spq", "--labels_per_class=4", f"--split_seed={seed}")
        for seed in (1, 1, 2)
    )
    for found in (one, other):
        labels_belong(found, label_of)
        assert found.labelled[1].bincount().tolist() == 10 * [4]
        sets = roles_of(found)
        assert sets["labelled"] | sets["train"] == sets["database"]
        assert not sets["labelled"] & sets["train"]
    assert torch.equal(one.labelled[0], again.labelled[0])
    assert not torch.equal(one.labelled[0], other.labelled[0])
    assert (one.split.seed, other.split.seed) == (1, 2)
    # the whole of it: nothing is left without labels
    whole = semi_cifar(small_set, "--protocol=spq")
    labels_belong(whole, label_of)
    assert torch.equal(whole.labelled[0], whole.train)
    assert len(whole.train) == 300
    assert whole.split.seed is None  # nothing was drawn


def test_limits_cut_what_is_trained_on_without_labels(small_set, colours):
    found = semi_cifar(small_set, "--limit_train=50", "--limit_db=70", "--limit_query=4")
    whole = semi_cifar(small_set)
    assert torch.equal(found.train, whole.train[:50])
    assert torch.equal(found.db[0], whole.db[0][:70])
    assert torch.equal(found.query[0], whole.query[0][:4])
    assert torch.equal(found.labelled[0], whole.labelled[0])
    labels_belong(found, colours[2])


@pytest.mark.parametrize("flags", [[], ["--protocol=spq"], ["--protocol=spq", "--split_seed=3"]])
def test_validation_takes_no_label_for_a_query_and_no_query_of_the_split(small_set, colours, flags):
    few = ["--labels_per_class=3", *flags]
    found, plain = (semi_cifar(small_set, *few, *more) for more in (["--validate"], []))
    sets, asked = roles_of(found), set(keys(plain.query[0]))
    assert not asked & (sets["train"] | sets["labelled"] | sets["query"] | sets["database"])
    assert not sets["query"] & sets["database"]
    assert torch.equal(found.labelled[0], plain.labelled[0])  # a tenth of the others are asked
    assert sets["query"] | sets["train"] == set(keys(plain.train))
    labels_belong(found, colours[2])


def test_validation_where_all_is_labelled(small_set, colours):
    found = semi_cifar(small_set, "--protocol=spq", "--validate")
    sets = roles_of(found)
    assert sets["labelled"] == sets["train"] == sets["database"]
    assert (len(sets["train"]), len(sets["query"])) == (270, 30)
    labels_belong(found, colours[2])


def test_a_split_file_says_what_is_labelled(small_set, tmp_path, colours):
    args = parse_args(gpq_parser(), ["--dataset=cifar10", f"--data_dir={small_set}"])
    write_split(tmp_path / "my.split", load_split(args))
    found, want = semi_cifar(small_set, f"--split={tmp_path / 'my.split'}"), semi_cifar(small_set)
    assert torch.equal(found.labelled[0], want.labelled[0])
    assert torch.equal(found.train, want.train)
    labels_belong(found, colours[2])


def test_what_is_trained_on_lies_on_the_device_with_its_labels(lists):
    found = load(lists, device=torch.device("meta"), semi=True)  # stands for a GPU
    assert {part.device.type for part in (found.train, *found.labelled)} == {"meta"}
    assert {part.device.type for part in (*found.query, *found.db)} == {"cpu"}


def test_an_unsupervised_method_gets_no_labels_to_train_on(small_set, lists):
    assert cifar(small_set, "--protocol=gpq").labelled is None
    assert load(lists).labelled is None


def test_lists_of_classes_and_of_labels(lists):
    for label_of in (multi, single):
        write_lists(lists, label_of)
        found = load(lists, semi=True)
        same(found.labelled, lists, TRAIN, label_of)
        assert torch.equal(found.train, pixels(lists, [name for name in DB if name not in TRAIN]))
        same(found.query, lists, QUERY, label_of)
        same(found.db, lists, DB, label_of)
    # of classes 2, 3, 4 one image each, of those that are trained on
    found = load(lists, "--labels_per_class=1", semi=True)
    assert sorted(found.labelled[1].tolist()) == [2, 3, 4]
    names = dict(zip(keys(pixels(lists, NAMES)), NAMES, strict=True))
    labelled = [names[key] for key in keys(found.labelled[0])]
    assert [single(name) for name in labelled] == found.labelled[1].tolist()
    assert set(labelled) < set(TRAIN)
    others = [name for name in DB if name not in labelled]
    assert torch.equal(found.train, pixels(lists, others))


def test_nuswide_s_labels_belong_to_its_images(tmp_path):
    folder = tmp_path / "nuswide"
    folder.mkdir()
    make_nuswide(folder, 168)
    told = {}
    for name in ("train", "test", "database"):
        lines = [line.split() for line in (folder / f"{name}.txt").read_text().splitlines()]
        told[name] = {path: list(map(int, labels)) for path, *labels in lines}
    label_of = told["test"] | told["database"]
    name_of = dict(zip(keys(pixels(folder, label_of)), label_of, strict=True))
    assert len(name_of) == 168
    whole = load(folder, dataset="nuswide", semi=True)
    few = load(folder, "--labels_per_class=2", dataset="nuswide", semi=True)
    for found in (whole, few):
        for images, labels in (found.labelled, found.query, found.db):
            assert labels.tolist() == [label_of[name_of[key]] for key in keys(images)]
        sets = {role: {name_of[key] for key in part} for role, part in roles_of(found).items()}
        assert sets["labelled"] | sets["train"] == sets["database"] == told["database"].keys()
        assert not sets["labelled"] & sets["train"]
        assert sets["labelled"] <= told["train"].keys()
        assert sets["query"] == told["test"].keys()
    assert len(whole.labelled[0]) == len(told["train"])
    # two images for each of 21 labels, none for two of them
    assert few.labelled[1].shape == (42, 21)
    assert (few.labelled[1].sum(dim=0) >= 2).all()


def test_labels_stay_with_their_images_when_some_are_left_out(faulty):
    found = load(faulty, "--skip_missing", semi=True)
    good = [name for name in DB if name not in BAD]
    same(found.labelled, faulty, [name for name in good if name in TRAIN])
    assert torch.equal(found.train, pixels(faulty, [name for name in good if name not in TRAIN]))
    assert found.used.counts() == {"train": 7, "labelled": 12, "query": 4, "database": 19}
    assert found.split.counts() == {"train": 10, "labelled": 14, "query": 6, "database": 24}


def test_sets_without_enough_labels_are_told(lists):
    with pytest.raises(
        UserError, match=r"--dataset=folder: its split \(all\) has no labels.*class-fol"
    ):
        load(lists, "--protocol=all", dataset="folder", semi=True)
    found = load(lists, dataset="folder", semi=True)  # class folders, a tenth of each are queries
    assert len(found.query[0]) == 3
    assert found.classes == ("a", "b", "c")
    names = dict(zip(keys(pixels(lists, NAMES)), NAMES, strict=True))
    for images, labels in (found.labelled, found.query):
        assert [found.classes[c] for c in labels] == [names[key][0] for key in keys(images)]
    for name in TRAIN:
        (lists / name).write_bytes(b"")
    with pytest.raises(UserError, match="no image is left for the role labelled"):
        load(lists, "--skip_missing", semi=True)


# --- where they are held ------------------------------------------------------------------------


def test_what_is_too_large_for_memory_stays_on_disk(lists, monkeypatch):
    share = data.datasets.MEMORY_SHARE
    row = 3 * 8 * 8
    monkeypatch.setattr(data.datasets, "_memory", lambda device: 20 * row / share)
    found = load(lists)
    assert isinstance(found.train, torch.Tensor)  # 14 images
    assert isinstance(found.query[0], torch.Tensor)
    assert isinstance(found.db[0], RowStore)  # 24
    assert torch.equal(found.train, pixels(lists, TRAIN))
    same(found.db, lists, DB)


def test_what_fits_memory_and_not_the_device_is_held_in_memory(lists, monkeypatch):
    memory = {"cpu": 2**40, "meta": 0}
    monkeypatch.setattr(data.datasets, "_memory", lambda device: memory[device.type])
    meta = torch.device("meta")  # stands for a GPU
    images = load(lists).train
    assert hold(images, None, meta).device.type == "cpu"
    memory["meta"] = 2**40
    assert hold(images, None, meta).device.type == "meta"


def test_images_of_two_roles_are_held_once(small_set):
    found = cifar(small_set)
    assert found.train.data_ptr() == found.db[0].data_ptr()
    found = cifar(small_set, "--limit_db=300", "--limit_train=299")
    assert found.train.data_ptr() != found.db[0].data_ptr()


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = data.datasets._memory(CPU)
    assert 2**28 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data.datasets._memory(CPU) == alone // 4


@pytest.mark.parametrize(
    ("line", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "3000"}, 3000),
        ("0::/\n", {"memory.max": "2000"}, 2000),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "1000"}, 1000),
        ("1:cpu:/a\n", {"cpu/a/memory.max": "1000"}, 2**63 - 1),
        ("", {}, 2**63 - 1),
    ],
)
def test_limits_of_containers_and_schedulers_hold(tmp_path, monkeypatch, line, files, wanted):
    monkeypatch.setattr(data.datasets, "CGROUPS", tmp_path)
    (tmp_path / "own").write_text(line)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert min(data.datasets._cgroup_limits(tmp_path / "own")) == wanted
    assert data.datasets._cgroup_limits(tmp_path / "none") == [2**63 - 1]
