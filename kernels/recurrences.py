"""Dispatch the recurrence of a token mixer by this table. Mixers call these functions wherever lrnn is installed.

| | float32 on CUDA | 16 bits on CUDA | CPU or float64 |
|---|---|---|---|
| `diagonal_recurrence` (GLA, Mamba-2, mLSTM) | PyTorch, by chunks | fla (one token: PyTorch) | PyTorch |
| `rwkv7_recurrence` | PyTorch, token by token | fla (one token: PyTorch) | PyTorch |
| `selective_scan` (Mamba) | Triton, `selective_scan.py` | the same, computed in float32 | PyTorch |

The dtype is that of the first argument (q, r or x), whatever the others have. fla's kernels multiply float32 operands
as tf32, with 10 bits: tracked states would be off by 1e-3, where float32 gives 1e-6. So float32 stays in PyTorch.

Each function has the arguments, results and errors of the function of its name in `reference/diagonal.py` or
`reference/steps.py`. On fla's kernels, k and v, and in RWKV-7 kappa and a . kappa as well, are rounded to the dtype of
q or r, which is also the dtype of o. The state is float32 everywhere. An ImportError is raised if fla is needed and not
installed.
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
    """Compute `lrnn.kernels.reference.diagonal.diagonal_recurrence`. fla's kernels take no `chunk_size`."""
    rule = fla().diagonal_recurrence if _runs_on_fla(q) else diagonal.diagonal_recurrence
    return rule(q, *args, **options)


def rwkv7_recurrence(r: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute `lrnn.kernels.reference.steps.rwkv7_recurrence`."""
    rule = fla().rwkv7_recurrence if _runs_on_fla(r) else steps.rwkv7_recurrence
    return rule(r, *args, **options)


def selective_scan(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute `lrnn.kernels.reference.steps.selective_scan`."""
    scan = scan_on_kernels if use_kernels(x) and x.dtype != torch.float64 else steps.selective_scan
    return scan(x, *args, **options)


def fla() -> ModuleType:
    """Return the module that calls fla. It is imported here, when it is first needed.

    Raises:
        ImportError: if fla is not installed.
    """
    try:
        from lrnn.kernels import fla_recurrences
    except ImportError as error:
        raise ImportError(
            "this mixer runs on fla's kernels in 16 bits on CUDA: install the package flash-linear-attention"
        ) from error
    return fla_recurrences


def _runs_on_fla(x: Tensor) -> bool:
    # A single token is a step of generation, for which the plain recurrence is as fast.
    return x.is_cuda and x.dtype in HALF and x.shape[1] > 1
