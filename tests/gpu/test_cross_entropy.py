"""Compare cross-entropy and z-loss on a GPU with float64."""

import pytest
import torch
import torch.nn.functional as F

from lrnn.kernels.cross_entropy import cross_entropy_


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize(("vocabulary", "dtype", "bar"), [(32000, torch.bfloat16, 4e-3), (50_000, torch.float32, 1e-5)])
def test_cross_entropy_and_z_loss(vocabulary, dtype, bar, z_loss):
    torch.manual_seed(0)
    logits = (4 * torch.randn(512, vocabulary, device="cuda") + 3).to(dtype)
    labels = torch.randint(0, vocabulary, (512,), device="cuda")
    labels[::7] = -100
    leaf = logits.double().requires_grad_()
    losses, squares = F.cross_entropy(leaf, labels, reduction="none"), leaf.logsumexp(-1).square() * (labels >= 0)
    (truth,) = torch.autograd.grad(losses.sum() + z_loss * squares.sum(), leaf)
    found, found_squares = cross_entropy_(logits, labels, True, z_loss)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    assert (logits.double() - truth).norm() < bar * truth.norm()
    assert (found_squares is None) == (z_loss == 0)
    if found_squares is not None:
        torch.testing.assert_close(found_squares.double(), squares.detach(), rtol=1e-5, atol=1e-5)
