"""Sort the time that a GPU works into kinds of computation, by the names of its kernels."""

import heapq
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

COLLECTIVES, OTHER = "collectives", "other"
# A kernel is of the first kind whose pattern is found in its name, in upper or lower case.
PATTERNS = {
    COLLECTIVES: r"nccl",
    "AdamW": r"adam",
    "norm of the gradient": r"lpnorm|normtwo",
    "gated norm": r"gated_rms_norm|layer_norm_gated",
    "RMS norm": r"rms_?norm|layer_?norm|gammabeta",
    "short convolution": r"short_conv|conv1d|conv_depthwise|^next_inputs",
    "SwiGLU": r"swiglu|silu",
    "attention": r"flash|fmha|sdpa|attention|^rotate_",
    # The core of every other mixer: its gates, normalised keys and scans.
    "recurrence": r"(chunk|packed)_(forward|backward|inverse|scan|table)|segment_(scan|reach)|gate_backward|recurrent"
    r"|next_state|delta_(rule|product)|gdn_gate|_kkt_|solve_tril|_inverse_kernel|w_u_fwd|wy_repr|l2norm|beta_sigmoid"
    r"|chunk_(fwd|bwd)_kernel|cumsum|chunk_transform_qk|selective_scan|gla_|dplr|rwkv|mamba|ssd_|fused_chunk",
    "loss": r"cross_entropy|nll_loss|softmax|logsumexp|^elementwise_mul",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|splitk|xmma",
    "embedding": r"embedding|gather_kernel|index_?select|grad_weight|sum_and_scatter|krn_partial|radixsort",
    "casts and copies": r"memcpy|memset|copy|fill|^cast_|catarray",
    "elementwise and sums": r"elementwise|reduce_kernel|multi_tensor_apply|devicescan|searchsorted"
    r"|^triton_(poi|red|per|for)_",
}
KINDS = [*PATTERNS, OTHER]
_COMPILED = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in PATTERNS.items()]
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace; a marked range of code has another one


def kind_of(name: str) -> str:
    """Return the kind of a kernel, copy or fill."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)


def by_kind(times: Counter[str]) -> Counter[str]:
    """Add up the times of kernels by their kinds."""
    kinds: Counter[str] = Counter()
    for name, milliseconds in times.items():
        kinds[kind_of(name)] += milliseconds
    return kinds


def kernel_times(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Return the milliseconds of each kernel, copy and fill on a GPU, by name.

    They sum to the time in which anything runs there. Where several run at once, the time is that of the one that
    started first, and a collective's only if nothing else runs.

    Args:
        events: the `traceEvents` of a Chrome trace, as `torch.profiler` writes it. Those on the host are left out.
    """
    on_device = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE]
    on_device.sort(key=lambda event: (event["ts"], -event["dur"]))
    bounds = sorted({time for event in on_device for time in (event["ts"], event["ts"] + event["dur"])})
    running: list[tuple[bool, int, float, str]] = []  # (is a collective, order, end, name); the first one counts
    times: Counter[str] = Counter()
    started = 0
    for start, end in pairwise(bounds):
        while started < len(on_device) and on_device[started]["ts"] <= start:
            event = on_device[started]
            is_collective = kind_of(event["name"]) == COLLECTIVES
            heapq.heappush(running, (is_collective, started, event["ts"] + event["dur"], event["name"]))
            started += 1
        while running and running[0][2] <= start:
            heapq.heappop(running)
        if running:
            times[running[0][3]] += (end - start) / 1e3  # a trace counts microseconds
    return times
