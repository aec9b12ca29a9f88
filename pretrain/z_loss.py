"""The z-loss, which keeps log sum exp of the logits near 0: PaLM (arXiv 2204.02311, section 5).

    z-loss = coefficient (log sum exp(logits))^2

Its gradient is added to that of the cross-entropy, and its value is not: the loss of a step stays the cross-entropy.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrnn.model.modeling_lrnn import LOSS_CHUNK, SMALL_LOGITS, LrnnForCausalLM
from lrnn.pretrain.data.micro_batch import IGNORED
from lrnn.pretrain.fused.loss import FusedLoss


class LossWithZ:
    """Compute the summed cross-entropy of a head's logits, with the gradient of the z-loss besides.

    It is the plain form of `FusedLoss`. Unless the logits are few, they are computed in pieces, and again in the
    backward pass.

    Args:
        head: the linear layer of the logits.
        coefficient: that of the z-loss.

    Attributes:
        z_sum: the z-loss of the passes with a gradient so far, summed over labels; None before the first.
    """

    def __init__(self, head: nn.Linear, coefficient: float):
        self._head, self._coefficient = head, coefficient
        self.z_sum: Tensor | None = None

    def __call__(self, h: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy summed over the labels, float32.

        Args:
            h: hidden states [n, hidden].
            labels: [n] int64, -100 for tokens without one.
        """
        if labels.numel() * self._head.out_features <= SMALL_LOGITS:
            pieces = [self._piece(h, labels)]
        else:
            run = partial(checkpoint, self._piece, use_reentrant=False, preserve_rng_state=False)
            pieces = [run(*p) for p in zip(h.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)]
        losses, zs = (torch.stack(parts).sum() for parts in zip(*pieces, strict=True))
        if torch.is_grad_enabled():
            self.z_sum = zs if self.z_sum is None else self.z_sum + zs
        return losses

    def _piece(self, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of cross-entropy and z-loss. The gradient of the first is that of both."""
        logits = self._head(h).float()
        log_sums = logits.logsumexp(-1)[labels != IGNORED]
        z = self._coefficient * log_sums.square().sum()
        return F.cross_entropy(logits, labels, reduction="sum") + (z - z.detach()), z.detach()


def take_z_loss(model: nn.Module) -> Tensor | None:
    """Return the z-loss of a model since the last call, summed over labels. None if it has none."""
    loss = model.fused_loss if isinstance(model, LrnnForCausalLM) else None
    if not isinstance(loss, LossWithZ | FusedLoss):
        return None
    taken, loss.z_sum = loss.z_sum, None
    return taken
