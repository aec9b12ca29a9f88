"""Test that an operation finds the same numbers whatever was computed before it; see interpreter_plans.py."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

DTYPES = [torch.float16, torch.float32, torch.int32]


@triton.jit
def kernel(x, y, square, product, chosen, scaled, OTHER: tl.constexpr):
    o = tl.arange(0, 4)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(square + o, a * a)  # one tensor twice, before two tensors of the same types
    tl.store(product + o, a * b + tl.sum(a[:, None] * b[None, :], 0))
    tl.store(chosen + o, tl.where((a < b) & (o >= 1), a - b, b))
    tl.store(scaled + o, a.to(tl.float32) * OTHER)


# These are equal, but float32 times -0.0 is not what it is times 0.0, and a sum of integers and 1.0 is a float.
@pytest.mark.parametrize("other", [0, 0.0, -0.0, False, 1, 1.0, True, 2])
def test_results_do_not_depend_on_the_operations_before(other):
    r = torch.Generator().manual_seed(0)
    for dtypes in itertools.product(DTYPES, DTYPES):
        x, y = (torch.randint(3, 20, (4,), generator=r).to(dtype) for dtype in dtypes)  # all results are exact
        square, product, chosen, scaled = found = torch.full((4, 4), torch.nan)
        kernel[(1,)](x, y, *found, other)
        a, b = x.float(), y.float()
        assert torch.equal(square, a * a) and torch.equal(product, a * b + a.sum() * b)
        assert torch.equal(chosen, torch.where((a < b) & (torch.arange(4) >= 1), a - b, b))
        expected = a * float(other)
        assert torch.equal(scaled, expected) and torch.equal(scaled.signbit(), expected.signbit())
