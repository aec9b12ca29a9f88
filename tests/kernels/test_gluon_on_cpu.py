"""Kernels in Gluon, executed on the CPU by mocks of Gluon (`gluon_on_cpu`), against their equations in float64."""

import functools

import pytest
import torch
from gluon_on_cpu import Deadlock, launch_on_cpu

from lrnn.kernels import scans
from lrnn.kernels.tiles import CHUNK, Tiles

D = 128
SCALE = D**-0.5


def inputs(chunks, H, HV, seed=0):
    """One sequence: q, k, v-like tensors, their vectors (log2 of gates, step sizes, log2 of 1/|k| and 1/|q|)."""
    torch.manual_seed(seed)
    n = chunks * CHUNK
    q, k = torch.randn(2, 1, n, H, D)
    vectors = torch.empty(4 * HV, n)
    vectors[0::4] = -(0.3 * torch.rand(HV, chunks, CHUNK)).cumsum(-1).view(HV, n)
    vectors[1::4] = 2 * torch.rand(HV, n)
    group = HV // H
    vectors[2::4] = -k[0].norm(dim=-1).log2().T.repeat_interleave(group, 0)
    vectors[3::4] = -q[0].norm(dim=-1).log2().T.repeat_interleave(group, 0)
    return q, k, vectors


def of_chunk(x, c, h):
    """The rows of chunk c and the columns of head h of a matrix with D columns a head, in float64."""
    return x[c * CHUNK : (c + 1) * CHUNK, h * D : (h + 1) * D].double()


def numbers(vectors, c, h, normalize):
    """g, beta, r of k and r of q of a chunk and value head, in float64."""
    g, beta, log_rk, log_rq = vectors[4 * h : 4 * h + 4, c * CHUNK : (c + 1) * CHUNK].double()
    one = torch.ones_like(g)
    return g, beta, log_rk.exp2() if normalize else one, log_rq.exp2() if normalize else one


def assert_close(found, truth):
    for name, true in truth.items():
        error = (found[name].double().view(true.shape) - true).norm() / true.norm()
        assert error < 1e-5, (name, error)


@pytest.fixture
def run_on_cpu(monkeypatch):
    """`run_on_cpu(programs, seed, changes)` makes `scans` launch Gluon kernels on the CPU, persistent ones with so many
    programs."""

    original = scans.scan_launch

    def make(programs=1, seed=0, changes=()):
        monkeypatch.setattr(scans, "is_for_hopper", lambda *a: True)
        # Matrices are float32 here, of the tiles that they have in 16 bits.
        monkeypatch.setattr(scans, "scan_launch", lambda K, V, dtype: original(K, V, torch.bfloat16))
        monkeypatch.setattr(scans, "result_tiles", lambda x, *sizes: None if x is None else Tiles(x, *sizes[:2]))
        monkeypatch.setattr(scans, "multiprocessors", lambda device: programs)
        monkeypatch.setattr(scans, "launch", functools.partial(launch_on_cpu, seed=seed, changes=changes))

    return make


# ---- chunk_backward


def chunk_backward_truth(q, k, do, dw, y, states, dstates, vectors, chunks, H, HV, normalize):
    """The equations of `chunk_backward`'s docstring."""
    n = chunks * CHUNK
    found = {name: torch.empty(n, HV * D, dtype=torch.float64) for name in ("dq", "dk", "dv")}
    found |= {name: torch.empty(HV, n, dtype=torch.float64) for name in ("dbeta", "dot_q", "dot_k")}
    for c in range(chunks):
        rows = slice(c * CHUNK, (c + 1) * CHUNK)
        for h in range(HV):
            g, beta, rk, rq = numbers(vectors, c, h, normalize)
            hk = h // (HV // H)
            q_hat, k_hat = of_chunk(q, c, hk) * rq[:, None], of_chunk(k, c, hk) * rk[:, None]
            dO, dW, Y = (of_chunk(x, c, h) for x in (do, dw, y))
            S, dS = (x[(c * HV + h) * D : (c * HV + h + 1) * D].double() for x in (states, dstates))  # [V, K]
            N, dX = beta[:, None] * Y, beta[:, None] * dW
            G = (g[:, None] - g[None, :]).exp2()
            gamma, rho = g.exp2()[:, None], (g[-1] - g).exp2()[:, None]
            dP = (SCALE * G * (dO @ N.T)).tril()
            dM = (-G * (dX @ N.T)).tril(-1)
            dq = SCALE * gamma * (dO @ S) + dP @ k_hat
            first = -gamma * (dX @ S) + dM @ k_hat
            inside = dM.T @ k_hat + dP.T @ q_hat
            at_end = rho * (N @ dS)
            dk = first + inside + at_end
            dot_q, dot_k = (q_hat * dq).sum(1), (k_hat * (first - inside - at_end)).sum(1)
            dot_q[-1] += g[-1].exp2() * (S * dS).sum()
            dot_k[-1] += (k_hat * at_end).sum()
            if normalize:
                dq = rq[:, None] * (dq - q_hat * (q_hat * dq).sum(1, keepdim=True))
                dk = rk[:, None] * (dk - k_hat * (k_hat * dk).sum(1, keepdim=True))
            columns = slice(h * D, (h + 1) * D)
            found["dq"][rows, columns], found["dk"][rows, columns], found["dv"][rows, columns] = dq, dk, dX
            found["dbeta"][h, rows], found["dot_q"][h, rows], found["dot_k"][h, rows] = (dW * Y).sum(1), dot_q, dot_k
    return found


