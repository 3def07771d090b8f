"""Files of gallery features and anchors: what comes back, what is refused, how anchors are made."""

import os
import pickle
import re

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import make_anchors
from utils.errors import UserError
from utils.gallery import (
    Gallery,
    class_means,
    identify_names,
    identity_of,
    read_anchors,
    read_gallery,
    train_anchors,
    write_anchors,
    write_gallery,
)

N, M, K, d = 40, 3, 8, 4
D = M * d
NAMES = [f"{i}.png" for i in range(N)]


def features(n=N):
    return F.normalize(torch.randn(n, D))


@pytest.fixture
def kept(tmp_path):
    """A file of features of NAMES."""
    path = tmp_path / "features.safetensors"
    write_gallery(path, Gallery(features(), identify_names(NAMES), "GPQ x", "cifar10"))
    return path


def put(path, tensors, **about):
    save_file(tensors, path, about)
    return path


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [(identify_names(NAMES), "cifar10"), (None, None)])
def test_features_come_back(tmp_path, known):
    x = features()
    path = tmp_path / "a" / "b" / "features.safetensors"  # folders are made
    write_gallery(path, Gallery(x, known[0], "GPQ cifar_vgg 0123", known[1]))
    for found in (read_gallery(path), read_gallery(path, NAMES, "cifar10")):
        # they are scaled once more, which rounds them
        torch.testing.assert_close(found.features, x, rtol=0, atol=1e-6)
        assert (found.names_sha256, found.network) == (known[0], "GPQ cifar_vgg 0123")
        assert found.dataset == known[1]
    assert [p.name for p in path.parent.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(NAMES[:-1], id="fewer"),
        pytest.param([*NAMES, "x.png"], id="more"),
        pytest.param(NAMES[::-1], id="order"),
        pytest.param([*NAMES[:-1], "x.png"], id="one other"),
    ],
)
def test_features_of_other_images_are_refused(kept, names):
    with pytest.raises(
        UserError,
        match=rf"--features=.*: is of 40 other images of cifar10; this "
        rf"set has {len(names)}\. Make features of it with extract_features\.py",
    ):
        read_gallery(kept, names)


def test_sets_whose_images_have_the_same_names_are_told_apart(kept):
    with pytest.raises(UserError, match=r"is of 40 other images of cifar10; this set has 40"):
        read_gallery(kept, NAMES, "cifar100")


def test_names_are_told_apart_wherever_one_ends():
    assert identify_names(["a", "b"]) != identify_names(["ab"])
    assert identify_names(["a", "bc"]) != identify_names(["ab", "c"])
    assert identify_names(["a", "b"]) != identify_names(["b", "a"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_is_taken_for_rows_in_the_order_of_the_names(tmp_path, dtype):
    x = 3 * torch.randn(N, D)  # of any length
    np.save(tmp_path / "x.npy", x.numpy().astype(dtype))
    found = read_gallery(tmp_path / "x.npy", NAMES, "cifar10")
    assert found.features.dtype == torch.float32
    # float16 has 11 bits
    torch.testing.assert_close(found.features, F.normalize(x), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.features.norm(dim=1), torch.ones(N))
    assert (found.names_sha256, found.dataset, found.tells_network) == (None, None, False)
    assert re.fullmatch(r"x\.npy [0-9a-f]{16}", found.network)
    with pytest.raises(UserError, match=r"x\.npy: is of 40 other images; this set has 39"):
        read_gallery(tmp_path / "x.npy", NAMES[1:])


def test_an_array_is_known_by_its_numbers_and_not_by_its_name(tmp_path):
    x = features()
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "renamed.npy", np.asfortranarray(x.numpy().astype(np.float64)))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(x.numpy()))
    known = identity_of(read_gallery(tmp_path / "x.npy").network)
    for name in ("renamed.npy", "x.pkl"):
        found = read_gallery(tmp_path / name).network
        assert found == f"{name} {known}"
    np.save(tmp_path / "x.npy", x.roll(1, 0).numpy())
    assert identity_of(read_gallery(tmp_path / "x.npy").network) != known


def test_a_network_is_known_by_its_weights_if_it_tells_them():
    assert identity_of("GPQ cifar_vgg 0123456789abcdef") == "0123456789abcdef"
    assert identity_of("GPQ cifar_vgg") == "GPQ cifar_vgg"


def with_gaps(path):
    """Features of NAMES, of which those of images 3 and 5 are NaN."""
    x = features()
    x[[3, 5]] = torch.nan
    write_gallery(path, Gallery(x, identify_names(NAMES), "GPQ x"))
    return x


