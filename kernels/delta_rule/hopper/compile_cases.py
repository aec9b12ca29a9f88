"""The forms in which training compiles the kernels in Gluon."""

from collections.abc import Iterator
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule.compile_cases import VARIANTS, Case, Variant
from lrnn.kernels.delta_rule.hopper.chunk_backward import chunk_backward_hopper_kernel, hopper_chunk_settings
from lrnn.kernels.delta_rule.hopper.chunk_forward import chunk_forward_hopper_kernel, hopper_settings
from lrnn.kernels.delta_rule.hopper.chunk_inverse import HOPPER_INVERSE_LAUNCH, chunk_inverse_hopper_kernel
from lrnn.kernels.delta_rule.hopper.scan_backward import chunk_scan_backward_hopper_kernel, hopper_backward_settings


def compile_cases() -> Iterator[Case]:
    """Yield the kernels in every variant that they are made for.

    The scans have one half of the values per program, or two; with several factors two.
    """
    for variant in VARIANTS:
        if variant.size == 128 and not variant.packed and variant.dtype != torch.float32:
            for cases in (_matrices, _forward_scans, _backward_scans, _inside_chunks):
                yield from filter(variant.includes, cases(variant))


def _tile(element: str, *shape: int) -> str:
    layout = NVMMASharedLayout(128 if shape[0] >= 8 else 0, 32 if element == "fp32" else 16, rank=len(shape))
    return f"tensordesc<{element}{list(shape)},{layout!r}>"


def _token_tile(variant: Variant, columns: int) -> str:
    """Return the type of `token_tiles`."""
    rows = (CHUNK,) if variant.factors == 1 else (CHUNK // variant.factors, variant.factors)
    return _tile(variant.element, *rows, columns)


def _matrices(variant: Variant) -> Iterator[Case]:
    types = {"k": _tile(variant.element, CHUNK, 128), "c_out": _tile(variant.matrix, CHUNK, CHUNK)}
    types |= dict.fromkeys(("gate", "beta"), variant.numbers)
    yield variant.case(
        "chunk_inverse_hopper", chunk_inverse_hopper_kernel, {}, types, HOPPER_INVERSE_LAUNCH["num_warps"]
    )


def _scan_types(variant: Variant) -> dict[str, str]:
    types = {"c": _tile(variant.matrix, CHUNK, CHUNK), "vector_rows": _tile("fp32", 1, CHUNK)}
    types |= dict.fromkeys(("states", "dstates"), _tile(variant.element, 64, 128))
    types |= {"q": _token_tile(variant, 128), "k": _tile(variant.element, CHUNK, 128)}
    types |= dict.fromkeys(("o", "do"), _token_tile(variant, 64))
    return types | dict.fromkeys(("v", "y", "dv"), _tile(variant.element, CHUNK, 64))


def _forward_scans(variant: Variant) -> Iterator[Case]:
    types, nothing = _scan_types(variant), {"OUTPUT": False, "SAVE_STATES": False, "TRANSITION": False}
    nothing |= {"HAS_INITIAL": False, "SAVE_FINAL": False}
    no_output, nothing_saved = dict.fromkeys(("q", "o")), dict.fromkeys(("y", "states"))
    absent = dict.fromkeys(("initial_state", "final_state", "reach"))
    forms: dict[str, dict[str, Any]] = {
        "forward_hopper": {"OUTPUT": True} | nothing_saved | absent,
        "forward_states_hopper": {"OUTPUT": True, "SAVE_STATES": True} | absent,
        "states_hopper": {"SAVE_STATES": True} | no_output | absent,
        "transition_hopper": {"TRANSITION": True, "SAVE_FINAL": True, "initial_state": None}
        | no_output
        | nothing_saved,
    }
    for full in (False, True) if variant.factors == 1 else (True,):
        for name, form in forms.items():
            flags = nothing | form
            launch = hopper_settings(full, flags["OUTPUT"], flags["SAVE_STATES"], variant.split)
            constants = flags | launch._asdict()
            yield variant.case(f"{name}_{launch.HALVES}", chunk_forward_hopper_kernel, constants, types, 4)


def _backward_scans(variant: Variant) -> Iterator[Case]:
    types = _scan_types(variant)
    saving: dict[str, Any] = {"SAVE_STATES": True, "SAVE_INITIAL": False, "REACH": False}
    saving |= dict.fromkeys(("dfinal", "dinitial", "reach"))
    start: dict[str, Any] = {"SAVE_STATES": False, "SAVE_INITIAL": True, "REACH": True}
    start |= dict.fromkeys(("dfinal", "dv", "dstates"))
    for full in (False, True) if variant.factors == 1 else (True,):
        for name, flags in (("scan_backward_hopper", saving), ("start_gradient_hopper", start)):
            launch = hopper_backward_settings(full, flags["SAVE_STATES"])
            constants = {"HAS_FINAL": False} | flags | launch._asdict()
            yield variant.case(f"{name}_{launch.HALVES}", chunk_scan_backward_hopper_kernel, constants, types, 4)


def _inside_chunks(variant: Variant) -> Iterator[Case]:
    types = dict.fromkeys(("k", "dx", "y", "states", "dstates", "dk"), _tile(variant.element, CHUNK, 128))
    types |= dict.fromkeys(("q", "do", "dq"), _token_tile(variant, 128))
    types |= {"dv": f"*{variant.element}", "vector_rows": _tile("fp32", 1, CHUNK)}
    settings = hopper_chunk_settings()._asdict()
    yield variant.case("chunk_backward_hopper", chunk_backward_hopper_kernel, settings, types, 4)
