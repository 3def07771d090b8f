"""scripts/benchmark_data.py: images, figures, and a program that is watched and killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_data

ROOT = Path(__file__).resolve().parents[2]


def test_memory_of_a_program_is_seen_and_it_is_killed_on_a_condition(tmp_path):
    code = "x = bytearray(200 * 2**20); import time; print('there', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    watched = benchmark_data.Watched([sys.executable, "-c", code], log)
    start = time.perf_counter()
    seen = []

    def condition():
        seen.append(log.exists() and "there" in log.read_text())
        return len(seen) > 1 and seen[-2]  # once more after it is there

    assert watched.run(condition) == -9
    assert time.perf_counter() - start < 30
    assert 200 < watched.peak["anonymous"] < 260
    assert watched.peak["all"] >= watched.peak["anonymous"]


def test_all_of_it_on_a_few_small_images(tmp_path):
    words = [sys.executable, "scripts/benchmark_data.py", f"--folder={tmp_path}", "--images=5000"]
    words += ["--side=16", "--", "--width=8", "--batch_size=50", "--max_steps=3", "--device=cpu"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(list(tmp_path.glob("pictures/*/*.jpg"))) == found["images"] == 5000
    assert all(speed > 0 for speed in found["images_per_s"].values())
    epoch = found["epoch"]
    assert epoch["changed_file_refused"]
    assert epoch["store_killed"]
    assert 2500 <= epoch["images_stored_before_the_kill"] < 5000
    assert epoch["set_mib_as_pixels"] == 5000 * 768 / 2**20
    log = (tmp_path / "log.txt").read_text()
    assert "Trained to step 3" in log
