"""Landmark sets in their authors' layouts: read right, and every fault named."""

import pickle

import numpy as np
import pytest

from data.landmarks import (
    missing_files,
    read_distractors,
    read_gldv2,
    read_revisited,
    read_sfm,
    split_gldv2,
)
from utils.errors import UserError
from utils.landmark_metrics import evaluate_revisited


def save(path, value, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


# --- retrieval-SfM --------------------------------------------------------------------------------

CIDS = [f"{i:028x}{tail}" for i, tail in enumerate(("abcd", "1234", "00ff", "9a9b"))]


def sfm_file():
    train = {"cids": CIDS, "cluster": [7, 7, 3, 3], "qidxs": [0, 2, 0], "pidxs": [1, 3, 1]}
    val = {"cids": CIDS[:2], "cluster": [1, 1], "qidxs": [1], "pidxs": [0], "bbxs": [None, None]}
    return {"train": train, "val": val}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_retrieval_sfm(tmp_path, protocol):
    save(tmp_path / "retrieval-SfM-120k" / "retrieval-SfM-120k.pkl", sfm_file(), protocol)
    train = read_sfm(tmp_path, "train")
    assert train.paths[0] == f"retrieval-SfM-120k/ims/cd/ab/00/{CIDS[0]}"
    assert train.paths[1] == f"retrieval-SfM-120k/ims/34/12/01/{CIDS[1]}"
    assert train.clusters.tolist() == [7, 7, 3, 3]
    assert train.queries.tolist() == [0, 2, 0] and train.positives.tolist() == [1, 3, 1]
    assert all(a.dtype == np.int64 for a in (train.clusters, train.queries, train.positives))
    val = read_sfm(tmp_path, "val")
    assert len(val.paths) == 2 and val.queries.tolist() == [1] and val.positives.tolist() == [0]
    # the set's own folder, and the smaller set
    inside = read_sfm(tmp_path / "retrieval-SfM-120k")
    assert inside.paths == [p.removeprefix("retrieval-SfM-120k/") for p in train.paths]
    save(tmp_path / "retrieval-SfM-30k" / "retrieval-SfM-30k.pkl", sfm_file())
    assert read_sfm(tmp_path, name="retrieval-SfM-30k").paths[0].startswith("retrieval-SfM-30k/ims")


def test_retrieval_sfm_of_arrays_is_the_same(tmp_path):
    path = tmp_path / "retrieval-SfM-120k.pkl"
    save(path, sfm_file())
    plain = read_sfm(tmp_path)
    arrays = {
        part: {key: np.array(listed, dtype=object if key == "cids" else np.int32)}
        | {key: np.array(value) for key, value in entry.items() if key != "bbxs"}
        for part, entry in sfm_file().items()
        for key, listed in [("cids", entry["cids"])]
    }
    save(path, arrays)
    found = read_sfm(tmp_path)
    assert found.paths == plain.paths and type(found.paths[0]) is str
    assert np.array_equal(found.queries, plain.queries) and found.clusters.dtype == np.int64


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cids", None, r"train: 'cids' is missing; there are cluster, pidxs, qidxs"),
        ("pidxs", None, r"train: 'pidxs' is missing"),
        ("cids", "abcdef", r"'cids' is of type str; it must be a list"),
        ("cids", [], r"'cids' must be names of images; it is empty"),
        ("cids", [*CIDS[:3], 5], r"'cids' must be names of images; number 3 is a int"),
        ("cids", [*CIDS[:3], "abc"], r"number 3 is 'abc'"),
        ("cids", [*CIDS[:3], "../../../etc/passwd"], r"number 3 is '\.\./"),
        ("cids", CIDS[:3], r"'qidxs' has|'pidxs' has the image 3; allowed is 0 to 2"),
        ("cluster", [1, 1, 1], r"'cluster' has 3 numbers for 4 images"),
        ("cluster", [1, 1, 1, "x"], r"'cluster' must be a list of integers"),
        ("cluster", [1, 1, 1, 0.5], r"'cluster' must be a list of integers"),
        ("cluster", [1, 1, 1, 2**63], r"'cluster' must be a list of integers"),
        ("cluster", [[1, 1], [1]], r"'cluster' must be a list of integers"),
        ("cluster", np.ones((4, 2), dtype=int), r"'cluster' is an array of 2 dimensions; it must"),
        ("cluster", [1, 1, np.uint64(2**63), 1], r"'cluster' must be a list of integers"),
        ("cluster", 4, r"'cluster' is of type int"),
        ("qidxs", [0, 2], r"'qidxs' has 2 images and 'pidxs' 3; they are pairs"),
        ("qidxs", [0, 2, 4], r"'qidxs' has the image 4; allowed is 0 to 3"),
        ("pidxs", [0, -1, 3], r"'pidxs' has the image -1; allowed is 0 to 3"),
        ("pidxs", [True, False, True], r"'pidxs' must be a list of integers"),
    ],
)
def test_faults_of_retrieval_sfm_are_named(tmp_path, key, value, message):
    content = sfm_file()
    content["train"][key] = value
    if value is None:
        del content["train"][key]
    path = tmp_path / "retrieval-SfM-120k.pkl"
    save(path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_sfm(tmp_path)
    assert str(caught.value).startswith(f"--data_dir={path}: train: ")
    read_sfm(tmp_path, "val")


def test_nested_lists_are_refused_before_they_are_an_array(tmp_path, monkeypatch):
    """Each level names the one below twice: with a few more, a small file of 2^30 numbers."""
    nested = [1, 1]
    for _ in range(10):
        nested = [nested, nested]
    content = sfm_file()
    content["train"]["cluster"] = nested
    save(tmp_path / "retrieval-SfM-120k.pkl", content)
    array = np.array
    made = []
    monkeypatch.setattr(np, "array", lambda x, *a, **k: made.append(x) or array(x, *a, **k))
    with pytest.raises(UserError, match="'cluster' must be a list of integers"):
        read_sfm(tmp_path)
    assert all(x == [] for x in made)


def test_keys_that_are_no_names_are_not_shown(tmp_path):
    """Python refuses to write out an integer of so many digits."""
    content = {10**5000: 1, ("a",): 2, "test": 3}
    save(tmp_path / "retrieval-SfM-120k.pkl", content)
    with pytest.raises(UserError, match=r"'train' is missing; there are test$"):
        read_sfm(tmp_path)


def test_retrieval_sfm_that_is_not_what_it_should_be(tmp_path):
    with pytest.raises(
        UserError, match=r"has neither retrieval-SfM-120k/retrieval-SfM-120k\.pkl nor retrieval"
    ):
        read_sfm(tmp_path)
    with pytest.raises(UserError, match="there is no part 'test'; allowed are train, val"):
        read_sfm(tmp_path, "test")
    with pytest.raises(UserError, match="there is no set 'sfm'; allowed are retrieval-SfM-120k, "):
        read_sfm(tmp_path, name="sfm")
    path = tmp_path / "retrieval-SfM-120k.pkl"
    save(path, [1])
    with pytest.raises(UserError, match=r"120k\.pkl: is of type list; it must be a dict"):
        read_sfm(tmp_path)
    save(path, {"train": 3})
    with pytest.raises(UserError, match=r"train: is of type int; it must be a dict"):
        read_sfm(tmp_path)
    with pytest.raises(UserError, match=r"'val' is missing; there are train"):
        read_sfm(tmp_path, "val")
    save(path, {"train": print})
    with pytest.raises(UserError, match=r"--sfm_dir=.*print, which is not plain data"):
        read_sfm(tmp_path, flag="--sfm_dir")


# --- Google Landmarks v2 --------------------------------------------------------------------------

CLEAN = "landmark_id,images\n203,17660ef415d37059 92b6290d571448f6\n9,cd41bf948edc0340\n"
FULL = (
    "id,url,landmark_id\n"
    '6e158a47eb2ca3f6,"https://a.org/x,y.jpg",142820\n'
    "202cd79556f30760,http://b.org/z.jpg,104169\n"
    "3ad87684c99c06e1,http://b.org/w.jpg,142820\n"
)


@pytest.mark.parametrize("place", ["gldv2/", "", "gldv2/train/", "train/"])
def test_gldv2(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "train_clean.csv").write_text(CLEAN)
    (tmp_path / place / "train.csv").write_text(FULL)
    prefix = "gldv2/" if "gldv2" in place else ""
    clean = read_gldv2(tmp_path)
    assert clean.paths == [
        f"{prefix}train/1/7/6/17660ef415d37059.jpg",
        f"{prefix}train/9/2/b/92b6290d571448f6.jpg",
        f"{prefix}train/c/d/4/cd41bf948edc0340.jpg",
    ]
    assert clean.labels.tolist() == [1, 1, 0] and clean.landmark_ids.tolist() == [9, 203]
    whole = read_gldv2(tmp_path, clean=False)
    assert whole.paths[0] == f"{prefix}train/6/e/1/6e158a47eb2ca3f6.jpg"
    assert whole.labels.tolist() == [1, 0, 1] and whole.labels.dtype == np.int64
    assert whole.landmark_ids.tolist() == [104169, 142820]


def test_gldv2_of_other_tools_is_the_same(tmp_path):
    """Line ends, a byte order mark, quotes, another order of columns, a very long line."""
    (tmp_path / "train_clean.csv").write_text(CLEAN)
    (tmp_path / "train.csv").write_text(FULL)
    clean, whole = read_gldv2(tmp_path), read_gldv2(tmp_path, clean=False)
    rows = CLEAN.splitlines()
    quoted = [rows[0], *('"{}","{}"'.format(*row.split(",")) for row in rows[1:])]
    (tmp_path / "train_clean.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode())
    (tmp_path / "train.csv").write_bytes(
        b"\xef\xbb\xbflandmark_id,id\r\n142820,6e158a47eb2ca3f6\r\n104169,202cd79556f30760\r\n"
        b"142820,3ad87684c99c06e1\r\n"
    )
    for found, want in ((read_gldv2(tmp_path), clean), (read_gldv2(tmp_path, False), whole)):
        assert found.paths == want.paths and found.labels.tolist() == want.labels.tolist()
    latin = FULL.encode().replace(b"z.jpg", b"caf\xe9.jpg")  # of no concern
    (tmp_path / "train.csv").write_bytes(latin)
    assert read_gldv2(tmp_path, False).paths == whole.paths
    listed = " ".join(f"{i:016x}" for i in range(20_000))
    (tmp_path / "train_clean.csv").write_text(f"landmark_id,images\n5,{listed}\n")
    assert len(read_gldv2(tmp_path).paths) == 20_000


@pytest.mark.parametrize(
    ("clean", "text", "message"),
    [
        (True, "", "begins with ''; it must be 'landmark_id,images'"),
        (True, FULL, "begins with 'id,url,landmark_id'; it must be 'landmark_id,images'"),
        (True, "landmark_id,images\n", "lists no image"),
        (True, "landmark_id,images\n5,\n", "line 2 has the image ''"),
        (True, "landmark_id,images\nx,abc\n", "line 2 has the landmark 'x'; it must be a number"),
        (True, "landmark_id,images\n-1,abc\n", "line 2 has the landmark '-1'"),
        (True, "landmark_id,images\n5,abc ../d\n", r"line 2 has the image '\.\./d'; allowed are"),
        (True, "landmark_id,images\n5,ab\n", "line 2 has the image 'ab'"),
        (True, "landmark_id,images\n5,abc abc\n", "'abc', which line 2 has already"),
        (True, "landmark_id,images\n5,abc\n\n6,abc\n", "line 4 has the image 'abc', which line 2"),
        (True, "landmark_id,images\n" + "x,abc\n" * 5, r"line 2.*line 3.*line 4.*; 2 more"),
        (False, "", "begins with ''; it must be 'id,url,landmark_id'"),
        (False, CLEAN, "begins with 'landmark_id,images'; it must be"),
        (False, "id,url,landmark_id\n", "lists no image"),
        (False, "id,url,landmark_id\nabc,5\n", "line 2 has the image 'abc,5'"),
        (False, "id,url,landmark_id\nabc,u,5\nabd,u,\n", "line 3 has the landmark ''"),
        (False, "id,url,landmark_id\nabc,u,5\nabc,v,5\n", "line 3 has .*'abc', which line 2 has"),
        (False, "id,url,landmark_id\nabc,u," + "9" * 30 + "\n", "has the landmark '999"),
        (False, 'id,url,landmark_id\nabc,"' + "u" * 200_000 + '",5\n', "cannot be read: field"),
    ],
)
def test_faults_of_gldv2_are_named(tmp_path, clean, text, message):
    name = "train_clean.csv" if clean else "train.csv"
    with pytest.raises(UserError, match=f"has neither gldv2/{name} nor {name}; put the set"):
        read_gldv2(tmp_path, clean)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_gldv2(tmp_path, clean)
    assert str(caught.value).startswith(f"--data_dir={tmp_path / name}: ")


def test_a_split_takes_its_share_of_each_landmark():
    sizes = {0: 1, 1: 2, 2: 3, 3: 10, 4: 29, 5: 100, 9: 1}
    labels = np.repeat(list(sizes), list(sizes.values()))
    labels = labels[np.random.default_rng(1).permutation(len(labels))]
    for share, want in (
        (0.2, [0, 1, 1, 2, 5, 20, 0]),
        (0.29, [0, 1, 1, 2, 8, 29, 0]),
        (0.9, [0, 1, 2, 9, 26, 90, 0]),
        (0.999, [0, 1, 2, 9, 28, 99, 0]),
    ):
        train, val = split_gldv2(labels, share, seed=3)
        assert [int((labels[val] == c).sum()) for c in sizes] == want
        assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
        assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
        assert set(labels[train].tolist()) == set(sizes)  # every landmark is trained


def test_a_split_is_drawn_by_its_seed():
    labels = np.repeat(np.arange(20), 10)
    first, again, other = (split_gldv2(labels, 0.2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    # neither the first of each landmark, nor the same place in each
    drawn = [split_gldv2(labels, 0.2, seed)[1] % 10 for seed in range(50)]
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert counts.min() > 150 and counts.max() < 250  # 200 +- 50: more than 3.9 deviations
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="val_share must lie between 0 and 1"):
            split_gldv2(labels, share, 0)


# --- revisited Oxford and Paris -------------------------------------------------------------------


def revisited_file():
    return {
        "imlist": [f"oxford_{i:06d}" for i in range(6)],
        "qimlist": ["all_souls_000013", "radcliffe_camera_000519"],
        "gnd": [
            {"bbx": [136.5, 34.1, 648.5, 955.7], "easy": [0, 4], "hard": [1], "junk": [5]},
            {
                "bbx": np.array([1, 2, 3, 4], dtype=np.float32),
                "easy": np.array([], dtype=np.float64),
                "hard": np.array([2, 3], dtype=np.int32),
                "junk": [],
            },
        ],
    }


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_revisited(tmp_path, name):
    save(tmp_path / name / f"gnd_{name}.pkl", revisited_file())
    found = read_revisited(tmp_path, name)
    assert (
        found.query_paths[0] == f"{name}/jpg/all_souls_000013.jpg" and len(found.query_paths) == 2
    )
    assert found.db_paths == [f"{name}/jpg/oxford_{i:06d}.jpg" for i in range(6)]
    assert found.boxes.dtype == np.float64
    assert found.boxes.tolist() == [[136.5, 34.1, 648.5, 955.7], [1, 2, 3, 4]]
    listed = [{grade: a.tolist() for grade, a in truth.items()} for truth in found.ground_truth]
    assert listed == [
        {"easy": [0, 4], "hard": [1], "junk": [5]},
        {"easy": [], "hard": [2, 3], "junk": []},
    ]
    assert all(a.dtype == np.int64 for truth in found.ground_truth for a in truth.values())
    inside = read_revisited(tmp_path / name, name)
    assert inside.db_paths[0] == "jpg/oxford_000000.jpg"
    # and it is what the protocol takes
    result = evaluate_revisited(
        np.array([[5, 0, 4, 1, 2, 3], [2, 3, 0, 1, 4, 5]]), found.ground_truth
    )
    assert [result[setup]["mAP"] for setup in ("easy", "medium", "hard")] == [1, 1, 1]
    assert [result[setup]["queries"] for setup in ("easy", "medium", "hard")] == [1, 2, 2]


def change(q, **values):
    def apply(content):
        content["gnd"][q].update(values)

    return apply


def replace(**values):
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("gnd"), r"'gnd' is missing; there are imlist, qimlist"),
        (lambda c: c["gnd"][1].pop("junk"), r"gnd\[1\]: 'junk' is missing; there are bbx, easy, h"),
        (lambda c: c["gnd"][0].pop("bbx"), r"gnd\[0\]: 'bbx' is missing"),
        (lambda c: c["gnd"].pop(), r"'gnd' has 1 entries for 2 queries of 'qimlist'"),
        (replace(gnd=[1, 2]), r"gnd\[0\]: is of type int; it must be a dict"),
        (replace(imlist=[]), r"'imlist' must be names of images; it is empty"),
        (replace(imlist=["../x"] * 6), r"'imlist' must be names of images; number 0 is '\.\./x'"),
        (replace(imlist=["/etc/x"] * 6), r"number 0 is '/etc/x'"),
        (
            replace(qimlist=["a", None]),
            r"'qimlist' must be names of images; number 1 is a NoneType",
        ),
        (change(0, easy=[0, 6]), r"gnd\[0\]: 'easy' has the image 6; allowed is 0 to 5"),
        (change(1, hard=[-1]), r"gnd\[1\]: 'hard' has the image -1; allowed is 0 to 5"),
        (change(0, hard=[1, 4]), r"gnd\[0\]: image 4 is listed as easy and hard; an image has one"),
        (change(0, junk=[5, 5]), r"gnd\[0\]: image 5 is listed as junk and junk"),
        (change(0, easy=[0.5]), r"gnd\[0\]: 'easy' must be a list of integers"),
        (change(0, easy=[[0, 4]]), r"gnd\[0\]: 'easy' must be a list of integers"),
        (change(0, easy=3), r"gnd\[0\]: 'easy' is of type int; it must be a list"),
        (change(1, bbx=[1, 2, 3]), r"gnd\[1\]: 'bbx' must be 4 numbers: left, top, right, bottom"),
        (change(1, bbx=["1", "2", "3", "4"]), r"gnd\[1\]: 'bbx' must be 4 numbers"),
        (change(1, bbx=[1, 2, 10**400, 4]), r"gnd\[1\]: 'bbx' must be 4 numbers"),
        (change(1, bbx=[np.complex64(x) for x in (1, 2, 3, 4)]), r"'bbx' must be 4 numbers"),
        (change(1, bbx=[3, 2, 1, 4]), r"'bbx' is \[3\.0, 2\.0, 1\.0, 4\.0\]; it must be left, top"),
        (change(1, bbx=[1, 4, 3, 4]), r"with left < right and top < bottom"),
        (change(1, bbx=[1, 2, float("nan"), 4]), r"'bbx' is \[1\.0, 2\.0, nan, 4\.0\]"),
    ],
)
def test_faults_of_revisited_sets_are_named(tmp_path, damage, message):
    content = revisited_file()
    damage(content)
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    save(path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_revisited(tmp_path, "roxford5k")
    assert str(caught.value).startswith(f"--data_dir={path}: ")


def test_revisited_sets_have_two_names(tmp_path):
    with pytest.raises(
        UserError, match="there is no set 'oxford5k'; allowed are roxford5k, rparis6k"
    ):
        read_revisited(tmp_path, "oxford5k")
    with pytest.raises(
        UserError, match=r"--test_dir=.*: has neither rparis6k/gnd_rparis6k\.pkl nor"
    ):
        read_revisited(tmp_path, "rparis6k", flag="--test_dir")


# --- distractors, and files that are not there ----------------------------------------------------


def test_distractors(tmp_path):
    folder = tmp_path / "revisitop1m"
    folder.mkdir()
    (folder / "revisitop1m.txt").write_bytes(b"0a/b1.jpg\r\ncaf\xe9 2.JPG\n\nc.png\n")
    found = read_distractors(tmp_path)
    assert found[::2] == ["revisitop1m/jpg/0a/b1.jpg", "revisitop1m/jpg/c.png"]
    assert found[1].endswith(" 2.JPG") and len(found) == 3
    assert read_distractors(folder)[0] == "jpg/0a/b1.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "lists no image"),
        ("a.jpg\n\n../b.jpg\n", r"line 3 has '\.\./b\.jpg', which is not below the folder jpg"),
        ("/a.jpg\n", "line 1 has '/a.jpg', which is not below"),
        ("a\\b.jpg\n", "line 1 has .*, which is not below"),
        ("a.jpg\nb.jpg\na.jpg\n", "line 3 has 'a.jpg' of line 1 again"),
    ],
)
def test_faults_of_the_distractors_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=r"has neither revisitop1m/revisitop1m\.txt nor"):
        read_distractors(tmp_path)
    (tmp_path / "revisitop1m.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_distractors(tmp_path)


def test_missing_files_are_listed_in_their_order(tmp_path):
    save(tmp_path / "retrieval-SfM-120k" / "retrieval-SfM-120k.pkl", sfm_file())
    paths = read_sfm(tmp_path).paths
    assert missing_files(paths, tmp_path) == paths
    for path in paths[1:3]:
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"")
    (tmp_path / paths[3]).mkdir(parents=True)  # a folder is no file
    assert missing_files(paths, tmp_path) == [paths[0], paths[3]]
    assert missing_files(paths[1:3], str(tmp_path)) == []
