"""Cross-entropy of a row of logits, with its gradient in place of the logits.

    loss = log sum exp(z) - z_label       dz = softmax(z) - onehot(label)

With a z-loss (PaLM, arXiv 2204.02311, section 5), the gradient is that of loss + c (log sum exp(z))^2:

    dz = softmax(z) (1 + 2 c log sum exp(z)) - onehot(label)

The kernel goes over a row twice: once for the maximum and the sum, once for the gradient. Both are in float32.

Symbols of the kernel: rows of V logits, BV at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch

WARPS = 16
BLOCK = 8192  # logits at a time


@triton.jit
def cross_entropy_kernel(
    logits, labels, losses, squares, c, V: tl.constexpr, BV: tl.constexpr, NEEDS_GRADIENT: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64)
    p = logits + i_r * V
    label = tl.load(labels + i_r)
    counts = label >= 0  # other rows have no label
    largest, total = -float("inf"), 0.0
    for i in range(0, V, BV):
        o_v = i + tl.arange(0, BV)
        b_z = tl.load(p + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(b_z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(b_z - largest), 0)
    z_label = tl.load(p + tl.where(counts, label, 0)).to(tl.float32)
    tl.store(losses + i_r, tl.where(counts, largest + tl.log(total) - z_label, 0.0))
    if squares is not None:
        log_sum = largest + tl.log(total)
        tl.store(squares + i_r, tl.where(counts, log_sum * log_sum, 0.0))
    if NEEDS_GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before it is replaced
        for i in range(0, V, BV):
            o_v = i + tl.arange(0, BV)
            b_z = tl.load(p + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
            b_p = tl.exp(b_z - largest) / total
            if squares is not None:
                b_p *= 1.0 + 2.0 * c * log_sum
            b_dz = b_p - tl.where(o_v == label, 1.0, 0.0)
            tl.store(p + o_v, tl.where(counts, b_dz, 0.0).to(logits.dtype.element_ty), mask=o_v < V)


def cross_entropy_(
    logits: Tensor, labels: Tensor, needs_gradient: bool, z_loss: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy of each row and, with `needs_gradient`, replace the logits by its gradient.

    Args:
        logits: [R, V] contiguous, any float dtype.
        labels: [R] int64, negative for rows without a label: their loss and gradient are 0.
        needs_gradient: whether the logits are replaced.
        z_loss: coefficient of the squares below, whose gradient is added. 0 leaves them out.

    Returns:
        The cross-entropies, [R] float32, and the squares of log sum exp(z), [R] float32, None without a z-loss. Both
        are 0 for rows without a label.
    """
    R, V = logits.shape
    losses = torch.empty(R, dtype=torch.float32, device=logits.device)
    squares = torch.empty_like(losses) if z_loss else None
    if R:
        BV = min(BLOCK, triton.next_power_of_2(V))
        arguments = {"V": V, "BV": BV, "NEEDS_GRADIENT": needs_gradient}
        tensors = (logits, labels, losses, squares, z_loss)
        launch(cross_entropy_kernel, (R, 1, 1), *tensors, **arguments, num_warps=WARPS, num_stages=1)
    return losses, squares


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernel as training compiles it, without and with a z-loss, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    signature = {"logits": "*bf16", "labels": "*i64", "losses": "*fp32", "c": "fp32"}
    constants = {"V": 32000, "BV": BLOCK, "NEEDS_GRADIENT": True}
    yield "cross_entropy_bf16", cross_entropy_kernel, signature, {**constants, "squares": None}, WARPS, 1
    with_squares = {**signature, "squares": "*fp32"}
    yield "cross_entropy_z_loss_bf16", cross_entropy_kernel, with_squares, constants, WARPS, 1
