"""Digests of data, weights and files: what differs anywhere has another one, what is the same elsewhere has the same."""

import numpy as np
import torch

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_file, digest_rows, digest_weights


def test_digests_see_every_row_sign_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridzoo.zoo.digests._CHUNK", 1000)
    table = np.arange(40_000, dtype=np.int64).reshape(-1, 4)
    np.save(tmp_path / "t.npy", table)
    whole = digest_rows(table)
    assert whole == digest_rows(np.load(tmp_path / "t.npy", mmap_mode="r")) == digest_rows(np.asfortranarray(table))
    assert whole == digest_rows(table.astype(">i8")) and whole != digest_rows(table.reshape(-1, 8))
    changed = table.copy()
    changed[7777, 2] += 1
    assert digest_rows(changed) != whole
    model = zoo.build("transformer-tiny", ["d_model=16", "layers=attention mlp"])
    weights = digest_weights(model)
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[3].neg_()
    assert digest_weights(model) != weights
    before = digest_file(tmp_path / "t.npy")
    with open(tmp_path / "t.npy", "r+b") as f:
        f.seek(200_000)
        f.write(b"\xff")
    assert digest_file(tmp_path / "t.npy") != before
