"""Test `chunk_inverse` in Gluon, run on the CPU, against its equations in float64."""

import pytest
import torch
import torch.nn.functional as F
from delta_rule_calls import BackendCall
from delta_rule_truth import relative_error

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import matrix_dtype
from lrnn.kernels.delta_rule.hopper.backend import Hopper

D = 128
# Bounds for blocks of C, which are rounded once, by at most half of the last bit. If keys are equal, all numbers are
# rounded by the same amount.
BARS = {torch.float32: 1e-5, torch.float16: 5.5e-4, torch.bfloat16: 4.4e-3}


def gates_and_steps(gate, B, T, HV, dtype, r):
    """Return inputs of the kernel: gates, step sizes, A_log, dt_bias, and beta_range.

    beta_range is 2 if the kernel computes step sizes as 2 sigmoid of its input, else None. Most gates are near 1, so
    that the blocks far below the diagonal are not zero.
    """
    a, b = torch.randn(2, B, T, HV, generator=r)
    if gate == "raw":
        rates = (0.1 + 0.1 * torch.rand(HV, generator=r)).log()
        return a.to(dtype), (2 * b).to(dtype), rates, torch.randn(HV, generator=r) - 2, 2.0
    log_gates = {"none": None, "log": -0.02 * a.abs(), "strong": torch.where(a > 1.5, -80.0, -0.02)}[gate]
    return log_gates, 2 * b.sigmoid(), None, None, None


