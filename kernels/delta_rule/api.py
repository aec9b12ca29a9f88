"""The gated delta rule for training and generation: by Triton kernels on CUDA, by chunks in PyTorch on the CPU.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        alpha_t = exp(g_t)
    o_t = scale S_t^T q_t

This is gated DeltaNet (arXiv 2412.06464, equation 10) or, without a gate, DeltaNet (arXiv 2406.06484). With |k| = 1 the
factor has the eigenvalue 1 - beta along k. With beta in (0, 2) it reaches [-1, 1], which state tracking needs (arXiv
2411.12537).

On CUDA there is no other path: inputs that the kernels do not support raise an error. The kernels are written for keys
of 64, 128 and 256, and for values of multiples of 64 up to 256. Other sizes are padded with zeros to the next of these,
which changes no result. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn.kernels.common.architecture import Architecture
from lrnn.kernels.common.dispatch import use_kernels
from lrnn.kernels.common.dtypes import DTYPES
from lrnn.kernels.delta_rule.heads import pad_heads, padded_sizes
from lrnn.kernels.delta_rule.operator import gated_delta_rule_forward, gated_delta_rule_recurrent
from lrnn.kernels.delta_rule.settings import choose_settings
from lrnn.kernels.reference import delta_rule as reference

MOST_FACTORS = 16  # factors per token: with more, a chunk would have fewer queries than products take rows
SHORT = 16  # steps up to which the recurrence is faster, if no gradient is needed
_saving = False  # the default of `save_states`


@contextmanager
def saving_states() -> Iterator[None]:
    """Make `save_states` True by default inside this context, for layers that are recomputed.

    Their backward pass follows at once, so the saved tensors take no memory that the pass would not take itself, and
    one scan is avoided. Use this as the second context that `context_fn` of `torch.utils.checkpoint.checkpoint`
    returns. The saved tensors then differ in size from the first time, so `determinism_check` must be "none".
    """
    global _saving
    before, _saving = _saving, True
    try:
        yield
    finally:
        _saving = before


def is_saving() -> bool:
    """Return whether `save_states` is True by default here."""
    return _saving


def check_gpu(K: int, V: int, dtype: torch.dtype, gpu: Architecture) -> None:
    """Check that a GPU has kernels for keys of size K, values of size V, and a dtype.

    Raises:
        ValueError: a size is above 256, or the GPU's shared memory or its compute capability is too small.
    """
    choose_settings(padded_sizes(K, V)[0], dtype, gpu)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    precision: str = "standard",
    save_states: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule to whole sequences, with gradients to every floating-point argument.

    Args:
        q, k: queries and keys [B, T, H, K]; on CUDA K and V are each at most 256, and q, k, v have one dtype,
            bfloat16, float16 or float32. K costs as much as the next of 64, 128 and 256, V as the next multiple of 64.
        v: values [B, T, HV, V], HV a multiple of H: value head h uses query and key head h // (HV // H).
        g: log-gates [B, T, HV], at most 0, any float dtype; None for no gate.
        beta: step sizes [B, T, HV], in [0, 2], any float dtype.
        scale: factor on the output, above 0; default K ** -0.5.
        normalize_qk: use q/|q| and k/|k|, with |x| at least 1e-6. The norms are those of q and k as given, in float32,
            and stay out of the rounded operands: the factor has the eigenvalue 1 - beta in every dtype. A key that was
            normalised and then rounded does not give that, because |k|^2 is off by the rounding.
        initial_state: [N, HV, K, V] float32, or None for zeros; N is B, or the number of documents with `cu_seqlens`.
        output_final_state: whether the final state is returned.
        cu_seqlens: int32 or int64 [N + 1], boundaries of documents in the flattened B * T tokens. They cover all of
            them, from 0 to B * T, and do not fall. On CUDA this is not checked, because that would wait for the GPU.
            Each document starts from its initial state, and may be empty. All tokens must be finite: a NaN can reach
            the document before its own.
        precision: "standard" or "split". With "split", each value that enters the states, or their gradients, is a sum
            of two numbers of 16 bits, at the cost of one more product in each scan. A state that is carried by
            reflections along several keys is then about 3 times as exact in bfloat16, and little more exact in float16.
            It changes nothing in float32, whose products are split either way, nor for up to 16 tokens without
            gradients, where no state is rounded.
        save_states: keep tensors until the backward pass that it would otherwise recompute by a second scan: the states
            before chunks of 64 tokens, and an error for each value. That takes V (2 + K / 32) bytes per token and value
            head in 16 bits (768 with K = V = 128), twice as many in float32; K and V are the sizes of the kernels, as
            above. It changes no result. Nothing is kept if no gradient is needed, nor with K above 128 (in float32
            above 64), where the scan that saves would exceed the shared memory. Default: only inside `saving_states`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32, or None.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, there are no tokens, the scale is not positive,
            `cu_seqlens` on the CPU does not cover the tokens in order, or the precision is unknown. On CUDA, also if a
            head size or dtype is not supported, or not on that GPU (`check_gpu`).
    """
    reference.check_shapes(q, k, v, g, beta, initial_state, cu_seqlens, scale)
    reference.check_precision(precision)
    if not use_kernels(q):
        return reference.gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            normalize_qk=normalize_qk,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            precision=precision,
        )
    options = (initial_state, output_final_state, cu_seqlens, precision, save_states)
    return _run(q, k, v, g, beta, None, None, None, scale, normalize_qk, *options)


