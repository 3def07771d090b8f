"""evaluate_landmarks.py from end to end on a made-up ROxford of a dozen small images."""

import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from small_images import save_model

from args import parse_landmarks_args
from evaluate_landmarks import main
from models import OwnGallery, build_embedding, build_pooled, build_trunk
from utils import landmark_features
from utils.checkpoint import LAST, save_checkpoint
from utils.cli import run_main
from utils.embedders import load_network
from utils.errors import UserError
from utils.gallery import read_gallery
from utils.trained import build_from_flags, load_trained

TINY = "test_efficientnet"
D = 24
LONGEST, SCALES = 64, (1.0, 1.4142, 0.7071)
SSP_ARGS = {
    "arch": TINY,
    "width": 64,
    "embedding_dim": D,
    "n_classes": 0,
    "method": "ssp",
    "gem_p": 3.0,
    "trainable_p": False,
    "stem": "imagenet",
    "input_size": 64,
    "gallery": "tiny gallery",
}
SIZES = [(80, 60), (40, 90), (64, 64), (50, 33), (97, 41), (48, 48)]  # width, height
TRUTH = [
    {"bbx": [10, 5.4, 70, 50], "easy": [0, 7], "hard": [3], "junk": [5]},
    {"bbx": [-3, 0, 300, 60], "easy": [], "hard": [2, 8], "junk": []},
    {"bbx": [1, 2, 40, 60], "easy": [4], "hard": [], "junk": [1, 6]},
]


def scramble(model, seed):
    """Weights that make embeddings depend on the image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in ("trunk.mean", "trunk.std") or not value.is_floating_point():
                continue
            if value.dim() > 1:
                scale = (2 / value[0].numel()) ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            elif name.endswith(("bias", "running_mean")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


def save_images(folder, names, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        blocks = rng.integers(0, 256, (rng.integers(3, 9), rng.integers(3, 9), 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC)
        image.save(folder / name, quality=95)


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory):
    """The set in its layout; not to be changed."""
    root = tmp_path_factory.mktemp("landmarks")
    db, queries = [f"oxford_{i:03d}" for i in range(9)], [f"query_{i}" for i in range(3)]
    save_images(root / "roxford5k" / "jpg", [f"{name}.jpg" for name in (*queries, *db)], 0)
    content = {"imlist": db, "qimlist": queries, "gnd": TRUTH}
    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    names = [f"{i}.jpg" for i in range(5)]
    save_images(root / "revisitop1m" / "jpg", names, 1)
    (root / "revisitop1m" / "revisitop1m.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """(network, flags): R101-GeM but for the trunk, its weights as they are published."""
    model = scramble(build_embedding("gem", TINY, D=D), 1)
    path = tmp_path_factory.mktemp("gallery") / "weights.safetensors"
    weights = {
        name.removeprefix("trunk.net."): value
        for name, value in model.state_dict().items()
        if name not in ("trunk.mean", "trunk.std")
    }
    save_file(weights, path)
    return model, [f"--gallery={TINY}", f"--gallery_weights={path}"]


@pytest.fixture(scope="module")
def query(tmp_path_factory):
    """(network, flags): a run's folder of main_SSP.py."""
    model = scramble(build_from_flags("SSP", SSP_ARGS), 2)
    folder = tmp_path_factory.mktemp("query")
    save_checkpoint(folder / LAST, ssp_state(model.state_dict()))
    return model, [f"--query={folder}"]


def ssp_state(weights, **changes):
    state = {"method": "SSP", "args": SSP_ARGS | changes, "model": weights, "optimizer": {}}
    return state | {"scaler": {}, "step": 1, "last_eval": None}


def run(landmarks, *flags):
    main(
        [
            "--dataset=roxford5k",
            f"--data_dir={landmarks}",
            f"--longest={LONGEST}",
            "--device=cpu",
            "--amp=off",
            *flags,
        ]
    )


