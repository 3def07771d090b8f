"""--dataset: images, labels and roles as the flags say; faults stop a run or are counted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import make_images

import data.datasets
from args import parse_args, spq_parser
from data.cifar10 import hold_out, load_cifar10
from data.datasets import hold, load_dataset
from data.images import read_image, to_array
from data.manifest import write_split
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


def load(folder, *flags, dataset="lists", device=CPU):
    words = [f"--dataset={dataset}", f"--data_dir={folder}", "--input_size=8", *flags]
    args = parse_args(spq_parser(), [*words, f"--cache_dir={folder.parent / 'cache'}"])
    return load_dataset(args, device)


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
