"""Choose the kernels that a call runs on: one backend per family of GPUs.

To add a family, add a folder beside `hopper/` with a class that has the members of `Backend`, and put it before
`Portable` in BACKENDS. It can use the launchers of `Portable` in place of kernels that it does not have.
"""

from typing import Protocol

from torch import Tensor

from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.hopper.backend import Hopper
from lrnn.kernels.delta_rule.portable.backend import Portable


class Backend(Protocol):
    """Launchers of the four kernels that each family of GPUs may implement. A class with static methods is a backend.

    Below, N is the number of sequences that are scanned: `Call.chunks.sequences`. q, gate, o, do and dq are by token,
    [B, T / factors, ...], and all others by step.
    """

    def fits(self, call: Call) -> bool:
        """Return whether the kernels are made for this call and its GPU."""

    def chunk_inverse(
        self,
        call: Call,
        operands: Operands,
        gate: Tensor | None,
        beta: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
    ) -> None:
        """Compute C, and all vectors but the norms of queries, from gates and step sizes [B, T, HV]."""

    def forward_scan(
        self,
        call: Call,
        operands: Operands,
        initial: Tensor | None,
        final: Tensor | None,
        o: Tensor | None = None,
        y: Tensor | None = None,
        states: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """Scan the chunks forward, and fill the results that are given.

        Args:
            initial: states [N, HV, K, V] float32 in which the sequences start, or None for zeros.
            final: their last states [N, HV, K, V] float32; with `reach` [N, HV, K, V + K].
            o: the output [B, T, HV, V] in the dtype of v. With it, the norms of queries are filled too.
            y: what each token found missing, [B * T, HV * V] in the dtype of v.
            states: the transposed states before the chunks, [chunks * HV * V, K] in the dtype of v.
            reach: scan the identity [K, K] beside the values, for the transition of each sequence, and only the chunks
                that `find_reach` found to matter.
        """

    def backward_scan(
        self,
        call: Call,
        operands: Operands,
        do: Tensor,
        dfinal: Tensor | None,
        dinitial: Tensor | None,
        dv: Tensor | None = None,
        dstates: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """Scan the chunks backward, and fill the results that are given.

        Args:
            do: gradient of the output [B, T, HV, V] in the dtype of v, from `with_rows`.
            dfinal: gradients of the last states [N, HV, K, V] float32, or None for zeros.
            dinitial: those of the first states [N, HV, K, V] float32.
            dv: the gradient of v [B, T, HV, V] in the dtype of v, except for tokens with small step sizes
                (`is_kept_small`), which `chunk_backward` finishes.
            dstates: transposed gradients of the states after the chunks, [chunks * HV * V, K] in the dtype of v.
            reach: scan only the chunks that `find_reach` found to matter to `dinitial`.
        """

    def chunk_backward(
        self,
        call: Call,
        operands: Operands,
        do: Tensor,
        dv: Tensor,
        y: Tensor,
        states: Tensor,
        dstates: Tensor,
        dq: Tensor,
        dk: Tensor,
        dbeta: Tensor,
        dot_q: Tensor,
        dot_k: Tensor,
    ) -> None:
        """Compute the gradients inside all chunks at once.

        Args:
            do: gradient of the output [B, T, HV, V] in the dtype of v, from `with_rows`.
            dv: as the backward scan fills it; afterwards the gradient of v of all tokens.
            y, states, dstates: as the two scans fill them.
            dq, dk: to be filled, [B, T, HV, K] in the dtype of v: those of each value head.
            dbeta, dot_q, dot_k: to be filled, [HV, R] float32: the gradient of the step sizes, and the two parts of
                that of the accumulated log-gates.
        """


BACKENDS: tuple[Backend, ...] = (Hopper, Portable)


def choose_backend(call: Call) -> Backend:
    """Return the first backend whose kernels are made for the call."""
    return next(backend for backend in BACKENDS if backend.fits(call))