def test_images_without_features_are_refused_where_they_are_used(tmp_path):
    path = tmp_path / "x.safetensors"
    x = with_gaps(path)
    for rows in (None, torch.tensor([0, 5, 39])):
        row = 3 if rows is None else 5
        message = rf"image {row}, '{row}\.png', has a feature that is not finite; make its"
        with pytest.raises(UserError, match=message):
            read_gallery(path, NAMES, rows=rows)
    used = torch.tensor([0, 4, 39])
    found = read_gallery(path, NAMES, rows=used).features
    torch.testing.assert_close(found[used], x[used])
    known = read_gallery(path, rows="known").features
    assert known.isnan().any(dim=1).nonzero()[:, 0].tolist() == [3, 5]
    x[7, 0] = torch.nan  # that is no row that stands for nothing
    write_gallery(path, Gallery(x, None, "GPQ x"))
    with pytest.raises(UserError, match="image 7 has a feature that is not finite"):
        read_gallery(path, rows="known")


def test_anchors_are_made_of_the_images_that_have_features(tmp_path, capsys):
    path, out = tmp_path / "x.safetensors", tmp_path / "a.safetensors"
    x = with_gaps(path)
    make_anchors.main([f"--features={path}", f"--output={out}", "--M=3", "--bits=3"])
    assert "2 images could not be read and have no features" in capsys.readouterr().out
    rows = [n for n in range(N) if n not in (3, 5)]
    want = train_anchors(F.normalize(x[rows]), M, bits=3)
    torch.testing.assert_close(read_anchors(out, D, "GPQ x"), want)


def test_names_that_are_not_utf8_are_told_apart():
    names = [os.fsdecode(b"\xff.png"), os.fsdecode(b"\xfe.png")]
    assert identify_names(names) != identify_names(names[::-1])


def save_objects(path):
    np.save(path, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)


def save_pickle(path):
    path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system")


def save_half(path):
    np.save(path, np.ones((N, D), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:-8])


