"""Compare every token mixer with the equations of its paper: outputs, gradients and eigenvalues."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_models import MORE_SIZES, WITHOUT_RANGE, every_case, largest, make_model, tokens

from lrnn import LrnnForCausalLM
from lrnn.model import mixer_deltanet
from lrnn.model.mixer_deltanet import DeltaNet
from lrnn.model.mixer_mlstm import stabilizer
from lrnn.model.mixers import MIXERS

RANGES = {True: (-1, 1), False: (0, 1)}

both_ranges = pytest.mark.parametrize("allow_neg_eigval", [True, False])


# ---- the equations, token by token in float64: x [T, hidden] -> output [T, hidden], eigenvalues or None


def conv(x, weight):
    """y[t] = silu(sum_i weight[:, i] x[t - taps + 1 + i]), zeros before the start."""
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return F.silu(sum(weight[:, 0, i] * padded[i : i + len(x)] for i in range(taps)))


def norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def doubled(a, c):
    return 2 * a - 1 if c.allow_neg_eigval else a


def delta(x, p, c):
    n = c.num_householder if c.mixer.endswith("product") else 1
    H, K, T = c.num_heads, c.head_dim, len(x)
    HV, V = c.num_value_heads or H, c.head_v_dim or K
    q, k, v = (conv(x @ p[f"{y}_proj.weight"].T, p[f"{y}_conv1d.weight"]) for y in "qkv")
    q, k, v = unit(q.view(T, H, K)), unit(k.view(T, n, H, K)), v.view(T, n, HV, V)
    beta = (2 if c.allow_neg_eigval else 1) * (x @ p["b_proj.weight"].T).sigmoid().view(T, n, HV)
    gated = c.mixer.startswith("gated")
    alpha = torch.ones(T, HV)
    if gated:
        alpha = torch.exp(-p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"]))
    out = []
    for h in range(HV):
        shared = h * H // HV  # the key head of this value head
        S = torch.zeros(K, V).to(x)
        for t in range(T):
            S = alpha[t, h] * S
            for j in range(n):
                key = k[t, j, shared]
                S = (torch.eye(K).to(x) - beta[t, j, h] * torch.outer(key, key)) @ S
                S = S + beta[t, j, h] * torch.outer(key, v[t, j, h])
            out.append(S.T @ q[t, shared] / K**0.5)
    o = norm(torch.stack(out).view(HV, T, V).transpose(0, 1), p["o_norm.weight"])
    if gated:
        o = o * F.silu(x @ p["g_proj.weight"].T).view(T, HV, V)
    return o.reshape(T, -1) @ p["o_proj.weight"].T, 1 - beta


def linear_attention(q, k, v, a):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; q, k [T, H, K], v [T, H, V], a [T, H, K] or [T, H, 1]."""
    S = torch.zeros(q.shape[1], q.shape[2], v.shape[2]).to(q)
    out = []
    for t in range(len(q)):
        S = a[t, :, :, None] * S + k[t, :, :, None] * v[t, :, None, :]
        out.append((S * q[t, :, :, None]).sum(1))
    return torch.stack(out)


def gla(x, p, c):
    q, k, v, g = ((x @ p[f"{y}_proj.weight"].T).view(-1, c.num_heads, c.head_dim) for y in "qkvg")
    logits = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    a = doubled(logits.sigmoid() ** (1 / 16), c).view(q.shape)
    o = norm(linear_attention(q / c.head_dim**0.5, k, v, a), p["o_norm.weight"]) * F.silu(g)
    return o.flatten(1) @ p["o_proj.weight"].T, a


def mamba2(x, p, c):
    q, k, v = (conv(x @ p[f"{y}_proj.weight"].T, p[f"{y}_conv1d.weight"]) for y in "qkv")
    v = v.view(-1, c.num_heads, c.head_dim)
    q, k = (y[:, None].repeat(1, c.num_heads, 1) for y in (q, k))
    dt = F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"])[..., None]
    a = doubled(torch.exp(-dt * p["A_log"].exp()[:, None]), c)
    o = linear_attention(q, dt * k, v, a) + p["D"][:, None] * v
    o = norm(o, p["o_norm.weight"]) * F.silu(x @ p["g_proj.weight"].T).view(v.shape)
    return o.flatten(1) @ p["o_proj.weight"].T, a