def figures(path):
    return json.loads(path.read_text())


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the images that went through a network."""
    seen = []
    real = landmark_features.multiscale_features

    def counting(network, image, scales):
        seen.append(tuple(image.shape[1:]))
        return real(network, image, scales)

    monkeypatch.setattr("utils.landmark_features.multiscale_features", counting)
    return seen


# --- an independent computation -------------------------------------------------------------------


@torch.no_grad()
def embedding(model, path, box=None, longest=LONGEST):
    image = Image.open(path).convert("RGB")
    if box is not None:
        left, top, right, bottom = map(round, box)
        image = image.crop(
            (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        )
    factor = min(1, longest / max(image.size))
    image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    found = []
    for scale in SCALES:
        size = [round(side * scale) for side in pixels.shape[2:]]
        found.append(model(F.interpolate(pixels, size, mode="bilinear", antialias=True))[0])
    return F.normalize(sum(found), dim=0)


def embeddings(model, landmarks, longest=LONGEST):
    jpg = landmarks / "roxford5k" / "jpg"
    queries = [
        embedding(model, jpg / f"query_{i}.jpg", t["bbx"], longest) for i, t in enumerate(TRUTH)
    ]
    db = [embedding(model, jpg / f"oxford_{i:03d}.jpg", None, longest) for i in range(9)]
    return torch.stack(queries), torch.stack(db)


def expected(query, db):
    """mAP and mP@k of each setup, by the definition, one image after the other."""
    sim = query @ db.T
    gaps = sim.sort(dim=1).values.diff(dim=1)
    assert gaps.min() > 1e-6  # or rounding would decide the order
    found = {}
    for setup in ("easy", "medium", "hard"):
        AP, at = [], {1: [], 5: [], 10: []}
        for truth, row in zip(TRUTH, sim.tolist(), strict=True):
            easy, hard = set(truth["easy"]), set(truth["hard"])
            good = {"easy": easy, "medium": easy | hard, "hard": hard}[setup]
            junk = set(truth["junk"]) | (easy | hard) - good
            if not good:
                continue
            order = sorted(set(range(len(db))) - junk, key=lambda i: -row[i])
            area, hits = 0.0, 0
            for rank, i in enumerate(order):
                if i in good:
                    before = hits / rank if rank else 1.0
                    hits += 1
                    area += (before + hits / (rank + 1)) / 2 / len(good)
            AP.append(area)
            last = max(order.index(i) for i in good) + 1
            for k, values in at.items():
                cut = min(k, last)
                values.append(sum(i in good for i in order[:cut]) / cut)
        found[setup] = {"queries": len(AP), "mAP": np.mean(AP)}
        found[setup] |= {f"mP@{k}": np.mean(values) for k, values in at.items()}
    return found


def assert_figures(row, want):
    for setup, values in want.items():
        assert row[setup] == pytest.approx(values, abs=1e-9), setup


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_those_of_the_definition(landmarks, gallery, query, tmp_path, capsys):
    output = tmp_path / "deep" / "figures.json"
    scales = f"--scales={','.join(map(str, SCALES))}"
    run(landmarks, *gallery[1], *query[1], "--all_sides", scales, f"--output={output}")
    content = figures(output)
    by = {
        name: embeddings(model, landmarks)
        for name, (model, _) in {"query": query, "gallery": gallery}.items()
    }
    assert [row["side"] for row in content["sides"]] == [
        "query-gallery",
        "query-query",
        "gallery-gallery",
    ]
    for row in content["sides"]:
        asks, asked = row["side"].split("-")
        assert_figures(row, expected(by[asks][0], by[asked][1]))
    assert [row["hard"]["queries"] for row in content["sides"]] == [2, 2, 2]
    assert len({row["medium"]["mAP"] for row in content["sides"]}) == 3  # three different rankings
    assert content["database"] == 9 and content["dimensions"] == D
    assert content["query"].startswith(f"SSP {TINY} ") and content["gallery"].startswith(TINY)
    # printed in per cent
    said = capsys.readouterr().out
    row = content["sides"][0]["easy"]
    line = next(x for x in said.splitlines() if x.startswith("query-gallery   easy"))
    values = [f"{100 * row[name]:.2f}" for name in ("mAP", "mP@1", "mP@5", "mP@10")]
    assert line.split() == ["query-gallery", "easy", "2", *values]
    assert "which learned from tiny gallery" in said


def test_without_query_the_gallery_asks_itself(landmarks, gallery, tmp_path):
    output = tmp_path / "figures.json"
    run(landmarks, *gallery[1], f"--output={output}")
    content = figures(output)
    assert content["query"] == content["gallery"] and len(content["sides"]) == 1
    assert_figures(content["sides"][0], expected(*embeddings(gallery[0], landmarks)))


def test_distractors_follow_the_database(landmarks, gallery, tmp_path):
    output = tmp_path / "figures.json"
    run(landmarks, *gallery[1], "--distractors", f"--output={output}")
    queries, db = embeddings(gallery[0], landmarks)
    jpg = landmarks / "revisitop1m" / "jpg"
    more = torch.stack([embedding(gallery[0], jpg / f"{i}.jpg") for i in range(5)])
    assert figures(output)["database"] == 14
    assert_figures(figures(output)["sides"][0], expected(queries, torch.cat([db, more])))


def test_networks_for_small_images_are_given_squares(landmarks, tmp_path, monkeypatch):
    """An SPQ network of 16 pixels; --scales does not matter to it."""
    path = save_model(tmp_path / "model.pt", seed=0)
    given = []
    real = OwnGallery.describe
    monkeypatch.setattr(
        OwnGallery, "describe", lambda self, x: given.append(tuple(x.shape)) or real(self, x)
    )
    kept = tmp_path / "features"
    run(landmarks, f"--gallery={path}", f"--features_dir={kept}")
    assert given == [(1, 3, 16, 16)] * 12
    run(landmarks, f"--gallery={path}", f"--features_dir={kept}", "--scales=1")
    assert len(given) == 12
    network = load_network(str(path), None, "--gallery")
    trained = load_trained(path)
    assert network.identity == trained.identity and network.squeezed == 16
    # and SSP's own small networks
    args = {"arch": "cifar_vgg", "width": 8, "stem": "cifar", "input_size": 32}
    model = build_from_flags("SSP", SSP_ARGS | args)
    save_checkpoint(tmp_path / "small.pt", ssp_state(model.state_dict(), **args))
    assert load_network(str(tmp_path / "small.pt"), None, "--query").squeezed == 32


# --- kept features --------------------------------------------------------------------------------


def test_features_are_kept_and_used_again(landmarks, gallery, query, tmp_path, passes):
    kept = f"--features_dir={tmp_path / 'features'}"
    outputs = [tmp_path / f"{i}.json" for i in range(2)]
    run(landmarks, *gallery[1], *query[1], kept, f"--output={outputs[0]}")
    assert len(passes) == 12
    assert max(max(size) for size in passes) == LONGEST
    pieces = [tmp_path.glob(f"features/roxford5k-{part}-*/*") for part in ("queries", "database")]
    for (path,), (model, _), want in zip(pieces, (query, gallery), (0, 1), strict=True):
        want = embeddings(model, landmarks)[want]
        # another order of the same sums
        torch.testing.assert_close(read_gallery(path).features, want, rtol=0, atol=1e-5)
    run(landmarks, *gallery[1], *query[1], kept, f"--output={outputs[1]}")
    assert len(passes) == 12 and figures(outputs[0]) == figures(outputs[1])
    run(landmarks, *gallery[1], kept)  # the database is there, by the same network
    assert len(passes) == 15
    # what decides the features makes new ones
    run(landmarks, *gallery[1], kept, "--longest=32")
    assert len(passes) == 27 and max(max(size) for size in passes[15:]) == 32
    run(landmarks, *gallery[1], kept, "--scales=1")
    assert len(passes) == 39
    run(landmarks, *gallery[1], kept, "--scales=1")
    assert len(passes) == 39
    run(landmarks, *gallery[1], kept, "--scales=1", "--amp=bf16")
    assert len(passes) == 51


def test_another_image_of_the_same_name_makes_new_features(landmarks, gallery, tmp_path, passes):
    own = tmp_path / "own"
    shutil.copytree(landmarks, own)
    kept = f"--features_dir={tmp_path / 'features'}"
    run(own, *gallery[1], kept, "--scales=1")
    Image.new("RGB", (30, 30), "red").save(own / "roxford5k" / "jpg" / "oxford_004.jpg")
    run(own, *gallery[1], kept, "--scales=1")
    assert len(passes) == 12 + 9  # the queries stay


def test_a_killed_run_is_gone_on_with(landmarks, gallery, tmp_path, monkeypatch, passes):
    monkeypatch.setattr("utils.landmark_features.PIECE", 4)
    kept = f"--features_dir={tmp_path / 'features'}"
    counting = landmark_features.multiscale_features

    def deadly(network, image, scales):
        if len(passes) == 6:  # in the second piece of the database
            raise KeyboardInterrupt
        return counting(network, image, scales)

    with monkeypatch.context() as patch:
        patch.setattr("utils.landmark_features.multiscale_features", deadly)
        with pytest.raises(KeyboardInterrupt):
            run(landmarks, *gallery[1], kept)
    assert [path.name for path in tmp_path.glob("features/*/*")] == ["0000000.safetensors"]
    output, whole = tmp_path / "figures.json", tmp_path / "whole.json"
    run(landmarks, *gallery[1], kept, f"--output={output}")
    assert len(passes) == 6 + 8  # all but the four that were kept
    assert len(list(tmp_path.glob("features/*/*"))) == 3 + 1
    run(landmarks, *gallery[1], f"--output={whole}")
    assert figures(output) == figures(whole)


def test_a_damaged_piece_is_named(landmarks, gallery, tmp_path):
    kept = tmp_path / "features"
    run(landmarks, *gallery[1], f"--features_dir={kept}", "--scales=1")
    (path,) = kept.glob("roxford5k-database-*/*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"--features_dir=.*/0000000\.safetensors: is damaged; delete"
    ):
        run(landmarks, *gallery[1], f"--features_dir={kept}", "--scales=1")


# --- what is missing or wrong ---------------------------------------------------------------------


def test_dry_run_of_what_is_there(landmarks, gallery, query, capsys, passes):
    run(landmarks, *gallery[1], *query[1], "--distractors", "--dry_run")
    said = capsys.readouterr().out
    assert "roxford5k: 3 in roxford5k-queries, 9 in roxford5k-database; 0 missing" in said
    assert "revisitop1m: 5 in revisitop1m; 0 missing" in said
    assert f"--query: SSP {TINY}" in said and "Everything is there." in said
    assert not passes


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_missing_images_are_counted_and_named(landmarks, gallery, tmp_path, flags, passes):
    own = tmp_path / "own"
    shutil.copytree(landmarks, own)
    for i in range(7):
        (own / "roxford5k" / "jpg" / f"oxford_{i:03d}.jpg").unlink()
    with pytest.raises(UserError) as caught:
        run(own, *gallery[1], *flags)
    said = str(caught.value)
    assert f"--data_dir={own}: 7 of 12 images of roxford5k are missing: " in said
    assert "roxford5k/jpg/oxford_004.jpg and 2 more" in said and "oxford_005" not in said
    assert "project page of Revisiting Oxford and Paris" in said
    assert not passes


def test_everything_that_is_missing_is_told_at_once(tmp_path, monkeypatch, capsys):
    """Large networks by name, without a file of theirs; the exit code is 2."""
    flags = ["--dataset=rparis6k", f"--data_dir={tmp_path}", "--distractors", "--dry_run"]
    for side, name in (("gallery", "r101-delg"), ("query", "r101-gem")):
        flags += [f"--{side}={name}", f"--{side}_weights={tmp_path / name}.pth"]
    monkeypatch.setattr(sys, "argv", ["evaluate_landmarks.py"])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main(flags))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    for told in (
        "has neither rparis6k/gnd_rparis6k.pkl nor gnd_rparis6k.pkl",
        "Paris Buildings",
        "has neither revisitop1m/revisitop1m.txt",
        "as R1M",
        f"--gallery_weights={tmp_path}/r101-delg.pth: no such file",
        f"--query_weights={tmp_path}/r101-gem.pth: no such file",
    ):
        assert told in said, told


def test_weights_that_do_not_fit(gallery, query, landmarks, tmp_path):
    model, _ = gallery
    whole = {n.removeprefix("trunk.net."): v for n, v in model.state_dict().items()}
    del whole["whiten.bias"], whole["trunk.mean"], whole["trunk.std"]
    save_file(whole, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"^--gallery_weights=.* does not fit .*: whiten\.bias is"):
        load_network(TINY, tmp_path / "part.safetensors", "--gallery")
    save_file(model.trunk.net.state_dict(), tmp_path / "trunk.safetensors")  # a trunk alone
    with pytest.raises(UserError, match=r"does not fit --gallery=r101-gem: .* is missing"):
        load_network("r101-gem", tmp_path / "trunk.safetensors", "--gallery")
    with pytest.raises(
        UserError, match=r"^--query_weights=.* does not fit --query=resnet26: .* is"
    ):
        load_network("resnet26", tmp_path / "trunk.safetensors", "--query")
    with pytest.raises(UserError, match="--gallery=cifar_vgg: cifar_vgg is not timm's"):
        load_network("cifar_vgg", tmp_path / "trunk.safetensors", "--gallery")
    weights = query[0].state_dict()
    for changes in ({"embedding_dim": 10**9}, {"arch": "no_such"}, {"input_size": 10**6}):
        save_checkpoint(tmp_path / "bad.pt", ssp_state(weights, **changes))
        with pytest.raises(UserError, match="is damaged: its weights and its flags do not fit"):
            load_network(str(tmp_path / "bad.pt"), None, "--query")
    # a small file, which asks for as much memory as it likes
    few = {n: v.flatten()[:1].clone().expand(v.shape) if v.dim() else v for n, v in weights.items()}
    none = {name: value.to("meta") for name, value in weights.items()}
    for small in (few, none):
        save_checkpoint(tmp_path / "small.pt", ssp_state(small))
        with pytest.raises(UserError, match="weights that are larger than their file"):
            load_network(str(tmp_path / "small.pt"), None, "--query")
    with pytest.raises(UserError, match=f"--query={landmarks}: holds neither {LAST} nor model"):
        load_network(str(landmarks), None, "--query")
    weights = {name: value.clone() for name, value in weights.items()}
    weights["whiten.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", ssp_state(weights))
    with pytest.raises(UserError, match="has weights that are not finite"):
        load_network(str(tmp_path / "nan.pt"), None, "--query")


def test_embeddings_of_two_lengths_are_not_compared(landmarks, gallery, tmp_path):
    path = save_model(tmp_path / "model.pt", seed=0)  # 16 dimensions
    with pytest.raises(UserError, match=f"--query: .* have 16 dimensions and the gallery's {D}"):
        run(landmarks, *gallery[1], f"--query={path}", "--dry_run")


def test_a_network_of_timm_alone_is_pooled_and_not_whitened(gallery, landmarks, tmp_path):
    model, _ = gallery
    weights = tmp_path / "trunk.safetensors"
    save_file(model.trunk.net.state_dict(), weights)
    network = load_network(TINY, weights, "--gallery")
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.trunk.eval()(images)
        x = maps.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
    want = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(network.model.describe(images), want, rtol=0, atol=1e-6)
    assert network.squeezed is None  # images at their own aspect
    assert not any(p.requires_grad for p in network.model.parameters())
    output = tmp_path / "x.json"
    flags = [f"--gallery={TINY}", f"--gallery_weights={weights}", "--scales=1"]
    run(landmarks, *flags, f"--output={output}")
    assert json.loads(output.read_text())["dimensions"] == model.trunk.feature_dim


def test_a_transformer_takes_squares(tmp_path):
    arch = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    trunk = build_trunk(arch, input_size=64).eval()
    save_file(trunk.net.state_dict(), tmp_path / "vit.safetensors")
    network = load_network(arch, tmp_path / "vit.safetensors", "--gallery", input_size=64)
    assert network.squeezed == 64
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = torch.nn.functional.normalize(trunk(images), dim=1)
    torch.testing.assert_close(network.model.describe(images), want, rtol=0, atol=1e-6)
    assert build_pooled("resnet26")[1:] == (224, False)


def test_a_network_that_trips_over_a_size_is_told_with_the_image(gallery, landmarks, monkeypatch):
    def trip(*args):
        raise RuntimeError("The size of tensor a (57) must match\nthe size of tensor b (58)")

    monkeypatch.setattr("utils.landmark_features.multiscale_features", trip)
    with pytest.raises(UserError, match=r"does not take roxford5k/jpg/\S+ at \d+ x \d+ .*a \(57\)"):
        run(landmarks, *gallery[1], "--scales=1")

    def fill(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("utils.landmark_features.multiscale_features", fill)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        run(landmarks, *gallery[1], "--scales=1")


def test_an_image_that_cannot_be_decoded_is_named(landmarks, gallery, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(landmarks, own)
    (own / "roxford5k" / "jpg" / "oxford_002.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"roxford5k/jpg/oxford_002\.jpg is not an image"):
        run(own, *gallery[1], "--scales=1")


# --- command line ---------------------------------------------------------------------------------

BASE = ["--dataset=roxford5k", "--data_dir=sets"]


def test_defaults():
    args = parse_landmarks_args([*BASE, "--gallery=r101-gem", "--gallery_weights=a.pth"])
    assert args.longest == 1024 and args.scales == (1, 1.4142, 0.7071) and args.query is None
    assert args.amp == "auto" and args.device == "auto" and args.features_dir is None
    assert not (args.distractors or args.all_sides or args.dry_run)
    words = [*BASE, "--gallery=runs/a", "--query=model.pt", "--all_sides", "--no-distractors"]
    args = parse_landmarks_args([*words, "--scales=1,2", "--dry_run=False"])
    assert args.all_sides and not args.dry_run and not args.distractors and args.scales == (1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gallery=r101-delg"], "--gallery=r101-delg: needs --gallery_weights, a file; "),
        (["--gallery=resnet50"], "needs --gallery_weights, a file, or --pretrained; allowed"),
        (["--gallery=r101-gem", "--pretrained"], "--gallery=r101-gem: needs --gallery_weights"),
        (["--gallery=resnet5o"], "--gallery=resnet5o: is no file, and neither of r101-delg and"),
        (["--gallery=a.pt", "--gallery_weights=b"], "--gallery_weights: --gallery=a.pt is a file"),
        (["--gallery=a.pt", "--query=r101-gem"], "--query=r101-gem: needs --query_weights"),
        (["--gallery=a.pt", "--query_weights=b"], "--query_weights: of which network"),
        (["--gallery=a.pt", "--all_sides"], "--all_sides: without --query"),
        (["--gallery=a.pt", "--scales=1,0"], "--scales: 0: must be a finite number above 0"),
        (["--gallery=a.pt", "--scales=1,,2"], "--scales: : must be a finite number above 0"),
        (["--gallery=a.pt", "--longest=0"], "--longest: 0: must be"),
        (["--gallery=a.pt", "--output=a.txt"], "--output=a.txt: allowed is .* ends in .json"),
        (["--gallery=a.pt", "--dry_run=perhaps"], "--dry_run=perhaps: must be True or False"),
        (["--gallery=a.pt", "--dataset=oxford5k"], "--dataset: invalid choice"),
        (["--gallery=a.pt", "--pretrained"], "--pretrained: does nothing here"),
        ([], "required: --gallery"),
    ],
)
def test_faults_of_the_command_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_landmarks_args([*BASE, *flags])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
