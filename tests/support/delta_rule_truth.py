"""The gated delta rule by its definition, token by token in float64, and the distance of other implementations to it.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        alpha_t = exp(g_t)
    o_t = scale * S_t^T q_t

Nothing here is shared with the code under test. There are no chunks and no inverse, and autograd computes the
gradients. The functions have the signatures of those in `lrnn.kernels.delta_rule.api`, take any float dtype and device,
and compute in float64 from the tensors as they are given.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SEGMENT = 64  # tokens whose states autograd keeps at a time in a long sequence, and one state per other segment
LONG = 512  # tokens; autograd keeps all states of a sequence that is not longer


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
) -> tuple[Tensor, Tensor | None]:
    """Apply n factors per token, with the gate before the first and the output after the last.

    q [B, T, H, K]; k [B, T, n, H, K]; v [B, T, n, HV, V]; g [B, T, HV]; beta [B, T, n, HV]; value head h uses the query
    and key of head h // (HV // H). Returns o [B, T, HV, V] and the state [N, HV, K, V] or None, in float64.
    """
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    g = torch.zeros_like(beta[:, :, 0]) if g is None else g.double()
    B, T, H, K = q.shape
    HV, V = v.shape[3:]
    if normalize_qk:
        q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(HV // H, -2) for x in (q, k))
    scale = K**-0.5 if scale is None else float(scale)

    # Documents of different length become the rows of a batch. Past its end, a document has beta = 0 and g = 0, which
    # is the identity on the state.
    inside = None
    if cu_seqlens is not None:
        starts, lengths = cu_seqlens.long()[:-1], cu_seqlens.long().diff()
        steps = torch.arange(max(1, int(lengths.max())), device=q.device)
        inside = steps < lengths[:, None]
        index = torch.where(inside, starts[:, None] + steps, 0)
        q, k, v, g, beta = (x.flatten(0, 1)[index] for x in (q, k, v, g, beta))
        g, beta = g * inside[..., None], beta * inside[..., None, None]
    state = q.new_zeros(q.shape[0], HV, K, V) if initial_state is None else initial_state.double()

    outputs = []
    for parts in zip(*(x.split(SEGMENT, 1) for x in (q, k, v, g, beta)), strict=True):
        if torch.is_grad_enabled() and q.shape[1] > LONG:
            o, state = checkpoint(_scan, *parts, state, use_reentrant=False)
        else:
            o, state = _scan(*parts, state)
        outputs.append(scale * o)
    o = torch.cat(outputs, 1)
    if inside is not None:
        o = o[inside].unflatten(0, (B, T))
    return o, state if output_final_state else None


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    # unbind, not indexing: its backward writes each gradient once.
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta)), strict=True):
        state = state * g_t.exp()[..., None, None]
        for k_j, v_j, beta_j in zip(*(x.unbind(1) for x in (k_t, v_t, beta_t)), strict=True):
            error = v_j - (k_j[..., None, :] @ state)[..., 0, :]
            state = state + k_j[..., None] * (beta_j[..., None] * error)[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1), state


def gated_delta_rule(q, k, v, g, beta, **options) -> tuple[Tensor, Tensor | None]:
    """Apply one factor per token: k [B, T, H, K], v [B, T, HV, V], beta [B, T, HV]."""
    return gated_delta_product(q, k[:, :, None], v[:, :, None], g, beta[:, :, None], **options)


def fused_gated_delta_rule(q, k, v, a, b, A_log, dt_bias, *, beta_range=2.0, **options):
    """Take raw projections: q / |q|, k / |k|, beta = beta_range sigmoid(b), g = -exp(A_log) softplus(a + dt_bias)."""
    beta = b if beta_range is None else beta_range * b.double().sigmoid()
    g = None if a is None else -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    return gated_delta_rule(q, k, v, g, beta, normalize_qk=True, **options)


def evaluate(
    function: Callable, tensors: dict[str, Tensor | None], do: Tensor | None, dstate: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """Return outputs `o` and `final_state` of a function, and the gradient `d<name>` of every tensor argument.

    `do` and `dstate` are the gradients of the outputs. If one is None, the loss does not depend on that output.
    """
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o, state = function(**leaves, **options, output_final_state=True)
    arriving = [(y, dy.to(y.dtype)) for y, dy in ((o, do), (state, dstate)) if dy is not None]
    names = [name for name, x in leaves.items() if x is not None]
    gradients = torch.autograd.grad(
        [y for y, _ in arriving], [leaves[n] for n in names], [dy for _, dy in arriving], allow_unused=True
    )
    found = {"o": o.detach(), "final_state": state.detach()}
    for name, gradient in zip(names, gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def evaluate_truth(function: Callable, tensors: dict[str, Tensor | None], *arriving, **options) -> dict[str, Tensor]:
    """Run `evaluate` on float64 copies, so that the gradients are float64 too."""
    return evaluate(function, {n: None if x is None else x.double() for n, x in tensors.items()}, *arriving, **options)


def relative_error(x: Tensor, truth: Tensor, floor: float = 1e-20) -> float:
    """Return |x - truth| / |truth| in the Euclidean norm. The divisor is at least `floor`.

    With the default floor, zero passes for numbers that float32 hardly represents (a gate of e^-80, twice).
    """
    assert x.shape == truth.shape, (x.shape, truth.shape)
    truth = truth.double()
    return (torch.linalg.vector_norm(x.double() - truth) / torch.linalg.vector_norm(truth).clamp(min=floor)).item()


def floors(truth: dict[str, Tensor], do: Tensor) -> dict[str, float]:
    """Return the `floor` of `relative_error` for gradients that strong gates make almost zero.

    Under gates near 0 the true dg is as small as e^-80. An implementation computes it as a difference of terms as large
    as o_t . do_t, so its error is measured in their units, and no relative accuracy is required below a hundredth of
    them. The gradient of the initial state may underflow float16 where it is 1e-4 of that of the outputs. Gradients of
    A_log and dt_bias are sums over all tokens of terms of either sign, at least as large as those of a. The sum of a
    head can be small by chance, but its error is not.
    """
    gate = 0.01 * torch.linalg.vector_norm((truth["o"] * do.double()).sum(-1)).item()
    least = {"dg": gate, "da": gate, "dinitial_state": 1e-4 * torch.linalg.vector_norm(do.double()).item()}
    if "da" in truth:
        least |= dict.fromkeys(("dA_log", "ddt_bias"), torch.linalg.vector_norm(truth["da"]).item())
    return least


def check(
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    bars: dict[str, float],
    label: str,
    floors: dict[str, float] | None = None,
):
    """Print the relative errors of all outputs and gradients, and fail if one is not finite or above its bar.

    Args:
        bars: the bar by name; the one named "" is for names that are not listed.
        floors: `floor` of `relative_error` by name.
    """
    assert found.keys() == truth.keys(), (sorted(found), sorted(truth))
    errors = {n: relative_error(found[n], t, max((floors or {}).get(n, 0.0), 1e-20)) for n, t in truth.items()}
    print(f"{label}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    odd = [n for n, x in found.items() if not x.isfinite().all()]
    assert not odd, f"{label}: not finite: {', '.join(odd)}"
    wrong = [f"{n} {e:.1e} > {bars.get(n, bars[''])}" for n, e in errors.items() if not e <= bars.get(n, bars[""])]
    assert not wrong, f"{label}: {', '.join(wrong)}"
