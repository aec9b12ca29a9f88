"""The head and the cross-entropy, whose gradient the forward pass computes. The plain form is in `LrnnForCausalLM`."""

from typing import Any

import torch
from torch import Tensor, nn

from lrnn.kernels.cross_entropy import cross_entropy_
from lrnn.pretrain.fused.product import Product, add_product_float32, product_float32

CHUNK = 4096  # tokens whose logits exist at a time: [4096, 32000] in bfloat16 is 0.25 GB


class FusedLoss:
    """Compute the cross-entropy of the head's logits, summed over the labels.

    The logits are computed once: where a gradient is needed, they are turned into their own gradient, and this into
    those of the hidden states and of the head, a chunk of tokens at a time.

    Args:
        head: the linear layer of the logits.
        dtype: what products compute in.
        z_loss: coefficient of the z-loss, which changes the gradient and not what is returned.

    Attributes:
        z_sum: the z-loss of the passes with a gradient so far, summed over labels; None before the first.
    """

    def __init__(self, head: nn.Linear, dtype: torch.dtype, z_loss: float = 0.0):
        self.head = Product([head.weight], dtype)
        self.products = [self.head]
        self.z_loss = z_loss
        self.z_sum: Tensor | None = None

    def __call__(self, h: Tensor, labels: Tensor) -> Tensor:
        """Return the sum, float32.

        Args:
            h: hidden states [n, hidden] in the dtype of the product.
            labels: [n] int64, negative for tokens without one.
        """
        return _FusedLoss.apply(h.contiguous(), labels.contiguous(), self, torch.is_grad_enabled(), *self.head.weights)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, labels: Tensor, loss: FusedLoss, needs_gradient: bool, weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if needs_gradient else None
        dweight: Tensor | None = None
        for start in range(0, len(h), CHUNK):
            piece = h[start : start + CHUNK]
            logits = loss.head.forward(piece)
            losses, squares = cross_entropy_(logits, labels[start : start + CHUNK], needs_gradient, loss.z_loss)
            total += losses.sum()
            if dh is None:
                continue
            if squares is not None:
                z = loss.z_loss * squares.sum()
                loss.z_sum = z if loss.z_sum is None else loss.z_sum + z
            torch.mm(logits, loss.head.matrix(), out=dh[start : start + CHUNK])
            if dweight is None:
                dweight = product_float32(logits.T, piece)
            else:
                add_product_float32(dweight, logits.T, piece)
        if needs_gradient:
            ctx.save_for_backward(dh, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        dh, dweight = ctx.saved_tensors
        # In 16 bits d, a single number, would be off by up to 0.4%, and so would every gradient but the head's.
        return (dh.float() * d).to(dh.dtype), None, None, None, dweight * d
