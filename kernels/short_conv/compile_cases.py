"""The kernels of the short convolution as training compiles them, for a GPU that need not be there."""

from collections.abc import Iterator
from typing import Any

from lrnn.kernels.short_conv.kernels import short_conv_backward_kernel, short_conv_forward_kernel
from lrnn.kernels.short_conv.launch import BACKWARD, BACKWARD_PACKED, FORWARD, LONG_BLOCK, WARPS, block_channels


def compile_cases(D: int = 2048) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int, int]]:
    """Yield cases (name, kernel, types of its arguments, values of its constants, warps, stages).

    The type of a tuple is the tuple of its types.
    """
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for packed in (False, True):
            constants: dict[str, Any] = {
                "before": None,
                "D": (D,) * 3,
                "S": (D,) * 3,
                "SB": (),
                "W": 4,
                "BT": LONG_BLOCK,
            }
            constants |= {"HAS_BEFORE": False, "IS_VARLEN": packed}
            constants |= {} if packed else {"cu_seqlens": None, "N": None}
            types: dict[str, Any] = {name: (f"*{dtype}",) * 3 for name in ("x", "y", "dy", "dx")}
            types |= {"w": ("*fp32",) * 3}
            types |= {"dw_parts": "*fp32", "cu_seqlens": "*i32", "T": "i32", "NT": "i32", "N": "i32"}
            backward = BACKWARD_PACKED if packed else BACKWARD
            for name, kernel, tile in (
                ("forward", short_conv_forward_kernel, FORWARD),
                ("backward", short_conv_backward_kernel, backward),
            ):
                own = constants | {"BR": tile.rows, "BD": block_channels(tile, size)}
                own |= {"SO": (D,) * 3} if name == "backward" else {}
                signature = {n: types[n] for n in kernel.arg_names if n not in own}
                suffix = f"{dtype}_packed" if packed else dtype
                yield f"short_conv_{name}_{suffix}", kernel, signature, own, WARPS, 1
