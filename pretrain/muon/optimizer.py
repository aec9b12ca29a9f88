"""The step of Muon over ZeRO's flat slices, with AdamW for the parameters that are no matrices."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lrnn.pretrain.muon.matrices import Matrices
from lrnn.pretrain.muon.newton_schulz import orthogonalize
from lrnn.pretrain.muon.sharing import Sharing, Weight
from lrnn.pretrain.zero_layout import Slice

BATCH = 2**25  # numbers of matrices of one shape that are orthogonalized at a time

# Factors of the update of a matrix [rows, columns], by the names that `torch.optim.Muon` has for them.
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


class MuonAdamW(torch.optim.AdamW):
    """Muon over the parameter groups with `matrices: True`, AdamW over the others.

    ZeRO puts flat slices in place of the parameters, one slice per step of the optimizer. `bind` says what they hold.

    Args:
        groups: parameter groups. Those with `matrices` also have `lr_ratio`, a factor of their learning rate.
        matrices: the weights of these groups, and the matrices of each.
        momentum: decay of the moving average of the gradient.
        nesterov: whether a step looks ahead: the average is taken with the gradient once more.
        adjust_lr_fn: a name in `ADJUST_LR`.
        dtype: what matrices are orthogonalized in.
        adamw: arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: dict[Tensor, Matrices],
        *,
        momentum: float,
        nesterov: bool,
        adjust_lr_fn: str,
        dtype: torch.dtype,
        **adamw: Any,
    ):
        super().__init__(groups, **adamw)
        self._matrices, self._momentum, self._nesterov = matrices, momentum, nesterov
        self._adjust, self._dtype = ADJUST_LR[adjust_lr_fn], dtype
        self._sharings: dict[int, Sharing] = {}

    def bind(self, slices: Iterable[Slice]) -> None:
        """Learn what ZeRO's slices hold, those of AdamW included. All ranks call it together."""
        for group, flat, pieces in slices:
            if self.param_groups[group].get("matrices"):
                self._sharings[id(flat)] = Sharing(pieces, self._matrices)

    def holds_matrices(self, flat: Tensor) -> bool:
        """Return whether a slice is of Muon, whose state is `momentum_buffer`, and not of AdamW."""
        return id(flat) in self._sharings

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the slices of the parameter groups, whose gradients are overwritten."""
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group.get("matrices") else ():
                self._update(flat, group["lr"] * group["lr_ratio"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group.get("matrices")]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def momentum(self, flat: Tensor) -> Tensor:
        """Return the momentum of a slice of Muon, zeros before the first step."""
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        return state["momentum_buffer"]

    def _update(self, flat: Tensor, lr: float, weight_decay: float) -> None:
        """Update a slice of matrices."""
        sharing, momentum, gradient = self._sharings[id(flat)], self.momentum(flat), flat.grad
        assert gradient is not None
        momentum.lerp_(gradient, 1 - self._momentum)
        source = gradient.lerp_(momentum, self._momentum) if self._nesterov else momentum
        flat.mul_(1 - lr * weight_decay)
        collected = sharing.collect(source, self._dtype)
        changes = [flat.new_zeros(x.shape) for x in collected]
        pairs: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        whole = [(w, _part(source, offset, w), _part(flat, offset, w)) for w, offset in sharing.whole]
        for weight, x, y in [*whole, *zip(sharing.cut, collected, changes, strict=True)]:
            for pair in zip(weight.matrices.split(x), weight.matrices.split(y), strict=True):
                pairs.setdefault(pair[0].shape, []).append(pair)
        for (rows, columns), alike in pairs.items():
            self._add_orthogonalized(alike, -lr * self._adjust(rows, columns))
        sharing.hand_back(changes, flat)

    def _add_orthogonalized(self, pairs: list[tuple[Tensor, Tensor]], factor: float) -> None:
        """Add `factor` times the orthogonalized x to y, for pairs (x, y) of matrices of one shape."""
        x, _ = pairs[0]
        count = max(1, BATCH // x.numel())
        for i in range(0, len(pairs), count):
            xs, ys = zip(*pairs[i : i + count], strict=True)
            batch = x.new_empty(len(xs), *x.shape, dtype=self._dtype)
            torch._foreach_copy_(list(batch), list(xs))
            torch._foreach_add_(list(ys), list(orthogonalize(batch)), alpha=factor)


def _part(flat: Tensor, offset: int, weight: Weight) -> Tensor:
    """Return the view of a weight [rows, columns] that lies in a slice from `offset` on."""
    rows, columns = weight.shape
    return flat.narrow(0, offset, rows * columns).view(rows, columns)
