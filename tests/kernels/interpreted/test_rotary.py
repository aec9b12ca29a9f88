"""Test the kernel of rotary positions against complex multiplication in float64."""

import pytest
import torch

from lrnn.kernels.rotary import rotate

BARS = {torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 5, 3, 12), 2), ((2, 5, 4, 16), 1), ((1, 1, 1, 2), 1), ((1, 0, 2, 8), 1)]
)
def test_pairs_are_turned_and_gradients_turned_back(shape, rows, dtype):
    torch.manual_seed(0)
    B, T, H, D = shape
    x, dy = (torch.randn(B, T, 2 * H, D).to(dtype)[:, :, :H] for _ in range(2))  # in other strides
    angle = 100 * torch.rand(rows, T, 1, D // 2)
    leaf = x.detach().clone().requires_grad_()
    y = rotate(leaf, angle.cos(), angle.sin())
    y.backward(dy)
    for found, given, sign in ((y, x, 1), (leaf.grad, dy, -1)):
        first, second = given.double().chunk(2, -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle).double(), sign * angle.double())
        assert found.dtype == dtype and found.shape == shape
        assert torch.allclose(found.double(), torch.cat([turned.real, turned.imag], -1), atol=10 * BARS[dtype])