def save_huge(path):
    """A header that asks for 4 EB."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)


def save_several(path):
    with path.open("wb") as file:
        np.savez(file, x=np.ones((N, D)))


@pytest.mark.parametrize(
    "save",
    [
        save_objects,
        save_pickle,
        save_half,
        save_huge,
        save_several,
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: np.save(path, np.array(["a", "b"])),
        lambda path: None,
    ],
    ids=["objects", "pickle", "half", "huge", "several", "empty", "folder", "text", "missing"],
)
def test_arrays_that_cannot_be_read_are_a_sentence(tmp_path, save):
    save(tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"--features=.*x\.npy: cannot be read as an array") as stop:
        read_gallery(tmp_path / "x.npy")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(D), r"holds \(12,\) numbers of torch.float64; allowed are features \(N, D\)"),
        (np.ones((2, 3, 4)), r"holds \(2, 3, 4\) numbers"),
        (np.ones((2, D), dtype=np.int64), r"numbers of torch.int64"),
        (np.ones((0, D)), r"holds \(0, 12\) numbers"),
        (np.diag([1.0, np.nan, 1.0]), "image 1 has a feature that is not finite"),
        (np.diag([1.0, np.inf, 1.0]), "image 1 has a feature that is not finite"),
        (np.diag([1.0, 1e300, 1.0]), "image 1 has a feature that is not finite"),  # as float32
        (np.diag([1.0, 1e30, 1.0]), "image 1 has a feature that is not finite"),  # its length
        (np.diag([1.0, 1.0, 0.0, 0.0]), "image 2 has a feature 0"),
        (np.diag([1.0, 1e-30, 1.0]), "image 1 has a feature 0"),
    ],
)
def test_what_is_no_feature_is_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        read_gallery(tmp_path / "x.npy")
    if array.dtype == np.float64 and "float64" not in message:
        tensors = {"features": torch.from_numpy(array)}
        path = put(tmp_path / "x.safetensors", tensors, format="gallery-features")
        with pytest.raises(UserError, match=message):
            read_gallery(path)


def test_a_file_of_another_kind_is_refused(tmp_path, kept):
    anchors = tmp_path / "anchors.safetensors"
    write_anchors(anchors, torch.randn(M, K, d), "x")
    with pytest.raises(UserError, match=r"is not what extract_features\.py writes"):
        read_gallery(anchors)
    with pytest.raises(UserError, match=r"--anchors=.*: is not what make_anchors\.py writes"):
        read_anchors(kept, D)
    bare = put(tmp_path / "bare.safetensors", {"features": features()})
    with pytest.raises(UserError, match=r"is not what extract_features\.py writes"):
        read_gallery(bare)
    other = put(tmp_path / "other.safetensors", {"x": features()}, format="gallery-features")
    with pytest.raises(UserError, match=r"cannot be read .*features.*extract_features\.py writes"):
        read_gallery(other)


@pytest.mark.parametrize(
    "content", [lambda b: b[:-4], lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * 64]
)
def test_damaged_files_are_a_sentence(kept, content):
    kept.write_bytes(content(kept.read_bytes()))
    with pytest.raises(UserError, match=r"cannot be read \(.*extract_features\.py writes such"):
        read_gallery(kept)


def test_missing_files_are_named_with_what_makes_them(tmp_path):
    with pytest.raises(UserError, match=r"no such file; extract_features\.py makes it"):
        read_gallery(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no such file; make_anchors\.py makes it"):
        read_anchors(tmp_path / "x.safetensors", D)
    with pytest.raises(UserError, match=r"^--gallery_features="):
        read_gallery(tmp_path / "x.safetensors", flag="--gallery_features")


@pytest.mark.parametrize("step", ["safetensors.torch.save_file", "os.replace", "os.fsync"])
def test_a_write_that_fails_leaves_the_old_file(kept, step, monkeypatch):
    old = kept.read_bytes()

    def fail(*args, **kwargs):
        raise RuntimeError("no room") if step.startswith("safe") else OSError("no room")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no room"):
        write_gallery(kept, Gallery(features(), None, "another"))
    assert kept.read_bytes() == old
    assert list(kept.parent.iterdir()) == [kept]


# --- anchors --------------------------------------------------------------------------------------


def test_anchors_come_back(tmp_path):
    anchors = F.normalize(torch.randn(M, K, d), dim=-1)
    path = tmp_path / "new" / "anchors.safetensors"
    write_anchors(path, anchors.transpose(0, 1).contiguous().transpose(0, 1), "x")
    assert torch.equal(read_anchors(path, D), anchors)


@pytest.mark.parametrize("wrong", [D - 1, D + d, d])
def test_anchors_that_do_not_fit_the_features_are_refused(tmp_path, wrong):
    write_anchors(tmp_path / "a.safetensors", torch.randn(M, K, d), "x")
    message = rf"3 codebooks of 4 dimensions are for features of 12, and these have {wrong};"
    with pytest.raises(UserError, match=message):
        read_anchors(tmp_path / "a.safetensors", wrong)


def test_anchors_in_another_network_s_space_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    one, other = "GPQ cifar_vgg 0123456789abcdef", "GPQ cifar_vgg 00000000000000ff"
    write_anchors(path, torch.randn(M, K, d), "x", one)
    message = rf"--anchors=.*: are in the space of {one}, and the features are by {other}; make"
    with pytest.raises(UserError, match=message):
        read_anchors(path, D, other)
    for network in (one, None, "named otherwise 0123456789abcdef"):
        read_anchors(path, D, network)
    write_anchors(path, torch.randn(M, K, d), "x")  # of an array, or older ones
    read_anchors(path, D, other)


def test_anchors_of_an_array_are_of_no_network(tmp_path):
    """Which may be another set's, by the same network."""
    np.save(tmp_path / "x.npy", features().numpy())
    out = tmp_path / "a.safetensors"
    make_anchors.main([f"--features={tmp_path / 'x.npy'}", f"--output={out}", "--M=3", "--bits=3"])
    assert read_anchors(out, D, "GPQ cifar_vgg 0123456789abcdef").shape == (3, 8, D // 3)


@pytest.mark.parametrize(
    "flag", ["--M=3", "--bits=3", "--iterations=1", "--restarts=1", "--seed=1"]
)
def test_codebooks_are_taken_as_they_are(flag, capsys):
    with pytest.raises(SystemExit):
        make_anchors.main(["--codebooks_of=x.pt", "--output=a.safetensors", *flag.split("=")])
    name = flag.partition("=")[0]
    assert f"{name}: does nothing with --codebooks_of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "anchors",
    [
        torch.ones(M, D),
        torch.ones(M, 0, d),
        torch.full((M, K, d), torch.nan),
        torch.full((M, K, d), torch.inf),
    ],
)
def test_what_is_no_anchor_is_refused(tmp_path, anchors):
    path = put(tmp_path / "a.safetensors", {"anchors": anchors}, format="gallery-anchors")
    with pytest.raises(UserError, match=r"--anchors=.*: holds no anchors \(M, K, d\)"):
        read_anchors(path, D)


