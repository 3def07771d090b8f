"""Small landmark sets in the layouts of retrieval-SfM-120k and Google Landmarks v2, and flags that
make main_SSP.py train on them within seconds."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(80, 60), (40, 90), (64, 64), (50, 33), (97, 41)]  # width, height
N, LANDMARKS = 40, 8  # image i shows landmark i % 8

FAST = [
    "--arch=test_efficientnet",
    "--input_size=48",
    "--batch_size=8",
    "--epochs=2",
    "--device=cpu",
    "--amp=off",
    "--lr=0.01",
    "--warmup_epochs=0",
    "--log_every=1",
    "--num_workers=2",
]


def make_sfm(root: Path) -> Path:
    """`retrieval-SfM-120k`: matching pairs are images i and i + 8, of the first 32 images only."""
    names = [f"{i:02x}{(i * 37) % 256:02x}{i + 1:02x}{'abcdef'}{i:02x}" for i in range(N)]
    for i, name in enumerate(names):
        folder = root / "retrieval-SfM-120k" / "ims" / name[-2:] / name[-4:-2] / name[-6:-4]
        _save(folder / name, i)
    part = {
        "cids": names,
        "cluster": [5 * (i % LANDMARKS) + 3 for i in range(N)],
        "qidxs": list(range(24)),
        "pidxs": list(range(8, 32)),
    }
    content = {"train": part, "val": part}
    (root / "retrieval-SfM-120k" / "retrieval-SfM-120k.pkl").write_bytes(pickle.dumps(content))
    return root


def make_gldv2(root: Path) -> Path:
    """`gldv2`, its clean list."""
    names = [f"{(i * 7919) % 4096:03x}{i:013x}" for i in range(N)]
    lines = ["landmark_id,images"]
    for landmark in range(LANDMARKS):
        lines.append(f"{100 * landmark + 17},{' '.join(names[landmark::LANDMARKS])}")
    for i, name in enumerate(names):
        _save(root / "gldv2" / "train" / name[0] / name[1] / name[2] / f"{name}.jpg", i)
    (root / "gldv2" / "train_clean.csv").write_text("\n".join(lines) + "\n")
    return root


def _save(path: Path, i: int) -> None:
    """An image of its landmark's colours, as JPEG whatever its name ends in."""
    rng = np.random.default_rng(i % LANDMARKS)
    blocks = rng.integers(0, 256, (4, 4, 3)).astype(float)
    blocks += np.random.default_rng(100 + i).normal(0, 20, blocks.shape)
    image = Image.fromarray(blocks.clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    size = SIZES[i % len(SIZES)]
    image.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=95)
