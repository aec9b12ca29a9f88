"""Test the chunkwise form against the recurrence token by token in float64, in both ranges, with gradients."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lrnn.kernels.reference.diagonal import diagonal_recurrence, recurrent, signed_decay

B, H, K, V = 2, 2, 6, 5


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T: int, width: int, kind: str) -> dict[str, torch.Tensor]:
    """Return q, k, v and logits of a = sigmoid(logit), [B, T, H, width]. `kind` says where 2a - 1 lies."""
    logits = 2 * random(3, B, T, H, width)
    if kind == "near 0":
        logits = 1e-3 * logits
    elif kind == "near -1":
        logits = -12 + logits
    elif kind == "near 1":
        logits = 12 + logits
    elif kind == "at the ends":
        logits = 1000 * logits.sign()
    return {"q": random(0, B, T, H, K), "k": random(1, B, T, H, K), "v": random(2, B, T, H, V), "logits": logits}


def truth(q, k, v, logits, allow_neg_eigval, bounds=None, state=None):
    """Return o and the final state by the definition, one document at a time."""
    a = logits.sigmoid()
    a = 2 * a - 1 if allow_neg_eigval else a
    if bounds is None:
        return loop(q, k, v, a, state)
    flat = [x.flatten(0, 1)[None] for x in (q, k, v, a)]
    o = torch.cat([loop(*(x[:, s:e] for x in flat), None)[0] for s, e in pairwise(bounds) if s < e], 1)
    return o.view(v.shape), None


def loop(q, k, v, a, state):
    S = q.new_zeros(q.shape[0], H, K, V) if state is None else state
    out = []
    for t in range(q.shape[1]):
        S = torch.diag_embed(a[:, t].expand(-1, -1, K)) @ S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S


def by_chunks(q, k, v, logits, allow_neg_eigval, **options):
    log_a = F.logsigmoid(logits)
    g, sign = signed_decay(log_a) if allow_neg_eigval else (log_a, None)
    return diagonal_recurrence(q, k, v, g, sign, **options)


def with_gradients(function, x: dict, *arguments, **options) -> dict[str, torch.Tensor]:
    leaves = {n: y.clone().requires_grad_() for n, y in x.items()}
    o, state = function(*leaves.values(), *arguments, **options)
    loss = (o * random(7, *o.shape).to(o.dtype)).sum()
    if state is not None:
        loss = loss + (state * random(8, *state.shape).to(o.dtype)).sum()
    loss.backward()
    found = {"o": o.detach(), **{f"d{n}": y.grad for n, y in leaves.items()}}
    return found if state is None else {**found, "state": state.detach()}


def check(found: dict, true: dict, bar: float):
    assert found.keys() == true.keys()
    for name, x in found.items():
        assert x.isfinite().all(), name
        scale = true[name].norm().clamp(min=1e-4)  # gradients may vanish: those of the logits are 0 at the ends
        error = ((x.double() - true[name]).norm() / scale).item()
        assert error <= bar, f"{name} {error:.1e}"


KINDS = ["spread", "near 0", "near -1", "near 1", "at the ends"]


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
@pytest.mark.parametrize("width", [1, K])
@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, width, allow_neg_eigval):
    x = inputs(90, width, kind)
    state = random(5, B, H, K, V)
    true = with_gradients(truth, x, allow_neg_eigval, state=state)
    for chunk_size in (None, 32):
        options = {"initial_state": state, "output_final_state": True, "chunk_size": chunk_size}
        check(with_gradients(by_chunks, x, allow_neg_eigval, **options), true, 1e-9)


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
@pytest.mark.parametrize("width", [1, K])
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, width, allow_neg_eigval):
    """A decay as small as 1e-4 does not spoil the gradient of its logit, which is divided by it."""
    x = {n: y.float() for n, y in inputs(90, width, kind).items()}
    true = with_gradients(truth, {n: y.double() for n, y in x.items()}, allow_neg_eigval)
    check(with_gradients(by_chunks, x, allow_neg_eigval, output_final_state=True), true, 1e-5)


@pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_decays_of_exactly_zero(dtype, bar):
    """If the logit is 0, so is 2a - 1. Its logarithm is not finite there, but the gradient is."""
    x = inputs(40, K, "spread")
    x["logits"][:, ::3] = 0
    true = with_gradients(truth, x, True)
    check(with_gradients(by_chunks, {n: y.to(dtype) for n, y in x.items()}, True, output_final_state=True), true, bar)


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
@pytest.mark.parametrize("width", [1, K])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_lengths(T, width, allow_neg_eigval):
    x = inputs(T, width, "spread")
    state = random(5, B, H, K, V)
    true = with_gradients(truth, x, allow_neg_eigval, state=state)
    check(with_gradients(by_chunks, x, allow_neg_eigval, initial_state=state, output_final_state=True), true, 1e-10)


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
@pytest.mark.parametrize("width", [1, K])
def test_documents(width, allow_neg_eigval):
    bounds = [0, 1, 40, 43, 90, 155, 180]
    document = torch.bucketize(torch.arange(180), torch.tensor(bounds[1:]), right=True).view(B, 90)
    x = inputs(90, width, "spread")
    true = with_gradients(truth, x, allow_neg_eigval, bounds)
    check(with_gradients(by_chunks, x, allow_neg_eigval, document=document), true, 1e-10)


def test_steps_agree_with_the_definition():
    """`recurrent` is the documented truth, and generation runs it."""
    x = inputs(30, K, "spread")
    a = 2 * x["logits"].sigmoid() - 1
    state = random(5, B, H, K, V)
    for found, true in zip(
        recurrent(x["q"], x["k"], x["v"], a, state), loop(x["q"], x["k"], x["v"], a, state), strict=True
    ):
        assert torch.allclose(found, true, rtol=1e-12, atol=1e-12)


def test_parity_over_thousands_of_tokens():
    """With a decay of exactly -1 per set bit, the state flips each time and is still +-1 after 5,000 tokens."""
    bits = torch.randint(2, (1, 5000, 1, 1), generator=torch.Generator().manual_seed(0))
    log_a = torch.where(bits == 1, float("-inf"), 0.0)
    g, sign = signed_decay(log_a)
    q, k, v = torch.ones(1, 5000, 1, 1), torch.zeros(1, 5000, 1, 1), torch.ones(1, 5000, 1, 1)
    o, _ = diagonal_recurrence(q, k, v, g, sign, initial_state=torch.ones(1, 1, 1, 1))
    assert torch.equal(o, (1 - 2 * (bits.cumsum(1) % 2)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signed_decay(dtype):
    log_a = torch.cat([-torch.logspace(-12, 2, 200, dtype=torch.float64), torch.tensor([0.0, -torch.inf])])
    g, sign = signed_decay(log_a.to(dtype))
    true = 2 * log_a.to(dtype).double().exp() - 1
    assert (g <= 0).all() and g.isfinite().all()
    assert (sign * g.exp() - true).abs().max() < (3e-7 if dtype == torch.float32 else 2e-8)
    # Near 1, the logarithm itself is exact, as products of thousands of decays need.
    near = log_a > -1e-3
    exact = torch.log1p(2 * torch.expm1(log_a[near].to(dtype).double()))
    assert ((g[near] - exact).abs() <= 1e-6 * exact.abs()).all()


def test_bad_shapes():
    x = inputs(8, K, "spread")
    g = F.logsigmoid(x["logits"])
    with pytest.raises(ValueError, match=r"g \[2, 8, 2, 4\]"):
        diagonal_recurrence(x["q"], x["k"], x["v"], g[..., :4])
