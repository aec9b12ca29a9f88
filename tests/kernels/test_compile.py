"""Each kernel as training uses it, compiled for a Hopper GPU (sm_90a), which need not be there: registers, spills and
shared memory against what is recorded in `compile_limits.json`.

A change of a kernel, or of Triton, that makes the compiler spill more, or takes the room of the second block of a
multiprocessor, costs speed that no other test on a CPU notices. Nor does one see where the compiled kernel uses
registers that the tensor cores may still read. Triton before 3.8 makes that of some loops, later ones of the same loops
do not, so a change of a kernel is compiled under each (PYTHONPATH=/where/that/triton/lies).

The limits are what each Triton gives with the ptxas that it brings along for sm_90a: 3.6.0 and 3.7.1 with 12.8.93,
3.8.0 with 12.9.86, 3.9.0 with 13.4.59. Another one spills otherwise, so TRITON_PTXAS_PATH is not looked at here.

    pytest tests/kernels/test_compile.py -s         prints what was found
    RECORD_COMPILE_LIMITS=1 pytest ...              writes it down as the new limits; to be read before it is committed
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from wgmma_hazards import find_hazards

KERNELS = Path(__file__).parents[2] / "kernels"
RECORD = Path(__file__).with_name("compile_limits.json")
SM_SHARED = 228 * 1024  # bytes of shared memory of a multiprocessor, of which each block takes 1 KB for the system
SM_REGISTERS = 65536


def cases():
    """Every case of every `compile_cases` in kernels/, by name."""
    found = {}
    for path in sorted(KERNELS.rglob("*.py")):
        if "def compile_cases" in path.read_text():
            for name, *case in importlib.import_module(
                ".".join(("lrnn.kernels", *path.relative_to(KERNELS).with_suffix("").parts))
            ).compile_cases():
                assert name not in found, f"two cases are named {name}"
                found[name] = case
    return found


CASES = cases()


@pytest.fixture(autouse=True)
def ptxas_of_this_triton(monkeypatch):
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)


def triton_minor() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def limits() -> dict[str, dict[str, int]]:
    """What is recorded for this Triton, else for the nearest older one, else for the oldest."""
    record = json.loads(RECORD.read_text())["triton"]

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    here = number(triton_minor())
    older = [v for v in record if number(v) <= here]
    return record[max(older, key=number) if older else min(record, key=number)]


def aligned_places(argument_type: str | tuple, place: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where an argument, or a tuple's elements, would tell the compiler that they are multiples of 16, as pointers and
    sizes are."""
    if isinstance(argument_type, tuple):
        return [p for i, element in enumerate(argument_type) for p in aligned_places(element, (*place, i))]
    return [place] if argument_type.startswith(("*", "i")) else []


def compiled(kernel, types, constants, warps, stages) -> tuple[dict[str, int], str]:
    """Registers a thread, bytes spilled by a thread (stores), bytes of shared memory, and warps, as ptxas reports; and
    the PTX."""
    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [
        place
        for i, (n, p) in enumerate(zip(names, kernel.params, strict=True))
        if n not in constants and not p.do_not_specialize
        for place in aligned_places(types[n], (i,))
    ]
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel has no log
        result = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
        )
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert registers and spills, f"ptxas did not say what it used:\n{log.getvalue()}"
    used = {
        "registers": int(registers[1]),
        "spilled": int(spills[1]),
        "shared": result.metadata.shared,
        "warps": result.metadata.num_warps,
    }
    return used, result.asm["ptx"]


def blocks(used: dict[str, int]) -> int:
    """Blocks of a kernel that a multiprocessor holds at a time, as far as shared memory and registers go."""
    per_warp = -(-used["registers"] * 32 // 256) * 256  # the unit in which registers are given out
    by_registers = SM_REGISTERS // (per_warp * used["warps"])
    return min(by_registers, SM_SHARED // (used["shared"] + 1024), 32)


def test_every_kernel_is_compiled():
    """A kernel that is launched somewhere and has no case here would escape this file."""
    launched = set()
    for path in KERNELS.rglob("*.py"):
        text = path.read_text()
        launched |= {*re.findall(r"\b(\w+_kernel)\[", text), *re.findall(r"launch\w*\(\s*(\w+_kernel)\b", text)}
    assert launched, "no kernel is launched anywhere in kernels/"
    tested = {case[0].__name__ for case in CASES.values()}
    exempt = set(json.loads(RECORD.read_text())["not_compiled"])
    assert launched - tested == exempt, f"without a case: {launched - tested}; listed as such: {exempt}"


def test_ptxas_is_named(capsys):
    text = subprocess.run([get_ptxas(90).path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert version, text
    with capsys.disabled():
        print(f"\nTriton {triton.__version__}, ptxas {version[1]}, {len(CASES)} kernels for sm_90a")


@pytest.mark.parametrize("name", CASES)
def test_compiles_within_its_limits(name):
    used, ptx = compiled(*CASES[name])
    print(f"{name}: {used}, {blocks(used)} blocks a multiprocessor")
    if os.environ.get("RECORD_COMPILE_LIMITS"):
        record = json.loads(RECORD.read_text())
        record["triton"].setdefault(triton_minor(), {})[name] = used | {"blocks": blocks(used)}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    limit = limits()
    assert name in limit, f"{name} has no limits in {RECORD.name}"
    assert used["spilled"] <= limit[name]["spilled"]
    assert blocks(used) >= limit[name]["blocks"], "fewer blocks fit on a multiprocessor than planned"
    assert used["shared"] <= SM_SHARED - 1024
    assert not find_hazards(ptx), "registers of products under way are used, which gives other results now and then"
