"""Inputs and expected results, in float64, of the scans over chunks and of the backward pass inside chunks.

Heads have 128 keys and values. The expected results of the scans come from the recurrence, token by token, and from
autograd.
"""

import torch
from delta_rule_calls import BackendCall
from delta_rule_truth import relative_error

from lrnn.kernels.common.constants import CHUNK, LEAST_KEPT, LEAST_KEPT_FP16
from lrnn.kernels.delta_rule.hopper.backend import Hopper

D = 128
SCALE = D**-0.5


def nans(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(found, truth, bar=1e-5):
    assert found.keys() == truth.keys()
    errors = {name: relative_error(found[name], truth[name].reshape(found[name].shape)) for name in truth}
    wrong = {name: error for name, error in errors.items() if not error < bar}
    assert not wrong, wrong


def recurrence_inputs(B, T, H, HV, normalize, seed=0, dtype=torch.float32):
    """Return a call's tensors, with accumulated gates. q and k have any length if they are normalised, else about 1."""
    r = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, H, D, generator=r) / (1 if normalize else D**0.5) for _ in range(2))
    x = {"q": q.to(dtype), "k": k.to(dtype), "v": torch.randn(B, T, HV, D, generator=r).to(dtype)}
    g, beta = torch.rand(2, B, T, HV, generator=r)
    return x | {"g": -0.1 * g, "beta": 0.1 + 1.8 * beta}


def by_head(x):
    """Return x [B, T, HV] as [HV, B * T]."""
    return x.flatten(0, 1).T