def fused_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    beta_range: float | None = 2.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    precision: str = "standard",
    save_states: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule to raw projections: norms, gates and step sizes are computed inside the kernels.

        k^ = k/|k|, q^ = q/|q|        beta = beta_range sigmoid(b)        g = -exp(A_log) softplus(a + dt_bias)

    Args:
        q, k, v: as in `gated_delta_rule`, before normalisation.
        a: raw gates [B, T, HV], any float dtype; None, with A_log and dt_bias, for no gate (DeltaNet).
        b: logits of the step sizes [B, T, HV], any float dtype. A token with b and a of -inf leaves the state as it is.
        A_log, dt_bias: [HV], any float dtype, contiguous.
        beta_range: 2 for eigenvalues in [-1, 1] (arXiv 2411.12537), 1 for [0, 1]; None if b holds the step sizes
            themselves, in [0, 2]. At most 2.

    The other arguments, the results and the errors are those of `gated_delta_rule`.
    """
    reference.check_shapes(q, k, v, a, b, initial_state, cu_seqlens, scale, names=("a", "b"))
    reference.check_gate(a, A_log, dt_bias, v)
    reference.check_beta_range(beta_range)
    reference.check_precision(precision)
    if not use_kernels(q):
        return reference.fused_gated_delta_rule(
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            beta_range=beta_range,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            precision=precision,
        )
    options = (initial_state, output_final_state, cu_seqlens, precision, save_states)
    return _run(q, k, v, a, b, A_log, dt_bias, beta_range, scale, True, *options)


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    precision: str = "standard",
    save_states: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply gated DeltaProduct (arXiv 2502.10297): n_h generalised Householder factors per token.

        S_t = prod_j (I - beta_tj k_tj k_tj^T) alpha_t S_{t-1} + what the factors write        o_t = scale S_t^T q_t

    It is the gated delta rule on n_h steps per token, with the gate on the first and the output after the last. Each
    factor has its own eigenvalue 1 - beta in [-1, 1]. There are no outputs after the other steps.

    Args:
        q: [B, T, H, K].
        k: keys of the factors [B, T, n_h, H, K]; on CUDA n_h is at most 16.
        v: [B, T, n_h, HV, V].
        g: [B, T, HV] or None.
        beta: [B, T, n_h, HV].

    The other arguments, the results and the errors are those of `gated_delta_rule`; `cu_seqlens` counts tokens.
    """
    reference.check_factors(q, k, v, g, beta, cu_seqlens)
    reference.check_shapes(q, k[:, :, 0], v[:, :, 0], g, beta[:, :, 0], initial_state, cu_seqlens, scale)
    reference.check_precision(precision)
    if not use_kernels(q):
        return reference.gated_delta_product(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            normalize_qk=normalize_qk,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            precision=precision,
        )
    options = (initial_state, output_final_state, cu_seqlens, precision, save_states)
    return _run_factors(q, k, v, g, beta, None, None, None, scale, normalize_qk, *options)


def fused_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    beta_range: float | None = 2.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    precision: str = "standard",
    save_states: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply gated DeltaProduct to raw projections, as `fused_gated_delta_rule` applies the rule.

    Args:
        q, k, v: as in `gated_delta_product`, before normalisation.
        a: raw gates [B, T, HV], one per token; None, with A_log and dt_bias, for no gate.
        b: logits of the step sizes [B, T, n_h, HV].

    The other arguments, the results and the errors are those of `fused_gated_delta_rule`; `cu_seqlens` counts tokens.
    """
    reference.check_factors(q, k, v, a, b, cu_seqlens, names=("a", "b"))
    reference.check_shapes(q, k[:, :, 0], v[:, :, 0], a, b[:, :, 0], initial_state, cu_seqlens, scale, names=("a", "b"))
    reference.check_gate(a, A_log, dt_bias, v[:, :, 0])
    reference.check_beta_range(beta_range)
    reference.check_precision(precision)
    if not use_kernels(q):
        return reference.fused_gated_delta_product(
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            beta_range=beta_range,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            precision=precision,
        )
    options = (initial_state, output_final_state, cu_seqlens, precision, save_states)
    return _run_factors(q, k, v, a, b, A_log, dt_bias, beta_range, scale, True, *options)


def _run_factors(
    q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, output_final_state, cu_seqlens,
    precision, save_states,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n_h = k.shape[2]
    if n_h > MOST_FACTORS:
        raise ValueError(f"the kernels support up to {MOST_FACTORS} factors per token; got {n_h}")
    k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2)  # by step
    bounds = None if cu_seqlens is None else cu_seqlens * n_h
    options = (initial_state, output_final_state, bounds, precision, save_states)
    return _run(q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, *options)


def _run(
    q, k, v, gate, beta, A_log, dt_bias, beta_range, scale, normalize_qk, initial_state, output_final_state, cu_seqlens,
    precision, save_states,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    K, V = q.shape[3], v.shape[3]
    padded_k, padded_v = padded_sizes(K, V)
    if v.dtype not in DTYPES or q.dtype != v.dtype or k.dtype != v.dtype:
        raise ValueError(
            "the kernels support q, k and v of one dtype, bfloat16, float16 or float32; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    scale = K**-0.5 if scale is None else float(scale)
    more_k, more_v = padded_k - K, padded_v - V
    q, k, v = pad_heads(q, padded_k), pad_heads(k, padded_k), pad_heads(v, padded_v)
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    tensors, options = (q, k, v, gate, beta, A_log, dt_bias), (beta_range, scale, normalize_qk)
    needs_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*tensors, initial_state)
    )
    if v.shape[1] <= SHORT and not needs_gradient:
        o, final = gated_delta_rule_recurrent(*tensors, *options, initial_state, cu_seqlens)
    else:
        saves = needs_gradient and (_saving if save_states is None else save_states)
        flags = (initial_state, output_final_state, cu_seqlens, precision, saves)
        o, final, *_ = gated_delta_rule_forward(*tensors, *options, *flags)
    return o[..., :V], final[..., :K, :V] if output_final_state else None
