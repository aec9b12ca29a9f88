"""How much each layer uses negative eigenvalues of its state transition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrnn.model.layers import Mixer

EIGENVALUE_BINS = 20  # equal bins over [-1, 1]


class EigenvalueProbe:
    """Note the distribution of the state transitions' eigenvalues in every layer, over tokens and heads.

    The eigenvalues of channels or factors, where a mixer has those, count as well. They are only computed when `arm`
    was called: each layer then notes those of its next forward pass. Later passes (further micro-batches of the step, a
    layer that is recomputed in the backward pass) are not noted.

    Args:
        model: its mixers that have a range of eigenvalues are watched.
    """

    def __init__(self, model: nn.Module):
        self._counts: dict[int, Tensor] = {}
        self._layers = set[int]()
        self._armed = set[int]()
        for module in model.modules():
            if isinstance(module, Mixer) and module.ranges is not None:
                self._layers.add(module.layer_idx)
                module.on_eigenvalues = self._note(module.layer_idx)

    def arm(self) -> None:
        """Note the eigenvalues of each layer's next forward pass."""
        self._armed |= self._layers

    def _note(self, layer: int) -> Callable[[Callable[[], Tensor]], None]:
        def note(compute: Callable[[], Tensor]) -> None:
            if layer in self._armed:
                self._armed.discard(layer)
                with torch.no_grad():
                    self._counts[layer] = torch.histc(compute().float(), EIGENVALUE_BINS, -1, 1)

        return note

    def counts(self) -> Tensor | None:
        """Return the eigenvalues in each bin of the last pass that was noted: [watched layers, bins], on the device."""
        return torch.stack([self._counts[i] for i in sorted(self._counts)]) if self._counts else None

    def read(self) -> dict[str, Any]:
        """Return the fraction of each bin and of the negative half by layer, from the last pass that was noted.

        The histogram has one row for each layer that the negative half names, in the same order.
        """
        counts = self.counts()
        return {} if counts is None else self.describe(counts.cpu())

    def describe(self, counts: Tensor) -> dict[str, Any]:
        """Return what `read` returns, from `counts` on the CPU."""
        fractions = counts / counts.sum(-1, keepdim=True)
        negative = fractions[:, : EIGENVALUE_BINS // 2].sum(-1)
        return {
            "negative_fraction": {
                str(i): round(x, 5) for i, x in zip(sorted(self._counts), negative.tolist(), strict=True)
            },
            "histogram": [[round(x, 5) for x in row] for row in fractions.tolist()],
        }
