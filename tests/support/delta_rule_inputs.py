"""Inputs of the gated delta rule for tests: random ones, and ones that break implementations.

The functions return tensors by the argument names of `gated_delta_rule` or, with `raw`, of `fused_gated_delta_rule`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds of the error of an output or a gradient on random inputs, relative to its norm. "" is for all other names.
BARS = {
    torch.bfloat16: {"": 5e-3, "dbeta": 1e-2, "dg": 1e-2, "db": 1e-2, "da": 1e-2, "dA_log": 1e-2, "ddt_bias": 1e-2},
    torch.float16: {"": 1e-3, "dbeta": 2e-3, "dg": 2e-3, "db": 2e-3, "da": 2e-3, "dA_log": 2e-3, "ddt_bias": 2e-3},
    torch.float32: {"": 1e-4},
}


def generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random(
    B: int,
    T: int,
    H: int = 2,
    K: int = 64,
    V: int | None = None,
    HV: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    gate: float = 0.1,
    raw: bool = False,
    states: int | None = None,
) -> dict[str, Tensor | None]:
    """Return keys and queries of random direction and length, beta in (0, 2), log-gates in (-gate, 0), a random state.

    Args:
        states: number of initial states, default B; 0 for none.
        raw: return logits and per-head parameters in place of g and beta, for gates of about the same strength.
    """
    r = generator(device, seed)
    HV, V = HV or H, V or K

    def normal(*shape):
        return torch.randn(*shape, generator=r, device=device)

    x: dict[str, Tensor | None] = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    x = {n: y.to(dtype) for n, y in x.items()}
    if raw:
        x["a"], x["b"] = normal(B, T, HV).to(dtype), (2 * normal(B, T, HV)).to(dtype)
        x["A_log"] = torch.log(gate * (0.5 + torch.rand(HV, generator=r, device=device)))
        x["dt_bias"] = 0.5 * normal(HV)
    else:
        x["g"] = -gate * torch.rand(B, T, HV, generator=r, device=device)
        x["beta"] = 2 * torch.rand(B, T, HV, generator=r, device=device)
    if states != 0:
        x["initial_state"] = normal(states or B, HV, K, V)
    return x


def unit_keys(x: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Normalise and round q and k, for calls without `normalize_qk`."""
    return x | {n: F.normalize(x[n].double(), dim=-1).to(x[n].dtype) for n in ("q", "k")}


def arriving(x: dict[str, Tensor | None], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random gradients of o, in the dtype of v as autograd would pass it, and of the final state in float32."""
    r = generator(str(x["v"].device), seed)
    do = torch.randn(x["v"].shape, generator=r, device=x["v"].device).to(x["v"].dtype)
    return do, torch.randn(x["initial_state"].shape, generator=r, device=do.device)


def key_sequence(kind: str, T: int, K: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Return keys [T, K] in float64, of any length unless the kind says otherwise.

    parity: one key. alternating: k, -k, k, ... orthogonal: two orthogonal keys in turn. N keys: N random directions in
    random order. swaps: (e_i - e_j) / sqrt 2 of 8 axes, whose reflections swap two coordinates. parallel EPS: one key
    and noise of relative size EPS. positive: all coordinates positive. random: independent directions.
    """
    r = generator(device, seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, device=device, dtype=torch.float64)

    word, *number = kind.split()
    if word.isdigit():
        return normal(int(word), K)[torch.randint(int(word), (T,), generator=r, device=device)]
    if word == "parity":
        return normal(1, K).expand(T, K)
    if word == "alternating":
        return normal(1, K) * (1 - 2 * (torch.arange(T, device=device) % 2))[:, None]
    if word == "orthogonal":
        pair = torch.linalg.qr(normal(K, 2)).Q.mT
        return pair[torch.arange(T, device=device) % 2]
    if word == "swaps":
        i = torch.randint(8, (T,), generator=r, device=device)
        j = (i + torch.randint(1, 8, (T,), generator=r, device=device)) % 8
        axes = torch.eye(K, device=device, dtype=torch.float64)
        return (axes[i] - axes[j]) / 2**0.5
    if word == "parallel":
        return F.normalize(normal(1, K), dim=-1) + float(number[0]) * F.normalize(normal(T, K), dim=-1)
    if word == "positive":
        return normal(T, K).abs()
    if word == "random":
        return normal(T, K)
    raise ValueError(f"unknown keys {kind!r}")


KEYS = ["parity", "alternating", "orthogonal", "2 keys", "4 keys", "8 keys", "swaps", "positive"]
KEYS += ["parallel 1e-1", "parallel 1e-2", "parallel 1e-3"]


def set_keys(x: dict[str, Tensor | None], kind: str, seed: int = 3) -> dict[str, Tensor | None]:
    """Replace the keys by one sequence of keys per head, and the queries by ones that read along them."""
    B, T, H, K = x["k"].shape
    device = str(x["k"].device)
    keys = torch.stack([key_sequence(kind, T, K, device, seed + h) for h in range(H)], 1).to(x["k"].dtype)
    return x | {"k": keys.expand(B, T, H, K).clone(), "q": (x["q"] + 8 * keys).to(x["q"].dtype)}


def set_gates(x: dict[str, Tensor | None], kind: str) -> dict[str, Tensor | None]:
    """Replace the log-gates.

    none: no gate. one: 0 at every token. tiny: -1e-6. A number: that number at every token. once: -20 at the first
    token of each 64 and at the 31st, mild at the others. mixed: one head without decay, the others -20, -80, ...
    """
    g = torch.zeros_like(x["g"])
    if kind == "none":
        return x | {"g": None}
    if kind == "tiny":
        g -= 1e-6
    elif kind == "once":
        g -= 0.05
        g[:, ::64] = g[:, 30::64] = -20.0
    elif kind == "mixed":
        for h in range(g.shape[2]):
            g[:, :, h] = (0.0, -20.0, -80.0, -0.1)[h % 4]
    elif kind != "one":
        g += float(kind)
    return x | {"g": g}


GATES = ["none", "one", "tiny", "-20", "-80", "once", "mixed"]


def set_betas(x: dict[str, Tensor | None], kind: str) -> dict[str, Tensor | None]:
    """Replace the step sizes.

    A number: that number at every token. rows: 0 at every third token and 2 at every fifth. chunk: 0 in the second 64
    tokens.
    """
    beta = x["beta"].clone()
    if kind == "rows":
        beta[:, ::3], beta[:, 1::5] = 0.0, 2.0
    elif kind == "chunk":
        beta[:, 64:128] = 0.0
    else:
        beta.fill_(float(kind))
    return x | {"beta": beta}


BETAS = ["0", "1e-6", "1", "1.9", "2", "rows", "chunk"]