def make_scan(x, normalize, split=False):
    """Return the scans of a call with the results of `chunk_inverse`: C, and rows of gates, step sizes and norms."""
    (B, T, HV), H = x["beta"].shape, x["k"].shape[2]
    vectors = (
        nans(HV, 4, B * T) if normalize else torch.zeros(HV, 4, B * T)
    )  # the forward scan computes the norms of queries
    g = by_head(x["g"]).reshape(HV, -1, CHUNK).cumsum(-1) / torch.log(torch.tensor(2.0))
    vectors[:, 0], vectors[:, 1] = g.flatten(1), by_head(x["beta"])
    k = x["k"].double().repeat_interleave(HV // H, 2)
    norms = k.norm(dim=-1) if normalize else torch.ones(B, T, HV, dtype=torch.float64)
    vectors[:, 2] = -by_head(norms.log2())
    unit = (k / norms[..., None]).flatten(0, 1).reshape(-1, CHUNK, HV, D).permute(2, 0, 1, 3)
    decay = torch.exp2(g.double()[..., :, None] - g.double()[..., None, :])
    m = torch.tril(decay * (unit @ unit.mT), -1)
    beta = vectors[:, 1].double().reshape(HV, -1, 1, CHUNK)
    c = torch.linalg.solve(torch.eye(CHUNK) + m * beta, m)  # [HV, chunks, CHUNK, CHUNK]
    c = c.permute(1, 2, 0, 3).reshape(B * T, HV * CHUNK).to(x["v"].dtype)
    tensors = (x["q"], x["k"], x["v"], c, vectors.flatten(0, 1))
    return BackendCall(Hopper, *tensors, scale=SCALE, normalize_qk=normalize, split=split)


def log_norms(q, HV):
    """Return log2 of 1 / |q| for each value head, as the forward scan writes it."""
    return -by_head(q.double().norm(dim=-1).log2().repeat_interleave(HV // q.shape[2], 2))


def recurrence(x, initial, normalize):
    """Compute token by token the outputs, the errors that tokens find, the states before chunks, and the last one."""
    x = {name: y.double() for name, y in x.items()}
    q, k, v = (x[name] for name in "qkv")
    if normalize:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    q, k = (y.repeat_interleave(v.shape[2] // y.shape[2], 2) for y in (q, k))
    state, outputs, errors, starts = initial.double(), [], [], []
    for t in range(v.shape[1]):
        if t % CHUNK == 0:
            state = state.clone()  # a separate tensor, so that it gets its own gradient
            starts.append(state)
        state = state * x["g"][:, t].exp()[..., None, None]
        errors.append(v[:, t] - (k[:, t, :, None] @ state)[..., 0, :])
        state = state + k[:, t, :, :, None] * (x["beta"][:, t, :, None] * errors[-1])[..., None, :]
        outputs.append(SCALE * (q[:, t, :, None] @ state)[..., 0, :])
    # The last output reads the state too. The clone gets only the gradient of the state that leaves the chunk.
    return torch.stack(outputs, 1), torch.stack(errors, 1), starts, state.clone()


def state_rows(states):
    """Return states [B, HV, K, V] of each chunk as kernels store them: S^T by sequence, chunk and head."""
    return torch.stack(states, 1).mT.reshape(-1, D)


def is_kept_small(beta, dtype):
    return beta < (LEAST_KEPT_FP16 if dtype == torch.float16 else LEAST_KEPT).value


def scan_gradients(x, initial, do, dfinal, normalize=True):
    """Return autograd's results for the backward scan. For small step sizes, dv is not multiplied by them."""
    leaves = {name: y.double().requires_grad_() for name, y in x.items()}
    start = initial.double().requires_grad_()
    o, _, starts, final = recurrence(leaves, start, normalize)
    loss = (o * do.double()).sum() + (final * dfinal.double()).sum()
    dv, dinitial, *dends = torch.autograd.grad(loss, [leaves["v"], start, *starts[1:], final])
    kept_small = is_kept_small(x["beta"], x["v"].dtype)
    dv = dv / torch.where(kept_small, x["beta"].double(), 1.0)[..., None]
    return {"dv": dv, "dstates": state_rows(dends), "dinitial": dinitial}


def inside_chunks(chunks, H, HV, normalize, seed=0, dtype=torch.float32):
    """Return scans, and random inputs of the backward pass inside their chunks."""
    n = chunks * CHUNK
    scan = make_scan(recurrence_inputs(1, n, H, HV, normalize, seed, dtype), normalize)
    vectors = scan.vectors.view(HV, 4, -1)
    if normalize:
        vectors[:, 3] = log_norms(scan.operands.q.base, HV)
    else:
        vectors[:, 2:] = torch.nan
    vectors[0, 1, 5 * seed + 7 :: 50] = 0.0  # step sizes of a few tokens
    shapes = {"do": (1, n, HV, D), "dv": (1, n, HV, D), "y": (n, HV * D)}
    shapes |= dict.fromkeys(("states", "dstates"), (chunks * HV * D, D))
    return scan, {name: normal(*shape, seed=seed + i).to(dtype) for i, (name, shape) in enumerate(shapes.items(), 100)}


def chunk_gradients(scan, given, normalize):
    """Compute the equations in the docstring of `chunk_backward`."""
    H, HV, n = scan.call.H, scan.call.HV, scan.call.T

    def tiles(x):  # [HV, chunks, CHUNK, D]
        return x.double().reshape(-1, CHUNK, HV, D).permute(2, 0, 1, 3)

    def rows(x):  # back
        return x.permute(1, 2, 0, 3).reshape(1, n, HV, D)

    def states(x):  # S as [HV, chunks, V, K]
        return x.double().reshape(-1, HV, D, D).transpose(0, 1)

    q, k = (tiles(x.base.repeat_interleave(HV // H, 2)) for x in (scan.operands.q, scan.operands.k))
    do, kept, y = (tiles(given[name]) for name in ("do", "dv", "y"))
    s, ds = states(given["states"]), states(given["dstates"])
    g, beta, log_rk, log_rq = scan.vectors.double().view(HV, 4, -1, CHUNK).transpose(0, 1)
    rq, rk = (torch.exp2(x)[..., None] if normalize else 1.0 for x in (log_rq, log_rk))
    q, k = q * rq, k * rk
    decay = torch.exp2(g[..., :, None] - g[..., None, :])
    gamma, rho = torch.exp2(g)[..., None], torch.exp2(g[..., -1:] - g)[..., None]
    kept_small = is_kept_small(beta, given["dv"].dtype)
    n_, dx = beta[..., None] * y, torch.where(kept_small, beta, 1.0)[..., None] * kept
    dw = kept / torch.where(kept_small, 1.0, beta)[..., None]
    dp, dm = SCALE * torch.tril(decay * (do @ n_.mT)), -torch.tril(decay * (dx @ n_.mT), -1)
    dq = SCALE * gamma * (do @ s) + dp @ k
    first, second, third = -gamma * (dx @ s) + dm @ k, dm.mT @ k + dp.mT @ q, rho * (n_ @ ds)
    dk = first + second + third
    dot_q = (q * dq).sum(-1)
    dot_k = (k * (first - second - third)).sum(-1)
    dot_q[..., -1] += gamma[..., -1, 0] * (s * ds).sum((-2, -1))
    dot_k[..., -1] += (k * third).sum((-2, -1))
    if normalize:
        dq, dk = rq * (dq - q * (q * dq).sum(-1, keepdim=True)), rk * (dk - k * (k * dk).sum(-1, keepdim=True))
    numbers = {"dbeta": (dw * y).sum(-1), "dot_q": dot_q, "dot_k": dot_k}
    return {"dq": rows(dq), "dk": rows(dk), "dv": rows(dx)} | {name: x.flatten(1) for name, x in numbers.items()}
