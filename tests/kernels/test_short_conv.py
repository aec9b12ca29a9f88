"""Test `short_conv` on CPU tensors, where it is the reference, and the inputs that it refuses.

The kernels are tested in `interpreted/` and `tests/gpu`.
"""

import pytest
import torch
from short_conv_truth import boundaries, check, make, outputs_and_gradients, true_outputs_and_gradients

from lrnn.kernels.short_conv.api import short_conv

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("kind", ["plain", "before", "packed", "before packed"])
@pytest.mark.parametrize(
    ("T", "taps", "dtype"), [(1, 4, FP32), (2, 4, FP32), (3, 4, FP32), (65, 4, BF16), (3, 2, FP16), (3, 3, FP32)]
)
def test_matches_the_truth(T, taps, dtype, kind):
    xs, weights, before, dys = make(2, T, [8, 5], taps, dtype, before="before" in kind)
    cu_seqlens = boundaries([T, 0, 1, T - 1]) if "packed" in kind else None
    options = {"before": before, "cu_seqlens": cu_seqlens}
    found = outputs_and_gradients(short_conv, xs, weights, dys, **options)
    check(found, true_outputs_and_gradients(xs, weights, dys, **options), xs, weights)


def test_float64_is_computed_in_float64():
    xs, weights, _, _ = make(1, 6, [3], dtype=FP64, weight_dtype=FP64)
    assert torch.autograd.gradcheck(lambda x, w: short_conv([x], [w])[0], (xs[0], weights[0]))


def test_documents_do_not_touch_each_other():
    xs, weights, _, _ = make(1, 9, [4])
    clean = short_conv(xs, weights, cu_seqlens=boundaries([4, 5]))[0]
    spoilt = xs[0].detach().clone()
    spoilt[:, 3] = float("nan")
    assert torch.equal(short_conv([spoilt], weights, cu_seqlens=boundaries([4, 5]))[0][:, 4:], clean[:, 4:])


def test_compiles_to_one_graph():
    xs, weights, _, dys = make(2, 10, [8, 4])
    step = torch.compile(short_conv, fullgraph=True, backend="aot_eager")
    check(outputs_and_gradients(step, xs, weights, dys), true_outputs_and_gradients(xs, weights, dys), xs, weights)


X, W, BEFORE = torch.zeros(2, 6, 8), torch.zeros(8, 1, 4), torch.zeros(2, 3, 8)
CU = boundaries([5, 7])
REFUSED = {
    "no tensor": ([], [], {}, "1 to 3"),
    "four tensors": ([X] * 4, [W] * 4, {}, "1 to 3"),
    "weights missing": ([X, X], [W], {}, "a weight for each"),
    "before missing": ([X, X], [W, W], {"before": [BEFORE]}, "before"),
    "two dimensions": ([X[0]], [W], {}, r"\[B, T, D_i\]"),
    "no channels": ([X[..., :0]], [W[:0]], {}, "D_i > 0"),
    "lengths differ": ([X, X[:, :5]], [W, W], {}, "same B and T"),
    "one tap": ([X], [W[..., :1]], {}, r"\(2, 3, 4\)"),
    "five taps": ([X], [torch.zeros(8, 1, 5)], {}, r"\(2, 3, 4\)"),
    "taps differ": ([X, X], [W, W[..., :3]], {}, "same number of taps"),
    "channels differ": ([X], [W[:4]], {}, r"\[D_i, 1, taps\]"),
    "weight of two dimensions": ([X], [W[:, 0]], {}, r"\[D_i, 1, taps\]"),
    "integers": ([X.int()], [W], {}, "bfloat16"),
    "dtypes differ": ([X, X.half()], [W, W], {}, "one dtype"),
    "dtypes of weights differ": ([X, X], [W, W.half()], {}, "one dtype"),
    "before of another length": ([X], [W], {"before": [BEFORE[:, :2]]}, "taps - 1"),
    "before with a gradient": ([X], [W], {"before": [BEFORE.clone().requires_grad_()]}, "detach"),
    "boundaries of floats": ([X], [W], {"cu_seqlens": CU.float()}, "int32"),
    "boundaries in two dimensions": ([X], [W], {"cu_seqlens": CU[None]}, r"\[N \+ 1\]"),
    "another device": ([X], [W.to("meta")], {}, "one device"),
}


@pytest.mark.parametrize(("xs", "weights", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(xs, weights, options, message):
    with pytest.raises(ValueError, match=message):
        short_conv(xs, weights, **options)


def test_before_may_require_a_gradient_if_none_is_computed():
    with torch.no_grad():
        short_conv([X], [W], before=[BEFORE.clone().requires_grad_()])
