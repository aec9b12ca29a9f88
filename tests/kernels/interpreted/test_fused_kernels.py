"""Test the kernels of the fused layers against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from lrnn.kernels.cross_entropy import cross_entropy_
from lrnn.kernels.float8 import cast_rows
from lrnn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from lrnn.kernels.swiglu import swiglu_backward, swiglu_backward_float8, swiglu_forward, swiglu_forward_float8

BARS = {torch.float16: 5e-4, torch.float32: 1e-6}


def near(found, truth, dtype):
    assert found.dtype == dtype and found.shape == truth.shape and found.isfinite().all()
    assert (found.double() - truth).norm() <= BARS[dtype] * truth.norm()


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "eps", "past"),
    [(1, 7, torch.float32, 1e-6, True), (19, 64, torch.float16, 1e-5, False), (33, 4100, torch.float32, 0.1, True)],
)
def test_rms_norm(rows, size, dtype, eps, past):
    """33 rows take more than one program, and do not fill the last."""
    x, dy = normal(2, rows, size, dtype=dtype), normal(2, rows, size, dtype=dtype, seed=1)
    weight, dpast = normal(size, seed=2), normal(2, rows, size, dtype=dtype, seed=3) if past else None
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = F.rms_norm(leaves[0], (size,), leaves[1], eps)
    dx, dweight = torch.autograd.grad(y, leaves, dy.double())
    near(rms_norm_forward(x, weight, eps), y.detach(), dtype)
    found = rms_norm_backward(dy, x, weight, eps, dpast)
    near(found[0], dx if dpast is None else dx + dpast.double(), dtype)
    near(found[1], dweight, torch.float32)
    assert torch.equal(found[2], rms_norm_forward(x, weight, eps))


def test_rms_norm_of_long_rows_is_refused():
    with pytest.raises(ValueError, match="up to 8192 elements per row"):
        rms_norm_forward(torch.zeros(1, 8193), torch.zeros(8193), 1e-6)


@pytest.mark.parametrize(("rows", "size", "dtype"), [(3, 40, torch.float32), (2, 2100, torch.float16)])
def test_swiglu(rows, size, dtype):
    """2100 columns take two programs per row."""
    ab, dh = normal(rows, 2 * size, dtype=dtype), normal(rows, size, dtype=dtype, seed=1)
    leaf = ab.double().requires_grad_()
    a, b = leaf.chunk(2, -1)
    h = F.silu(a) * b
    (dab,) = torch.autograd.grad(h, leaf, dh.double())
    near(swiglu_forward(ab), h.detach(), dtype)
    found = swiglu_backward(dh, ab)
    near(found[0], dab, dtype)
    assert torch.equal(found[1], swiglu_forward(ab))


def check_float8(found, x):
    """Compare a matrix in float8 with torch's cast of x, up to the last bit of what was cast."""
    scales = x.abs().amax(1, keepdim=True) / 448
    assert found.scales.double().flatten().tolist() == pytest.approx(scales.flatten().tolist(), rel=1e-6)
    values, truth = found.values.float(), (x / scales).to(torch.float8_e4m3fn).float()
    assert (values != truth).float().mean() < 0.01 and (values - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize(("rows", "size", "dtype"), [(3, 5000, torch.float32), (70, 40, torch.float16)])
def test_rows_in_float8(rows, size, dtype):
    """A row of 5000 is one program's; the last program of 70 rows is not full. Rows may lie apart."""
    x = (normal(rows, size + 8) * torch.logspace(-3, 2, rows)[:, None]).to(dtype)[:, :size]
    assert not x.is_contiguous()
    check_float8(cast_rows(x), x.double())


def test_float8_of_zeros_and_of_what_is_not_finite():
    x = normal(4, 20)
    x[1], x[2, 3], x[3, 5] = 0, float("nan"), float("inf")
    values, scales = (t.float() for t in cast_rows(x))
    assert scales[1] == 1 and not values[1].any()
    assert values.isnan().nonzero().tolist() == [[2, 3], [3, 5]]
    with pytest.raises(ValueError, match="contiguous elements"):
        cast_rows(x.T)


@pytest.mark.parametrize("size", [40, 5000])
def test_swiglu_in_float8(size):
    ab, dh = normal(3, 2 * size), normal(3, size, seed=1)
    dab, h = swiglu_backward(dh, ab)
    check_float8(swiglu_forward_float8(ab), h.double())
    found = swiglu_backward_float8(dh, ab)
    assert torch.equal(found[0], dab) and torch.equal(found[1], h)
    check_float8(found[2], dab.double())
    with pytest.raises(ValueError, match="up to 16384 elements"):
        swiglu_forward_float8(torch.zeros(1, 2 * 16385))


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "z_loss"),
    [(50, torch.float32, 0.0), (9000, torch.float16, 0.0), (9000, torch.float32, 0.3)],
)
def test_cross_entropy(vocabulary, dtype, z_loss):
    """9000 logits are read in two pieces. Large ones overflow without the maximum; a row without a label counts 0."""
    logits = (8 * normal(4, vocabulary)).to(dtype)
    logits[1] += 200
    labels = torch.tensor([3, vocabulary - 1, -100, 0])
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    squares = (leaf.logsumexp(-1) ** 2)[labels >= 0]
    (dlogits,) = torch.autograd.grad(losses.sum() + z_loss * squares.sum(), leaf)
    kept = logits.clone()
    assert cross_entropy_(kept, labels, needs_gradient=False)[0].double() == pytest.approx(losses.detach(), rel=1e-5)
    assert torch.equal(kept, logits)
    found, found_squares = cross_entropy_(logits, labels, needs_gradient=True, z_loss=z_loss)
    assert found.double() == pytest.approx(losses.detach(), rel=1e-5) and found[2] == 0 and not logits[2].any()
    near(logits, dlogits, dtype)
    assert (found_squares is not None) == bool(z_loss)
    if found_squares is not None:
        assert found_squares[2] == 0
        assert found_squares[labels >= 0].double() == pytest.approx(squares.detach(), rel=1e-5)


def test_cross_entropy_passes_nan_on():
    logits = normal(2, 20)
    logits[0, 5] = float("nan")
    assert cross_entropy_(logits, torch.tensor([1, 1]), needs_gradient=False)[0].isnan().tolist() == [True, False]
