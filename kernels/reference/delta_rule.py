"""The gated delta rule in plain PyTorch: the chunkwise form for training, the recurrence for generation.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        alpha_t = exp(g_t)
    o_t = scale * S_t^T q_t

(gated DeltaNet, arXiv 2412.06464, equation 10; DeltaNet, arXiv 2406.06484, is `g = None`.) With |k| = 1 the factor has
the eigenvalue 1 - beta along k: beta in (0, 1) keeps it in [0, 1], beta in (0, 2) in [-1, 1] (arXiv 2411.12537).

Everything is computed in float32, or in float64 for float64 inputs, whatever autocast says. The file depends on torch
alone: it is copied unchanged into exported model folders.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import document_ids

PRECISIONS = ("standard", "split")


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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule to whole sequences by chunks, or by the recurrence if T is 1.

    Args:
        q, k: queries and keys [B, T, H, K], any float dtype.
        v: values [B, T, HV, V], HV a multiple of H: value head h uses query and key head h // (HV // H).
        g: log-gates [B, T, HV], at most 0, any float dtype; None for no gate.
        beta: step sizes [B, T, HV], in [0, 2], any float dtype.
        scale: factor on the output, above 0; default K ** -0.5.
        normalize_qk: use q/|q| and k/|k|, with |x| at least 1e-6; otherwise q and k are used as given.
        initial_state: [N, HV, K, V], any float dtype, or None for zeros; N is B, or the number of documents with
            `cu_seqlens`.
        output_final_state: whether the final state is returned.
        cu_seqlens: int32 or int64 [N + 1], boundaries of documents in the flattened B * T tokens, all of them covered.
            Each document starts from its initial state. Documents may be empty.
        precision: "standard" or "split", as for the kernels, so that models may use either. It has no effect here,
            because nothing is rounded to 16 bits.
        chunk_size: tokens per chunk.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32 (float64 for float64 inputs), or
        None.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, there are no tokens, the scale is not positive,
            `cu_seqlens` on the CPU does not cover the tokens in order, or the precision is unknown.
    """
    check_shapes(q, k, v, g, beta, initial_state, cu_seqlens, scale)
    check_precision(precision)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v_, beta = (x.to(dtype) for x in (q, k, v, beta))
        g, state = (None if x is None else x.to(dtype) for x in (g, initial_state))
        if normalize_qk:
            q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        if v.shape[2] != q.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        if cu_seqlens is not None and (output_final_state or state is not None):
            o, state = _document_by_document(q, k, v_, beta, g, state, scale, cu_seqlens, chunk_size)
        elif q.shape[1] == 1 and cu_seqlens is None:
            o, state = _recurrent(q, k, v_, beta, g, state, scale)
        else:
            document = None if cu_seqlens is None else document_ids(cu_seqlens, q.shape[0], q.shape[1])
            o, state = _chunkwise(q, k, v_, beta, g, state, scale, document, chunk_size)
    return o.to(v.dtype), state if output_final_state else None


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
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule to raw projections: normalise q and k, and compute gates and step sizes from a and b.

        beta = beta_range sigmoid(b)        g = -exp(A_log) softplus(a + dt_bias)

    Args:
        a, b: [B, T, HV], any float dtype; a is None (with A_log and dt_bias) for no gate.
        A_log, dt_bias: [HV], any float dtype, contiguous.
        beta_range: 2 for eigenvalues in [-1, 1] (arXiv 2411.12537), 1 for [0, 1]; None if b holds the step sizes
            themselves, in [0, 2]. At most 2.

    The other arguments, the results and the errors are those of `gated_delta_rule`.
    """
    check_shapes(q, k, v, a, b, initial_state, cu_seqlens, scale, names=("a", "b"))
    check_gate(a, A_log, dt_bias, v)
    check_beta_range(beta_range)
    g, beta = _gates_and_steps(a, b, A_log, dt_bias, beta_range, v)
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        normalize_qk=True,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        precision=precision,
    )


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
) -> tuple[Tensor, Tensor | None]:
    """Apply gated DeltaProduct (arXiv 2502.10297, equation 5) by the rule above. See `factors_as_steps`."""
    *steps, bounds = factors_as_steps(q, k, v, g, beta, cu_seqlens)
    n_h = k.shape[2]
    o, state = gated_delta_rule(
        *steps,
        scale=scale,
        normalize_qk=normalize_qk,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=bounds,
        precision=precision,
    )
    return o[:, n_h - 1 :: n_h], state


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
) -> tuple[Tensor, Tensor | None]:
    """Apply gated DeltaProduct to raw projections, as `fused_gated_delta_rule` applies the rule.

    Args:
        a: [B, T, HV] or None, b: [B, T, n_h, HV]. The others are those of `gated_delta_product`.
    """
    check_factors(q, k, v, a, b, cu_seqlens, names=("a", "b"))
    check_gate(a, A_log, dt_bias, v[:, :, 0])
    check_beta_range(beta_range)
    g, beta = _gates_and_steps(a, b, A_log, dt_bias, beta_range, v)
    return gated_delta_product(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        normalize_qk=True,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        precision=precision,
    )


def _gates_and_steps(a, b, A_log, dt_bias, beta_range, v):
    """Return the log-gates, or None, and the step sizes of raw ones."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        beta = b if beta_range is None else beta_range * b.to(dtype).sigmoid()
        if a is None:
            return None, beta
        return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype)), beta


