"""The forms in which training compiles the kernels in plain Triton."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule.call import can_save_states
from lrnn.kernels.delta_rule.compile_cases import VARIANTS, Case, Variant
from lrnn.kernels.delta_rule.cut import query_rows
from lrnn.kernels.delta_rule.portable.chunk_backward import chunk_backward_kernel
from lrnn.kernels.delta_rule.portable.chunk_forward import chunk_forward_kernel
from lrnn.kernels.delta_rule.portable.chunk_inverse import INVERSE_LAUNCH, chunk_inverse_kernel
from lrnn.kernels.delta_rule.portable.gate_backward import GATE_BACKWARD, gate_backward_kernel
from lrnn.kernels.delta_rule.portable.recurrent import recurrent_kernel, recurrent_launch
from lrnn.kernels.delta_rule.portable.scan_backward import chunk_scan_backward_kernel
from lrnn.kernels.delta_rule.portable.segment_reach import SEGMENT_REACH, segment_reach_kernel
from lrnn.kernels.delta_rule.portable.segment_scan import segment_scan_kernel, segment_scan_launch

GENERATION = Variant("")


def compile_cases(variants: Iterable[Variant] = VARIANTS) -> Iterator[Case]:
    """Yield the kernels of training in every variant, and that of generation in bf16."""
    for variant in variants:
        for cases in (_matrices, _forward_scans, _backward_scans, _inside_chunks, _gates, _segments):
            yield from filter(variant.includes, cases(variant))
    yield _recurrent(GENERATION)


def _tile(element: str, rows: int, columns: int) -> str:
    return f"tensordesc<{element}[{rows}, {columns}]>"


def _matrices(variant: Variant) -> Iterator[Case]:
    types = {"k": f"*{variant.element}", "c_out": f"*{variant.matrix}"} | dict.fromkeys(
        ("gate", "beta"), variant.numbers
    )
    yield variant.case("chunk_inverse", chunk_inverse_kernel, {"BK": 64}, types, *INVERSE_LAUNCH.values())


def _scan_types(variant: Variant, columns: int) -> dict[str, str]:
    """Return the types of the arguments of both scans."""
    element, K = variant.element, variant.size
    values = _tile(element, CHUNK, columns)
    by_pointer = variant.packed or variant.dtype == torch.float32
    result = f"*{element}" if by_pointer else values
    queries = query_rows(variant.factors)
    types = {"q": _tile(element, queries, K), "k": _tile(element, CHUNK, K), "c": _tile(variant.matrix, CHUNK, CHUNK)}
    types |= {"vector_rows": _tile("fp32", 1, CHUNK), "states": _tile(element, columns, K), "v": values}
    types |= {"do": _tile(element, queries, columns), "o": result if by_pointer else _tile(element, queries, columns)}
    return types | dict.fromkeys(("y", "dv"), result)


def _forward_scans(variant: Variant) -> Iterator[Case]:
    launch = variant.settings.forward_scan
    types = _scan_types(variant, launch.BV)
    settings = {"BV": launch.BV, "STAGES": launch.stages}
    flags: dict[str, Any] = {"HAS_INITIAL": False, "SAVE_FINAL": False, "TRANSITION": False, "reach": None}
    forms: dict[str, dict[str, Any]] = {
        "chunk_forward": {"OUTPUT": True, "SAVE_STATES": False, "y": None, "states": None},
        "chunk_states": {"OUTPUT": False, "SAVE_STATES": True, "q": None, "o": None},
    }
    if can_save_states(variant.size, variant.dtype):
        forms["chunk_forward_states"] = {"OUTPUT": True, "SAVE_STATES": True}
    for name, form in forms.items():
        constants = settings | flags | form
        yield variant.case(name, chunk_forward_kernel, constants, types, launch.warps, launch.stages)
    if variant.settings.cuts_sequences and not variant.packed:
        flags = {"OUTPUT": False, "SAVE_STATES": False, "HAS_INITIAL": False, "SAVE_FINAL": True, "TRANSITION": True}
        constants = settings | flags | dict.fromkeys(("q", "o", "y", "states", "initial_state"))
        yield variant.case("transition", chunk_forward_kernel, constants, types, launch.warps, launch.stages)


def _backward_scans(variant: Variant) -> Iterator[Case]:
    launch = variant.settings.backward_scan
    types = _scan_types(variant, launch.BV) | {"dstates": _tile(variant.element, launch.BV, variant.size // 2)}
    settings = {"BV": launch.BV, "STAGES": launch.stages, "HAS_FINAL": False}
    flags: dict[str, Any] = {"SAVE_STATES": True, "SAVE_INITIAL": False, "REACH": False, "reach": None}
    yield variant.case(
        "chunk_scan_backward", chunk_scan_backward_kernel, settings | flags, types, launch.warps, launch.stages
    )
    if variant.settings.cuts_sequences and not variant.packed:
        flags = {"SAVE_STATES": False, "SAVE_INITIAL": True, "REACH": True}
        flags |= dict.fromkeys(("dfinal", "dv", "dstates"))
        yield variant.case(
            "start_gradient", chunk_scan_backward_kernel, settings | flags, types, launch.warps, launch.stages
        )


def _inside_chunks(variant: Variant) -> Iterator[Case]:
    launch = variant.settings.inside_chunks
    types = _scan_types(variant, launch.BV) | dict.fromkeys(("dq", "dk", "dv"), f"*{variant.element}")
    types |= dict.fromkeys(("dx", "y"), _tile(variant.element, CHUNK, launch.BV))
    types |= dict.fromkeys(("states", "dstates"), _tile(variant.element, launch.BV, variant.size))
    constants = {"BV": launch.BV, "STAGES": launch.stages}
    yield variant.case("chunk_backward", chunk_backward_kernel, constants, types, launch.warps, launch.stages)


def _gates(variant: Variant) -> Iterator[Case]:
    constants: dict[str, Any] = {"BH": GATE_BACKWARD["BH"]}
    if variant.gate != "raw":
        constants["sums"] = None
    types = dict.fromkeys(("gate", "dgate_out", "dbeta_out"), variant.numbers)
    yield variant.case("gate_backward", gate_backward_kernel, constants, types, GATE_BACKWARD["num_warps"], 1)


def _segments(variant: Variant) -> Iterator[Case]:
    if variant.packed or not variant.settings.cuts_sequences:
        return
    settings = segment_scan_launch(variant.size)
    constants = {"BK": settings["BK"], "BV": settings["BV"], "E_STRIDE": variant.size, "M_STRIDE": 2 * variant.size}
    constants |= {"BACKWARD": True, "HAS_START": True, "SAVE_LAST": True}
    yield variant.case("segment_scan", segment_scan_kernel, constants, {}, settings["num_warps"])
    constants = {"BN": SEGMENT_REACH["BN"], "HAS_START": False, "SAVE_LAST": False}
    yield variant.case("segment_reach", segment_reach_kernel, constants, {}, SEGMENT_REACH["num_warps"])


def _recurrent(variant: Variant) -> Case:
    launch = recurrent_launch(variant.size)
    types = dict.fromkeys(("q", "k", "v", "gate", "beta", "o"), f"*{variant.element}")
    constants = {"BV": launch["BV"], "HAS_INITIAL": True}
    return variant.case("recurrent", recurrent_kernel, constants, types, launch["num_warps"])
