"""The dtypes that the kernels take, and what they compute in for each."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of queries, keys and values


def matrix_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """Return the dtype of the matrices C. With unit keys |C_ij| <= 1, of which float16 keeps three bits more than
    bfloat16."""
    return torch.float16 if normalize and dtype == torch.bfloat16 else dtype


def dot_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of products: three tf32 products for float32; others ignore it."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