def factors_as_steps(q, k, v, g, beta, cu_seqlens):
    """Turn n_h factors per token into n_h steps of the rule, with the gate on the first and the query on the last.

    Args:
        q: [B, T, H, K].
        k: [B, T, n_h, H, K].
        v: [B, T, n_h, HV, V].
        g: [B, T, HV] or None.
        beta: [B, T, n_h, HV].
        cu_seqlens: boundaries of documents, in tokens.

    Returns:
        The arguments in the same order for T n_h steps. The output of token t is that of step t n_h + n_h - 1.

    Raises:
        ValueError: If the shapes do not fit, or `cu_seqlens` does not fit the tokens (`check_factors`).
    """
    check_factors(q, k, v, g, beta, cu_seqlens)
    n_h = k.shape[2]
    # [B, T, n_h, ...] -> [B, T n_h, ...]
    q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n_h - 1, 0)).flatten(1, 2)
    if g is not None:
        g = F.pad(g.unsqueeze(2), (0, 0, 0, n_h - 1)).flatten(1, 2)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens * n_h
    return q, k.flatten(1, 2), v.flatten(1, 2), g, beta.flatten(1, 2), cu_seqlens


def check_factors(q, k, v, g, beta, cu_seqlens, names=("g", "beta")):
    """Raise ValueError if the shapes of `gated_delta_product` do not fit, or `cu_seqlens` does not fit the tokens.

    Later checks would name the shapes of steps, which the caller never passed. g and beta go by `names`.
    """
    fits = q.ndim == 4 and k.ndim == v.ndim == 5 and k.shape[:3] == v.shape[:3] and k.shape[:2] == q.shape[:2]
    if not fits or k.shape[3:] != q.shape[2:] or k.shape[2] == 0:
        raise ValueError(
            "q must be [B, T, H, K], k [B, T, n_h, H, K] and v [B, T, n_h, HV, V], n_h > 0; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    B, T, n_h, HV, _ = v.shape
    if g is not None and list(g.shape) != [B, T, HV]:
        raise ValueError(f"{names[0]} must be [B, T, HV] = {[B, T, HV]}, one gate per token; got {list(g.shape)}")
    if list(beta.shape) != [B, T, n_h, HV]:
        raise ValueError(f"{names[1]} must be [B, T, n_h, HV] = {[B, T, n_h, HV]}; got {list(beta.shape)}")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q.device, B * T)


def check_precision(precision: str):
    """Raise ValueError if `precision` is unknown to the kernels."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")


def check_shapes(q, k, v, g, beta, initial_state, cu_seqlens, scale, names=("g", "beta")):
    """Raise ValueError if the arguments of `gated_delta_rule` do not fit each other; g and beta go by `names`."""
    fits = q.ndim == v.ndim == 4 and q.shape == k.shape and v.shape[:2] == q.shape[:2]
    if not fits or v.shape[2] % q.shape[2]:
        raise ValueError(
            "q and k must be [B, T, H, K] and v [B, T, HV, V], HV a multiple of H; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    tokens = v.shape[0] * v.shape[1]
    if tokens == 0:
        raise ValueError(f"there must be tokens; got v {list(v.shape)}")
    named = {"q": q, "k": k, "v": v, **dict(zip(names, (g, beta), strict=True)), "initial_state": initial_state}
    for name in names:
        if named[name] is not None and named[name].shape != v.shape[:3]:
            raise ValueError(f"{name} must be [B, T, HV] = {list(v.shape[:3])}; got {list(named[name].shape)}")
    _check_numbers(named, q.device)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q.device, tokens)
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        wanted = [sequences, v.shape[2], q.shape[3], v.shape[3]]
        if list(initial_state.shape) != wanted:
            raise ValueError(f"initial_state must be [N, HV, K, V] = {wanted}; got {list(initial_state.shape)}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")


def check_gate(a, A_log, dt_bias, v):
    """Raise ValueError if some arguments of a raw gate are missing, or do not fit v [B, T, HV, V]."""
    if (a is None) != (A_log is None) or (a is None) != (dt_bias is None):
        raise ValueError("a, A_log and dt_bias go together: all three for a gate, or none")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        # The kernels read HV contiguous numbers, whatever the length of the tensor.
        if x is not None and (list(x.shape) != [v.shape[2]] or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be [HV] = [{v.shape[2]}] and contiguous; got {list(x.shape)}, strides {list(x.stride())}"
            )
    _check_numbers({"A_log": A_log, "dt_bias": dt_bias}, v.device)


def check_beta_range(beta_range):
    """Raise ValueError unless the range is None or in (0, 2]. With larger step sizes, a transition could grow."""
    if beta_range is not None and not 0 < beta_range <= 2:
        raise ValueError(f"beta_range must be in (0, 2], or None for step sizes as they are; got {beta_range}")


def check_documents(cu_seqlens, device, tokens):
    """Raise ValueError if `cu_seqlens` does not bound documents that cover that many tokens.

    Values are checked only on the CPU. On a GPU, every call would have to wait for it.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [documents + 1]; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on {device}; it is on {cu_seqlens.device}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():  # a graph cannot depend on values
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must go from 0 to {tokens}, the number of tokens, and not fall; got {bounds}")


