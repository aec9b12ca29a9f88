"""Test the results of cells: read as they were written, whole or not at all, and small."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lrnn.errors import UserError
from lrnn.ladder.results import CellResult, Figure, has_result, read_result, thinned, write_result


@pytest.fixture
def result() -> CellResult:
    return CellResult(
        name="15m/delta/negative/308M/seed-0", size="15m", arm="delta", range="negative", seed=0, tokens=308_019_200,
        lr=2.8e-3, parameters=28_000_000, non_embedding_parameters=15_400_000, steps=4700, tokens_per_step=65_536,
        settings={"run.optim.lr": 2.8e-3, "model.mixer": ["gla", {"mixer": "attention"}]}, corpora={"code": "ab12"},
        figures=(
            Figure("heldout_bits_per_byte", "code", None, 1.25, 0.01, "heldout/code"),
            Figure("traces_accuracy", "s5", 64, 0.5),
        ),
        training={"seconds": 1.5}, environment={"device": "cpu"},
        documents={"heldout/code": np.array([[-3.5, 4.0], [-1.0 / 3, 2.0]])},
        metrics=[{"event": "start", "step": 0}, {"step": 1, "loss": 2.5}],
    )  # fmt: skip


def test_a_result_is_read_as_it_was_written(tmp_path, result):
    folder = tmp_path / "results" / result.name
    assert not has_result(folder)
    write_result(folder, result)
    write_result(folder, replace(result, seed=1))  # replaces the first
    again = read_result(folder)
    assert has_result(folder) and again == replace(result, seed=1)
    assert again.documents.keys() == result.documents.keys() and again.metrics == result.metrics
    assert again.documents["heldout/code"].tobytes() == result.documents["heldout/code"].tobytes()
    assert json.loads((folder / "cell.json").read_text())["schema_version"] == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_wrong_result_is_not_written(tmp_path, result):
    with pytest.raises(ValueError, match="by document that are not given"):
        write_result(tmp_path / "x", replace(result, documents={}))
    with pytest.raises(ValueError, match="heldout/code are not finite"):
        write_result(tmp_path / "x", replace(result, documents={"heldout/code": np.array([np.nan])}))
    assert not (tmp_path / "x").exists()


def test_a_damaged_result_is_refused(tmp_path, result):
    write_result(tmp_path / "x", result)
    whole = (tmp_path / "x/documents.npz").read_bytes()
    (tmp_path / "x/documents.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x cannot be read as a result .*; remove it"):
        read_result(tmp_path / "x")
    (tmp_path / "x/documents.npz").unlink()
    with pytest.raises(UserError, match=r"documents\.npz is missing"):
        read_result(tmp_path / "x")
    (tmp_path / "x/cell.json").write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(UserError, match="schema_version 2, and this program reads 1"):
        read_result(tmp_path / "x")


def test_records_are_thinned_evenly():
    plain = [{"step": step, "loss": 1.0 + step, "note": "x" * 100} for step in range(1, 1001)]
    events = [{"event": "checkpoint", "step": step} for step in range(100, 1001, 100)]
    records = sorted([*plain, *events], key=lambda record: record["step"])
    kept = thinned(records, limit=20_000)
    assert sum(len(json.dumps(record)) + 1 for record in kept) <= 20_000
    assert [record for record in kept if "event" in record] == events
    steps = [record["step"] for record in kept if "event" not in record]
    assert steps[-1] == 1000 and len(steps) > 100 and len(set(np.diff(steps))) == 1
    assert thinned(records, limit=10**6) == records
