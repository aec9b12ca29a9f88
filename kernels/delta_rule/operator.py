"""The chunkwise gated delta rule as `torch.library` operators: allocation and launches, forward and backward.

Kept for the backward pass: the inputs, the matrix C of each chunk (`chunk_inverse`) and four numbers a token and head.
The states of the chunks and the errors Y are computed anew, unless asked for: they would be two thirds of what a layer
keeps.

Few long sequences are cut into segments, which are scanned side by side and joined (`scans`).
"""

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from lrnn.kernels.common.assembler import check_assembler
from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import matrix_dtype
from lrnn.kernels.common.launch import launch
from lrnn.kernels.common.tiles import with_rows
from lrnn.kernels.delta_rule.chunks import count_chunks
from lrnn.kernels.delta_rule.portable.gate_backward import GATE_BACKWARD, gate_backward_kernel
from lrnn.kernels.delta_rule.portable.recurrent import recurrent_kernel, recurrent_launch
from lrnn.kernels.delta_rule.scans import Scan, can_save_states, count_segments

# `torch.library.custom_op` would take fewer lines, and an eighth more host time for a forward and a backward pass.
_library = torch.library.Library("lrnn", "FRAGMENT")


def _operator(function: Callable) -> torch._ops.OpOverload:
    """The operator `lrnn::<name of the function>`, which is computed by the function, and not traced by Dynamo."""

    @torch.compiler.disable
    @functools.wraps(function)
    def run(*args):
        check_assembler(args[0].device)  # here, since Dynamo would trace it in the public function
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(args[0]):  # does nothing for CPU tensors
            return function(*args)

    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.lrnn, name).default


def _gate_kind(gate: Tensor | None, A_log: Tensor | None) -> str:
    return "none" if gate is None else "log" if A_log is None else "raw"


def _forward_results(
    q: Tensor, v: Tensor, normalize_qk: bool, output_final_state: bool, cu_seqlens: Tensor | None, save_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what the forward operator returns."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = 1 if cu_seqlens is not None else count_segments(B, T, HV, K, V, v.dtype)
    chunks = count_chunks(B, T, cu_seqlens)
    floats = functools.partial(torch.empty, dtype=torch.float32, device=v.device)
    saved = save_states and can_save_states(K, v.dtype)
    return (
        torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device),
        floats((sequences, HV, K, V) if output_final_state else 0),
        torch.empty((B * T, HV * CHUNK), dtype=matrix_dtype(v.dtype, normalize_qk), device=v.device),
        floats((4 * HV, chunks * CHUNK)),
        floats((B * segments, HV, K, V) if segments > 1 else 0),
        floats((B * segments, HV, K, V + K) if segments > 1 else 0),
        v.new_empty((B * T, HV * V) if saved else 0),
        v.new_empty((chunks * HV * V, K) if saved else 0),
    )


