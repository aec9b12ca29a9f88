"""Test attention on the GPU against a mask of all pairs in float64, and the memory that it takes."""

import pytest
import torch

from lrnn.kernels.reference import rotary
from lrnn.kernels.reference.documents import note_longest
from lrnn.kernels.rotary import rotate
from lrnn.model.attention import attend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PACKED = [0, 1, 1, 130, 700, 1000, 1001, 1999, 2000]


def with_a_mask(q, k, v, window, cu_seqlens):
    """Return `attend` by the definition."""
    B, T, H, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    behind = torch.arange(T, device="cuda")[:, None] - torch.arange(T, device="cuda")
    sees = ((behind >= 0) & (behind < (window or T))).expand(B, 1, T, T)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(B * T, device="cuda"), cu_seqlens, right=True).view(B, 1, T)
        sees = sees & (document[..., None] == document[..., None, :])
    scores = torch.einsum("bthd, bshd -> bhts", q, k) / D**0.5
    return torch.einsum("bhts, bshd -> bthd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


def error(found, true) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 20])  # PyTorch's FlashAttention does not take the last
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 2, 100, 999])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients(packed, window, kv_heads, head_dim, dtype):
    torch.manual_seed(0)
    true_inputs, inputs = [], []
    for heads in (6, kv_heads, kv_heads):
        x = torch.randn(2, 1000, heads, head_dim, device="cuda", dtype=dtype)
        inputs.append(x.requires_grad_())
        true_inputs.append(x.detach().double().requires_grad_())
    direction = torch.randn(2, 1000, 6, head_dim, device="cuda", dtype=dtype)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device="cuda") if packed else None
    found, true = attend(*inputs, window, cu_seqlens), with_a_mask(*true_inputs, window, cu_seqlens)
    bound = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[dtype]
    assert found.dtype == dtype and error(found, true) < bound
    gradients = torch.autograd.grad(found, inputs, direction)
    true_gradients = torch.autograd.grad(true, true_inputs, direction.double())
    for name, x, y in zip("qkv", gradients, true_gradients, strict=True):
        if window == 1 and name != "v":  # the softmax of one number has no gradient
            assert x.abs().max() < bound
        else:
            assert error(x, y) < bound, name


def test_a_noted_length_changes_nothing():
    q, k, v = torch.randn(3, 2, 1000, 4, 64, device="cuda", dtype=BF16).unbind()
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device="cuda")
    expected = attend(q, k, v, None, cu_seqlens)
    note_longest(cu_seqlens, 998)  # of the document from token 1,001 to 1,999
    assert torch.equal(attend(q, k, v, None, cu_seqlens), expected)


@pytest.mark.parametrize("window", [None, 1000])
def test_documents_and_windows_take_no_matrix_of_scores(window):
    T = 2**17
    q, k, v = (torch.randn(1, T, h, 64, device="cuda", dtype=BF16, requires_grad=True) for h in (4, 2, 2))
    cu_seqlens = None if window else torch.tensor([0, T // 3, T], dtype=torch.int32, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, window, cu_seqlens).square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30  # a bit per pair is 2 GB


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("heads", "head_dim", "rows"), [(16, 128, 1), (30, 128, 4), (3, 20, 4), (1, 64, 1)])
def test_rotation(heads, head_dim, rows, dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 4, 1000, heads, head_dim, device="cuda", dtype=dtype).unbind()
    angle = 1000 * torch.rand(rows, 1000, 1, head_dim // 2, device="cuda")
    results = []
    for function, inputs in ((rotate, x), (rotary.rotate, x.double())):
        leaf = inputs.clone().requires_grad_()
        y = function(leaf, angle.cos(), angle.sin())
        y.backward(dy.to(y.dtype))
        results.append((y, leaf.grad))
    for found, true in zip(*results, strict=True):
        assert found.dtype == dtype and error(found, true) < {BF16: 4e-3, FP16: 5e-4, FP32: 1e-6}[dtype]
