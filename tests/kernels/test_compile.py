"""Compile every kernel, as training uses it, for a Hopper GPU (sm_90a), which the machine need not have.

Spills and the blocks that fit on a multiprocessor are compared with `compile_limits.json`. A change of a kernel or of
Triton that makes the compiler spill more, or leaves no room for a multiprocessor's second block, costs speed that no
other test on a CPU notices. The PTX is searched for registers that are used while the tensor cores may still read them,
which no other test on a CPU notices either. Triton before 3.8 does that in some loops in which later versions do not.
So compile a changed kernel under each version (PYTHONPATH=/folder/of/that/triton).

The limits are the results of each Triton with the ptxas that it ships for sm_90a: 3.6.0 and 3.7.1 with 12.8.93, 3.8.0
with 12.9.86, 3.9.0 with 13.4.59. Another ptxas spills differently, so these tests ignore TRITON_PTXAS_PATH.

    pytest tests/kernels/test_compile.py -s                               print registers, spills and shared memory
    LRNN_TORTURE=1 pytest tests/kernels/test_compile.py                   compile every case (`make torture`)
    RECORD_COMPILE_LIMITS=1 pytest tests/kernels/test_compile.py          record this Triton's limits; read the diff

By default, cases are left out that only combine again what others contain; see `chosen`.

A kernel in Triton's cache is not compiled again.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from compiled_kernels import KERNELS, compiled, modules_with_cases
from triton.backends.nvidia.compiler import get_ptxas
from wgmma_hazards import find_hazards

RECORD = Path(__file__).with_name("compile_limits.json")
SM_SHARED = 228 * 1024  # bytes of shared memory of a multiprocessor, of which each block takes 1 KB for the system
SM_REGISTERS = 65536


def cases():
    """Return every case of every `compile_cases` in kernels/, by name."""
    found = {}
    for _, compile_cases in modules_with_cases():
        for name, *case in compile_cases():
            assert name not in found, f"two cases are named {name}"
            found[name] = case
    return found


CASES = cases()
RECORDING = bool(os.environ.get("RECORD_COMPILE_LIMITS"))
# The kernels that take most of a training step of a gated DeltaNet on a Hopper GPU, and branches that depend on two
# constants at a time.
ALWAYS = (
    *("chunk_inverse_hopper", "forward_states_hopper_2", "scan_backward_hopper_2", "chunk_backward_hopper"),
    *("forward_hopper_2", "forward_states_hopper_1_plain", "scan_backward_hopper_1_plain"),
)


def chosen():
    """Return the names of the cases to compile.

    By default, each kernel takes every value of each constant and every type of each argument that it takes in any
    case. Of two cases that add as many, the one with fewer absent arguments is compiled.
    """
    if RECORDING or os.environ.get("LRNN_TORTURE") == "1":
        return list(CASES)

    def parts(name):
        kernel, types, constants, *launch = CASES[name]
        taken = types | constants | dict(zip(("warps", "stages"), launch, strict=True))
        return {(kernel.__name__, of, str(value)) for of, value in taken.items()}

    def size(name):
        _, types, constants, *_ = CASES[name]
        return sum(value not in (None, False) for value in (types | constants).values())

    names, seen = list(ALWAYS), set().union(*map(parts, ALWAYS))
    while rest := [name for name in CASES if parts(name) - seen]:
        names.append(max(rest, key=lambda name: (len(parts(name) - seen), size(name))))
        seen |= parts(names[-1])
    return sorted(names)


@pytest.fixture(autouse=True)
def ptxas_of_this_triton(monkeypatch):
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)


def triton_minor() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def limits(name: str) -> tuple[int, int]:
    """Return the bytes that a kernel may spill and the blocks that must fit on a multiprocessor.

    They are those of this Triton, of the nearest older version that is recorded, or of the oldest.
    """
    limit = json.loads(RECORD.read_text())["limits"]
    assert name in limit, f"{name} has no limits in {RECORD.name}"

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    here = number(triton_minor())
    older = [v for v in limit[name] if number(v) <= here]
    spilled, blocks = limit[name][max(older, key=number) if older else min(limit[name], key=number)]
    return spilled, blocks


def record(name: str, spilled: int, blocks: int) -> None:
    """Write the limits of a kernel under this Triton, one line per kernel."""
    found = json.loads(RECORD.read_text())
    found["limits"].setdefault(name, {})[triton_minor()] = [spilled, blocks]
    lines = [f'  "{n}": {json.dumps(dict(sorted(of.items())))}' for n, of in sorted(found["limits"].items())]
    RECORD.write_text(
        f'{{\n "not_compiled": {json.dumps(found["not_compiled"])},\n "limits": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    )


def blocks(used: dict[str, int]) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at a time by shared memory and registers."""
    per_warp = -(-used["registers"] * 32 // 256) * 256  # registers are allocated in units of 256
    by_registers = SM_REGISTERS // (per_warp * used["warps"])
    return min(by_registers, SM_SHARED // (used["shared"] + 1024), 32)


def test_every_kernel_is_compiled():
    """Every kernel that is launched somewhere has a case here."""
    launched = set()
    for path in KERNELS.rglob("*.py"):
        text = path.read_text()
        launched |= {*re.findall(r"\b(\w+_kernel)\[", text), *re.findall(r"launch\w*\(\s*(\w+_kernel)\b", text)}
    assert launched, "no kernel is launched anywhere in kernels/"
    tested = {case[0].__name__ for case in CASES.values()}
    exempt = set(json.loads(RECORD.read_text())["not_compiled"])
    assert launched - tested == exempt, f"without a case: {launched - tested}; listed as such: {exempt}"
    recorded = set(json.loads(RECORD.read_text())["limits"])
    assert recorded <= set(CASES), f"limits without a case: {recorded - set(CASES)}"


def test_ptxas_is_named(capsys):
    text = subprocess.run([get_ptxas(90).path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert version, text
    with capsys.disabled():
        print(f"\nTriton {triton.__version__}, ptxas {version[1]}, {len(CASES)} kernels for sm_90a")


@pytest.mark.parametrize("name", chosen())
def test_compiles_within_its_limits(name):
    used, ptx = compiled(*CASES[name])
    print(f"{name}: {used}, {blocks(used)} blocks per multiprocessor")
    if RECORDING:
        record(name, used["spilled"], blocks(used))
    most_spilled, least_blocks = limits(name)
    assert used["spilled"] <= most_spilled
    assert blocks(used) >= least_blocks, "fewer blocks fit on a multiprocessor than planned"
    assert used["shared"] <= SM_SHARED - 1024
    assert not find_hazards(ptx), "registers of products under way are used, which gives other results now and then"
