"""Where the recurrence of a token mixer runs; what the mixers call wherever lrnn is installed.

| | float32 on CUDA | 16 bits on CUDA | CPU, float64, one token |
|---|---|---|---|
| `diagonal_recurrence` (GLA, Mamba-2, mLSTM) | PyTorch, by chunks | fla | PyTorch |
| `rwkv7_recurrence` | PyTorch, token by token | fla | PyTorch |
| `selective_scan` (Mamba) | Triton, `selective_scan.py` | the same, computed in float32 | PyTorch |

The dtype is that of the first argument (q, r, x), whatever the others have. fla's kernels multiply float32 operands as
tf32, with 10 bits: tracked states would be off by 1e-3, where float32 gives 1e-6. So float32 stays in PyTorch.
"""

from types import ModuleType

import torch
from torch import Tensor

from lrnn.kernels import diagonal_recurrence as diagonal
from lrnn.kernels import step_recurrences as steps
from lrnn.kernels.selective_scan import selective_scan as scan_on_kernels
from lrnn.kernels.tiles import use_kernels

HALF = (torch.bfloat16, torch.float16)


def diagonal_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    sign: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`lrnn.kernels.diagonal_recurrence.diagonal_recurrence`: arguments, results and errors. On fla's kernels k and v
    are rounded to the dtype of q, and o [B, T, H, V] has it; the state is float32 everywhere.

    Raises:
        ImportError: fla is needed and missing.
    """
    rule = fla().diagonal_recurrence if _runs_on_fla(q) else diagonal.diagonal_recurrence
    return rule(
        q,
        k,
        v,
        g,
        sign,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        document=document,
    )


def rwkv7_recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lrnn.kernels.step_recurrences.rwkv7_recurrence`: arguments and results. On fla's kernels k, v, kappa and
    a . kappa are rounded to the dtype of r, and o [B, T, H, V] has it; the state is float32 everywhere.

    Raises:
        ImportError: fla is needed and missing.
    """
    rule = fla().rwkv7_recurrence if _runs_on_fla(r) else steps.rwkv7_recurrence
    return rule(r, w, k, v, kappa, a, initial_state=initial_state, cu_seqlens=cu_seqlens)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    allow_neg_eigval: bool,
    initial_state: Tensor | None = None,
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lrnn.kernels.step_recurrences.selective_scan`: arguments and results."""
    scan = scan_on_kernels if use_kernels(x) and x.dtype != torch.float64 else steps.selective_scan
    return scan(x, dt, A, B, C, allow_neg_eigval=allow_neg_eigval, initial_state=initial_state, document=document)


def fla() -> ModuleType:
    """The functions that call fla, which is imported here and nowhere before."""
    try:
        from lrnn.kernels import fla_recurrences
    except ImportError as error:
        raise ImportError(
            "this mixer runs on fla's kernels in 16 bits on CUDA: install the package flash-linear-attention"
        ) from error
    return fla_recurrences


def _runs_on_fla(x: Tensor) -> bool:
    # A single token is a step of generation: the plain recurrence is as fast.
    return x.is_cuda and x.dtype in HALF and x.shape[1] > 1
