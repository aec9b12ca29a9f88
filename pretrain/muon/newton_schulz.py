"""Orthogonalize matrices by the Newton-Schulz iteration of Muon."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, as `torch.optim.Muon` and its author's code have them
STEPS = 5
SMALLEST_NORM = 1e-7


def orthogonalize(X: Tensor) -> Tensor:
    """Return U s V^T for each matrix U S V^T, with every singular value s between 0.68 and 1.14 if S is not tiny.

    X is divided by its norm, and five times replaced by a X + b (X X^T) X + c (X X^T)^2 X.

    Args:
        X: [n, rows, columns], overwritten. The iteration runs in its dtype.
    """
    if X.shape[1] > X.shape[2]:
        return orthogonalize(X.mT.contiguous()).mT
    norms = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True, dtype=torch.float32)
    X.div_(norms.clamp(min=SMALLEST_NORM))
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X
