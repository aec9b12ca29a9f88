"""The delta-rule kernels as they are compiled in training, to be compiled for a GPU that is not there.

A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
"""

from collections.abc import Iterator
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import dot_precision, matrix_dtype
from lrnn.kernels.delta_rule.call import can_save_states
from lrnn.kernels.delta_rule.hopper.chunk_backward import chunk_backward_hopper_kernel, hopper_chunk_settings
from lrnn.kernels.delta_rule.hopper.chunk_forward import HopperLaunch, chunk_forward_hopper_kernel, hopper_settings
from lrnn.kernels.delta_rule.hopper.chunk_inverse import HOPPER_INVERSE_LAUNCH, chunk_inverse_hopper_kernel
from lrnn.kernels.delta_rule.hopper.scan_backward import chunk_scan_backward_hopper_kernel, hopper_backward_settings
from lrnn.kernels.delta_rule.portable.chunk_backward import chunk_backward_kernel, chunk_launch
from lrnn.kernels.delta_rule.portable.chunk_forward import chunk_forward_kernel, scan_launch
from lrnn.kernels.delta_rule.portable.chunk_inverse import INVERSE_LAUNCH, chunk_inverse_kernel
from lrnn.kernels.delta_rule.portable.gate_backward import GATE_BACKWARD, gate_backward_kernel
from lrnn.kernels.delta_rule.portable.recurrent import recurrent_kernel, recurrent_launch
from lrnn.kernels.delta_rule.portable.scan_backward import chunk_scan_backward_kernel, scan_backward_launch
from lrnn.kernels.delta_rule.portable.segment_reach import SEGMENT_REACH, segment_reach_kernel
from lrnn.kernels.delta_rule.portable.segment_scan import segment_scan_kernel, segment_scan_launch

Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int]
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_cases() -> Iterator[Case]:
    """Gated training in bf16 with raw gates and normalised keys; the same on packed documents, and what differs most:
    no gate, step sizes and keys as given. The scans also where they split what enters their state; they and the
    backward pass inside chunks in float32, at the smallest heads. Generation in bf16."""
    yield from delta_rule_cases("")
    yield from delta_rule_cases("_packed", packed=True)
    yield from delta_rule_cases("_plain", gate="none", normalize=False)
    yield from (case for case in delta_rule_cases("_split", split=True) if "SPLIT" in case[1].arg_names)
    in_float32 = delta_rule_cases("_fp32", size=64, dtype=torch.float32)
    yield from (case for case in in_float32 if "STAGES" in case[1].arg_names)
    yield recurrent_case()


