"""Test the kernels of the fused layers against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from lrnn.kernels.cross_entropy import cross_entropy_
from lrnn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from lrnn.kernels.swiglu import swiglu_backward, swiglu_forward

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


@pytest.mark.parametrize(("vocabulary", "dtype"), [(50, torch.float32), (9000, torch.float16)])
def test_cross_entropy(vocabulary, dtype):
    """9000 logits are read in two pieces. Large ones overflow without the maximum; a row without a label counts 0."""
    logits = (8 * normal(4, vocabulary)).to(dtype)
    logits[1] += 200
    labels = torch.tensor([3, vocabulary - 1, -100, 0])
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    (dlogits,) = torch.autograd.grad(losses.sum(), leaf)
    kept = logits.clone()
    assert cross_entropy_(kept, labels, needs_gradient=False).double() == pytest.approx(losses.detach(), rel=1e-5)
    assert torch.equal(kept, logits)
    found = cross_entropy_(logits, labels, needs_gradient=True)
    assert found.double() == pytest.approx(losses.detach(), rel=1e-5) and found[2] == 0 and not logits[2].any()
    near(logits, dlogits, dtype)


def test_cross_entropy_passes_nan_on():
    logits = normal(2, 20)
    logits[0, 5] = float("nan")
    assert cross_entropy_(logits, torch.tensor([1, 1]), needs_gradient=False).isnan().tolist() == [True, False]
