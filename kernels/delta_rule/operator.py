"""The gated delta rule as `torch.library` operators: allocation and launches, forward and backward.

The inputs, the matrix C of each chunk (`chunk_inverse`) and four numbers per token and head are kept for the backward
pass. The states of the chunks and the errors Y are recomputed unless `save_states` is set. They would be two thirds of
the memory that a layer keeps.

Operators take their arguments by position, in the order of `lrnn.kernels.delta_rule.api`, which checks them. Keys,
values and step sizes are by step, [B, T, ...], and queries, gates and outputs by token: with n_h factors per token,
they are [B, T / n_h, ...] (`Call`).
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lrnn.kernels.common.assembler import check_assembler
from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import matrix_dtype
from lrnn.kernels.common.tiles import with_rows
from lrnn.kernels.delta_rule.backends import choose_backend
from lrnn.kernels.delta_rule.call import Call, Operands, can_save_states
from lrnn.kernels.delta_rule.portable.gate_backward import launch_gate_backward
from lrnn.kernels.delta_rule.portable.recurrent import launch_recurrent
from lrnn.kernels.delta_rule.segments import find_end_gradients, find_starts

# `torch.library.custom_op` would take fewer lines, but an eighth more host time for a forward and a backward pass.
_library = torch.library.Library("lrnn", "FRAGMENT")


def _operator(function: Callable) -> torch._ops.OpOverload:
    """Return the operator `lrnn::<name of the function>`, which runs the function and is not traced by Dynamo."""

    @torch.compiler.disable
    @functools.wraps(function)
    def run(*args):
        check_assembler(args[0].device)  # here, because Dynamo would trace it in the public function
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(args[0]):  # does nothing for CPU tensors
            return function(*args)

    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.lrnn, name).default


def _forward_results(
    call: Call, output_final_state: bool, save_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return new tensors for the results of the forward operator; empty ones for results that are not requested."""
    segments, cut = call.B * call.segments, call.segments > 1
    saved = save_states and can_save_states(call.K, call.dtype)

    def empty_if(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.empty(*(shape if wanted else (0,)), dtype=dtype)

    return (
        call.empty(call.B, call.tokens, call.HV, call.V, dtype=call.dtype),
        empty_if(output_final_state, call.states, call.HV, call.K, call.V),
        call.empty(call.B * call.T, call.HV * CHUNK, dtype=matrix_dtype(call.dtype, call.normalize_qk)),
        call.empty(4 * call.HV, call.R),
        empty_if(cut, segments, call.HV, call.K, call.V),
        empty_if(cut, segments, call.HV, call.K, call.V + call.K),
        empty_if(saved, call.B * call.T, call.HV * call.V, dtype=call.dtype),
        empty_if(saved, call.R // CHUNK * call.HV * call.V, call.K, dtype=call.dtype),
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
    """Compute o, the final state, and the tensors that the backward pass needs.

    Args:
        gate: log-gates, or raw gates if `A_log` and `dt_bias` are given.
        beta: step sizes, or their logits unless `beta_range` is None.
        precision: with "split", each value that enters the states, or their gradients in the backward pass, is a sum of
            two numbers of 16 bits.

    The other arguments are those of `fused_gated_delta_rule`.

    Returns:
        o and the final state; C and the vectors (`Operands`); states in which segments start, and their ends with
        transitions (`find_starts`); with `save_states` (where `can_save_states`) Y and the states of the chunks, as
        `Backend.forward_scan` fills them. Results that are not requested are empty.
    """
    call = Call.of(q, k, v, gate, A_log, beta_range, scale, normalize_qk, cu_seqlens, precision)
    results = _forward_results(call, output_final_state, save_states)
    o, final, c, vectors, starts, segment_ends, y, states = results
    backend, operands = choose_backend(call), Operands(call, q, k, v, c, vectors)
    backend.chunk_inverse(call, operands, gate, beta, A_log, dt_bias)
    initial = None if initial_state is None else initial_state.contiguous()
    last: Tensor | None = final if output_final_state else None
    if call.segments > 1:
        find_starts(backend, call, operands, initial, starts, segment_ends, save_last=output_final_state)
        initial = starts
        if output_final_state:
            last = call.empty(call.chunks.sequences, call.HV, call.K, call.V)
    saved = {"y": y, "states": states} if states.numel() else {}
    backend.forward_scan(call, operands, initial, last, o=o, **saved)
    if call.segments > 1 and last is not None:
        final.copy_(last.unflatten(0, (call.B, call.segments))[:, -1])
    return results


@torch.library.register_fake("lrnn::gated_delta_rule_forward", lib=_library)
def _(
    q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, output_final_state, cu_seqlens,
    precision, save_states,
):  # fmt: skip
    call = Call.of(q, k, v, gate, A_log, beta_range, scale, normalize_qk, cu_seqlens, precision)
    return _forward_results(call, output_final_state, save_states)


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
    """Compute the gradients of q, k, v, gate, beta, A_log and dt_bias [2, HV], and the initial state.

    Args:
        do: gradient of the output, by token.
        dfinal: gradient of the final state [N, HV, K, V] float32, or None for zeros.
        c, vectors, starts, segment_ends, y, states: what the forward operator returned.

    The other arguments are those of the forward operator.

    Returns:
        Contiguous gradients of the shapes of their inputs, empty where there is no such input. Those of A_log, dt_bias
        and the initial state are float32, the others have the dtypes of their inputs.
    """
    call = Call.of(q, k, v, gate, A_log, beta_range, scale, normalize_qk, cu_seqlens, precision)
    backend, operands = choose_backend(call), Operands(call, q, k, v, c, vectors)
    do = with_rows(do)
    dlast = None if dfinal is None else dfinal.contiguous()
    by_step, by_chunk = (call.B * call.T, call.HV * call.V), (call.chunks.count * call.HV * call.V, call.K)
    dv = call.empty(call.B, call.T, call.HV, call.V, dtype=call.dtype)
    dstates = call.empty(*by_chunk, dtype=call.dtype)
    dinitial = None if initial_state is None else call.empty(*initial_state.shape)

    if not states.numel():
        y, states = (call.empty(*shape, dtype=call.dtype) for shape in (by_step, by_chunk))
        initial = starts if call.segments > 1 else None if initial_state is None else initial_state.contiguous()
        backend.forward_scan(call, operands, initial, None, y=y, states=states)
    if call.segments > 1:
        dends = find_end_gradients(backend, call, operands, do, dlast, dinitial, segment_ends)
        backend.backward_scan(call, operands, do, dends, None, dv, dstates)
    else:
        backend.backward_scan(call, operands, do, dlast, dinitial, dv, dstates)

    dq, dk = (call.empty(call.B, T, call.HV, call.K, dtype=call.dtype) for T in (call.tokens, call.T))
    dbeta_used, dot_q, dot_k = call.empty(3, call.HV, call.R).unbind()
    backend.chunk_backward(call, operands, do, dv, y, states, dstates, dq, dk, dbeta_used, dot_q, dot_k)
    # The gradients of A_log and dt_bias are one result, because results must not alias.
    dgate, dbeta, dparameters = launch_gate_backward(
        call, operands, dbeta_used, dot_q, dot_k, gate, beta, A_log, dt_bias
    )
    if call.HV != call.H:  # value heads that share a query and key head
        dq, dk = (x.unflatten(2, (call.H, call.HV // call.H)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dgate, dbeta, dparameters, call.empty(0) if dinitial is None else dinitial


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
            do = v.new_zeros(*q.shape[:2], *v.shape[2:])
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


# `register_autograd` would also work for the forward operator, but it fills in arguments by the schema at every call.
# This takes 40 us, where the operator takes 60.
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
    """Compute o and the final state token by token, without gradients. Arguments are those of the forward operator."""
    call = Call.of(q, k, v, gate, A_log, beta_range, scale, normalize_qk, cu_seqlens)
    return launch_recurrent(call, q, k, v, gate, beta, A_log, dt_bias, initial_state)


@torch.library.register_fake("lrnn::gated_delta_rule_recurrent", lib=_library)
def _(q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty([sequences, v.shape[2], q.shape[3], v.shape[3]], dtype=torch.float32)
    return v.new_empty([*q.shape[:2], *v.shape[2:]]), final
