"""Test several works at once: each continues when it may, and cells equal those trained one by one."""

import json

import pytest
import torch

from lrnn.records import read_metrics
from lrnn.track.cell import train_cell
from lrnn.track.interleave import interleave

CPU = torch.device("cpu")


def ready() -> bool:
    return True


def test_works_take_turns_and_free_places_are_filled():
    log = []

    def start(name):
        for i in range(int(name[1])):
            log.append(f"{name}{i}")
            yield ready
        return name.upper()

    def todo():
        for name in ("a3", "b1", "c0", "d2"):
            log.append(f"take {name}")
            yield name

    assert list(interleave(todo(), start, 2, CPU)) == [("b1", "B1"), ("c0", "C0"), ("a3", "A3"), ("d2", "D2")]
    assert log == ["take a3", "a30", "take b1", "b10", "a31", "a32", "take c0", "take d2", "d20", "d21"]
    assert list(interleave([], start, 2, CPU)) == []


def test_a_work_whose_piece_is_unfinished_waits_and_blocks_no_other():
    looks, log = [], []

    def slow():
        log.append("slow")
        yield lambda: looks.append(1) or len(looks) == 5
        assert log.count("quick") == 3
        log.append("slow")

    def quick():
        for _ in range(3):
            log.append("quick")
            yield ready

    list(interleave([slow, quick], lambda work: work(), 2, CPU))
    assert log == ["slow", "quick", "quick", "quick", "slow"] and len(looks) == 5


def test_an_error_ends_all():
    closed = []

    def bad():
        yield ready
        raise KeyError("bad")

    def endless():
        try:
            while True:
                yield ready
        finally:
            closed.append(True)

    with pytest.raises(KeyError, match="bad"):
        list(interleave([endless, bad, endless], lambda work: work(), 3, CPU))
    assert closed == [True, True]


def test_cells_at_once_equal_cells_one_by_one(tiny_cells):
    """Records, states and results of several mixers and seeds are equal bitwise."""
    model = tiny_cells()[0].model_config.to_diff_dict()
    model = {k: model[k] for k in ("hidden_size", "num_hidden_layers", "num_heads", "head_dim", "intermediate_size")}
    models = {mixer: model | {"mixer": mixer} for mixer in ("deltanet", "mamba2", "transformer")}
    found = []
    for folder, at_once in (("one", 1), ("four", 4)):
        cells = tiny_cells(folder, models=models)
        lines = []

        def start(cell, at_once=at_once, say=lines.append):
            return train_cell(cell, CPU, at_once, say)

        results = {str(cell): result for cell, result in interleave(cells, start, at_once, CPU)}
        assert len(lines) == len(cells) * 5
        for result in results.values():
            assert result.pop("concurrent") == at_once and result.pop("steps_per_second") > 0
        records = [[{**r, "steps_per_second": 0, "time": ""} for r in read_metrics(cell.folder)] for cell in cells]
        states = [torch.load(cell.folder / "state.pt", weights_only=True) for cell in cells]
        written = [json.loads((cell.folder / "result.json").read_text())["accuracy"] for cell in cells]
        found.append((results, records, written, [state["model"] for state in states]))
    one, four = found
    assert len(one[0]) == 10 and one[:3] == four[:3]
    for a, b in zip(one[3], four[3], strict=True):
        assert all(torch.equal(x, b[name]) for name, x in a.items())