def _check_numbers(named, device):
    for name, x in named.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating-point; it is {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device}; it is on {x.device}")


def _document_by_document(q, k, v, beta, g, state, scale, cu_seqlens, chunk_size):
    """Process each document as a separate batch, for initial and final states, which masks in one pass do not give."""
    shape = v.shape
    q, k, v, beta, g = (None if x is None else x.flatten(0, 1)[None] for x in (q, k, v, beta, g))
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        before = None if state is None else state[n : n + 1]
        if start == end:
            states.append(q.new_zeros(1, *v.shape[2:3], q.shape[3], v.shape[3]) if before is None else before)
            continue
        own_q, own_k, own_v, own_beta, own_g = (None if x is None else x[:, start:end] for x in (q, k, v, beta, g))
        o, after = _chunkwise(own_q, own_k, own_v, own_beta, own_g, before, scale, None, chunk_size)
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, 1).view(shape), torch.cat(states)


def _recurrent(q, k, v, beta, g, state, scale):
    """Compute the recurrence as written above, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    out = []
    for t in range(T):
        if g is not None:
            S = S * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S


def _chunkwise(q, k, v, beta, g, state, scale, document, chunk_size):
    """Compute it by chunks of C tokens: the WY form of arXiv 2406.06484, section 3, gated as 2412.06464, section 3.3.

    Inside a chunk, with gamma_i the gate accumulated up to token i, G_ij = gamma_i / gamma_j and S the incoming state:
        L = tril(diag(beta) (G . K K^T), -1)      [U | W] = (I + L)^-1 diag(beta) [V | gamma K]
        N = U - W S                               O = scale (gamma Q S + tril(G . Q K^T) N)
        S' = gamma_C S + (gamma_C / gamma . K)^T N
    A document that starts inside the chunk cuts every product that would reach back past its start.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = min(chunk_size, T)
    n_chunks = -(-T // C)
    pad = n_chunks * C - T  # padded tokens have beta = 0 and g = 0: the identity on the state

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, n, C, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) if pad else x
        return x.unflatten(1, (n_chunks, C)).movedim(3, 1)

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    ones = torch.ones(C, C, dtype=torch.bool, device=q.device)
    reaches = ones.tril()  # [C, C]: token i sees token j
    from_start = to_end = passes = (
        None  # which tokens see the incoming state, reach the outgoing one; does the state pass
    )
    if document is not None:
        document = F.pad(document, (0, pad), mode="replicate") if pad else document
        document = document.view(B, 1, n_chunks, C)
        reaches = reaches & (document[..., :, None] == document[..., None, :])
        incoming = torch.cat([document[:, :, :1, :1] - 1, document[:, :, :-1, -1:]], 2)
        from_start = (document == incoming)[..., None]
        to_end = (document == document[..., -1:])[..., None]
        passes = (document[..., -1:] == incoming)[..., None]

    if g is None:
        decay = reaches.to(q.dtype)
        gamma, rho, gamma_C = (1.0 if m is None else m.to(q.dtype) for m in (from_start, to_end, passes))
    else:
        # Sums of log-gates in float64: a gate of e^-80 would otherwise cost its neighbours three digits.
        total = chunks(g).double().cumsum(-1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~reaches, float("-inf"))
        decay = between.to(q.dtype).exp()

        def gate(log: Tensor, mask: Tensor | None) -> Tensor:
            log = log.to(q.dtype)[..., None]
            return (log if mask is None else log.masked_fill(~mask, float("-inf"))).exp()

        gamma = gate(total, from_start)
        rho = gate(total[..., -1:] - total, to_end)
        gamma_C = gate(total[..., -1:], passes)

    lower = (beta * decay * (k @ k.mT)).tril(-1)
    solved = torch.linalg.solve_triangular(
        lower, torch.cat([beta * v, beta * gamma * k], -1), upper=False, unitriangular=True
    )
    u, w = solved.split([V, K], -1)

    # Only this loop is sequential; unbind (not indexing) keeps its backward linear in the number of chunks.
    S = q.new_zeros(B, H, K, V) if state is None else state
    states, news = [], []
    carried = [gamma_C] * n_chunks if isinstance(gamma_C, float) else gamma_C.unbind(2)
    for u_n, w_n, k_n, carry in zip(u.unbind(2), w.unbind(2), (rho * k).unbind(2), carried, strict=True):
        new = u_n - w_n @ S
        states.append(S)
        news.append(new)
        S = carry * S + k_n.mT @ new
    o = (gamma * q) @ torch.stack(states, 2) + (decay * (q @ k.mT)) @ torch.stack(news, 2)
    o = (scale * o).movedim(1, 3).flatten(1, 2)[:, :T]
    return o, S
