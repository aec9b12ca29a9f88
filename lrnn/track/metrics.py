"""Compute the scores of the state-tracking tasks."""

import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.track.tasks.base import IGNORE


def scaled_accuracy(accuracy: float, num_classes: int) -> float:
    """Return (acc - 1/K) / (1 - 1/K), which is 0 for guessing and 1 for perfection (arXiv 2411.12537 section 5.1)."""
    if num_classes < 2:
        raise UserError(f"scaled accuracy needs at least 2 classes, not {num_classes}")
    return (accuracy - 1 / num_classes) / (1 - 1 / num_classes)


def prefix_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the share of sequences with no wrong answer up to each position (arXiv 2411.12537 section 5.2).

    At position t only sequences with a label there count. With one answer per sequence, the result is the accuracy by
    the position of the answer.

    Args:
        predictions: `[B, L]` int64.
        labels: `[B, L]` int64.

    Returns:
        `[L]` float64, NaN where no sequence has a label.
    """
    if predictions.shape != labels.shape or labels.dim() != 2:
        raise UserError(f"shapes must be equal and [B, L]: {list(predictions.shape)}, {list(labels.shape)}")
    labelled = labels != IGNORE
    right_so_far = ((predictions == labels) | ~labelled).cummin(1).values
    return (right_so_far & labelled).sum(0, dtype=torch.float64) / labelled.sum(0)
