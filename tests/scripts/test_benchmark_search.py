"""What the benchmark of search says of agreement is right, and its command runs."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_search

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tiny_model):
    args = Namespace(checkpoint=tiny_model, codes="uniform", items=500, queries=6, seed=0)
    return benchmark_search.make_codes(args)


def test_agreement_with_itself_and_with_a_worse_ranking(made):
    packed, codebooks, query = made
    own = benchmark_search.build("own", packed, codebooks, None)
    dist, index = own.search(query, 500)
    exact = dist[:, :20], index[:, :20]
    told = benchmark_search.agreement(query, packed, codebooks, exact, exact)
    assert told["overlap"] == 1
    assert told["distance_error"] < 1e-5
    # the last five of each query exchanged for the farthest items, distances told wrongly
    worse = np.concatenate([index[:, :15], index[:, -5:]], axis=1)
    told = benchmark_search.agreement(query, packed, codebooks, exact, (exact[0], worse))
    assert told["overlap"] == pytest.approx(15 / 20)
    assert told["distance_error"] > 0.01


def test_clustered_codes_are_near_their_centres(tiny_model):
    args = Namespace(checkpoint=tiny_model, codes="clustered", items=2000, queries=3, seed=0)
    packed, _, query = benchmark_search.make_codes(args)
    assert packed.shape == (2000, 2)
    assert query.shape == (3, 16)
    assert len(np.unique(packed, axis=0)) > 1000


def test_the_command(tmp_path, tiny_model):
    out = tmp_path / "out.json"
    words = ["--items=3000", "--queries=4", "--singles=2", "--k=5", "--rounds=1"]
    words += [
        "--engines=default,fastscan,ivfpq",
        "--nprobe=2,9999",
        f"--checkpoint={tiny_model}",
        f"--output={out}",
    ]
    done = subprocess.run(
        [sys.executable, "scripts/benchmark_search.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["engines"]["default"]["k5"]["overlap"] == 1
    assert result["engines"]["ivfpq, nprobe 9999"]["k5"]["overlap"] == 1  # all lists: exact
    assert result["engines"]["ivfpq, nprobe 2"]["k5"]["overlap"] < 1
    assert result["engines"]["fastscan"]["k5"]["queries_per_s"] > 0
    assert "| default |" in done.stdout
    done = subprocess.run(
        [sys.executable, "scripts/benchmark_search.py", "--engines=annoy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--engines=annoy: allowed are own, indexpq" in done.stderr
