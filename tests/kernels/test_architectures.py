"""Compile the portable kernels for every architecture that the documentation names, none of which need be there.

`architectures.json` has what each kernel takes on each of them: bytes of shared memory, columns of tensor memory and,
where ptxas has compiled it, registers per thread and bytes that a thread spills. The table in docs/kernels.md follows
from it. The kernels closest to a limit are compiled here up to the allocation of memory. All of them are compiled, with
ptxas, by `make torture`:

    LRNN_TORTURE=1 pytest tests/kernels/test_architectures.py                             takes an hour of CPU time
    LRNN_TORTURE=1 RECORD_ARCHITECTURES=1 pytest tests/kernels/test_architectures.py      record the results too
"""

import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from compiled_kernels import allocated, compiled, modules_with_cases

from lrnn.kernels.common.architecture import A100, ADA, BLACKWELL, COMPILED, HOPPER, RTX_BLACKWELL, Architecture
from lrnn.kernels.common.constants import HEAD_SIZES
from lrnn.kernels.delta_rule.compile_cases import TYPES, Case, variants_for
from lrnn.kernels.delta_rule.portable import compile_cases as portable
from lrnn.kernels.delta_rule.settings import choose_settings

RECORD = Path(__file__).with_name("architectures.json")
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "kernels.md"
TORTURE = os.environ.get("LRNN_TORTURE") == "1"
TENSOR_MEMORY = 512  # columns of a multiprocessor
OTHERS = tuple(gpu for gpu in COMPILED if gpu != HOPPER)  # `test_compile` compiles for Hopper
SAME_IN_EVERY_SIZE = ("chunk_inverse", "gate_backward")  # but for the rounds of a loop, so compiled for heads of 128

# The kernels of the delta rule that come closest to an architecture's memory.
TIGHTEST = (
    (A100, "chunk_scan_backward_128_fp32"),
    (A100, "start_gradient_64_fp32"),
    (ADA, "chunk_scan_backward_128_fp32"),
    (ADA, "chunk_forward_128_fp32"),
    (BLACKWELL, "chunk_forward_128_fp32"),
    (RTX_BLACKWELL, "chunk_forward_states_128_bf16"),
    (RTX_BLACKWELL, "chunk_scan_backward_256_fp32"),
)


@functools.cache
def delta_rule_cases(gpu: Architecture) -> dict[str, Case]:
    """Return the cases of the delta rule in each dtype and head size that an architecture has."""
    found = portable.compile_cases(variants_for(gpu))
    return {case[0]: case for case in found if not case[0].startswith(SAME_IN_EVERY_SIZE) or "128" in case[0]}


@functools.cache
def other_cases(float8: bool) -> dict[str, Case]:
    """Return the cases of all other kernels, which either take float8 or do not."""
    found = {}
    for module, compile_cases in modules_with_cases():
        if not module.startswith("delta_rule."):
            found |= {case[0]: case for case in compile_cases() if float8 == ("fp8" in str(case[2]))}
    return found


def cases(gpu: Architecture) -> dict[str, Case]:
    float8 = other_cases(True) if gpu.capability >= (8, 9) else {}
    return delta_rule_cases(gpu) | other_cases(False) | float8


def arch(gpu: Architecture) -> int:
    return gpu.capability[0] * 10 + gpu.capability[1]


def recorded() -> dict[str, dict[str, list[int]]]:
    return json.loads(RECORD.read_text())


def record(gpu: Architecture, name: str, used: dict[str, int]) -> None:
    """Write the resources of a kernel, one line per kernel."""
    found = recorded()
    names = ("shared", "tensor_memory", "registers", "spilled")
    found.setdefault(gpu.name, {})[name] = [used[n] for n in names if n in used]
    text = []
    for of, kernels in sorted(found.items(), key=lambda item: int(item[0][3:])):
        lines = ",\n".join(f'  "{n}": {json.dumps(numbers)}' for n, numbers in sorted(kernels.items()))
        text.append(f' "{of}": {{\n{lines}\n }}')
    RECORD.write_text("{\n" + ",\n".join(text) + "\n}\n")


def state(gpu: Architecture, names: list[str]) -> str:
    """Return how far the record says that kernels have come on an architecture, in the words of the documentation."""
    found = [recorded().get(gpu.name, {}).get(name) for name in names]
    if any(numbers is None for numbers in found):
        return "neither"
    return "compiled" if all(len(numbers) == 4 for numbers in found) else "fits"


def expected_row(label: str) -> list[str]:
    """Return the cells of a row of the table. Hopper's is `run`, which is what tests/gpu does."""
    cells = []
    for gpu in COMPILED:
        if label in ("others", "float8"):
            names = list(other_cases(label == "float8"))
            refused = label == "float8" and gpu.capability < (8, 9)
        else:
            size, dtype = int(label.split()[0]), getattr(torch, label.split()[1])
            refused = not has_settings(size, dtype, gpu)
            suffix = f"_{size}_{TYPES[dtype]}"
            shared = f"_128_{TYPES[dtype]}"
            names = [n for n in delta_rule_cases(gpu) if n.endswith(suffix)]
            names += [n for n in delta_rule_cases(gpu) if n.startswith(SAME_IN_EVERY_SIZE) and n.endswith(shared)]
        cells.append("refused" if refused else "run" if gpu == HOPPER else state(gpu, names))
    return cells


def has_settings(size: int, dtype: torch.dtype, gpu: Architecture) -> bool:
    try:
        choose_settings(size, dtype, gpu)
    except ValueError:
        return False
    return True


LABELS = [f"{size} {dtype}" for dtype in ("bfloat16", "float16", "float32") for size in HEAD_SIZES]


@pytest.mark.parametrize("label", [*LABELS, "others", "float8"])
def test_the_documentation_claims_what_was_compiled(label):
    rows = re.findall(r"^\| (\d+ \w+|others|float8) \|(.*)\|$", DOCUMENTATION.read_text(), re.MULTILINE)
    found = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert found[label] == expected_row(label)


def test_what_was_compiled_fits():
    for gpu in OTHERS:
        for name, (shared, tensor_memory, *_) in recorded()[gpu.name].items():
            assert shared <= gpu.shared and tensor_memory <= TENSOR_MEMORY, (gpu.name, name)
            assert name in cases(gpu), f"{gpu.name} has no kernel {name} any more"


@pytest.mark.parametrize(("gpu", "name"), TIGHTEST, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_tightest_fit(gpu, name):
    shared, tensor_memory = allocated(*cases(gpu)[name][1:], arch(gpu))
    assert shared <= gpu.shared and tensor_memory <= TENSOR_MEMORY


@pytest.mark.skipif(not TORTURE, reason="takes an hour of CPU time: LRNN_TORTURE=1")
@pytest.mark.parametrize(
    ("gpu", "name"),
    [(gpu, name) for gpu in OTHERS for name in (cases(gpu) if TORTURE else ())],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_every_kernel_is_compiled(gpu, name):
    used, _ = compiled(*cases(gpu)[name][1:], arch(gpu))
    if os.environ.get("RECORD_ARCHITECTURES"):
        record(gpu, name, used)
    assert used["shared"] <= gpu.shared and used["tensor_memory"] <= TENSOR_MEMORY
