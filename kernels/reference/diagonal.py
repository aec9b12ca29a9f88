"""Recurrences with a diagonal state transition of either sign, in plain PyTorch.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t        a_t = sign_t exp(g_t), g_t <= 0

a_t is a vector over the key dimension (GLA, arXiv 2312.06635) or one number per head (Mamba-2, arXiv 2405.21060, mLSTM,
arXiv 2405.04517). In these papers it is positive. Negative values through 2a - 1, which arXiv 2411.12537 uses for
Mamba, and their chunkwise form are new here: the sign of the product of a between tokens j and t is s_t s_j, where s_t
is the running product of all signs. Folded into q and k, it leaves a recurrence with decays |a|, computed in log space.

Kernels are tested against this file. It also runs in float32 on CUDA (`recurrences.py` decides what runs
where). Everything is computed in float32, or in float64 for float64 inputs, whatever autocast says. The file
depends on torch alone: it is copied into exported model folders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def signed_decay(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2a - 1 for a = exp(log_a) in [0, 1] as (log|2a - 1|, sign), both of the shape and dtype of log_a.

    If |2a - 1| is below the resolution of the dtype (1e-8 for float64), the logarithm is that of the resolution. The
    gradient is computed as if it were not clamped.
    """
    near_one = -torch.expm1(log_a)  # 1 - a
    a = log_a.exp()
    positive = a >= 0.5
    missing = 2 * torch.where(positive, near_one, a)  # 1 - |2a - 1|
    most = 1 - max(torch.finfo(log_a.dtype).eps, 1e-8)
    missing = missing + (missing.clamp(max=most) - missing).detach()
    return torch.log1p(-missing), torch.where(positive, 1.0, -1.0).to(log_a.dtype)


def diagonal_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    sign: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    document: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence over whole sequences in chunks, or token by token if T is 1.

    Args:
        q, k: [B, T, H, K], any float dtype.
        v: [B, T, H, V].
        g: log|a|, [B, T, H, K], or [B, T, H, 1] for one number per head; finite and at most 0.
        sign: of a, 1 or -1, of the shape of g; None where all are positive.
        scale: factor on the output.
        initial_state: [B, H, K, V], or None for zeros.
        output_final_state: whether the final state is returned.
        document: int64 [B, T], the document of each token (`document_ids`): the state is reset at each. The initial
            state is that ahead of the first document of each row, the final state that behind its last.
        chunk_size: tokens per chunk; default 64 with one number per head, 16 with a vector, whose decays between the
            tokens of a chunk are a tensor [chunk, chunk, K].

    Returns:
        o [B, T, H, V] and the final state [B, H, K, V], in float32 (float64 for float64 v); or None for the state.

    Raises:
        ValueError: If shapes do not fit.
    """
    check(q, k, v, g, sign)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
        state = None if initial_state is None else initial_state.to(dtype)
        if q.shape[1] == 1 and document is None:
            a = g.exp() if sign is None else sign.to(dtype) * g.exp()
            o, state = recurrent(q, k, v, a, state)
        else:
            if sign is not None:
                running = sign.to(dtype).cumprod(1)
                q, k = q * running, k * running
            chunk_size = chunk_size or (64 if g.shape[-1] == 1 else 16)
            o, state = _chunkwise(q, k, v, g, state, document, chunk_size)
            if sign is not None:
                state = state * running[:, -1, :, :, None]
    return scale * o, state if output_final_state else None


def recurrent(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as written above, token by token. The chunkwise form is tested against it.

    a [B, T, H, K] or [B, T, H, 1], of either sign; the other arguments and the results as above, with a scale of 1.
    """
    S = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if state is None else state
    out = []
    for q_t, k_t, v_t, a_t in zip(*(x.unbind(1) for x in (q, k, v, a)), strict=True):
        S = a_t[..., None] * S + k_t[..., None] * v_t[..., None, :]
        out.append((q_t[..., None, :] @ S)[..., 0, :])
    return torch.stack(out, 1), S


def check(q, k, v, g, sign):
    """Raise ValueError if the arguments of `diagonal_recurrence` do not fit each other."""
    fits = q.ndim == v.ndim == 4 and q.shape == k.shape and v.shape[:3] == q.shape[:3]
    if not fits or g.shape not in (q.shape, (*q.shape[:3], 1)) or (sign is not None and sign.shape != g.shape):
        raise ValueError(
            "q and k must be [B, T, H, K], v [B, T, H, V], g and sign [B, T, H, K] or [B, T, H, 1]; got q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, g {list(g.shape)}"
            + ("" if sign is None else f", sign {list(sign.shape)}")
        )


def _chunkwise(q, k, v, g, state, document, chunk_size):
    """Compute the recurrence with decays exp(g) in chunks of C tokens.

    With G_ij = exp(g_{j+1} + ... + g_i) and gamma_i the decay up to token i:

        O = gamma Q S + tril(sum_d Q_id K_jd G_ijd) V        S' = gamma_C S + (gamma_C / gamma . K)^T V

    Only differences that are at most 0 are exponentiated, so no decay is too strong. A document that starts inside the
    chunk cuts every product that would reach back past its start.
    """
    B, T, H, K = q.shape
    C = min(chunk_size, T)
    n_chunks = -(-T // C)
    pad = n_chunks * C - T  # padded tokens have k = 0 and g = 0: the identity on the state

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, n, C, D]
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return x.unflatten(1, (n_chunks, C)).movedim(3, 1)

    q, k, v = chunks(q), chunks(k), chunks(v)
    # In float64, in both directions: the gradient of g sums terms that cancel, and is divided by a small 1 - |2a - 1|.
    total = chunks(g).double().cumsum(-2)
    reaches = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    from_start = to_end = passes = None  # which tokens see the incoming state, reach the outgoing one; does it pass
    if document is not None:
        document = F.pad(document, (0, pad), mode="replicate") if pad else document
        document = document.view(B, 1, n_chunks, C)
        reaches = reaches & (document[..., :, None] == document[..., None, :])
        ahead = document[:, :, :1, :1] - (1 if state is None else 0)
        incoming = torch.cat([ahead, document[:, :, :-1, -1:]], 2)
        from_start = (document == incoming)[..., None]
        to_end = (document == document[..., -1:])[..., None]
        passes = (document[..., -1:] == incoming)[..., None]

    def decay(log: Tensor, mask: Tensor | None) -> Tensor:
        return (log if mask is None else log.masked_fill(~mask, float("-inf"))).to(q.dtype).exp()

    between = decay(total[..., :, None, :] - total[..., None, :, :], reaches[..., None])  # [B, H, n, C, C, K or 1]
    if g.shape[-1] == 1:
        weights = between[..., 0] * (q @ k.mT)
    else:
        weights = ((between * k[..., None, :, :]) @ q[..., :, None])[..., 0]
    read = decay(total, from_start) * q
    write = decay(total[..., -1:, :] - total, to_end) * k
    carried = decay(total[..., -1:, :], passes).mT  # [B, H, n, K or 1, 1]

    # Only this loop is sequential; unbind (not indexing) keeps its backward linear in the number of chunks.
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    states = []
    for written, carry in zip((write.mT @ v).unbind(2), carried.unbind(2), strict=True):
        states.append(S)
        S = carry * S + written
    o = read @ torch.stack(states, 2) + weights @ v
    return o.movedim(1, 3).flatten(1, 2)[:, :T], S