def test_anchors_are_faiss_s_centroids_of_unit_length():
    x = features(300)
    found = train_anchors(x, M, bits=3, iterations=4, restarts=2, max_points=20, seed=5)
    assert found.shape == (M, 8, d)
    # a k-means for each slice by the settings, in place of the product quantizer
    for m in range(M):
        cut = np.ascontiguousarray(x[:, m * d : (m + 1) * d].numpy())
        kmeans = faiss.Kmeans(
            d,
            8,
            niter=4,
            nredo=2,
            seed=5,
            max_points_per_centroid=20,
            min_points_per_centroid=1,
        )
        kmeans.train(cut)
        want = F.normalize(torch.from_numpy(kmeans.centroids), dim=1)
        torch.testing.assert_close(found[m], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(M, 8))
    assert len(found.flatten(0, 1).unique(dim=0)) == M * 8


def test_anchors_of_a_few_directions_are_these():
    """Features that lie in K directions a slice: k-means finds no other centroids."""
    words = F.normalize(torch.randn(M, 4, d), dim=-1)
    pick = torch.randint(4, (200, M))
    pick[:4] = torch.arange(4)[:, None]
    x = torch.stack([words[m, pick[:, m]] for m in range(M)], dim=1).flatten(1)
    found = train_anchors(F.normalize(x), M, bits=2, iterations=20, restarts=10)
    for m in range(M):
        sim = found[m] @ words[m].T  # (K, K), a permutation
        torch.testing.assert_close(sim.amax(dim=1), torch.ones(4))
        assert sorted(sim.argmax(dim=1).tolist()) == [0, 1, 2, 3]


def test_the_seed_decides_the_anchors():
    x = features(100)
    one, again, other = (train_anchors(x, M, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"M": 5, "bits": 3}, r"--M=5: does not divide the features' 12 dimensions; [46] does"),
        ({"M": 13, "bits": 3}, r"--M=13: does not divide the features' 12 dimensions; 12 does"),
        ({"M": 3, "bits": 6}, r"--bits=6: 64 anchors need as many features, and there are 40; .*5"),
    ],
)
def test_anchors_that_cannot_be_made_are_named(asked, message):
    with pytest.raises(UserError, match=message):
        train_anchors(features(), **asked)


def test_as_many_features_as_anchors_will_do():
    assert train_anchors(features(32), M, bits=5).shape == (M, 32, d)
    with pytest.raises(UserError, match=r"there are 31; allowed are up to 4 bits"):
        train_anchors(features(31), M, bits=5)


# --- class means ----------------------------------------------------------------------------------


def test_class_means_are_those_of_a_loop():
    x, labels = features(), torch.randint(0, 5, (N,))
    labels[labels == 3] = 4  # a class without an image
    found = class_means(x, labels, 6)
    for c in range(6):
        members = [x[n].double().numpy() for n in range(N) if labels[n] == c]
        if members:
            mean = np.mean(members, axis=0)
            assert found[c].numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
        else:
            assert not found[c].any()
    assert {3, 5} == {c for c in range(6) if not found[c].any()}


# --- pickles, as the released code leaves them ----------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"feature": x, "names": ["a", "b"]}])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_array_in_a_pickle_is_read(wrap, protocol, tmp_path):
    x = torch.nn.functional.normalize(torch.randn(40, 6))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(wrap(x.numpy()), protocol))
    torch.testing.assert_close(read_gallery(tmp_path / "x.pkl", NAMES).features, x)


class Opens:
    """A pickle of it makes a file when it is loaded by Python's own module."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"feature": Opens(mark)}))
    with pytest.raises(UserError, match=r"--features=.*x\.pkl.*io\.open"):
        read_gallery(tmp_path / "x.pkl")
    assert not mark.exists()
    pickle.loads((tmp_path / "x.pkl").read_bytes())["feature"].close()
    assert mark.exists()  # as it would have


@pytest.mark.parametrize("found", [[], {"a": np.ones((3, 2)), "b": np.ones((3, 2))}, np.ones(3)])
def test_a_pickle_without_one_array_is_told(found, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=r"holds [02] arrays \(N, D\)"):
        read_gallery(tmp_path / "x.pkl")
