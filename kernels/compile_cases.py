"""The delta-rule kernels as they are compiled in training, to be compiled for a GPU that is not there.

A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
"""

from collections.abc import Iterator
from typing import Any

import torch

from lrnn.kernels.chunk_backward import chunk_backward_kernel
from lrnn.kernels.chunk_forward import chunk_forward_kernel
from lrnn.kernels.chunk_inverse import chunk_inverse_kernel
from lrnn.kernels.chunk_scan_backward import chunk_scan_backward_kernel
from lrnn.kernels.gate_backward import gate_backward_kernel
from lrnn.kernels.launch_config import chunk_launch, scan_launch
from lrnn.kernels.tiles import CHUNK

Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int]


def compile_cases(K: int = 128, V: int = 128, H: int = 16) -> Iterator[Case]:
    """Gated training in bf16 with raw gates and normalised keys, sequences of equal length."""
    base = {"HV": H, "BT": CHUNK, "IS_VARLEN": False}
    heads = {"H": H, "K": K, "NORMALIZE": True, "PRECISION": "tf32", **base}
    absent = {"cu_seqlens": None}

    def tile(rows: int, columns: int) -> str:
        return f"tensordesc<bf16[{rows}, {columns}]>"

    def types(kernel: Any, constants: dict[str, Any], known: dict[str, str]) -> dict[str, str]:
        scalars = {"T": "i32", "R": "i32", "stride_k": "i32", "scale": "fp32", "beta_range": "fp32"}
        return {n: {**scalars, **known}.get(n, "*fp32") for n in kernel.arg_names if n not in constants}

    constants = {**heads, **absent, "chunk_table": None, "BK": 64, "GATE": "raw", "RAW_BETA": True}
    known = {"k": "*bf16", "gate": "*bf16", "beta": "*bf16", "c_out": "*bf16"}
    kernel = chunk_inverse_kernel
    yield "chunk_inverse", kernel, types(kernel, constants, known), constants, 1, 1

    launch = scan_launch(K, V, torch.bfloat16)
    matrices = {
        "vector_rows": f"tensordesc<fp32[1, {CHUNK}]>",
        "q": tile(CHUNK, K),
        "k": tile(CHUNK, K),
        "c": tile(CHUNK, CHUNK),
    }
    scan = {**heads, **absent, "chunk_starts": None, "V": V, "BV": launch.BV, "STAGES": launch.stages}
    kernel = chunk_forward_kernel
    for name, flags in (
        ("chunk_forward", {"OUTPUT": True, "SAVE_STATES": False, "y": None, "states": None}),
        ("chunk_states", {"OUTPUT": False, "SAVE_STATES": True, "q": None, "o": None}),
    ):
        constants = {**scan, **flags, "HAS_INITIAL": False, "SAVE_FINAL": False, "TRANSITION": False}
        known = {**matrices, "v": tile(CHUNK, launch.BV), "o": "*bf16", "y": "*bf16", "states": tile(launch.BV, K)}
        yield name, kernel, types(kernel, constants, known), constants, launch.warps, launch.stages

    kernel = chunk_scan_backward_kernel
    constants = {**scan, "SAVE_STATES": True, "HAS_FINAL": False, "SAVE_INITIAL": False}
    known = {**matrices, "do": tile(CHUNK, launch.BV), "dw": "*bf16", "dstates": tile(launch.BV, K // 2)}
    yield "chunk_scan_backward", kernel, types(kernel, constants, known), constants, launch.warps, launch.stages

    launch = chunk_launch(K, V, torch.bfloat16)
    kernel = chunk_backward_kernel
    constants = {**heads, **absent, "chunk_table": None, "V": V, "BV": launch.BV, "STAGES": launch.stages}
    values, states = tile(CHUNK, launch.BV), tile(launch.BV, K)
    known = {**matrices, "do": values, "dw": values, "y": values, "states": states, "dstates": states}
    known |= {"dq": "*bf16", "dk": "*bf16", "dv": "*bf16"}
    yield "chunk_backward", kernel, types(kernel, constants, known), constants, launch.warps, launch.stages

    kernel = gate_backward_kernel
    constants = {**base, **absent, "chunk_table": None, "GATE": "raw", "RAW_BETA": True}
    known = {"gate": "*bf16", "dgate_out": "*bf16", "dbeta_out": "*bf16"}
    yield "gate_backward", kernel, types(kernel, constants, known), constants, 1, 1