@_operator
def gated_delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_range: float | None,
    scale: float,
    normalize_qk: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    precision: str,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state, and what the backward pass needs: C, four numbers a token and head, states of the segments, and
    with `save_states` (where `can_save_states`) Y and the states of the chunks, as `Scan.run_forward` fills them.

    The numbers stand in rows: accumulated log-gates (base 2), step sizes, log2 of 1/|k| and of 1/|q|.

    `gate` is the log-gate, or the raw gate where `A_log` and `dt_bias` are given; `beta` the step size, or its logit
    unless `beta_range` is None. With `precision` "split" what enters the states, and in the backward pass their
    gradients, is a sum of two numbers of 16 bits. Checked by `lrnn.kernels.delta_rule.api`, the public function.
    """
    results = _forward_results(q, v, normalize_qk, output_final_state, cu_seqlens, save_states)
    o, final, c, vectors, starts, segment_ends, y, states = results
    s = Scan(q, k, v, c, vectors, cu_seqlens, scale, normalize_qk, precision == "split")
    s.run_inverse(gate, beta, A_log, dt_bias, beta_range or 0.0, _gate_kind(gate, A_log))
    initial = None if initial_state is None else initial_state.contiguous()
    last: Tensor | None = final if output_final_state else None
    if s.segments > 1:
        reach = s.find_reach(normalize_qk and beta_range is not None, initial is not None, output_final_state)
        s.run_forward(None, segment_ends, reach=reach)
        s.join_segments(starts, segment_ends, segment_ends, initial, None, backward=False)
        initial = starts
        if output_final_state:
            last = s.empty(s.chunks.sequences, s.HV, s.K, s.V)
    s.run_forward(initial, last, o=o, **({"y": y, "states": states} if states.numel() else {}))
    if s.segments > 1 and last is not None:
        final.copy_(last.unflatten(0, (s.B, s.segments))[:, -1])
    return results


@torch.library.register_fake("lrnn::gated_delta_rule_forward", lib=_library)
def _(
    q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, output_final_state, cu_seqlens,
    precision, save_states,
):  # fmt: skip
    return _forward_results(q, v, normalize_qk, output_final_state, cu_seqlens, save_states)


@_operator
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
    beta_range: float | None,
    scale: float,
    normalize_qk: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: str,
    c: Tensor,
    vectors: Tensor,
    starts: Tensor,
    segment_ends: Tensor,
    y: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate, beta, A_log and dt_bias [2, HV], and the initial state; empty where there is no such
    input.

    do [B, T, HV, V] is the gradient of the output, dfinal [N, HV, K, V] float32 that of the final state or None for
    zeros; c, vectors, starts, segment_ends, y and states are what the forward operator returned, the others what it was
    given. The gradients are contiguous, of the shapes of their inputs; those of A_log, dt_bias and the initial state
    are float32, the others have the dtypes of their inputs.
    """
    s = Scan(q, k, v, c, vectors, cu_seqlens, scale, normalize_qk, precision == "split")
    do = with_rows(do)
    dlast = None if dfinal is None else dfinal.contiguous()
    by_token, by_chunk = (s.B * s.T, s.HV * s.V), (s.chunks.count * s.HV * s.V, s.K)
    dv = s.empty(s.B, s.T, s.HV, s.V, dtype=s.dtype)
    dstates = s.empty(*by_chunk, dtype=s.dtype)
    dinitial = None if initial_state is None else s.empty(*initial_state.shape)

    if not states.numel():
        y, states = (s.empty(*shape, dtype=s.dtype) for shape in (by_token, by_chunk))
        initial = starts if s.segments > 1 else None if initial_state is None else initial_state.contiguous()
        s.run_forward(initial, None, y=y, states=states)
    if s.segments > 1:
        dstarts, dends = (s.empty(s.chunks.sequences, s.HV, s.K, s.V) for _ in range(2))
        reach = s.find_reach(normalize_qk and beta_range is not None, initial_state is not None, dlast is not None)
        s.run_backward_scan(do, None, dstarts, reach=reach)
        s.join_segments(dends, dstarts, segment_ends, dlast, dinitial, backward=True)
        s.run_backward_scan(do, dends, None, dv, dstates)
    else:
        s.run_backward_scan(do, dlast, dinitial, dv, dstates)

    dq, dk = (s.empty(s.B, s.T, s.HV, s.K, dtype=s.dtype) for _ in range(2))
    dbeta_used, dot_q, dot_k = s.empty(3, s.HV, s.R).unbind()
    s.run_chunk_backward(do, dv, y, states, dstates, dq, dk, dbeta_used, dot_q, dot_k)
    kind = _gate_kind(gate, A_log)
    dgate = s.empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    dbeta = torch.empty_like(beta, memory_format=torch.contiguous_format)
    sums = s.empty(2, s.HV, s.chunks.count) if kind == "raw" else None
    launch(
        gate_backward_kernel,
        (s.chunks.count, triton.cdiv(s.HV, GATE_BACKWARD["BH"]), 1),
        dot_q,
        dot_k,
        dbeta_used,
        None if gate is None else gate.contiguous(),
        vectors,
        A_log,
        dt_bias,
        dgate,
        dbeta,
        sums,
        cu_seqlens,
        s.chunks.table,
        s.chunks.count,
        s.chunks.seq_len,
        s.R,
        beta_range or 0.0,
        HV=s.HV,
        BT=CHUNK,
        GATE=kind,
        RAW_BETA=beta_range is not None,
        IS_VARLEN=cu_seqlens is not None,
        **GATE_BACKWARD,
    )
    dA_log_and_dt_bias = s.empty(2, 0) if sums is None else sums.sum(-1)  # one result, since results must not alias
    if s.HV != s.H:  # value heads that share a query and key head
        dq, dk = (x.unflatten(2, (s.H, s.HV // s.H)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dgate, dbeta, dA_log_and_dt_bias, s.empty(0) if dinitial is None else dinitial


@torch.library.register_fake("lrnn::gated_delta_rule_backward", lib=_library)
def _(do, dfinal, q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, *rest):
    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if x is None:
            return v.new_empty([0], dtype=torch.float32)
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

    numbers = v.new_empty([2, 0 if A_log is None else v.shape[2]], dtype=torch.float32)
    return like(q), like(k), like(v), like(gate), like(beta), numbers, like(initial_state, torch.float32)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = gated_delta_rule_forward(*inputs)
        *tensors, beta_range, scale, normalize_qk, initial_state, _, cu_seqlens, precision, _ = inputs
        ctx.save_for_backward(*tensors, initial_state, cu_seqlens, *output[2:])
        ctx.options, ctx.precision = (beta_range, scale, normalize_qk), precision
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, do, dfinal, *unused):
        q, k, v, *numbers, initial_state, cu_seqlens, c, vectors, starts, segment_ends, y, states = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(v)
        if dfinal is not None and dfinal.numel() == 0:
            dfinal = None
        with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv, dgate, dbeta, dparameters, dinitial = gated_delta_rule_backward(
                do, dfinal, q, k, v, *numbers, *ctx.options, initial_state, cu_seqlens, ctx.precision, c, vectors,
                starts, segment_ends, y, states,
            )  # fmt: skip
        found = zip((*numbers, initial_state), (dgate, dbeta, *dparameters.unbind(), dinitial), strict=True)
        *d, dinitial = (None if x is None else dx.to(x.dtype) for x, dx in found)
        return dq, dk, dv, *d, None, None, None, dinitial, None, None, None, None


def _forward_with_gradients(*inputs):
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _GatedDeltaRule.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return gated_delta_rule_forward(*inputs)


def _no_second_derivatives(ctx, *grads):
    raise NotImplementedError("the gradients of the gated delta rule have no gradients of their own")


# `register_autograd` would do for the forward operator too, but fills in arguments by the schema at every call: 40 us
# where the operator takes 60.
_library.impl("gated_delta_rule_forward", _forward_with_gradients, "Autograd")
torch.library.register_autograd("lrnn::gated_delta_rule_backward", _no_second_derivatives, lib=_library)


@_operator
def gated_delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_range: float | None,
    scale: float,
    normalize_qk: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and the final state, token by token, without gradients. Arguments as in the forward operator."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = v.new_empty(B, T, HV, V)
    final = v.new_empty(sequences, HV, K, V, dtype=torch.float32)
    settings = recurrent_launch(K)
    launch(
        recurrent_kernel,
        (V // settings["BV"] * HV * sequences, 1, 1),
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
        beta_range or 0.0,
        H=H,
        HV=HV,
        K=K,
        V=V,
        NORMALIZE=normalize_qk,
        GATE=_gate_kind(gate, A_log),
        RAW_BETA=beta_range is not None,
        HAS_INITIAL=initial_state is not None,
        IS_VARLEN=cu_seqlens is not None,
        **settings,
    )
    return o, final


@torch.library.register_fake("lrnn::gated_delta_rule_recurrent", lib=_library)
def _(q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty([sequences, v.shape[2], q.shape[3], v.shape[3]], dtype=torch.float32)
    return v.new_empty(v.shape), final
