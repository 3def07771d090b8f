"""search.py under kills, full disks, damaged files and foreign indexes."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import small_images
from small_images import files_of, finish, make_images, save_model, start

import search
import utils.search.index as search_index
from utils.errors import UserError
from utils.search.index import MANIFEST, open_index, verify

NAMES = [f"{c}/{i}.png" for c in "ab" for i in range(40)]
MORE = [f"c/{i}.png" for i in range(40)]
HALF_WAY = 12  # changes of the file system; the plan takes 4, a shard 2, 80 images 20
FLAGS = ("--batch_size=8", "--num_workers=1", "--device=cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), NAMES)


@pytest.fixture(scope="module")
def more(tmp_path_factory, images):
    """Beside the first folder, so that their paths begin with `..`."""
    return make_images(images.parent / (images.name + "-more"), MORE, seed=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory, images, tiny_model):
    """An index of the images; not to be changed."""
    index = tmp_path_factory.mktemp("built") / "index"
    assert finish("build", f"--checkpoint={tiny_model}", *_where(images, index)) == 0
    return index


@pytest.fixture
def index(tmp_path, built):
    """A copy of it."""
    return shutil.copytree(built, tmp_path / "index")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, built, more):
    """Codes and paths of an undisturbed build, and of an undisturbed add after it."""
    index = shutil.copytree(built, tmp_path_factory.mktemp("whole") / "index")
    assert finish("add", *_where(more, index)) == 0
    return files_of(built), files_of(index)


def kill_half_way(*words):
    """Kill it when a few of the shards are written: each is one fsync and one rename."""
    process = start(*words, die_at=HALF_WAY)
    process.join()
    assert process.exitcode == -9


def _where(images, index):
    return f"--images={images}", f"--index={index}", *FLAGS


def test_killed_builds_go_on_and_end_as_undisturbed(tmp_path, images, tiny_model, whole):
    """25 kills at random moments, over as many builds as that takes."""
    rng = random.Random(0)
    kills, finished = 0, 0
    while kills < 25 or not finished:
        index = tmp_path / f"index{finished}"
        process = start("build", f"--checkpoint={tiny_model}", *_where(images, index))
        process.join(rng.uniform(0.02, 0.3) if kills < 25 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            if not (index / MANIFEST).exists():
                continue  # not finished: the same command again
            assert files_of(index) == whole[0]  # killed after the commit
        assert process.exitcode in (0, -9)
        assert verify(index).N == len(NAMES)
        assert files_of(index) == whole[0]
        finished += 1


def test_killed_adds_leave_the_old_index_or_the_new_one(index, images, more, tiny_model, whole):
    """25 kills at random moments."""
    rng = random.Random(1)
    states = []
    for _ in range(25):
        process = start("add", *_where(more, index))
        process.join(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
        assert verify(index).N in (len(NAMES), len(NAMES) + len(MORE))
        states.append(whole.index(files_of(index)))
        if states[-1] == 1:  # done: back to the start
            search.main(["remove", f"--index={index}", str(more)])
    assert finish("add", *_where(more, index)) == 0
    assert files_of(index) == whole[1]


@pytest.mark.parametrize("command", ["build", "add", "remove"])
def test_a_kill_at_each_change_of_the_file_system(
    tmp_path, built, images, more, tiny_model, whole, command
):
    """Before the first change, the second, ...: until the command gets through."""
    before = whole[0] if command != "build" else None
    after, step = None, 0
    while True:
        index = tmp_path / str(step)
        if command != "build":
            shutil.copytree(built, index)
        words = {
            "build": ["build", f"--checkpoint={tiny_model}", *_where(images, index)],
            "add": ["add", *_where(more, index)],
            "remove": ["remove", f"--index={index}", "a"],
        }[command]
        process = start(*words, flush=60.0, die_at=step)
        process.join()
        if process.exitcode != -9:
            break
        if (index / MANIFEST).exists():
            verify(index)
            state = files_of(index)
            if state != before:
                assert after in (None, state)
                after = state
        else:
            assert command == "build"
        if after is None:  # not committed: the same command again brings it to its end
            assert finish(*words) == 0
            verify(index)
        step += 1
    assert process.exitcode == 0
    assert step > 10
    assert after is not None  # some kills came after the commit, in the cleaning up
    assert files_of(index) == after
    if command != "remove":
        assert after == whole[command == "add"]
    # nothing of a killed change is left but what the next one replaces
    names = sorted(path.name.split(".")[0] for path in index.iterdir())
    assert names == ["", "codebooks", "codes", "manifest", "model", "paths", "skipped"]


def test_a_full_disk_leaves_the_old_index_and_says_so(tmp_path, images, more, tiny_model, whole):
    index = tmp_path / "index"
    size = os.path.getsize(tiny_model)
    process = start("build", f"--checkpoint={tiny_model}", *_where(images, index), limit=size // 2)
    process.join()
    assert process.exitcode == 2
    with pytest.raises(UserError, match="build is not finished; give the same build command"):
        open_index(index)
    assert finish("build", f"--checkpoint={tiny_model}", *_where(images, index)) == 0  # room
    assert files_of(index) == whole[0]
    for limit in (0, 100, 500, 1000):  # bytes: fails at the plan, at a shard, at the paths
        process = start("add", *_where(more, index), limit=limit)
        assert "cannot be written" in (said := process.said()), said
        assert "index is as it was before" in said
        process.join()
        assert process.exitcode == 2
        assert verify(index).N == len(NAMES)
        assert files_of(index) == whole[0]
    assert finish("add", *_where(more, index)) == 0
    assert files_of(index) == whole[1]


def test_verify_finds_a_flipped_bit_anywhere(index, images, tiny_model):
    verify(index)
    rng = random.Random(0)
    for path in sorted(index.iterdir()):
        content = path.read_bytes()
        for _ in range(5 if content else 0):
            at = rng.randrange(len(content))
            flipped = content[at] ^ (1 << rng.randrange(8))
            path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
            with pytest.raises(UserError, match=r"--index=.*(damaged|version)"):
                verify(index)
        path.write_bytes(content)
    verify(index)


@pytest.mark.parametrize("part", ["codes", "paths", "codebooks", "model", "skipped"])
def test_a_missing_or_short_file_is_named(index, images, tiny_model, part):
    path = next(index.glob(f"{part}.*"))
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(UserError, match=rf"damaged: {path.name} has \d+ bytes instead of"):
        open_index(index)
    path.unlink()
    with pytest.raises(UserError, match=rf"damaged: {path.name} is missing"):
        open_index(index)


def test_another_models_index_is_refused_with_the_reason(
    index, images, more, tiny_model, other_model
):
    before = files_of(index)
    image = f"--image={images / NAMES[0]}"
    for words in (["add", *_where(more, index)], ["query", f"--index={index}", image]):
        with pytest.raises(UserError, match=r"made by model \w{16}; codes of one model mean noth"):
            search.main([*words, f"--checkpoint={other_model}"])
    assert files_of(index) == before
    search.main(["add", *_where(more, index), f"--checkpoint={tiny_model}"])  # the right one


def test_an_unfinished_build_of_another_model_is_not_mixed(
    tmp_path, images, tiny_model, other_model
):
    index = tmp_path / "index"
    kill_half_way("build", f"--checkpoint={tiny_model}", *_where(images, index))
    assert not (index / MANIFEST).exists()
    with pytest.raises(UserError, match=r"unfinished build of another model; .*--overwrite"):
        search.main(["build", f"--checkpoint={other_model}", *_where(images, index)])
    search.main(["build", f"--checkpoint={other_model}", *_where(images, index), "--overwrite"])
    assert verify(index).identity == search.load_trained(other_model).identity


def test_images_changed_between_kill_and_going_on_are_encoded_anew(tmp_path, tiny_model):
    images, index = make_images(tmp_path / "images", NAMES), tmp_path / "index"
    words = ["build", f"--checkpoint={tiny_model}", *_where(images, index)]
    kill_half_way(*words)
    assert not (index / MANIFEST).exists()
    make_images(images, NAMES[:8], seed=5)  # the first batch, which is encoded already
    (images / NAMES[9]).unlink()
    assert finish(*words) == 0
    fresh = tmp_path / "fresh"
    assert finish("build", f"--checkpoint={tiny_model}", *_where(images, fresh)) == 0
    assert files_of(index) == files_of(fresh)
    assert open_index(index).N == len(NAMES) - 1


def test_damaged_shards_are_encoded_again(tmp_path, images, tiny_model, whole, capsys):
    index = tmp_path / "index"
    words = ["build", f"--checkpoint={tiny_model}", *_where(images, index)]
    kill_half_way(*words)
    shard = next(index.glob("staging/shard-*.npz"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    search.main(words)
    assert "is damaged" in capsys.readouterr().out
    assert files_of(index) == whole[0]


def test_two_writers_wait_for_each_other(index, images, more, tiny_model, whole):
    both = [start("add", *_where(more, index)) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert files_of(index) == whole[1]


def test_a_model_of_another_format_is_refused(tmp_path, images):
    index = tmp_path / "index"
    (tmp_path / "x.pt").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"--checkpoint=.*x\.pt: is not a checkpoint"):
        search.main(["build", f"--checkpoint={tmp_path / 'x.pt'}", *_where(images, index)])
    assert not index.exists()


def test_a_folder_with_other_files_is_never_made_an_index(tmp_path, images, tiny_model):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.v1.pt").write_text("precious")
    words = ["build", f"--checkpoint={tiny_model}", *_where(images, tmp_path / "mine")]
    with pytest.raises(UserError, match=r"holds other files \(model\.v1\.pt\); allowed is a new"):
        search.main([*words, "--overwrite"])
    assert (tmp_path / "mine" / "model.v1.pt").read_text() == "precious"
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_weights_that_do_not_fit_their_flags_are_refused(tmp_path, images, tiny_model):
    trained = search.load_trained(tiny_model)
    wrong = save_model(tmp_path / "wrong.pt", seed=0, width=16)
    other = search.load_trained(wrong)
    other.args.update(small_images.ARGS | {"width": 100_000})  # would be terabytes
    small_images.save_trained(wrong, other)
    with pytest.raises(UserError, match="its weights and its flags do not fit"):
        search.load_trained(wrong)
    assert trained.identity != other.identity


def test_pictures_in_a_folder_called_staging_are_not_deleted(tmp_path, tiny_model):
    images = make_images(tmp_path / "parent" / "staging", ["x.png"])
    words = ["build", f"--checkpoint={tiny_model}", *_where(images, tmp_path / "parent")]
    for flags in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"holds other files \(staging/x\.png\)"):
            search.main([*words, *flags])
    assert (images / "x.png").exists()


def test_an_interrupted_overwrite_goes_on_and_the_old_index_answers_meanwhile(
    index, images, tiny_model, other_model, whole
):
    words = ["build", f"--checkpoint={other_model}", *_where(images, index), "--overwrite"]
    kill_half_way(*words)
    assert files_of(index) == whole[0]
    process = start(*words)
    said = process.said()
    process.join()
    assert process.exitcode == 0
    assert "Going on: " in said
    assert verify(index).identity == search.load_trained(other_model).identity


def test_strict_stays_strict_when_it_is_called_again(tmp_path, images, tiny_model):
    mixed = shutil.copytree(images, tmp_path / "mixed")
    (mixed / "a" / "5.png").write_bytes(b"")
    words = ["build", f"--checkpoint={tiny_model}", *_where(mixed, tmp_path / "index"), "--strict"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"--strict: 'a/5\.png' is empty"):
            search.main(words)
    make_images(mixed, ["a/5.png"])  # mended: tried again, and good
    search.main(words)
    assert verify(tmp_path / "index").N == len(NAMES)


def test_readers_stand_a_change_under_their_hands(index, monkeypatch):
    """verify hashes file by file; here an image is removed between two of them."""
    real, left = search_index.hash_file, [1]

    def hash_file(path):
        if path.name.startswith("codes.") and left.pop():
            left.append(0)
            monkeypatch.setattr(search_index, "hash_file", real)
            search.main(["remove", f"--index={index}", NAMES[0]])
        return real(path)

    monkeypatch.setattr(search_index, "hash_file", hash_file)
    assert verify(index).N == len(NAMES) - 1


def _rewrite_manifest(index, change):
    manifest = json.loads((index / MANIFEST).read_text())
    change(manifest)
    (index / MANIFEST).write_bytes(search_index._render(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(items="x"),
        lambda m: m.update(items=-1),
        lambda m: m.update(items=m["items"] + 1),
        lambda m: m.update(K=10),
        lambda m: m.update(K=256),
        lambda m: m.pop("M"),
        lambda m: m.update(d=m["d"] * 2),
        lambda m: m.update(images=None),
        lambda m: m["files"].pop("codes"),
        lambda m: m["files"]["codes"].update(name="../codes"),
        lambda m: m["model"].update(method="\x1b[31mSPQ"),
        lambda m: m.update(version="1; rm"),
    ],
)
def test_a_strangers_manifest_that_makes_no_sense_is_refused(index, change):
    """Its check sum is right: it was made so, not damaged."""
    _rewrite_manifest(index, change)
    with pytest.raises(UserError, match=r"--index=.* is damaged"):
        open_index(index)


def test_codebooks_that_do_not_fit_the_codes_never_reach_faiss(index):
    path = next(index.glob("codebooks.*.npy"))
    np.save(path, np.zeros((64, 256, 4), dtype=np.float32))  # FAISS would read beyond the codes
    entry = {"bytes": path.stat().st_size, "sha256": search_index.hash_file(path)}
    _rewrite_manifest(index, lambda m: m["files"]["codebooks"].update(entry))
    with pytest.raises(UserError, match=r"its parts do not fit \(codebooks are float32 \(64, 256"):
        open_index(index)


def test_a_full_disk_is_left_as_it_was(index):
    names = sorted(path.name for path in index.iterdir())
    size = (index / MANIFEST).stat().st_size
    assert finish("remove", f"--index={index}", "a", limit=size - 100) == 2  # the last of all
    assert sorted(path.name for path in index.iterdir()) == names
