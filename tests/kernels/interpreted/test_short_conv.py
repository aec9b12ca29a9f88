"""Test the Triton kernels of the short convolution against PyTorch's convolution in float64."""

import os
from itertools import pairwise

import pytest
import torch
from short_conv_truth import boundaries, check, make, outputs_and_gradients, true_outputs_and_gradients

from lrnn.kernels.reference import short_conv as reference
from lrnn.kernels.short_conv import launch
from lrnn.kernels.short_conv.api import short_conv

FP16, FP32 = torch.float16, torch.float32
TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # also run the cases that only combine again what others contain


def compare(T, *, B=1, widths=(8,), taps=4, dtype=FP32, weight_dtype=FP32, before=False, cu_seqlens=None, seed=0):
    xs, weights, ahead, dys = make(B, T, widths, taps, dtype, weight_dtype, seed=seed, before=before)
    options = {"before": ahead, "cu_seqlens": cu_seqlens}
    found = outputs_and_gradients(short_conv, xs, weights, dys, **options)
    check(found, true_outputs_and_gradients(xs, weights, dys, **options), xs, weights)


@pytest.fixture
def long_blocks(monkeypatch):
    """Use the blocks of 128 tokens that long inputs get."""
    monkeypatch.setattr(launch, "MANY_TOKENS", 1)


@pytest.mark.parametrize("T", [1, 3, 64, 65, *([2, 63, 130] if TORTURE else [])])
def test_lengths(T):
    compare(T, widths=[8, 4])


@pytest.mark.parametrize("T", [128, 131, 260, *([127, 129] if TORTURE else [])])
def test_lengths_of_long_blocks(T, long_blocks):
    compare(T)


@pytest.mark.parametrize(
    ("T", "taps", "before"),
    [
        *((T, taps, True) for T in (1, 2) for taps in (2, 3, 4)),
        *((35, taps, True) for taps in (2, 4)),
        *((1, 2, False), (2, 4, False), (35, 3, False)),
    ],
)
def test_taps(T, taps, before):
    compare(T, B=2, taps=taps, before=before)


@pytest.mark.parametrize("widths", [[1], [7, 16], [8, 600, 1], [512, 512, 512]])
def test_widths(widths):
    """A program has 512 channels of 16 bits. For 600 there are two, and the second one is partly outside."""
    compare(9, B=2, widths=widths, dtype=FP16)


@pytest.mark.parametrize("weight_dtype", [FP16, FP32])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_dtypes(dtype, weight_dtype):
    compare(20, widths=[16, 8], dtype=dtype, weight_dtype=weight_dtype)


PACKED = {
    "lengths 0, 1, 2": [0, 1, 2, 0, 0, 1, 1, 2, 3, 4, 5, 0, 30, 1, 16, 0],
    "one document": [66],
    "at block ends": [32, 1, 31, 2],
    "near block ends": [31, 2, 30, 3],
    "across blocks": [29, 7, 30],
}


@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_documents(lengths):
    """The boundaries are int32 here, and int64 where there are many documents."""
    compare(sum(lengths), cu_seqlens=boundaries(lengths))


@pytest.mark.parametrize(("T", "taps"), [(35, 4), (3, 3), (2, 2), *([(64, 4), (33, 2), (1, 4)] if TORTURE else [])])
def test_documents_behind_inputs(T, taps):
    """The inputs ahead belong to the first document of a row, which may be short or reach the row's end."""
    compare(T, B=3, taps=taps, before=True, cu_seqlens=boundaries([1, T - 1, 0, T - 1, 1, T]))


def test_documents_behind_inputs_in_long_blocks(long_blocks):
    compare(150, B=2, before=True, cu_seqlens=boundaries([2, 128, 20, 149, 1]))


@pytest.mark.parametrize("taps", [2, 3])
def test_documents_with_fewer_taps(taps):
    compare(66, taps=taps, cu_seqlens=boundaries(PACKED["lengths 0, 1, 2"]))


@pytest.mark.parametrize("seed", range(2))
def test_random_documents_in_long_blocks(seed, long_blocks):
    """In two rows of 150 tokens, a document often continues from one row to the next, where taps still end."""
    r = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, 301, (20,), generator=r).tolist() + [128, 150, 278] * (seed % 2)
    cu_seqlens = torch.tensor(sorted([0, *inner, *inner[:3], 300]), dtype=torch.int32)
    compare(150, B=2, cu_seqlens=cu_seqlens, seed=seed)


def test_many_documents():
    """There are more boundaries than the kernel reads at a time, and most of them are equal."""
    compare(300, cu_seqlens=boundaries([1, 0, 0, 2] * 100, torch.int64))