def delta_rule_cases(
    suffix: str,
    size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    gate: str = "raw",
    normalize: bool = True,
    packed: bool = False,
    split: bool = False,
) -> Iterator[Case]:
    K, V, H = size, size, 16
    element = TYPES[dtype]
    base = {"HV": H, "BT": CHUNK, "IS_VARLEN": packed}
    heads = {"H": H, "K": K, "NORMALIZE": normalize, "IS_FULL": not packed, "PRECISION": dot_precision(dtype), **base}
    heads["SPLIT"] = split
    absent = {} if packed else {"cu_seqlens": None}
    no_table, no_starts = ({}, {}) if packed else ({"chunk_table": None}, {"chunk_starts": None})
    documents = {"cu_seqlens": "*i32", "chunk_table": "*i32", "chunk_starts": "*i32"}
    gates = {"GATE": gate, "RAW_BETA": gate == "raw"}
    if gate == "none":
        gates |= {"gate": None, "A_log": None, "dt_bias": None}

    def tile(rows: int, columns: int, of: str = element) -> str:
        return f"tensordesc<{of}[{rows}, {columns}]>"

    def case(name: str, kernel: Any, constants: dict[str, Any], known: dict[str, str], warps: int, stages: int) -> Case:
        scalars = dict.fromkeys(("T", "R", "stride_k", "segments", "chunks"), "i32")
        scalars |= dict.fromkeys(("scale", "beta_range", "least"), "fp32")
        constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
        types = {n: {**scalars, **documents, **known}.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
        return name + suffix, kernel, types, constants, warps, stages

    numbers = f"*{element}" if gate == "raw" else "*fp32"
    matrix = TYPES[matrix_dtype(dtype, normalize)]
    constants = {**heads, **absent, **no_table, **gates, "BK": 64}
    known = {"k": f"*{element}", "gate": numbers, "beta": numbers, "c_out": f"*{matrix}"}
    yield case("chunk_inverse", chunk_inverse_kernel, constants, known, *INVERSE_LAUNCH.values())

    launch = scan_launch(K, dtype)
    values = tile(CHUNK, launch.BV)
    result = f"*{element}" if packed or dtype == torch.float32 else values
    matrices = {
        "vector_rows": tile(1, CHUNK, "fp32"),
        "q": tile(CHUNK, K),
        "k": tile(CHUNK, K),
        "c": tile(CHUNK, CHUNK, matrix),
    }
    scan = {**heads, **absent, **no_starts, "V": V, "BV": launch.BV, "STAGES": launch.stages}
    for name, flags in (
        ("chunk_forward", {"OUTPUT": True, "SAVE_STATES": False, "y": None, "states": None}),
        ("chunk_states", {"OUTPUT": False, "SAVE_STATES": True, "q": None, "o": None}),
        ("chunk_forward_states", {"OUTPUT": True, "SAVE_STATES": True}),
    ):
        if name == "chunk_forward_states" and not can_save_states(K, dtype):
            continue
        constants = {**scan, **flags, "HAS_INITIAL": False, "SAVE_FINAL": False, "TRANSITION": False, "reach": None}
        known = {**matrices, "v": values, "o": result, "y": result, "states": tile(launch.BV, K)}
        yield case(name, chunk_forward_kernel, constants, known, launch.warps, launch.stages)
    if not packed:
        constants = {**scan, **dict.fromkeys(("q", "o", "y", "states", "initial_state")), "TRANSITION": True}
        constants |= {"OUTPUT": False, "SAVE_STATES": False, "HAS_INITIAL": False, "SAVE_FINAL": True}
        known = {**matrices, "v": values, "reach": "*i32"}
        yield case("transition", chunk_forward_kernel, constants, known, launch.warps, launch.stages)

    if (K, V) == (128, 128) and not packed and dtype != torch.float32:
        yield from hopper_cases(suffix, {**heads, **gates}, element, matrix, numbers)

    launch = scan_backward_launch(K, dtype)
    constants = {**scan, "STAGES": launch.stages, "SAVE_STATES": True, "HAS_FINAL": False, "SAVE_INITIAL": False}
    constants |= {"REACH": False, "reach": None}
    known = {**matrices, "do": values, "dv": result, "dstates": tile(launch.BV, K // 2)}
    yield case("chunk_scan_backward", chunk_scan_backward_kernel, constants, known, launch.warps, launch.stages)
    if not packed:
        constants |= {"SAVE_STATES": False, "SAVE_INITIAL": True, "REACH": True, "dfinal": None}
        constants |= {"dv": None, "dstates": None}
        del constants["reach"]
        known = {**matrices, "do": values, "reach": "*i32"}
        yield case("start_gradient", chunk_scan_backward_kernel, constants, known, launch.warps, launch.stages)

    launch = chunk_launch(K, dtype)
    constants = {**heads, **absent, **no_table, "V": V, "BV": launch.BV, "STAGES": launch.stages}
    values, states = tile(CHUNK, launch.BV), tile(launch.BV, K)
    known = {**matrices, "do": values, "dx": values, "y": values, "states": states, "dstates": states}
    known |= dict.fromkeys(("dq", "dk", "dv"), f"*{element}")
    yield case("chunk_backward", chunk_backward_kernel, constants, known, launch.warps, launch.stages)

    constants = {**base, **absent, **no_table, **gates, "BH": GATE_BACKWARD["BH"]}
    if gate != "raw":
        constants["sums"] = None
    known = {"gate": numbers, "dgate_out": numbers, "dbeta_out": numbers, "chunks": "i32"}
    yield case("gate_backward", gate_backward_kernel, constants, known, GATE_BACKWARD["num_warps"], 1)

    if not packed:
        settings = segment_scan_launch(K)
        tiles = {"BK": settings["BK"], "BV": settings["BV"]}
        constants = {"HV": H, "K": K, "V": V, "E_STRIDE": V, "M_STRIDE": V + K, "BACKWARD": True, **tiles}
        constants |= {"HAS_START": True, "SAVE_LAST": True}
        yield case("segment_scan", segment_scan_kernel, constants, {}, settings["num_warps"], 3)
        constants = {"HV": H, "BT": CHUNK, "BN": SEGMENT_REACH["BN"], "HAS_START": False, "SAVE_LAST": False}
        yield case("segment_reach", segment_reach_kernel, constants, {"reach": "*i32"}, SEGMENT_REACH["num_warps"], 3)


def recurrent_case() -> Case:
    K, V, H = 128, 128, 16
    launch = recurrent_launch(K)
    constants: dict[str, Any] = {"H": H, "HV": H, "K": K, "V": V, "BV": launch["BV"], "cu_seqlens": None}
    constants |= {"NORMALIZE": True, "GATE": "raw", "RAW_BETA": True, "HAS_INITIAL": True, "IS_VARLEN": False}
    types = {"T": "i32", "scale": "fp32", "beta_range": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "gate", "beta", "o"), "*bf16")
    types = {n: types.get(n, "*fp32") for n in recurrent_kernel.arg_names if n not in constants}
    return "recurrent", recurrent_kernel, types, constants, launch["num_warps"], 3


def hopper_cases(suffix: str, heads: dict[str, Any], element: str, matrix: str, numbers: str) -> Iterator[Case]:
    """The matrices in Gluon, the scans, with one and with two halves of the values a program, and the backward pass
    inside chunks."""

    def tile(rows: int, columns: int, of: str = element) -> str:
        bits = 32 if of == "fp32" else 16
        layout = NVMMASharedLayout(128 if rows >= 8 else 0, bits, rank=2)
        return f"tensordesc<{of}[{rows}, {columns}],{layout!r}>"

    def case(name: str, kernel: Any, constants: dict[str, Any], launch: HopperLaunch) -> Case:
        constants = {**heads, "V": 128, **launch._asdict(), **constants}
        constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
        types = {"T": "i32", "R": "i32", "scale": "fp32", "reach": "*i32", "vector_rows": tile(1, CHUNK, "fp32")}
        types |= {"c": tile(CHUNK, CHUNK, matrix), "states": tile(64, 128), "dstates": tile(64, 128)}
        types |= dict.fromkeys(("q", "k"), tile(CHUNK, 128))
        types |= dict.fromkeys(("v", "o", "y", "do", "dv"), tile(CHUNK, 64))
        types = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
        return f"{name}_{launch.HALVES}{suffix}", kernel, types, constants, 4, 3

    kernel = chunk_inverse_hopper_kernel
    known = {n: value for n, value in heads.items() if n in kernel.arg_names}
    types = {"k": tile(CHUNK, 128), "c_out": tile(CHUNK, CHUNK, matrix), "gate": numbers, "beta": numbers}
    types |= {"R": "i32", "beta_range": "fp32"}
    types = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in known}
    yield f"chunk_inverse_hopper{suffix}", kernel, types, known, HOPPER_INVERSE_LAUNCH["num_warps"], 3

    output = {"OUTPUT": True, "SAVE_STATES": False, "TRANSITION": False, "HAS_INITIAL": False, "SAVE_FINAL": False}
    states = {**output, "OUTPUT": False, "SAVE_STATES": True, "q": None, "o": None}
    both = {**output, "SAVE_STATES": True}
    transition = {**output, "OUTPUT": False, "TRANSITION": True, "SAVE_FINAL": True, "q": None, "o": None}
    nothing_kept = {"y": None, "states": None}
    absent = {"initial_state": None, "final_state": None, "reach": None}
    for full in (False, True):
        launch = hopper_settings(full, output=True, save_states=False, split=heads["SPLIT"])
        yield case("forward_hopper", chunk_forward_hopper_kernel, output | nothing_kept | absent, launch)
        launch = hopper_settings(full, output=True, save_states=True, split=heads["SPLIT"])
        yield case("forward_states_hopper", chunk_forward_hopper_kernel, both | absent, launch)
        launch = hopper_settings(full, output=False, save_states=True, split=heads["SPLIT"])
        yield case("states_hopper", chunk_forward_hopper_kernel, states | absent, launch)
        constants = transition | nothing_kept | {"initial_state": None}
        yield case("transition_hopper", chunk_forward_hopper_kernel, constants, launch)
        constants = {"SAVE_STATES": True, "HAS_FINAL": False, "SAVE_INITIAL": False, "REACH": False}
        constants |= {"dfinal": None, "dinitial": None, "reach": None}
        launch = hopper_backward_settings(full, save_states=True)
        yield case("scan_backward_hopper", chunk_scan_backward_hopper_kernel, constants, launch)
        constants = {"SAVE_STATES": False, "HAS_FINAL": False, "SAVE_INITIAL": True, "REACH": True}
        constants |= {"dfinal": None, "dv": None, "dstates": None}
        launch = hopper_backward_settings(full, save_states=False)
        yield case("start_gradient_hopper", chunk_scan_backward_hopper_kernel, constants, launch)

    kernel, tiles = chunk_backward_hopper_kernel, ("q", "k", "do", "dx", "y", "states", "dstates", "dq", "dk")
    known = {**heads, "V": 128, **hopper_chunk_settings()._asdict()}
    known = {n: value for n, value in known.items() if n in kernel.arg_names}
    types = {"chunks": "i32", "R": "i32", "scale": "fp32", "vector_rows": tile(1, CHUNK, "fp32")}
    types |= {"dv": f"*{element}", **dict.fromkeys(tiles, tile(CHUNK, 128))}
    types = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in known}
    yield f"chunk_backward_hopper{suffix}", kernel, types, known, 4, 3
