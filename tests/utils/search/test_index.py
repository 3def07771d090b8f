"""Paths in one buffer; what a manifest admits."""

import json

import numpy as np
import pytest

from utils.errors import UserError
from utils.search.index import MANIFEST, Paths, check_folder, join_paths, open_index, split_paths

NAMES = ["a.png", "new\nline.png", "höhe/猫.png", "caf\udce9.png", "../up/x.png"]


def test_paths_come_back_one_by_one_and_together():
    content = join_paths(NAMES)
    assert split_paths(content) == NAMES
    paths = Paths(np.frombuffer(content, dtype=np.uint8))
    assert len(paths) == 5
    assert [paths[i] for i in range(5)] == list(paths) == NAMES
    for i in (-1, 5):
        with pytest.raises(IndexError):
            paths[i]
    assert len(Paths(np.empty(0, dtype=np.uint8))) == 0
    assert split_paths(b"") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged: manifest.json cannot be read"),
        (b"{}", "damaged: manifest.json cannot be read"),
        (b"[1]", "damaged: manifest.json cannot be read"),
        (b"\xff\xfe", "damaged: manifest.json cannot be read"),
        (b"[" * 100_000, "damaged: manifest.json cannot be read"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, message):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        open_index(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    files = {
        part: {"name": f"{part}.{'0' * 16}.{end}", "bytes": 0, "sha256": ""}
        for part, end in (("codes", "bin"), ("paths", "bin"), ("codebooks", "npy"), ("model", "pt"))
    }
    files["skipped"] = {"name": "skipped./../../etc/x.jsonl", "bytes": 0, "sha256": ""}
    manifest = {"format": "product-quantization-index", "version": 1, "files": files}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json (has changed|makes no sense)"):
        open_index(tmp_path)


def test_only_a_folder_of_its_own_becomes_an_index(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "codes.0123456789abcdef.bin").write_bytes(b"")
    (tmp_path / "model.tmp.tmp").write_bytes(b"")
    check_folder(tmp_path)
    (tmp_path / "codes.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds other files \(codes\.bin\)"):
        check_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be used"):
        check_folder(tmp_path / "file")