def test_documents_do_not_touch_each_other():
    """NaN in one document, or in its gradients, stays there."""
    lengths = [2, 3, 1, 30, 2]
    cu_seqlens = boundaries(lengths)
    xs, weights, _, dys = make(1, sum(lengths), [8])
    clean = outputs_and_gradients(short_conv, xs, weights, dys, cu_seqlens=cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        x, dy = xs[0].detach().clone(), dys[0].clone()
        x[:, start:end] = float("nan")
        dy[:, start:end] = float("nan")
        found = outputs_and_gradients(short_conv, [x.requires_grad_()], weights, [dy], cu_seqlens=cu_seqlens)
        for y, z in zip(found[:2], clean[:2], strict=True):
            assert torch.equal(y[:, :start], z[:, :start]) and torch.equal(y[:, end:], z[:, end:])


def test_rows_of_a_batch_do_not_touch_each_other():
    xs, weights, _, dys = make(3, 34, [8])
    clean = outputs_and_gradients(short_conv, xs, weights, dys)
    x, dy = xs[0].detach().clone(), dys[0].clone()
    x[1], dy[1] = float("nan"), float("nan")
    found = outputs_and_gradients(short_conv, [x.requires_grad_()], weights, [dy])
    for y, z in zip(found[:2], clean[:2], strict=True):
        assert torch.equal(y[0], z[0]) and torch.equal(y[2], z[2]) and y[1].isnan().any()


def strided(x):
    """Return the values as slices of channels with NaN around, with channels not contiguous, and with rows uneven."""
    B, T, D = x.shape
    wide = x.new_full((B, T, D + 16), float("nan"))
    wide[..., 8 : D + 8] = x
    uneven = x.new_full((B, T + 2, D), float("nan"))
    uneven[:, :T] = x
    return {"slice": wide[..., 8 : D + 8], "transposed": x.mT.contiguous().mT, "uneven": uneven[:, :T]}


@pytest.mark.parametrize("how", ["slice", "transposed", "uneven"])
@pytest.mark.parametrize("T", [1, 35])
def test_strides(T, how):
    xs, weights, before, dys = make(2, T, [16, 8], before=True)
    truth = true_outputs_and_gradients(xs, weights, dys, before=before)
    views, before, dys = ([strided(x.detach())[how] for x in group] for group in (xs, before, dys))
    assert not any(x.is_contiguous() for x in views) or T == 1
    views = [x.requires_grad_() for x in views]
    check(outputs_and_gradients(short_conv, views, weights, dys, before=before), truth, xs, weights)


def test_slices_of_one_projection():
    """Queries, keys and values are slices of one matrix product, whose whole gradient is checked."""
    xs, weights, _, dys = make(2, 20, [16, 16, 8])
    whole = torch.cat([x.detach() for x in xs], -1).requires_grad_()
    ys = short_conv(list(whole.split([16, 16, 8], -1)), weights)
    (found,) = torch.autograd.grad(ys, [whole], dys)
    truth = true_outputs_and_gradients(xs, weights, dys)[3:6]
    assert ((found - torch.cat(truth, -1)).norm() / found.norm()).item() < 1e-6


def test_some_outputs_without_gradient():
    xs, weights, _, dys = make(1, 20, [8, 8, 8])
    dys[1] = torch.zeros_like(dys[1])
    truth = true_outputs_and_gradients(xs, weights, dys)[3:]
    ys = short_conv(xs, weights)
    found = torch.autograd.grad([ys[0], ys[2]], [*xs, *weights], [dys[0], dys[2]])
    for x, y in zip(found, truth, strict=True):
        assert torch.allclose(x.double(), y.double(), atol=1e-5)


def test_gradient_of_the_weights_alone():
    xs, weights, _, dys = make(1, 20, [8])
    (found,) = torch.autograd.grad(short_conv([xs[0].detach()], weights), weights, dys)
    truth = true_outputs_and_gradients(xs, weights, dys)[2]
    assert torch.allclose(found.double(), truth.double(), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(shape):
    xs, weights, _, dys = make(*shape, [8, 4])
    found = outputs_and_gradients(short_conv, xs, weights, dys)
    assert [y.shape for y in found[:2]] == [x.shape for x in xs] and not any(dw.any() for dw in found[4:])


def test_extreme_activations():
    """Test values of z for which exp(-z) is infinite or zero."""
    xs, weights, _, dys = make(1, 9, [8])
    scaled = [(300 * xs[0].detach()).requires_grad_()]
    found = outputs_and_gradients(short_conv, scaled, weights, dys)
    check(found, true_outputs_and_gradients(scaled, weights, dys), xs, weights)


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_are_bitwise_equal(packed):
    xs, weights, _, dys = make(1, 40, [24], dtype=FP16)
    cu_seqlens = boundaries([3, 0, 20, 1, 16]) if packed else None
    runs = [outputs_and_gradients(short_conv, xs, weights, dys, cu_seqlens=cu_seqlens) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["before", "packed"])
def test_operators(kind):
    xs, weights, before, dys = make(2, 6, [8, 4], dtype=FP16, before=kind == "before")
    cu_seqlens = boundaries([4, 2, 0, 6]) if kind == "packed" else None
    arguments = (xs, weights, before or [], cu_seqlens)
    torch.library.opcheck(torch.ops.lrnn.short_conv_forward.default, arguments)
    detached = [[x.detach() for x in group] for group in (dys, xs, weights)]
    arguments = (*detached, before or [], cu_seqlens)
    torch.library.opcheck(torch.ops.lrnn.short_conv_backward.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast):
    xs, weights, _, dys = make(2, 10, [8, 4])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(xs, weights):
        return short_conv(xs, weights)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # autocast leaves the operator's inputs alone
        found = outputs_and_gradients(step, xs, weights, dys)
    check(found, true_outputs_and_gradients(xs, weights, dys), xs, weights)


def test_reference():
    """The reference also agrees with the truth."""
    for before, cu_seqlens in ((True, None), (False, None), (False, boundaries([5, 0, 1, 2, 24, 8]))):
        xs, weights, ahead, dys = make(2, 20, [8, 4], before=before)
        options = {"before": ahead, "cu_seqlens": cu_seqlens}
        truth = true_outputs_and_gradients(xs, weights, dys, **options)
        check(outputs_and_gradients(reference.short_conv, xs, weights, dys, **options), truth, xs, weights)


def test_float64_is_refused():
    xs, weights, _, _ = make(1, 5, [8])
    with pytest.raises(ValueError, match="float16"):
        short_conv([xs[0].double()], weights)
