"""Inputs of `next_token`, and what it must return, written out in float64 without code of this project."""

import torch
import torch.nn.functional as F
from torch import Tensor


def make_inputs(
    B: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    taps: int,
    gated: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    beta_range: float = 2.0,
) -> dict:
    """Return random arguments of `next_token` by name."""
    torch.manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    widths = (H * K, H * K, HV * V)
    return {
        "qkv": [draw(B, 1, width) for width in widths],
        "a": draw(B, 1, HV) if gated else None,
        "b": draw(B, 1, HV),
        "gate": draw(B, 1, HV * V) if gated else None,
        "taps": [draw(width, 1, taps) for width in widths],
        "window": draw(B, taps - 1, sum(widths)),
        "state": draw(B, HV, K, V, dtype=torch.float32),
        "A_log": draw(HV, dtype=torch.float32) if gated else None,
        "dt_bias": draw(HV, dtype=torch.float32) if gated else None,
        "norm": draw(V),
        "eps": 1e-5,
        "beta_range": beta_range,
    }


def true_next_token(inputs: dict) -> dict[str, Tensor]:
    """Return the output [B, 1, HV * V], the next window and the next state in float64 (equation 10 of 2412.06464)."""
    x = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    S = x["state"]
    B, HV, K, V = S.shape
    joined = torch.cat([x["window"], torch.cat([y.double() for y in x["qkv"]], -1)], 1)  # [B, taps, C]
    weight = torch.cat([w.double()[:, 0] for w in x["taps"]])  # [C, taps]
    mixed = F.silu(torch.einsum("btc,ct->bc", joined, weight))
    q, k, v = mixed.split([y.shape[-1] for y in x["qkv"]], -1)
    q, k = (y.view(B, -1, K).repeat_interleave(HV * K // y.shape[-1], 1) for y in (q, k))
    q, k, v = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v.view(B, HV, V)
    beta = x["beta_range"] * x["b"].sigmoid().view(B, HV, 1)
    if x["a"] is not None:
        S = S * torch.exp(-x["A_log"].exp() * F.softplus(x["a"][:, 0] + x["dt_bias"]))[..., None, None]
    missing = beta * (v - torch.einsum("bhkv,bhk->bhv", S, k))
    S = S + torch.einsum("bhk,bhv->bhkv", k, missing)
    o = torch.einsum("bhkv,bhk->bhv", S, q) * K**-0.5
    y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + x["eps"]) * x["norm"]
    if x["gate"] is not None:
        y = y * F.silu(x["gate"].view(B, HV, V))
    return {"y": y.view(B, 1, HV * V), "window": joined[:, 1:], "state": S}
