"""A store gives the rows that were made, survives kills, and is refused when sources changed."""

import errno
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_stores
import torch
from PIL import Image
from small_images import make_images

import data.store
from data.images import read_image, to_array
from data.store import RowStore, fill_store, store_images
from utils.errors import UserError

SIDE, CHUNK = 8, 4
NAMES = [f"{i % 3}/im{i}.png" for i in range(8)]
FAULTY = [*NAMES[:2], "empty.jpg", *NAMES[2:], "absent.png"]  # ten images, three chunks


def numbers(n=23, shape=(3, 2), dtype=torch.float16):
    """Rows that all differ."""
    return torch.arange(n * int(np.prod(shape))).reshape(n, *shape).to(dtype)


def keep(place: Path, rows: torch.Tensor, **how) -> RowStore:
    def make(start, stop):
        return rows[start:stop], []

    return fill_store(place, len(rows), rows.shape[1:], rows.dtype, make, "rows", **how)[0]


@pytest.fixture
def folder(tmp_path):
    """Eight images, an empty file, and one that FAULTY names and is not there."""
    make_images(tmp_path / "images", NAMES)
    (tmp_path / "images" / "empty.jpg").write_bytes(b"")
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that are decoded; in chunks of CHUNK."""
    names = []
    load = data.store.load_square

    def spy(source, name, *how):
        names.append(name)
        return load(source, name, *how)

    monkeypatch.setattr(data.store, "load_square", spy)
    monkeypatch.setattr(data.store, "CHUNK", CHUNK)
    return names


def build(cache, root, names=FAULTY, side=SIDE):
    return store_images(Path(cache), Path(root), names, side, num_workers=2)


def build_in_chunks(cache, root, gate=None):
    """For a process of its own; with `gate` no image is decoded before that file is there."""
    data.store.CHUNK = CHUNK
    load = data.store.load_square

    def wait(source, name, *how):
        while gate is not None and not os.path.exists(gate):
            time.sleep(0.01)
        return load(source, name, *how)

    data.store.load_square = wait
    build(cache, root)


def only_folder(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


# --- rows ---------------------------------------------------------------------------------------

ASKED = {
    "all": slice(None),
    "slice": slice(3, 17),
    "end": slice(20, 99),
    "none": slice(5, 5),
    "steps": slice(1, 20, 3),
    "shuffled": torch.randperm(23, generator=torch.Generator().manual_seed(0)),
    "neighbours": torch.tensor([4, 5, 6, 2, 3, 9, 8, 7]),
    "twice": torch.tensor([7, 7, 0, 22, 7, 8]),
    "square": torch.tensor([[3, 4, 5], [22, 0, 3]]),
    "one": torch.tensor(11),
    "empty": torch.tensor([], dtype=torch.int64),
    "negative": torch.tensor([-1, 0, -23]),
    "mask": torch.arange(23) % 3 == 1,
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("asked", ASKED)
def test_a_store_is_indexed_like_a_tensor(tmp_path, asked, dtype):
    rows, which = numbers(dtype=dtype), ASKED[asked]
    store = keep(tmp_path / "s", rows, chunk=5)
    assert (len(store), store.shape, store.dtype) == (23, (23, 3, 2), dtype)
    assert store.nbytes == rows.nbytes
    found = store[which]
    assert found.dtype == dtype
    assert torch.equal(found, rows[which])


@pytest.mark.parametrize("asked", ["slice", "shuffled", "mask", "empty"])
def test_parts_of_a_store_and_parts_of_these(tmp_path, asked):
    rows, which = numbers(), ASKED[asked]
    part, want = keep(tmp_path / "s", rows).part(which), rows[which]
    assert part.shape == want.shape
    assert torch.equal(part[:], want)
    some = torch.arange(len(want)).flip(0)[::2]
    assert torch.equal(part.part(some)[:], want[some])
    assert torch.equal(part[some], want[some])


def test_rows_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(IndexError):
        keep(tmp_path / "s", numbers())[torch.tensor([23])]


def test_neighbours_are_read_together_and_short_reads_go_on(tmp_path, monkeypatch):
    rows = numbers()
    store = keep(tmp_path / "s", rows)
    calls, read = [], os.preadv

    def counted(file, buffers, place):
        calls.append(place)
        return read(file, [buffers[0][:40]], place)  # a row has 12 bytes

    monkeypatch.setattr(os, "preadv", counted)
    assert torch.equal(store[2:5], rows[2:5])
    assert len(calls) == 1
    assert torch.equal(store[:], rows)
    assert len(calls) == 1 + 7  # 276 bytes, 40 at a time


def test_a_store_that_ends_too_early_is_told(tmp_path):
    store = keep(tmp_path / "s", numbers())
    os.truncate(tmp_path / "s" / "rows.bin", 12 * 20)
    assert len(store[:20]) == 20
    with pytest.raises(UserError, match=r"rows\.bin: ends too early; delete its folder"):
        store[19:21]


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    store = keep(tmp_path / "s", numbers())

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(UserError, match=r"rows\.bin: cannot be read \(Input/output error\)"):
        store[:1]


def test_a_store_deleted_meanwhile_is_read_to_the_end(tmp_path):
    store = keep(tmp_path / "s", numbers())
    shutil.rmtree(tmp_path / "s")
    assert torch.equal(store.part(slice(4, 9))[:], numbers()[4:9])


def test_reading_does_not_hold_the_store(tmp_path):
    row = 3 * 224 * 224
    path = tmp_path / "rows.bin"
    path.touch()
    os.truncate(path, 2000 * row)  # 301 MB, without blocks on the disk
    store = RowStore(path, (3, 224, 224), torch.uint8, torch.arange(2000))

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    order = torch.randperm(2000)
    store[order[:50]]
    before, most = resident(), 0
    for start in range(0, 2000, 50):  # 7.5 MB each
        assert store[order[start : start + 50]].count_nonzero() == 0
        most = max(most, resident())
    assert most - before < 60e6  # pages of a mapping would count, and a copy of all rows


# --- making -------------------------------------------------------------------------------------


def test_rows_of_a_wrong_number_or_kind_are_a_fault_of_the_program(tmp_path):
    for wrong in (numbers(22), numbers(23).float(), numbers(23).flatten(1)):

        def make(start, stop, rows=wrong):
            return rows, []

        with pytest.raises(ValueError, match="rows 0 to 23 came as"):
            fill_store(tmp_path / "s", 23, (3, 2), torch.float16, make, "rows")


def test_images_come_out_as_if_read_one_by_one(tmp_path, folder, decoded):
    store, faults = build(tmp_path / "cache", folder)
    assert store.shape == (10, 3, SIDE, SIDE)
    assert [name for name, _ in faults] == ["empty.jpg", "absent.png"]
    assert faults[0][1] == "is empty (0 bytes)"
    assert faults[1][1] == "No such file or directory"
    for i, name in enumerate(FAULTY):
        want = np.zeros((3, SIDE, SIDE), dtype=np.uint8)
        if name in NAMES:
            want = to_array(read_image(folder / name, side=SIDE), SIDE)
        assert (store[i : i + 1][0].numpy() == want).all()
    assert sorted(decoded) == sorted(FAULTY)


def test_the_second_time_nothing_is_decoded(tmp_path, folder, decoded):
    first, faults = build(tmp_path / "cache", folder)
    decoded.clear()
    again, known = build(tmp_path / "cache", folder)
    assert decoded == []
    assert torch.equal(first[:], again[:])
    assert known == faults
    assert again.identity == first.identity


def test_other_lists_sizes_and_folders_have_stores_of_their_own(tmp_path, folder):
    cache = tmp_path / "cache"
    first = build(cache, folder)[0]
    shutil.copytree(folder, tmp_path / "copy")
    others = [
        build(cache, folder, FAULTY[::-1])[0],
        build(cache, folder, side=SIDE + 1)[0],
        build(cache, tmp_path / "copy")[0],
    ]
    assert len(list(cache.iterdir())) == 4
    assert torch.equal(others[0][:], first[:].flip(0))
    parts = [first.part(slice(3)), first.part(slice(1, 4))]
    known = {store.identity for store in (first, *others, *parts)}
    assert len(known) == 6


def test_a_folder_told_in_two_ways_has_one_store(tmp_path, folder, monkeypatch):
    build(tmp_path / "cache", folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for root in ("images", "./images/../images", "link"):
        build(tmp_path / "cache", root)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_large_rows_are_made_few_at_a_time(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(data.store, "CHUNK_BYTES", 3 * SIDE**2 * 3)
    made = []
    mark = data.store._mark
    monkeypatch.setattr(
        data.store, "_mark", lambda place, done, faults: (made.append(done), mark(place, done, []))
    )
    build(tmp_path / "cache", folder, NAMES)
    assert made == [3, 6, 8]


def test_a_folder_with_none_of_the_images_is_told_before_anything_is_made(tmp_path, folder):
    with pytest.raises(
        UserError, match=r"none of the 8 images is there, '0/im0.png' .*--image_dir"
    ):
        build(tmp_path / "cache", tmp_path, NAMES)
    assert not (tmp_path / "cache").exists()


# --- kills --------------------------------------------------------------------------------------

# each of three chunks: rows, stamps and mark to the disk, then the mark into its place
KILLS = range(12)


@pytest.mark.parametrize("die_at", KILLS)
def test_a_killed_build_goes_on_and_gives_the_same(tmp_path, folder, decoded, die_at):
    whole, faults = build(tmp_path / "whole", folder)
    cache = tmp_path / "cache"
    code = small_stores.finish(build_in_chunks, cache, folder, die_at=die_at)
    assert code == -signal.SIGKILL
    finished = die_at // 4 * CHUNK
    decoded.clear()
    store, found = build(cache, folder)
    assert sorted(decoded) == sorted(FAULTY[finished:])
    assert found == faults
    one, two = only_folder(tmp_path / "whole"), only_folder(cache)
    for name in ("rows.bin", "stamps.i64", "state.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert store.identity == whole.identity
    assert torch.equal(store[:], whole[:])


def test_no_other_change_of_the_file_system_is_made(tmp_path, folder):
    """KILLS are all of them: the next one never comes."""
    assert small_stores.finish(build_in_chunks, tmp_path / "c", folder, die_at=len(KILLS)) == 0


def test_killed_again_and_again(tmp_path, folder, decoded):
    whole = build(tmp_path / "whole", folder)[0]
    codes = []
    while not codes or codes[-1]:
        codes.append(small_stores.finish(build_in_chunks, tmp_path / "cache", folder, die_at=5))
        assert len(codes) < 9
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]  # a chunk each
    decoded.clear()
    assert torch.equal(build(tmp_path / "cache", folder)[0][:], whole[:])
    assert decoded == []


def test_a_second_process_waits_and_uses_the_result(tmp_path, folder, decoded, monkeypatch, capfd):
    monkeypatch.setattr(data.store, "PATIENCE", 0.05)
    cache, gate = tmp_path / "cache", tmp_path / "gate"
    first = small_stores.start(build_in_chunks, cache, folder, gate)
    while first.is_alive() and not list(cache.glob("*/lock")):
        time.sleep(0.01)
    time.sleep(0.2)  # until it has locked what it made
    assert first.is_alive()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(build, cache, folder)
        time.sleep(0.3)
        assert not second.done()
        gate.touch()
        store, faults = second.result()
    first.join()
    assert first.exitcode == 0
    assert decoded == []
    assert len(faults) == 2
    assert torch.equal(store[:], build(tmp_path / "alone", folder)[0][:])
    assert "waiting for another process" in capfd.readouterr().err


# --- sources that changed -----------------------------------------------------------------------


def change_size(path):
    known = os.stat(path)
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))


def change_time(path):
    known = os.stat(path)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [change_size, change_time, os.unlink])
@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_changed_is_named(tmp_path, folder, change, killed):
    cache = tmp_path / "cache"
    die_at = 7 if killed else None  # within the second chunk
    code = small_stores.finish(build_in_chunks, cache, folder, die_at=die_at)
    assert code == (-signal.SIGKILL if killed else 0)
    change(folder / FAULTY[1])
    wanted = rf"1 of the files it was made from have changed .*\('{FAULTY[1]}'\); delete that"
    with pytest.raises(UserError, match=wanted):
        build(cache, folder)
    shutil.rmtree(only_folder(cache))  # what it tells to do
    assert len(build(cache, folder)[1]) == (3 if change is os.unlink else 2)


def test_a_missing_file_that_came_back_is_named(tmp_path, folder):
    build(tmp_path / "cache", folder)
    Image.new("RGB", (9, 9)).save(folder / "absent.png")
    with pytest.raises(UserError, match=r"1 of the files .*\('absent.png'\)"):
        build(tmp_path / "cache", folder)


def test_many_changed_files_are_counted_and_some_named(tmp_path, folder):
    build(tmp_path / "cache", folder, NAMES)
    for name in NAMES:
        change_time(folder / name)
    with pytest.raises(UserError, match=r"8 of the files .*\('0/im0.png', .*'1/im4.png', \.\.\.\)"):
        build(tmp_path / "cache", folder, NAMES)


def test_what_is_not_stored_yet_may_change(tmp_path, folder):
    cache = tmp_path / "cache"
    small_stores.finish(build_in_chunks, cache, folder, die_at=7)
    for name in FAULTY[CHUNK:-1]:
        change_time(folder / name)
    store = build(cache, folder)[0]
    assert torch.equal(store[:], build(tmp_path / "alone", folder)[0][:])
    build(cache, folder)  # with the new times


def test_names_that_are_not_text(tmp_path, folder):
    odd = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (9, 9)).save(folder / "x.png")
    os.rename(folder / "x.png", os.path.join(folder, odd))
    names = [*NAMES, odd, os.fsdecode(b"\xe9.png")]
    for _ in range(2):
        assert build(tmp_path / "cache", folder, names)[1] == [
            (names[-1], "No such file or directory")
        ]
    change_time(Path(os.path.join(folder, odd)))
    with pytest.raises(UserError) as caught:
        build(tmp_path / "cache", folder, names)
    str(caught.value).encode()  # can be printed


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"version": 1, "done": 4.5, "faults": []}',
        b'{"version": 1, "done": 11, "faults": []}',
        b'{"version": 1, "done": 10, "faults": [1]}',
        b'{"version": 99, "done": 10, "faults": []}',
    ],
)
def test_a_damaged_mark_is_told(tmp_path, folder, content):
    build(tmp_path / "cache", folder)
    (only_folder(tmp_path / "cache") / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json: is damaged \(.*\); delete its folder"):
        build(tmp_path / "cache", folder)


@pytest.mark.parametrize("name", ["rows.bin", "stamps.i64"])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 50), os.unlink])
def test_files_that_are_too_short_are_told(tmp_path, folder, name, killed, damage):
    """Also if the making was cut off: going on would leave a gap of black images."""
    cache = tmp_path / "cache"
    small_stores.finish(build_in_chunks, cache, folder, die_at=8 if killed else None)
    assert json.loads((only_folder(cache) / "state.json").read_text())["done"] == (
        8 if killed else 10
    )
    damage(only_folder(cache) / name)
    with pytest.raises(UserError, match=rf"{name}: is damaged .*; delete its folder"):
        build(cache, folder)


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, folder, decoded, monkeypatch):
    free = SimpleNamespace(free=10 * 3 * SIDE**2 - 1)
    monkeypatch.setattr(data.store.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"10 rows of 192 bytes take .* GiB, .*--cache_dir"):
        build(tmp_path / "cache", folder)
    assert decoded == []
    free.free += 1
    build(tmp_path / "cache", folder)
    free.free = 0
    build(tmp_path / "cache", folder)  # made already


def test_a_cache_that_cannot_be_written_is_told(tmp_path, folder, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); --cache_dir"):
        build(tmp_path / "file", folder)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left .*; --cache_dir"):
            build(tmp_path / "cache", folder)
    assert len(build(tmp_path / "cache", folder)[1]) == 2  # the lock was given back


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_another_user_is_told(tmp_path, folder):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); --cache_dir"):
        build(tmp_path / "cache", folder)
