"""Where the recurrence of a token mixer runs; what the mixers call wherever lrnn is installed.

| | float32 on CUDA | 16 bits on CUDA | CPU, float64, one token |
|---|---|---|---|
| `diagonal_recurrence` (GLA, Mamba-2, mLSTM) | PyTorch, by chunks | fla | PyTorch |
| `rwkv7_recurrence` | PyTorch, token by token | fla | PyTorch |
| `selective_scan` (Mamba) | Triton, `selective_scan.py` | the same, computed in float32 | PyTorch |

The dtype is that of the first argument (q, r, x), whatever the others have. fla's kernels multiply float32 operands as
tf32, with 10 bits: tracked states would be off by 1e-3, where float32 gives 1e-6. So float32 stays in PyTorch.

Each function here stands for the one of its name in PyTorch, in `diagonal_recurrence.py` or `step_recurrences.py`,
which describes the arguments, results and errors. On fla's kernels k and v, in RWKV-7 kappa and a . kappa too, are
rounded to the dtype of q or r, and o has it; the state is float32 everywhere. Where fla is needed and missing, an
ImportError says so.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lrnn.kernels.common.dispatch import use_kernels
from lrnn.kernels.reference import diagonal, steps
from lrnn.kernels.selective_scan import selective_scan as scan_on_kernels

HALF = (torch.bfloat16, torch.float16)


def diagonal_recurrence(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`lrnn.kernels.reference.diagonal.diagonal_recurrence`, but that fla's kernels take no `chunk_size`."""
    rule = fla().diagonal_recurrence if _runs_on_fla(q) else diagonal.diagonal_recurrence
    return rule(q, *args, **options)


def rwkv7_recurrence(r: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`lrnn.kernels.reference.steps.rwkv7_recurrence`."""
    rule = fla().rwkv7_recurrence if _runs_on_fla(r) else steps.rwkv7_recurrence
    return rule(r, *args, **options)


def selective_scan(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`lrnn.kernels.reference.steps.selective_scan`."""
    scan = scan_on_kernels if use_kernels(x) and x.dtype != torch.float64 else steps.selective_scan
    return scan(x, *args, **options)


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
