"""The chunkwise gated delta rule as `torch.library` operators: allocation and launches, forward and backward.

Kept for the backward pass: the inputs, the matrix C of each chunk (`chunk_inverse`) and four numbers a token and head.
The states of the chunks are computed anew: they would be two thirds of what a layer keeps.

Few long sequences do not fill the GPU with one scan each. They are cut into segments, whose transitions (a matrix
[K, K]) and end states from nothing are computed side by side, then joined, and the scans start from there. This is
exact; no decay is assumed.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lrnn.kernels.chunk_backward import chunk_backward_kernel
from lrnn.kernels.chunk_forward import chunk_forward_kernel
from lrnn.kernels.chunk_inverse import chunk_inverse_kernel
from lrnn.kernels.chunk_scan_backward import chunk_scan_backward_kernel
from lrnn.kernels.gate_backward import gate_backward_kernel
from lrnn.kernels.launch_config import INVERSE_LAUNCH, chunk_launch, scan_backward_stages, scan_launch
from lrnn.kernels.recurrent import recurrent_kernel
from lrnn.kernels.segment_scan import SEGMENT_SCAN, segment_scan_kernel
from lrnn.kernels.tiles import CHUNK, Chunks, count_chunks, dot_precision, matrix_dtype, result_tiles, rows_of, tiles

SCANS_TO_FILL = 256  # scans that fill an H100: 132 multiprocessors, two programs on each
SEGMENT = 16 * CHUNK  # tokens of a segment at least: below, the extra pass costs more than it gains


def count_segments(batch_size: int, seq_len: int, num_heads: int, K: int, V: int, dtype: torch.dtype) -> int:
    """Into how many equal segments each sequence is cut: 1, or a power of 2 from 4 on."""
    scans = batch_size * num_heads * (V // scan_launch(K, V, dtype).BV)
    segments = 1
    while 2 * segments * scans <= SCANS_TO_FILL and seq_len % (2 * segments * SEGMENT) == 0:
        segments *= 2
    return segments if segments >= 4 else 1


def _on_its_device(operator: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(operator)
    def run(*args, **kwargs):
        with torch.cuda.device_of(args[0]):  # does nothing for CPU tensors
            return operator(*args, **kwargs)

    return run


def _gate_kind(gate: Tensor | None, A_log: Tensor | None) -> str:
    return "none" if gate is None else "log" if A_log is None else "raw"


class _Scan:
    """What the launches of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, normalize: bool):
        self.B, self.T, self.H, self.K = k.shape
        self.HV, self.V = v.shape[2:]
        self.R = self.B * self.T
        self.dtype, self.device = v.dtype, v.device
        self.q, self.k, self.v = rows_of(q), rows_of(k), rows_of(v)
        self.cu_seqlens, self.scale, self.normalize = cu_seqlens, scale, normalize
        self.segments = 1
        if cu_seqlens is None:
            self.segments = count_segments(self.B, self.T, self.HV, self.K, self.V, self.dtype)
        # Segments end where chunks end, so cutting changes the number of sequences and no chunk.
        self.chunks = Chunks(self.B * self.segments, self.T // self.segments, cu_seqlens)
        self.launch = scan_launch(self.K, self.V, self.dtype)
        self.is_full = cu_seqlens is None and self.T % CHUNK == 0  # every chunk: no masks, and the TMA may store
        self.heads = {
            "H": self.H,
            "HV": self.HV,
            "K": self.K,
            "BT": CHUNK,
            "NORMALIZE": normalize,
            "IS_VARLEN": cu_seqlens is not None,
            "IS_FULL": self.is_full,
            "PRECISION": dot_precision(self.dtype),
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def key_tiles(self, matrix: Tensor):
        return tiles(matrix, CHUNK, self.K)

    def value_tiles(self, matrix: Tensor, columns: int):
        return tiles(matrix, CHUNK, columns)

    def result(self, matrix: Tensor | None):
        return result_tiles(matrix, CHUNK, self.launch.BV, self.is_full)

    def state_tiles(self, states: Tensor, columns: int):
        return tiles(states, columns, self.K)

    def chunk_states(self) -> Tensor:
        return self.empty(self.chunks.count * self.HV * self.V, self.K, dtype=self.dtype)

    def run_forward(
        self,
        c: Tensor,
        vectors: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        o: Tensor | None = None,
        y: Tensor | None = None,
        states: Tensor | None = None,
        transition: bool = False,
    ) -> None:
        columns = (self.V + self.K * transition) // self.launch.BV
        chunk_forward_kernel[(columns * self.HV * self.chunks.sequences,)](
            self.key_tiles(self.q) if o is not None else None,
            self.key_tiles(self.k),
            self.value_tiles(self.v, self.launch.BV),
            tiles(c, CHUNK, CHUNK),
            self.result(None if o is None else o.view(self.R, -1)),
            self.result(y),
            None if states is None else self.state_tiles(states, self.launch.BV),
            vectors,
            tiles(vectors, 1, CHUNK),
            initial,
            final,
            self.cu_seqlens,
            self.chunks.starts,
            self.chunks.seq_len,
            vectors.shape[1],
            self.scale,
            V=self.V,
            BV=self.launch.BV,
            OUTPUT=o is not None,
            SAVE_STATES=states is not None,
            TRANSITION=transition,
            HAS_INITIAL=initial is not None,
            SAVE_FINAL=final is not None,
            STAGES=self.launch.stages,
            num_warps=self.launch.warps,
            num_stages=self.launch.stages,
            **self.heads,
        )

    def run_backward_scan(
        self,
        c: Tensor,
        do: Tensor,
        vectors: Tensor,
        dfinal: Tensor | None,
        dinitial: Tensor | None,
        dw: Tensor | None = None,
        dstates: Tensor | None = None,
    ) -> None:
        stages = scan_backward_stages(self.K, self.V, self.dtype)
        chunk_scan_backward_kernel[(self.V // self.launch.BV * self.HV * self.chunks.sequences,)](
            self.key_tiles(self.q),
            self.key_tiles(self.k),
            tiles(c, CHUNK, CHUNK),
            self.value_tiles(do, self.launch.BV),
            self.result(dw),
            None if dstates is None else tiles(dstates, self.launch.BV, self.K // 2),
            vectors,
            tiles(vectors, 1, CHUNK),
            dfinal,
            dinitial,
            self.cu_seqlens,
            self.chunks.starts,
            self.chunks.seq_len,
            vectors.shape[1],
            self.scale,
            V=self.V,
            BV=self.launch.BV,
            SAVE_STATES=dstates is not None,
            HAS_FINAL=dfinal is not None,
            SAVE_INITIAL=dinitial is not None,
            STAGES=stages,
            num_warps=self.launch.warps,
            num_stages=stages,
            **self.heads,
        )

    def join_segments(
        self, ends: Tensor, segment_ends: Tensor, start: Tensor | None, last: Tensor | None, backward: bool
    ) -> Tensor:
        """States in which the segments start, or gradients of those in which they end; `last` gets what comes after.

        The transitions are columns of `segment_ends` [B * segments, HV, K, V + K]; forward it is `ends` too.
        """
        joined = self.empty(self.chunks.sequences, self.HV, self.K, self.V)
        segment_scan_kernel[(self.V // SEGMENT_SCAN["BV"], self.B, self.HV)](
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
            **SEGMENT_SCAN,
        )
        return joined


def _saved_shapes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> dict[str, list[int]]:
    """Shapes of what the forward operator returns beside the output and the final state."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    segments = 1 if cu_seqlens is not None else count_segments(B, T, HV, K, V, v.dtype)
    return {
        "c": [B * T, HV * CHUNK],
        "vectors": [4 * HV, count_chunks(B, T, cu_seqlens) * CHUNK],
        "starts": [B * segments, HV, K, V] if segments > 1 else [0],
        "segment_ends": [B * segments, HV, K, V + K] if segments > 1 else [0],
    }


@torch.library.custom_op("lrnn::gated_delta_rule_forward", mutates_args=())
@_on_its_device
def gated_delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    beta_range: float,
    normalize: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state, and what the backward pass needs: C, four numbers a token and head, states of the segments.

    The numbers stand in rows: accumulated log-gates (base 2), step sizes, log2 of 1/|k| and of 1/|q|.

    `gate` is the log-gate, or the raw gate where `A_log` and `dt_bias` are given; `beta` the step size, or its logit
    where `beta_range` is not 0. Checked by `lrnn.kernels.gated_delta_rule`, the public function.
    """
    s = _Scan(q, k, v, cu_seqlens, scale, normalize)
    shapes = _saved_shapes(q, v, cu_seqlens)
    c_dtype = matrix_dtype(s.dtype, normalize)
    saved = {
        name: s.empty(*shape, dtype=c_dtype if name == "c" else torch.float32)
        for name, shape in shapes.items()
        if s.segments == 1 or name != "starts"
    }
    c, vectors = saved["c"], saved["vectors"]
    o = s.empty(s.B, s.T, s.HV, s.V, dtype=s.dtype)
    sequences = s.chunks.sequences // s.segments
    final = s.empty(sequences, s.HV, s.K, s.V) if output_final_state else s.empty(0)
    kind = _gate_kind(gate, A_log)
    chunk_inverse_kernel[(s.chunks.count, s.HV)](
        s.k,
        None if gate is None else gate.contiguous(),
        beta.contiguous(),
        A_log,
        dt_bias,
        c,
        vectors,
        cu_seqlens,
        s.chunks.table,
        s.chunks.seq_len,
        vectors.shape[1],
        beta_range,
        s.k.stride(0),
        BK=64,
        GATE=kind,
        RAW_BETA=beta_range != 0,
        **INVERSE_LAUNCH,
        **s.heads,
    )
    initial = None if initial_state is None else initial_state.contiguous()
    last: Tensor | None = final if output_final_state else None
    if s.segments > 1:
        ends = saved["segment_ends"]
        s.run_forward(c, vectors, None, ends, transition=True)
        initial = saved["starts"] = s.join_segments(ends, ends, initial, None, backward=False)
        if output_final_state:
            last = s.empty(s.chunks.sequences, s.HV, s.K, s.V)
    s.run_forward(c, vectors, initial, last, o=o)
    if s.segments > 1 and last is not None:
        final.copy_(last.unflatten(0, (s.B, s.segments))[:, -1])
    return o, final, c, vectors, saved["starts"], saved["segment_ends"]


@gated_delta_rule_forward.register_fake
def _(q, k, v, gate, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, beta_range, normalize, output_final_state):
    B, T, HV, V = v.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = [sequences, HV, q.shape[3], V] if output_final_state else [0]
    saved = _saved_shapes(q, v, cu_seqlens)
    c_dtype = matrix_dtype(v.dtype, normalize)
    return (
        v.new_empty([B, T, HV, V]),
        v.new_empty(final, dtype=torch.float32),
        *(v.new_empty(shape, dtype=c_dtype if n == "c" else torch.float32) for n, shape in saved.items()),
    )


@torch.library.custom_op("lrnn::gated_delta_rule_backward", mutates_args=())
@_on_its_device
def gated_delta_rule_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    c: Tensor,
    vectors: Tensor,
    starts: Tensor,
    segment_ends: Tensor,
    scale: float,
    beta_range: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate, beta, A_log, dt_bias and the initial state; empty where there is no such input."""
    s = _Scan(q, k, v, cu_seqlens, scale, normalize)
    do_rows = rows_of(do)
    dlast = None if dfinal is None else dfinal.contiguous()
    y, dw = (s.empty(s.R, s.HV * s.V, dtype=s.dtype) for _ in range(2))
    states, dstates = s.chunk_states(), s.chunk_states()
    dinitial = None if initial_state is None else torch.empty_like(initial_state, dtype=torch.float32)

    initial = starts if s.segments > 1 else None if initial_state is None else initial_state.contiguous()
    s.run_forward(c, vectors, initial, None, y=y, states=states)
    if s.segments > 1:
        dstarts = s.empty(s.chunks.sequences, s.HV, s.K, s.V)
        s.run_backward_scan(c, do_rows, vectors, None, dstarts)
        dlast = s.join_segments(dstarts, segment_ends, dlast, dinitial, backward=True)
        s.run_backward_scan(c, do_rows, vectors, dlast, None, dw, dstates)
    else:
        s.run_backward_scan(c, do_rows, vectors, dlast, dinitial, dw, dstates)

    dq, dk = (s.empty(s.B, s.T, s.HV, s.K, dtype=s.dtype) for _ in range(2))
    dv = s.empty(s.B, s.T, s.HV, s.V, dtype=s.dtype)
    dbeta_used, dot_q, dot_k = (s.empty(s.HV, vectors.shape[1]) for _ in range(3))
    launch = chunk_launch(s.K, s.V, s.dtype)
    chunk_backward_kernel[(2 * s.HV * s.chunks.count,)](
        s.key_tiles(s.q),
        s.key_tiles(s.k),
        s.value_tiles(do_rows, launch.BV),
        s.value_tiles(dw, launch.BV),
        s.value_tiles(y, launch.BV),
        s.state_tiles(states, launch.BV),
        s.state_tiles(dstates, launch.BV),
        dq,
        dk,
        dv,
        dbeta_used,
        dot_q,
        dot_k,
        vectors,
        cu_seqlens,
        s.chunks.table,
        s.chunks.seq_len,
        vectors.shape[1],
        scale,
        V=s.V,
        BV=launch.BV,
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **s.heads,
    )
    kind = _gate_kind(gate, A_log)
    dgate = s.empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    dbeta = torch.empty_like(beta, memory_format=torch.contiguous_format)
    parts = [s.empty(s.chunks.count, s.HV) if kind == "raw" else None for _ in range(2)]
    gate_backward_kernel[(s.chunks.count, s.HV)](
        dot_q,
        dot_k,
        dbeta_used,
        None if gate is None else gate.contiguous(),
        vectors,
        A_log,
        dt_bias,
        dgate,
        dbeta,
        *parts,
        cu_seqlens,
        s.chunks.table,
        s.chunks.seq_len,
        vectors.shape[1],
        beta_range,
        HV=s.HV,
        BT=CHUNK,
        GATE=kind,
        RAW_BETA=beta_range != 0,
        IS_VARLEN=cu_seqlens is not None,
        num_warps=1,
    )
    dA_log, ddt_bias = (s.empty(0) if p is None else p.sum(0) for p in parts)
    if s.HV != s.H:  # value heads that share a query and key head
        dq, dk = (x.unflatten(2, (s.H, s.HV // s.H)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dgate, dbeta, dA_log, ddt_bias, s.empty(0) if dinitial is None else dinitial


@gated_delta_rule_backward.register_fake
def _(do, dfinal, q, k, v, gate, beta, A_log, dt_bias, initial_state, *rest):
    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if x is None:
            return v.new_empty([0], dtype=torch.float32)
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

    floats = [like(x, torch.float32) for x in (A_log, dt_bias, initial_state)]
    return (like(q), like(k), like(v), like(gate), like(beta), *floats)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.beta_range, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal, *unused):
    q, k, v, gate, beta, A_log, dt_bias, initial_state, *rest = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if dfinal is not None and dfinal.numel() == 0:
        dfinal = None
    inputs = (gate, beta, A_log, dt_bias, initial_state)
    dq, dk, dv, *others = gated_delta_rule_backward(
        do, dfinal, q, k, v, *inputs, *rest, ctx.scale, ctx.beta_range, ctx.normalize
    )
    d = [None if x is None else dx.to(x.dtype) for x, dx in zip(inputs, others, strict=True)]
    return dq, dk, dv, *d, None, None, None, None, None


gated_delta_rule_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("lrnn::gated_delta_rule_recurrent", mutates_args=())
@_on_its_device
def gated_delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    beta_range: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state, token by token, without gradients. Arguments as in the forward operator."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = v.new_empty(B, T, HV, V)
    final = v.new_empty(sequences, HV, K, V, dtype=torch.float32)
    BV = 32 if K <= 128 else 16
    recurrent_kernel[(V // BV * HV * sequences,)](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if gate is None else gate.contiguous(),
        beta.contiguous(),
        A_log,
        dt_bias,
        o,
        None if initial_state is None else initial_state.contiguous(),
        final,
        cu_seqlens,
        T,
        scale,
        beta_range,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BV=BV,
        NORMALIZE=normalize,
        GATE=_gate_kind(gate, A_log),
        RAW_BETA=beta_range != 0,
        HAS_INITIAL=initial_state is not None,
        IS_VARLEN=cu_seqlens is not None,
        num_warps=4,
    )
    return o, final


@gated_delta_rule_recurrent.register_fake
def _(q, k, v, gate, beta, A_log, dt_bias, initial_state, cu_seqlens, *rest):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty([sequences, v.shape[2], q.shape[3], v.shape[3]], dtype=torch.float32)
    return v.new_empty(v.shape), final
