"""Test Mamba's scan and RWKV-7's recurrence against loops over explicit matrices, in float64, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from lrnn.kernels.reference.steps import rwkv7_recurrence, selective_scan


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(function, true_function, x: dict[str, torch.Tensor], **options):
    results = []
    for f in (function, true_function):
        leaves = {n: y.clone().requires_grad_() for n, y in x.items()}
        o, state = f(**leaves, **options)
        ((o * random(7, *o.shape)).sum() + (state * random(8, *state.shape)).sum()).backward()
        results.append({"o": o, "state": state, **{f"d{n}": y.grad for n, y in leaves.items()}})
    for name, found in results[0].items():
        true = results[1][name]
        assert ((found - true).norm() <= 1e-11 * true.norm()).item(), name
        assert true.norm() > 0, name


def scan_truth(x, dt, A, B, C, allow_neg_eigval, initial_state=None, document=None):
    out, states = [], []
    for b in range(x.shape[0]):
        h = torch.zeros_like(A) if initial_state is None else initial_state[b]
        rows = []
        for t in range(x.shape[1]):
            if document is not None and t and document[b, t] != document[b, t - 1]:
                h = torch.zeros_like(A)
            a = torch.exp(dt[b, t][:, None] * A)
            h = (2 * a - 1 if allow_neg_eigval else a) * h + torch.outer(dt[b, t] * x[b, t], B[b, t])
            rows.append(h @ C[b, t])
        out.append(torch.stack(rows))
        states.append(h)
    return torch.stack(out), torch.stack(states)


def rwkv7_truth(r, w, k, v, kappa, a, initial_state=None, cu_seqlens=None):
    """Compute the paper's form, with rows: wkv_t = wkv_{t-1} (diag(w) - kappa^T (a . kappa)) + v^T k, y = wkv r^T."""
    out = torch.zeros_like(v)
    finals = []
    for b in range(r.shape[0]):
        for h in range(r.shape[2]):
            wkv = torch.zeros(v.shape[-1], r.shape[-1], dtype=r.dtype)
            wkv = wkv if initial_state is None else initial_state[b, h].T
            for t in range(r.shape[1]):
                if cu_seqlens is not None and b * r.shape[1] + t in cu_seqlens.tolist():
                    wkv = torch.zeros_like(wkv)
                row = (b, t, h)
                wkv = wkv @ (torch.diag(w[row]) - torch.outer(kappa[row], a[row] * kappa[row]))
                wkv = wkv + torch.outer(v[row], k[row])
                out = out.index_put(tuple(torch.tensor(i) for i in row), wkv @ r[row])
            finals.append(wkv.T)
    return out, torch.stack(finals).unflatten(0, (r.shape[0], r.shape[2]))


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
@pytest.mark.parametrize("T", [1, 5, 32, 75])
def test_selective_scan(T, allow_neg_eigval):
    x = {"x": random(0, 2, T, 5), "dt": random(1, 2, T, 5).abs(), "A": -random(2, 5, 3).abs()}
    x |= {"B": random(3, 2, T, 3), "C": random(4, 2, T, 3)}
    compare(selective_scan, scan_truth, x, allow_neg_eigval=allow_neg_eigval, initial_state=random(5, 2, 5, 3))
    if T > 1:
        document = (torch.arange(2 * T) // 7).view(2, T)
        compare(selective_scan, scan_truth, x, allow_neg_eigval=allow_neg_eigval, document=document)


@pytest.mark.parametrize("T", [1, 5, 40])
def test_rwkv7(T):
    shape = (2, T, 2, 4)
    x = {"r": random(0, *shape), "w": random(1, *shape).sigmoid(), "k": random(2, *shape)}
    x |= {"v": random(3, 2, T, 2, 3), "kappa": F.normalize(random(4, *shape), dim=-1)}
    x |= {"a": 2 * random(5, *shape).sigmoid()}
    start = random(6, 2, 2, 4, 3)
    compare(rwkv7_recurrence, rwkv7_truth, x, initial_state=start)
    if T > 1:
        bounds = torch.tensor([0, 3, 3, T, T + 4, 2 * T])
        compare(rwkv7_recurrence, rwkv7_truth, x, cu_seqlens=bounds)
