"""Compile kernels for GPUs that the machine need not have, and find their cases in kernels/."""

import contextlib
import importlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.cache import get_cache_manager

KERNELS = Path(__file__).parents[2] / "kernels"


def modules_with_cases() -> Iterator[tuple[str, Callable]]:
    """Yield each module in kernels/ that has `compile_cases`, by its dotted name there, with that function."""
    for path in sorted(KERNELS.rglob("*.py")):
        if "def compile_cases" in path.read_text():
            name = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
            yield name, importlib.import_module(f"lrnn.kernels.{name}").compile_cases


def compiled(kernel, types, constants, warps, stages, arch: int = 90) -> tuple[dict[str, int], str]:
    """Return the resources of a compiled kernel, and its PTX.

    Resources are registers per thread, bytes that a thread spills (stores), bytes of shared memory, columns of tensor
    memory, and warps.
    """
    source = source_of(kernel, types, constants)
    result, report = compile_and_report(source, {"num_warps": warps, "num_stages": stages}, arch)
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers and spills, f"ptxas did not report what the kernel uses:\n{report}"
    used = {
        "registers": int(registers[1]),
        "spilled": int(spills[1]),
        "shared": result.metadata.shared,
        "tensor_memory": result.metadata.tmem_size or 0,
        "warps": result.metadata.num_warps,
    }
    return used, result.asm["ptx"]


def allocated(kernel, types, constants, warps, stages, arch: int) -> tuple[int, int]:
    """Return the bytes of shared memory and the columns of tensor memory of a kernel.

    It is compiled up to their allocation, which takes a fraction of the time of LLVM and ptxas.
    """
    source, target = source_of(kernel, types, constants), GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": warps, "num_stages": stages})
    context = nvidia.ir.context()
    nvidia.ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    steps: dict[str, Callable] = {}
    backend.add_stages(steps, options, source.language)

    class Allocated(Exception):
        pass

    def stop(passes: Any, *_: Any) -> None:
        passes.run(module, "allocate")
        raise Allocated

    module = steps["ttgir"](steps["ttir"](module, {}), {})
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Allocated):
        patch.setattr(nvidia.nvidia.passes.ttgpuir, "add_to_llvmir", stop)  # the pass after the allocations
        steps["llir"](module, {})
    return module.get_int_attr("ttg.shared"), module.get_int_attr("ttg.tensor_memory_size") or 0


def source_of(kernel, types, constants) -> ASTSource:
    """Return a kernel with the types of its arguments and the values of its constants, as Triton compiles it."""
    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [
        place
        for i, (n, p) in enumerate(zip(names, kernel.params, strict=True))
        if n not in constants and not p.do_not_specialize
        for place in aligned_places(types[n], (i,))
    ]
    return (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )


def aligned_places(argument_type: str | tuple, place: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the positions of an argument, or of a tuple's elements, that are multiples of 16 for the compiler.

    These are pointers and sizes.
    """
    if isinstance(argument_type, tuple):
        return [p for i, element in enumerate(argument_type) for p in aligned_places(element, (*place, i))]
    return [place] if argument_type.startswith(("*", "i")) else []


def compile_and_report(source: ASTSource, options: dict[str, int], arch: int) -> tuple[CompiledKernel, str]:
    """Compile for a GPU (sm_90a for 90), or take the kernel from Triton's cache.

    Return the kernel with the report of ptxas, which is also kept in the cache.
    """

    def run() -> tuple[CompiledKernel, str]:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), log.getvalue()

    with knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        result, report = run()
        cache = get_cache_manager(result.hash)
        if "registers" not in report and (path := cache.get_file("ptxas_report")) is not None:
            return result, Path(path).read_text()
        if "registers" not in report:  # another program has compiled it
            knobs.compilation.always_compile = True
            result, report = run()
    cache.put(report, "ptxas_report", binary=False)
    return result, report
