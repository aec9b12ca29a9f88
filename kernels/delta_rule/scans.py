"""The matrices of the chunks of one call, the scans over them and the backward pass inside chunks, in Gluon where that
is made for the call.

Few long sequences do not fill the GPU with one scan each. They are cut into segments, whose transitions (a matrix
[K, K]) and end states from nothing are computed side by side, then joined, and the scans start from there. This is
exact: only what float32 could not hold is left out (`segment_reach`).
"""

from typing import Any

import torch
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import dot_precision
from lrnn.kernels.common.launch import launch, multiprocessors
from lrnn.kernels.common.tiles import Tiles, result_tiles, with_rows
from lrnn.kernels.delta_rule.chunks import Chunks
from lrnn.kernels.delta_rule.hopper.chunk_backward import chunk_backward_hopper_kernel, hopper_chunk_settings
from lrnn.kernels.delta_rule.hopper.chunk_forward import (
    FULL,
    chunk_forward_hopper_kernel,
    hopper_settings,
    is_for_hopper,
)
from lrnn.kernels.delta_rule.hopper.chunk_inverse import HOPPER_INVERSE_LAUNCH, chunk_inverse_hopper_kernel
from lrnn.kernels.delta_rule.hopper.scan_backward import chunk_scan_backward_hopper_kernel, hopper_backward_settings
from lrnn.kernels.delta_rule.portable.chunk_backward import chunk_backward_kernel, chunk_launch
from lrnn.kernels.delta_rule.portable.chunk_forward import chunk_forward_kernel, scan_launch
from lrnn.kernels.delta_rule.portable.chunk_inverse import INVERSE_LAUNCH, chunk_inverse_kernel
from lrnn.kernels.delta_rule.portable.scan_backward import chunk_scan_backward_kernel, scan_backward_stages
from lrnn.kernels.delta_rule.portable.segment_reach import LEAST, SEGMENT_REACH, segment_reach_kernel
from lrnn.kernels.delta_rule.portable.segment_scan import segment_scan_kernel, segment_scan_launch

SCANS_TO_FILL = 256  # scans that fill an H100: 132 multiprocessors, two programs on each
SEGMENT = 16 * CHUNK  # tokens of a segment at least: below, the extra pass costs more than it gains


