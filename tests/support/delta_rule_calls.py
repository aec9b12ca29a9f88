"""Calls of the delta rule on one backend without the operators around them, and records of their launches."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from lrnn.kernels.delta_rule.backends import Backend
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.hopper import chunk_backward as hopper_chunk_backward
from lrnn.kernels.delta_rule.hopper import chunk_forward as hopper_chunk_forward
from lrnn.kernels.delta_rule.hopper import chunk_inverse as hopper_chunk_inverse
from lrnn.kernels.delta_rule.hopper import scan_backward as hopper_scan_backward
from lrnn.kernels.delta_rule.portable import chunk_backward, chunk_forward, chunk_inverse, scan_backward

HOPPER = (hopper_chunk_inverse, hopper_chunk_forward, hopper_scan_backward, hopper_chunk_backward)
PORTABLE = (chunk_inverse, chunk_forward, scan_backward, chunk_backward)


def replace_launch(monkeypatch: pytest.MonkeyPatch, replacement: Callable[..., None]) -> None:
    """Make all backends launch kernels by `replacement` until the test ends."""
    for module in HOPPER + PORTABLE:
        monkeypatch.setattr(module, "launch", replacement)


class BackendCall:
    """A call with the launchers of a backend as its methods.

    `forward_scan(initial, final, ...)` and the others take the arguments that `Backend` describes after the call and
    its operands.
    """

    def __init__(
        self,
        backend: Backend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        vectors: Tensor,
        *,
        scale: float,
        normalize_qk: bool,
        gate: str = "none",
        beta_range: float | None = None,
        split: bool = False,
        factors: int = 1,
    ):
        B, T, H, K = k.shape
        self.backend, self.vectors = backend, vectors
        self.call = Call(
            B=B, T=T, H=H, HV=v.shape[2], K=K, V=v.shape[3], dtype=v.dtype, device=v.device, gate=gate,
            beta_range=beta_range, scale=scale, normalize_qk=normalize_qk, cu_seqlens=None, split=split,
            factors=factors,
        )  # fmt: skip
        self.operands = Operands(self.call, q, k, v, c, vectors)

    def __getattr__(self, launcher: str) -> Any:
        return functools.partial(getattr(self.backend, launcher), self.call, self.operands)