def chunk_backward(chunks, H, HV, normalize):
    """What the kernel finds, and the truth."""
    n = chunks * CHUNK
    q, k, vectors = inputs(chunks, H, HV)
    v, do = torch.randn(2, 1, n, HV, D)
    dw, y = torch.randn(2, n, HV * D)
    states, dstates = torch.randn(2, chunks * HV * D, D)
    found = {name: torch.full((1, n, HV, D), torch.nan) for name in ("dq", "dk", "dv")}
    found |= {name: torch.full((HV, n), torch.nan) for name in ("dbeta", "dot_q", "dot_k")}
    scan = scans.Scan(q, k, v, torch.zeros(n, HV * CHUNK), vectors, None, SCALE, normalize, False)
    scan.run_chunk_backward(do, dw, y, states, dstates, **found)
    flat = (x.view(n, -1) for x in (q, k, do))
    return found, chunk_backward_truth(*flat, dw, y, states, dstates, vectors, chunks, H, HV, normalize)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("chunks", "H", "HV", "normalize", "programs"),
    [(1, 1, 1, True, 1), (3, 1, 2, True, 1), (4, 2, 4, False, 1), (5, 1, 1, True, 2), (3, 2, 2, False, 4)],
)
def test_chunk_backward(chunks, H, HV, normalize, programs, seed, run_on_cpu):
    """One program takes up to 16 chunks and heads in turn, 9 tiles each, through a ring of 13."""
    run_on_cpu(programs, seed)
    assert_close(*chunk_backward(chunks, H, HV, normalize))


def test_a_tile_that_is_not_released_stops_chunk_backward(run_on_cpu):
    run_on_cpu(changes=[("        _release(loaded, i, DO, RING, 2)\n", "")])
    with pytest.raises(Deadlock):
        chunk_backward(3, 1, 1, True)


def test_a_mask_that_lets_the_diagonal_in_is_seen(run_on_cpu):
    run_on_cpu(changes=[("mask = rows[:, None] > columns[None, :]", "mask = rows[:, None] >= columns[None, :]")])
    with pytest.raises(AssertionError, match="dk"):  # of keys as given: a norm has no gradient along the key itself
        assert_close(*chunk_backward(2, 1, 1, False))


# ---- chunk_forward


def chunk_forward(chunks, H, HV, normalize, initial):
    """O and the final state that the kernel finds, and the truth by the equations of `chunk_forward`'s docstring."""
    n = chunks * CHUNK
    q, k, vectors = inputs(chunks, H, HV)
    if not normalize:  # keys as given: their norms are said to be 1
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        vectors[2::4] = vectors[3::4] = 0
    v = torch.randn(1, n, HV, D)
    c = (0.1 * torch.randn(n, HV, CHUNK)).view(chunks, CHUNK, HV, CHUNK).permute(0, 2, 1, 3).tril(-1)
    start = torch.randn(1, HV, D, D) if initial else None
    found = {"o": torch.full((1, n, HV, D), torch.nan), "final": torch.full((1, HV, D, D), torch.nan)}
    c_rows = c.permute(0, 2, 1, 3).reshape(n, HV * CHUNK).contiguous()
    given = vectors.clone()
    given[3::4] = torch.nan  # the forward pass computes it
    scan = scans.Scan(q, k, v, c_rows, given, None, SCALE, normalize, False)
    scan.run_forward(start, found["final"], o=found["o"])
    truth = {"o": torch.empty(n, HV, D, dtype=torch.float64), "final": torch.empty(HV, D, D, dtype=torch.float64)}
    flat_q, flat_k, flat_v = (x.view(n, -1) for x in (q, k, v))
    for h in range(HV):
        S = torch.zeros(D, D, dtype=torch.float64) if start is None else start[0, h].double()  # [K, V]
        for i in range(chunks):
            g, beta, rk, rq = numbers(vectors, i, h, normalize)
            hk = h // (HV // H)
            Q, K, V = (
                of_chunk(flat_q, i, hk) * rq[:, None],
                of_chunk(flat_k, i, hk) * rk[:, None],
                of_chunk(flat_v, i, h),
            )
            X = V - g.exp2()[:, None] * (K @ S)
            N = beta[:, None] * (X - c[i, h].double() @ (beta[:, None] * X))
            P = SCALE * ((g[:, None] - g[None, :]).exp2() * (Q @ K.T)).tril()
            truth["o"][i * CHUNK : (i + 1) * CHUNK, h] = SCALE * g.exp2()[:, None] * (Q @ S) + P @ N
            S = g[-1].exp2() * S + K.T @ ((g[-1] - g).exp2()[:, None] * N)
        truth["final"][h] = S
    return found, truth


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("chunks", "H", "HV", "normalize", "initial"),
    [(1, 1, 1, True, False), (5, 1, 2, True, True), (4, 2, 2, False, True)],
)
def test_chunk_forward(chunks, H, HV, normalize, initial, seed, run_on_cpu):
    run_on_cpu(seed=seed)
    assert_close(*chunk_forward(chunks, H, HV, normalize, initial))


@pytest.mark.parametrize("full", [1, 1000])
def test_chunk_forward_with_one_or_both_halves_of_the_values(full, run_on_cpu, monkeypatch):
    monkeypatch.setattr(scans, "FULL", full)
    run_on_cpu()
    assert_close(*chunk_forward(3, 1, 1, True, True))