def count_segments(batch_size: int, seq_len: int, num_heads: int, K: int, V: int, dtype: torch.dtype) -> int:
    """Into how many equal segments each sequence is cut: 1, or a power of 2 from 4 on."""
    scans = batch_size * num_heads * (V // scan_launch(K, dtype).BV)
    segments = 1
    while 2 * segments * scans <= SCANS_TO_FILL and seq_len % (2 * segments * SEGMENT) == 0:
        segments *= 2
    return segments if segments >= 4 else 1


def can_save_states(K: int, dtype: torch.dtype) -> bool:
    """Whether the forward scan may save the states beside the output: with longer keys than these both would exceed the
    shared memory, in one or another version of Triton."""
    return K * dtype.itemsize <= 256


class Scan:
    """What the launches of one call have in common.

    q, k [B, T, H, K] and v [B, T, HV, V] of one dtype, c [B * T, HV * CHUNK] of `matrix_dtype`, vectors [4 * HV,
    R] float32, where R is CHUNK times the number of chunks. Below, N is the number of sequences that are scanned: of
    segments, B times those of a sequence, or of documents.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        vectors: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        normalize: bool,
        split: bool,
    ):
        self.B, self.T, self.H, self.K = k.shape
        self.HV, self.V = v.shape[2:]
        self.dtype, self.device = v.dtype, v.device
        self.cu_seqlens, self.scale = cu_seqlens, scale
        self.split = split and self.dtype != torch.float32  # float32 operands are split by tf32x3 already
        self.segments = 1
        if cu_seqlens is None:
            self.segments = count_segments(self.B, self.T, self.HV, self.K, self.V, self.dtype)
        # Segments end where chunks end, so cutting changes the number of sequences and no chunk.
        self.chunks = Chunks(self.B * self.segments, self.T // self.segments, cu_seqlens)
        self.is_full = cu_seqlens is None and self.T % CHUNK == 0  # every chunk: no masks, and the TMA may store
        self.launch = scan_launch(self.K, self.dtype)
        self.for_hopper = is_for_hopper(self.K, self.V, self.dtype, self.is_full, self.device)
        self.vectors, self.R = vectors, vectors.shape[1]
        self.keys = with_rows(k)
        self.q, self.k = Tiles(with_rows(q), CHUNK, self.K), Tiles(self.keys, CHUNK, self.K)
        self.v = Tiles(with_rows(v), CHUNK, self.launch.BV)
        self.c, self.vector_rows = Tiles(c, CHUNK, CHUNK), Tiles(vectors, 1, CHUNK)
        self.sizes = {"H": self.H, "HV": self.HV, "K": self.K, "BT": CHUNK}
        self.heads = {
            **self.sizes,
            "NORMALIZE": normalize,
            "IS_VARLEN": cu_seqlens is not None,
            "IS_FULL": self.is_full,
            "PRECISION": dot_precision(self.dtype),
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def result(self, x: Tensor | None) -> Tensor | Tiles | None:
        return result_tiles(x, CHUNK, self.launch.BV, self.is_full)

    def run_inverse(
        self,
        gate: Tensor | None,
        beta: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        beta_range: float,
        kind: str,
    ) -> None:
        """Computes C and three of the four numbers a token and head, from what `kind` says the gates are."""
        numbers = None if gate is None else gate.contiguous(), beta.contiguous(), A_log, dt_bias
        flags = {"GATE": kind, "RAW_BETA": beta_range != 0}
        if self.for_hopper:
            launch(
                chunk_inverse_hopper_kernel,
                (self.chunks.count * self.HV, 1, 1),
                self.k,
                *numbers,
                self.c,
                self.vectors,
                self.R,
                beta_range,
                NORMALIZE=self.heads["NORMALIZE"],
                **flags,
                **HOPPER_INVERSE_LAUNCH,
                **self.sizes,
            )
            return
        launch(
            chunk_inverse_kernel,
            (self.chunks.count, self.HV, 1),
            self.keys,
            *numbers,
            self.c.base,
            self.vectors,
            self.cu_seqlens,
            self.chunks.table,
            self.chunks.seq_len,
            self.R,
            beta_range,
            self.keys.stride(1),
            BK=64,
            **flags,
            **INVERSE_LAUNCH,
            **self.heads,
        )

    def run_forward(
        self,
        initial: Tensor | None,
        final: Tensor | None,
        o: Tensor | None = None,
        y: Tensor | None = None,
        states: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """The scan of `chunk_forward`, which fills what is given of its results.

        Args:
            initial: states [N, HV, K, V] float32 in which the sequences start, or None for zeros.
            final: their last states [N, HV, K, V] float32; with `reach` [N, HV, K, V + K].
            o: the output [B, T, HV, V] in the dtype of v.
            y: what each token found missing [B * T, HV * V] in the dtype of v.
            states: the transposed states ahead of the chunks [chunks * HV * V, K] in the dtype of v.
            reach: scan the identity [K, K] beside the values, for the transition of each sequence, and only what
                `segment_reach` found to matter.
        """
        transition = reach is not None
        width = self.V + self.K * transition
        count = self.HV * self.chunks.sequences
        flags = {
            "OUTPUT": o is not None,
            "SAVE_STATES": states is not None,
            "TRANSITION": transition,
            "HAS_INITIAL": initial is not None,
            "SAVE_FINAL": final is not None,
            "SPLIT": self.split,
        }
        tensors = (
            self.q if o is not None else None,
            self.k,
            self.v,
            self.c,
            self.result(o),
            self.result(y),
            None if states is None else Tiles(states, self.launch.BV, self.K),
            self.vectors,
            self.vector_rows,
            initial,
            final,
            reach,
        )
        if self.for_hopper:
            hopper = hopper_settings(count >= FULL, o is not None, states is not None, self.split)
            columns = width // (64 * hopper.HALVES)
            settings = {"NORMALIZE": self.heads["NORMALIZE"], **flags, **hopper._asdict()}
            self._launch_hopper(chunk_forward_hopper_kernel, columns * count, tensors, settings)
        else:
            columns = width // self.launch.BV
            self._launch_plain(chunk_forward_kernel, columns * count, tensors, flags, self.launch.stages)

    def run_backward_scan(
        self,
        do: Tensor,
        dfinal: Tensor | None,
        dinitial: Tensor | None,
        dv: Tensor | None = None,
        dstates: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> None:
        """The scan of `chunk_scan_backward`, which fills what is given of its results.

        Args:
            do: gradient of the output [B, T, HV, V] in the dtype of v, from `with_rows`.
            dfinal: gradients of the last states [N, HV, K, V] float32, or None for zeros.
            dinitial: those of the first states [N, HV, K, V] float32.
            dv: the gradient of v [B, T, HV, V] in the dtype of v, but for tokens with small step sizes
                (`is_kept_small`), which `chunk_backward` finishes.
            dstates: transposed gradients of the states behind the chunks [chunks * HV * V, K] in the dtype of v.
            reach: scan only what `segment_reach` found to matter to `dinitial`.
        """
        flags = {
            "SAVE_STATES": dstates is not None,
            "HAS_FINAL": dfinal is not None,
            "SAVE_INITIAL": dinitial is not None,
            "REACH": reach is not None,
            "SPLIT": self.split,
        }
        count = self.HV * self.chunks.sequences
        # In plain Triton the states are stored by halves: a buffer for whole ones would leave too little memory.
        width = self.K if self.for_hopper else self.K // 2
        tensors = (
            self.q,
            self.k,
            self.c,
            Tiles(do, CHUNK, self.launch.BV),
            self.result(dv),
            None if dstates is None else Tiles(dstates, self.launch.BV, width),
            self.vectors,
            self.vector_rows,
            dfinal,
            dinitial,
            reach,
        )
        if self.for_hopper:
            hopper = hopper_backward_settings(count >= FULL, dstates is not None)
            columns = self.V // (64 * hopper.HALVES)
            settings = {**flags, **hopper._asdict()}
            self._launch_hopper(chunk_scan_backward_hopper_kernel, columns * count, tensors, settings)
        else:
            columns, stages = self.V // self.launch.BV, scan_backward_stages(self.K, self.dtype)
            self._launch_plain(chunk_scan_backward_kernel, columns * count, tensors, flags, stages)

    def _launch_hopper(self, kernel: Any, programs: int, tensors: tuple, settings: dict[str, int]) -> None:
        numbers = self.chunks.seq_len, self.R, self.scale
        launch(kernel, (programs, 1, 1), *tensors, *numbers, V=self.V, num_warps=4, **settings, **self.sizes)

    def _launch_plain(self, kernel: Any, programs: int, tensors: tuple, flags: dict[str, bool], stages: int) -> None:
        launch(
            kernel,
            (programs, 1, 1),
            *tensors,
            self.cu_seqlens,
            self.chunks.starts,
            self.chunks.seq_len,
            self.R,
            self.scale,
            V=self.V,
            BV=self.launch.BV,
            STAGES=stages,
            num_warps=self.launch.warps,
            num_stages=stages,
            **flags,
            **self.heads,
        )

    def run_chunk_backward(
        self,
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
        """The backward pass inside chunks (`chunk_backward`).

        Args:
            do: gradient of the output [B, T, HV, V] in the dtype of v, from `with_rows`.
            dv: as the backward scan fills it; afterwards the gradient of v of all tokens.
            y, states, dstates: as the two scans fill them.
            dq, dk: to be filled, [B, T, HV, K] in the dtype of v: those of each value head.
            dbeta, dot_q, dot_k: to be filled, [HV, R] float32: the gradient of the step sizes and the two parts of
                that of the accumulated log-gates.
        """
        numbers = dbeta, dot_q, dot_k
        if self.for_hopper:
            launch(
                chunk_backward_hopper_kernel,
                (min(self.chunks.count * self.HV, multiprocessors(self.device)), 1, 1),
                self.q,
                self.k,
                *(Tiles(x, CHUNK, self.K) for x in (do, dv, y, states, dstates, dq, dk)),
                dv,
                *numbers,
                self.vector_rows,
                self.chunks.count,
                self.R,
                self.scale,
                V=self.V,
                NORMALIZE=self.heads["NORMALIZE"],
                num_warps=4,
                **hopper_chunk_settings()._asdict(),
                **self.sizes,
            )
            return
        settings = chunk_launch(self.K, self.dtype)
        launch(
            chunk_backward_kernel,
            (2 * self.HV * self.chunks.count, 1, 1),
            self.q,
            self.k,
            *(Tiles(x, CHUNK, settings.BV) for x in (do, dv, y)),
            *(Tiles(x, settings.BV, self.K) for x in (states, dstates)),
            dq,
            dk,
            dv,
            *numbers,
            self.vectors,
            self.cu_seqlens,
            self.chunks.table,
            self.chunks.seq_len,
            self.R,
            self.scale,
            V=self.V,
            BV=settings.BV,
            STAGES=settings.stages,
            num_warps=settings.warps,
            num_stages=settings.stages,
            **self.heads,
        )

    def find_reach(self, contracts: bool, has_start: bool, save_last: bool) -> Tensor:
        """What `segment_reach` finds [B * segments, HV, 3] int32, with or without a state ahead of the first segment or
        behind the last one. Nothing is left out for its decay unless every factor `contracts`."""
        reach = self.empty(self.chunks.sequences, self.HV, 3, dtype=torch.int32)
        launch(
            segment_reach_kernel,
            (self.chunks.sequences, self.HV, 1),
            reach,
            self.vectors,
            self.segments,
            self.chunks.seq_len // CHUNK,
            self.R,
            LEAST if contracts else float("-inf"),
            HV=self.HV,
            BT=CHUNK,
            HAS_START=has_start,
            SAVE_LAST=save_last,
            **SEGMENT_REACH,
        )
        return reach

    def join_segments(
        self,
        joined: Tensor,
        ends: Tensor,
        segment_ends: Tensor,
        start: Tensor | None,
        last: Tensor | None,
        backward: bool,
    ) -> None:
        """States in which the segments start, or gradients of those in which they end; `last` gets what follows.

        The transitions are columns of `segment_ends` [B * segments, HV, K, V + K]; forward it is `ends` too.
        """
        settings = segment_scan_launch(self.K)
        launch(
            segment_scan_kernel,
            (self.V // settings["BV"], self.B, self.HV),
            joined,
            ends,
            segment_ends[..., self.V :],
            start,
            last,
            self.segments,
            HV=self.HV,
            K=self.K,
            V=self.V,
            E_STRIDE=ends.stride(2),
            M_STRIDE=self.V + self.K,
            BACKWARD=backward,
            HAS_START=start is not None,
            SAVE_LAST=last is not None,
            **settings,
        )