def matrices(B, T, H, HV, dtype, normalize, gate, seed=0, parallel=False):
    """Return C and the rows of numbers that the kernel writes, and the truth.

    The keys of the second half are equal. With `parallel`, all keys are nearly parallel instead and step sizes are near
    2, which amplifies rounding errors.
    """
    r = torch.Generator().manual_seed(seed)
    k = torch.randn(B, T, H, D, generator=r)
    if parallel:
        k = k[:, :1] + 0.05 * k
    else:
        k[:, T // 2 :] = k[:, T // 2 : T // 2 + 1]
    k = (k if normalize else F.normalize(k, dim=-1)).to(dtype)
    log_gates, steps, *given = gates_and_steps(gate, B, T, HV, dtype, r)
    if parallel:
        steps = 2 - 0.1 * torch.rand(B, T, HV, generator=r)
    c = torch.full((B * T, HV * CHUNK), torch.nan, dtype=matrix_dtype(dtype, normalize))
    vectors = torch.full((4 * HV, B * T), torch.nan)
    A_log, dt_bias, beta_range = given
    options = {"gate": "log" if gate == "strong" else gate, "beta_range": beta_range}
    v = torch.zeros(B, T, HV, D, dtype=dtype)
    call = BackendCall(Hopper, k, k, v, c, vectors, scale=1.0, normalize_qk=normalize, **options)
    call.chunk_inverse(log_gates, steps, A_log, dt_bias)
    rows = vectors.view(HV, 4, -1)
    assert (
        rows[:, 3].isnan().all() if normalize else not rows[:, 3].any()
    )  # `chunk_forward` writes the norms of queries
    found = {"c": c, "gates": rows[:, 0], "beta": rows[:, 1], "norms": rows[:, 2]}
    return found, matrices_truth(k, log_gates, steps, *given, normalize)


def matrices_truth(k, gate, beta, A_log, dt_bias, beta_range, normalize):
    """Compute the equations in the docstring of `chunk_inverse`."""
    (B, T, HV), group = beta.shape, beta.shape[2] // k.shape[2]
    beta = beta_range * beta.double().sigmoid() if beta_range else beta.double()
    g = torch.zeros_like(beta) if gate is None else gate.double()
    if A_log is not None:
        g = -A_log.double().exp() * F.softplus(g + dt_bias.double())

    def chunks(x):  # [HV, chunks, CHUNK, ...]
        return x.flatten(0, 1).unflatten(0, (-1, CHUNK)).movedim(2, 0)

    g, beta, k = chunks(g).cumsum(-1) / torch.log(torch.tensor(2.0).double()), chunks(beta), chunks(k.double())
    norms = k.norm(dim=-1) if normalize else torch.ones_like(k[..., 0])
    k, norms = ((x / y).repeat_interleave(group, 0) for x, y in ((k, norms[..., None]), (norms, 1)))
    m = ((g[..., :, None] - g[..., None, :]).exp2() * (k @ k.mT)).tril(-1)
    c = torch.linalg.solve(torch.eye(CHUNK) + m * beta[..., None, :], m)  # M (I + B M)^-1 = (I + M B)^-1 M
    c = c.permute(1, 2, 0, 3).reshape(B * T, HV * CHUNK)
    return {"c": c, "gates": g.flatten(1), "beta": beta.flatten(1), "norms": -norms.log2().flatten(1)}


def by_block(c):
    """Return C as [HV, chunks, 64, 64], and its ten blocks of 16 x 16 by row and column."""
    c = c.view(-1, CHUNK, c.shape[1] // CHUNK, CHUNK).permute(2, 0, 1, 3)
    return c, {f"C{i}{j}": c[..., 16 * i :, 16 * j :][..., :16, :16] for i in range(4) for j in range(i + 1)}


def check(found, truth):
    (c, blocks), (_, true_blocks) = by_block(found["c"]), by_block(truth["c"])
    assert not c.triu().any(), "something above the diagonal"
    # With equal keys, blocks farther down are nearly zero, so their errors are relative to at least a hundredth.
    errors = {name: relative_error(blocks[name], true_blocks[name], floor=1e-2) for name in blocks}
    numbers = {name: relative_error(found[name], truth[name], floor=1e-6) for name in truth if name != "c"}
    wrong = {name: error for name, error in numbers.items() if not error < 2e-6}
    wrong |= {name: error for name, error in errors.items() if not error < BARS[c.dtype]}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", ["raw", "log", "none"])
def test_chunk_inverse(dtype, normalize, gate, run_on_cpu):
    run_on_cpu()
    check(*matrices(1, 2 * CHUNK, 1, 2, dtype, normalize, gate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunk_inverse_of_nearly_parallel_keys(dtype, run_on_cpu):
    run_on_cpu()
    check(*matrices(1, 2 * CHUNK, 1, 1, dtype, True, "none", parallel=True))


def test_chunk_inverse_of_strong_gates(run_on_cpu):
    run_on_cpu()
    found, truth = matrices(1, 2 * CHUNK, 1, 1, torch.bfloat16, True, "strong")
    # where gates sum to thousands, float32 keeps differences near 1 to 2^-13
    assert relative_error(found["c"], truth["c"]) < 1e-3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(1, CHUNK, 1, 1), (2, CHUNK, 2, 4)], ids=str)
def test_chunk_inverse_in_any_order(sizes, seed, run_on_cpu):
    run_on_cpu(seed=seed)
    check(*matrices(*sizes, torch.bfloat16, True, "raw", seed))


WRONG = {
    "no wait for the keys": ("    mbarrier.wait(loaded, 0)\n", "", "before it is there"),
    "another parity": ("mbarrier.wait(loaded, 0)", "mbarrier.wait(loaded, 1)", "deadlock"),
    "more bytes expected": ("k.block_type.nbytes", "2 * k.block_type.nbytes", "deadlock"),
    "no fence": (
        "    fence_async_shared()\n    part_barrier()\n    tma_store", "    part_barrier()\n    tma_store",
        "without a fence",
    ),
    "no wait for the result": ("    tma.store_wait(0)\n", "", "before its last copy"),
    "a block forgotten": ("    _store_block(tile, c31, 3, 1)\n", "", "before it is there"),
    "keys of another head": ("i_h // (HV // H) * K", "i_h % H * K", "norms"),
    "another mask": ("_BY_ROW)[:, None] > gl", "_BY_ROW)[:, None] >= gl", "above"),
    "gates to another base": ("1.4426950408889634", "1.0", "gates"),
    "gates cut elsewhere": ("16 * I - 1, 1).load(_BY_COLUMN)", "16 * I, 1).load(_BY_COLUMN)", "C10"),
    "another step size": ("s20 = _left(-c20 * tokens.beta_of(2)", "s20 = _left(-c20 * tokens.beta_of(1)", "C30"),
    "operands rounded to 16 bits": (
        "mma_v2(a.high, b.low, mma_v2(a.low, b.high, acc))", "mma_v2(a.high, b.low, acc)", "C21",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_detected(wrong, run_on_cpu):
    old, new, message = WRONG[wrong]
    with pytest.raises(AssertionError, match=message):
        for seed in range(8):  # a race appears only in some orders
            run_on_cpu(seed=seed, changes=[(old, new)])
            check(*matrices(1, CHUNK, 2, 4, torch.float16, True, "raw", seed=1))