def mamba(x, p, c):
    N, rank = c.state_size, math.ceil(c.hidden_size / 16)
    v = conv(x @ p["v_proj.weight"].T, p["v_conv1d.weight"])
    low, B, C = (v @ p["x_proj.weight"].T).split([rank, N, N], -1)
    dt = F.softplus(low @ p["dt_proj.weight"].T + p["dt_bias"])
    a = doubled(torch.exp(-dt[..., None] * p["A_log"].exp()), c)
    h = torch.zeros(v.shape[1], N).to(x)
    out = []
    for t in range(len(x)):
        h = a[t] * h + dt[t][:, None] * B[t] * v[t][:, None]
        out.append(h @ C[t] + p["D"] * v[t])
    return (torch.stack(out) * F.silu(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T, a


def mlstm(x, p, c):
    """There is no stabiliser: float64 holds the exponential gates of a short sequence."""
    H, D = c.num_heads, c.head_dim
    q, k = (conv(x @ p[f"{y}_proj.weight"].T, p[f"{y}_conv1d.weight"]).view(-1, H, D) for y in "qk")
    v, gate = ((x @ p[f"{y}_proj.weight"].T).view(-1, H, D) for y in "vg")
    gates = x @ p["if_proj.weight"].T
    i = (gates[:, :H] + p["gate_bias"][0]).exp()
    f = doubled((gates[:, H:] + p["gate_bias"][1]).sigmoid(), c)
    C, n, out = torch.zeros(H, D, D).to(x), torch.zeros(H, D).to(x), []
    for t in range(len(x)):
        key = k[t] / D**0.5
        C = f[t][:, None, None] * C + i[t][:, None, None] * torch.einsum("hv,hk->hvk", v[t], key)
        n = f[t][:, None] * n + i[t][:, None] * key
        h = torch.einsum("hvk,hk->hv", C, q[t]) / (n * q[t]).sum(-1, keepdim=True).abs().clamp(min=1)
        out.append(norm(h, p["o_norm.weight"]) * gate[t].sigmoid())
    return torch.stack(out).flatten(1) @ p["o_proj.weight"].T, f


def rwkv7(x, p, c):
    """The state is [V, K] and vectors are rows, as in the paper."""
    H, D = c.num_heads, c.head_dim
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    mixed = {name: x + p["shift_mix"][i, 0, 0] * (previous - x) for i, name in enumerate("rwkvag")}
    r, k, v = (mixed[y] @ p[f"{y}_proj.weight"].T for y in "rkv")
    d = (mixed["w"] @ p["w_proj.0.weight"].T).tanh() @ p["w_proj.2.weight"].T + p["w_proj.2.bias"]
    w = torch.exp(-math.exp(-0.5) * d.sigmoid()).view(-1, H, D)
    a = (mixed["a"] @ p["a_proj.0.weight"].T @ p["a_proj.1.weight"].T + p["a_proj.1.bias"]).sigmoid()
    g = (mixed["g"] @ p["g_proj.0.weight"].T).sigmoid() @ p["g_proj.2.weight"].T
    kappa = unit((k * p["k_k"]).view(-1, H, D))
    k = (k * (1 + p["k_a"] * (a - 1))).view(-1, H, D)
    r, v, a = (y.view(-1, H, D) for y in (r, v, a))
    rate = a * (1 + w.min(-1, keepdim=True).values) if c.allow_neg_eigval else a
    wkv, out, eigenvalues = [torch.zeros(D, D).to(x)] * H, [], []
    for t in range(len(x)):
        row = []
        for h in range(H):
            A = torch.diag(w[t, h]) - torch.outer(kappa[t, h], rate[t, h] * kappa[t, h])
            wkv[h] = wkv[h] @ A + torch.outer(v[t, h], k[t, h])
            bonus = (r[t, h] * p["r_k"].view(H, D)[h] * k[t, h]).sum() * v[t, h]
            row.append(norm(wkv[h] @ r[t, h], p["o_norm.weight"]) + bonus)
            eigenvalues.append(torch.linalg.eigvals(A.detach()))
        out.append(torch.cat(row))
    return (torch.stack(out) * g) @ p["o_proj.weight"].T, torch.stack(eigenvalues)


def slstm(x, p, c):
    """There is no stabiliser, as in `mlstm`."""
    H, D = c.num_heads, c.head_dim
    inputs = (x @ p["zifo_proj.weight"].T).view(-1, H, 4 * D) + p["gate_bias"]
    cell, n, h = (torch.zeros(H, D).to(x) for _ in range(3))
    out = []
    for t in range(len(x)):
        z, i, f, o = (inputs[t] + (h[:, None] @ p["recurrent"])[:, 0]).split(D, -1)
        cell = f.sigmoid() * cell + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * cell / n
        out.append(norm(h, p["o_norm.weight"]).flatten())
    return torch.stack(out) @ p["o_proj.weight"].T, None


def attention(x, p, c):
    H, D, G, T = c.num_heads, c.head_dim, c.num_kv_heads or c.num_heads, len(x)
    q, k, v = ((x @ p[f"{y}_proj.weight"].T).view(T, -1, D) for y in "qkv")
    if c.qk_norm == "head":
        q, k = norm(q, p["q_norm.weight"]), norm(k, p["k_norm.weight"])
    turn = torch.polar(
        torch.ones(T, D // 2).double(),
        torch.arange(T).double()[:, None] * c.rope_theta ** (-torch.arange(0, D, 2).double() / D),
    )
    q, k = (torch.complex(y[..., : D // 2], y[..., D // 2 :]) * turn[:, None] for y in (q, k))
    out = []
    for t in range(T):
        heads = []
        for h in range(H):
            seen = slice(max(0, t + 1 - (c.sliding_window or T)), t + 1)
            scores = (q[t, h].conj() * k[seen, h * G // H]).real.sum(-1) / D**0.5
            heads.append(scores.softmax(0) @ v[seen, h * G // H])
        out.append(torch.cat(heads))
    out = torch.stack(out)
    if c.attention_gate:
        out = out * (x @ p["g_proj.weight"].T).sigmoid()
    return out @ p["o_proj.weight"].T, None


TRUTH = dict.fromkeys((name for name, mixer in MIXERS.items() if issubclass(mixer, DeltaNet)), delta)
TRUTH |= {"gla": gla, "mamba2": mamba2, "mamba": mamba, "mlstm": mlstm, "rwkv7": rwkv7}
TRUTH |= {"slstm": slstm, "attention": attention, "transformer": attention}


def truth(model: LrnnForCausalLM, x: torch.Tensor):
    """Return the output, the eigenvalues and the gradients of the mixer for one sequence [T, hidden], in float64."""
    attn = model.model.layers[0].attn
    p = {n: y.detach().double().requires_grad_() for n, y in attn.named_parameters()}
    x = x.double().requires_grad_()
    out, eigenvalues = TRUTH[model.config.mixer](x, p, model.config)
    (out * direction(out.shape)).sum().backward()
    return out.detach(), eigenvalues, {"x": x.grad, **{n: y.grad for n, y in p.items()}}


def direction(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@every_case
def test_outputs_gradients_and_eigenvalues_equal_the_equations(variant, allow_neg_eigval):
    compare(variant, allow_neg_eigval)


@pytest.mark.parametrize("variant", MORE_SIZES)
def test_key_and_value_heads_of_different_numbers_and_sizes(variant):
    compare(variant, allow_neg_eigval=True)


def compare(variant, allow_neg_eigval):
    model = make_model(variant, allow_neg_eigval)
    attn = model.model.layers[0].attn
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(1))
    true, eigenvalues, gradients = truth(model, x)
    seen = []
    attn.on_eigenvalues = lambda compute: seen.append(compute().detach()[0])
    x = x.requires_grad_()
    out = attn(x[None], None, None, None, None)[0]
    assert largest(true) > 0.1
    assert largest(out - true) < 2e-5 * max(1, largest(true))
    (out.double() * direction(out.shape)).sum().backward()
    for name, true_gradient in gradients.items():
        found = x.grad if name == "x" else attn.get_parameter(name).grad
        assert true_gradient.norm() > 0, name
        assert ((found - true_gradient).norm() / true_gradient.norm()).item() < 2e-4, name
    assert (attn.ranges is not None) == bool(seen)
    if not seen:
        assert model.config.mixer in WITHOUT_RANGE
        return
    low, high = RANGES[allow_neg_eigval]
    if model.config.mixer == "rwkv7":
        assert eigenvalues.imag.abs().max() < 1e-6
        eigenvalues = eigenvalues.real.view(70, 2, -1)
        assert (eigenvalues.min(-1).values - 1e-5 <= seen[0]).all() and (seen[0] <= eigenvalues.max(-1).values).all()
        low = low or -0.46
    else:
        assert largest(seen[0].flatten() - eigenvalues.detach().flatten()) < 1e-5
    assert low - 1e-6 <= eigenvalues.min() and eigenvalues.max() <= high + 1e-6
    assert allow_neg_eigval == bool((seen[0] < -0.5).any())
    assert (eigenvalues > 0.5).any()


@pytest.mark.parametrize("variant", ["mlstm", "slstm"])
@pytest.mark.parametrize("input_gate", [-60, 200])
def test_exponential_gates_far_from_one(variant, input_gate):
    """exp(200) overflows float32, so the stabiliser avoids it. exp(-60) leaves mLSTM's normaliser below its bound."""
    model = make_model(variant)
    attn = model.model.layers[0].attn
    with torch.no_grad():
        i = attn.gate_bias[0] if variant == "mlstm" else attn.gate_bias[:, 16:32]
        i.add_(input_gate + 20 * torch.randn(i.shape))
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    true, _, gradients = truth(model, x)
    out = attn(x[None], None, None, None, None)[0]
    assert largest(out - true) <= 1e-4 * largest(true)
    (out.double() * direction(out.shape)).sum().backward()
    for name, true_gradient in gradients.items():
        if name != "x":
            assert (attn.get_parameter(name).grad - true_gradient).norm() <= 1e-3 * true_gradient.norm() + 1e-12, name


def test_stabilizer_of_the_mlstm():
    """Compare m_t with its recurrence, with documents, with padding and with an initial state."""
    generator = torch.Generator().manual_seed(0)
    log_i, g = 30 * torch.randn(2, 50, 3, generator=generator), -10 * torch.rand(2, 50, 3, generator=generator)
    log_i[0, 10:20], g[0, 10:20] = float("-inf"), 0  # padding
    before = 20 * torch.randn(2, 3, generator=generator)
    document = (torch.arange(100) // 13).view(2, 50)
    for ahead, boundaries in ((None, None), (before, None), (None, document)):
        m, shift = stabilizer(log_i, g, ahead, boundaries)
        for b in range(2):
            last = torch.zeros(3) if ahead is None else ahead[b]
            for t in range(50):
                if boundaries is not None and t and boundaries[b, t] != boundaries[b, t - 1]:
                    last = torch.zeros(3)
                now = torch.maximum(g[b, t] + last, log_i[b, t])
                assert torch.allclose(m[b, t], now, atol=1e-4) and torch.allclose(shift[b, t], last - now, atol=1e-4)
                last = now


@pytest.mark.parametrize("gate", ["gated_", ""])
@both_ranges
def test_one_factor_is_deltanet(gate, allow_neg_eigval, monkeypatch):
    def as_product(q, k, v, a, b, *gates, **options):
        k, v, b = (x.unsqueeze(2) for x in (k, v, b))
        return mixer_deltanet.fused_gated_delta_product(q, k, v, a, b, *gates, **options)

    product = make_model(f"{gate}deltaproduct1", allow_neg_eigval)
    plain = make_model(f"{gate}deltanet", allow_neg_eigval)
    plain.load_state_dict(product.state_dict())
    ids = tokens(2, 70)
    with torch.no_grad():
        logits = plain(ids).logits
        assert torch.equal(product(ids).logits, logits)
        # Both run the same rule. The one for several factors agrees with it.
        monkeypatch.setattr(mixer_deltanet, "fused_gated_delta_rule", as_product)
        assert largest(product(ids).logits - logits) < 1e-5
