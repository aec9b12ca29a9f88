"""Compare what the code computes with what it computed when `golden.json` was written; see record.py.

Floats may differ by 1e-5, relative or absolute, because processors round differently. Everything else must be equal.

The record was written with the instructions of AVX2, in which PyTorch rounds in the same way on all processors. There
floats must be equal too, except those of `REORDERED`:

    ATEN_CPU_CAPABILITY=avx2 LRNN_GOLDEN_BITWISE=1 pytest tests/golden
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import run_program

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
ENTRIES = [(part, name) for part in GOLDEN for name in GOLDEN[part]]
TOLERANCE = 1e-5
BITWISE = os.environ.get("LRNN_GOLDEN_BITWISE") == "1"
# Entries whose sums are in another order since the record was written, by up to 1e-6: attention has grouped heads, and
# ZeRO-2 and ZeRO-3 reduce gradients once per step, after those of its micro-batches have been added up.
REORDERED = {
    ("training", "transformer none"),
    ("export", "transformer none"),
    ("zero", "stage 2"),
    ("zero", "stage 3"),
}
SHOWN = 20  # at most so many differences of an entry are printed


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """Record the current code, once for all tests of a process. This takes a minute or two."""
    if BITWISE:
        assert torch.backends.cpu.get_cpu_capability() == "AVX2", "LRNN_GOLDEN_BITWISE=1 needs ATEN_CPU_CAPABILITY=avx2"
    folder = tmp_path_factory.mktemp("golden")
    status = run_program(HERE / "record.py", folder / "output", folder / "found.json")
    assert status == 0, (folder / "output").read_text(errors="replace")[-8000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def differences(golden: Any, found: Any, name: str, tolerance: float) -> Iterator[str]:
    """Return a line for each value that has changed. Floats may differ by `tolerance`, relative or absolute."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in sorted(golden.keys() | found.keys()):
            if key not in found or key not in golden:
                yield f"{name} / {key}: {'missing' if key in golden else 'new'}"
            else:
                yield from differences(golden[key], found[key], f"{name} / {key}", tolerance)
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for i, values in enumerate(zip(golden, found, strict=True)):
            yield from differences(*values, f"{name}[{i}]", tolerance)
    elif isinstance(golden, float) and isinstance(found, float):
        if not math.isclose(golden, found, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{name}: {found!r}, it was {golden!r} ({found - golden:+.2g})"
    elif golden != found or type(golden) is not type(found):
        yield f"{name}: {found!r}, it was {golden!r}"


def check(golden: Any, found: Any, name: str, tolerance: float = 0.0 if BITWISE else TOLERANCE) -> None:
    lines = list(differences(golden, found, name, tolerance))
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        pytest.fail("\n".join([f"{len(lines)} values differ from golden.json:", *lines[:SHOWN], *more]), pytrace=False)


def test_entries_are_the_same(found):
    check({part: sorted(GOLDEN[part]) for part in GOLDEN}, {part: sorted(found[part]) for part in found}, "golden")


@pytest.mark.parametrize(("part", "name"), ENTRIES, ids=[f"{part}-{name}" for part, name in ENTRIES])
def test_entry_is_unchanged(found, part, name):
    if name in found[part]:  # a missing entry is named by the test above
        options = {"tolerance": TOLERANCE} if (part, name) in REORDERED else {}
        check(GOLDEN[part][name], found[part][name], f"{part} / {name}", **options)


def test_old_checkpoint_keeps_its_weight_decay():
    """A run that began when linear maps were told by shape keeps the groups that it began with."""
    from lrnn.pretrain.progress import Progress

    saved = HERE / "old_checkpoint/run/checkpoints/step-00000008"
    assert Progress.read(saved).decay_by_shape is True and Progress().decay_by_shape is False


def test_old_checkpoint_resumes_as_if_never_stopped(found):
    """The remaining steps equal the record, so neither the format nor the meaning of a checkpoint has changed."""
    whole, rest = GOLDEN["old checkpoint"]["never stopped"], found["old checkpoint"]["resumed"]
    assert found["old checkpoint"]["start"] == [8, True]
    for key in ("step", "loss", "grad_norm", "lr"):
        check(whole[key][8:], rest[key], f"resumed / {key}")
    check(whole["eigenvalues"], rest["eigenvalues"], "resumed / eigenvalues")
    assert [rest["tokens"], rest["samples"]] == [whole["tokens"], whole["samples"]]
