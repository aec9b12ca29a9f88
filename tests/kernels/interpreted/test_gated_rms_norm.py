"""Test the Triton kernels of the gated RMS norm against its formula in float64."""

import pytest
import torch
from gated_rms_norm_truth import check, make, output_and_gradients, true_output_and_gradients

from lrnn.kernels import gated_rms_norm as module
from lrnn.kernels.gated_rms_norm import gated_rms_norm
from lrnn.kernels.reference import gated_rms_norm as reference

FP16, FP32 = torch.float16, torch.float32


def compare(shape, eps=1e-6, function=gated_rms_norm, **options):
    inputs = make(shape, **options)
    found = output_and_gradients(function, *inputs, eps=eps)
    check(found, true_output_and_gradients(*inputs, eps=eps), *inputs[:3])


@pytest.mark.parametrize(
    ("T", "gated"),
    [(1, True), (2, False), (3, True), (63, False), (64, True), (65, False), (130, True), (130, False)],
)
def test_lengths(T, gated):
    """With 3 heads, rows do not fill the last tile. From T = 86 on, the backward pass has more than one program."""
    compare((1, T, 3, 64), gated=gated)


@pytest.mark.parametrize("D", [4, 8, 24, 64, 96, 128, 200, 256])
def test_sizes(D):
    compare((2, 5, D))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 2, 2, 64)])
def test_leading_dimensions(shape):
    compare(shape)


@pytest.mark.parametrize(  # every pair of types
    ("dtype", "gate_dtype", "weight_dtype"),
    [(FP16, FP16, FP16), (FP16, FP32, FP32), (FP32, FP16, FP32), (FP32, FP32, FP16)],
)
def test_dtypes(dtype, gate_dtype, weight_dtype):
    compare((2, 9, 2, 64), dtype=dtype, gate_dtype=gate_dtype, weight_dtype=weight_dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_eps(eps):
    compare((3, 3, 64), eps=eps)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(shape):
    inputs = make(shape)
    found = output_and_gradients(gated_rms_norm, *inputs)
    assert found["y"].shape == shape and not found["dweight"].any()


def strided(x):
    """Return views of the same values in other strides, with NaN around them."""
    B, T, H, D = x.shape
    wide = x.new_full((B, T, H * D + 32), float("nan"))
    wide[..., 16 : H * D + 16] = x.flatten(-2)
    padded = x.new_full((B, T, H, D + 16), float("nan"))
    padded[..., :D] = x
    uneven = x.new_full((B, T + 1, H, D), float("nan"))
    uneven[:, :T] = x
    return {
        "slice of a projection": wide[..., 16 : H * D + 16].unflatten(-1, (H, D)),
        "apart": padded[..., :D],
        "uneven": uneven[:, :T],
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "last not contiguous": x.mT.contiguous().mT,
        "expanded": x[:1].expand_as(x),
    }


KINDS = ["slice of a projection", "apart", "uneven", "heads first", "last not contiguous", "expanded"]


@pytest.mark.parametrize("which", ["x", "gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind, which):
    x, gate, weight, dy = make((2, 5, 3, 64))
    if which == "x":
        x = strided(x.detach())[kind].requires_grad_()
    else:
        gate = strided(gate.detach())[kind].requires_grad_()
    assert not (x.is_contiguous() and gate.is_contiguous())
    inputs = (x, gate, weight, strided(dy)[kind])
    found = output_and_gradients(gated_rms_norm, *inputs)
    check(found, true_output_and_gradients(*inputs), x, gate, weight)


def test_which_inputs_are_read_in_place():
    x = torch.zeros(2, 5, 3, 64)
    in_place = {kind for kind in KINDS if module._pieces(strided(x)[kind])}
    assert in_place == {"slice of a projection"}
    assert module._pieces(x) == (1, 64) and module._pieces(strided(x)[KINDS[0]]) == (3, 3 * 64 + 32)


def test_rows_do_not_touch_each_other():
    """NaN in a row, which shares a tile with others, stays in that row, except in the gradient of the weight."""
    x, gate, weight, dy = make((7, 64))
    clean = output_and_gradients(gated_rms_norm, x, gate, weight, dy)
    spoilt = x.detach().clone()
    spoilt[3] = float("nan")
    found = output_and_gradients(gated_rms_norm, spoilt.requires_grad_(), gate, weight, dy)
    others = torch.arange(7) != 3
    for name in ("y", "dx", "dgate"):
        assert torch.equal(found[name][others], clean[name][others]) and found[name][3].isnan().all()


def test_extreme_gates_and_rows():
    """Test gates for which exp(-gate) is infinite or zero, and rows of zeros, of tiny and of huge numbers."""
    x, gate, weight, dy = make((6, 64))
    with torch.no_grad():
        gate.mul_(200)
        x[0] = 0
        x[1] *= 1e-15
        x[2] *= 1e15
    found = output_and_gradients(gated_rms_norm, x, gate, weight, dy)
    truth = true_output_and_gradients(x, gate, weight, dy)
    for row in range(6):  # each row separately, since the gradients differ by 20 orders of magnitude
        pick = [{n: z[row] for n, z in d.items() if n != "dweight"} for d in (found, truth)]
        check(*pick, x[row], gate[row], weight, f"row {row}")


def test_two_runs_are_bitwise_equal():
    inputs = make((1, 100, 3, 64), dtype=FP16)
    first, second = (output_and_gradients(gated_rms_norm, *inputs) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("gated", [True, False])
def test_operators(gated):
    x, gate, weight, dy = make((2, 3, 2, 64), dtype=FP16, gated=gated)
    torch.library.opcheck(torch.ops.lrnn.gated_rms_norm_forward.default, (x, gate, weight, 1e-6))
    arguments = [None if t is None else t.detach() for t in (dy, x, gate, weight)]
    torch.library.opcheck(torch.ops.lrnn.gated_rms_norm_backward.default, (*arguments, 1e-6))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_compiles_to_one_graph(gated, autocast):
    inputs = make((2, 3, 2, 64), gated=gated)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args):
        return gated_rms_norm(*args)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # autocast leaves the operator's inputs alone
        found = output_and_gradients(step, *inputs)
    check(found, true_output_and_gradients(*inputs), *inputs[:3])


@pytest.mark.parametrize("gated", [True, False])
def test_reference(gated):
    compare((2, 3, 64), function=reference.gated_rms_norm, gated=gated)


def test_unsupported_inputs():
    x, gate, weight, _ = make((2, 257))
    with pytest.raises(ValueError, match="256"):
        gated_rms_norm(x, gate, weight, 1e-6)
    with pytest.raises(ValueError, match="bfloat16"):
        gated_rms_norm(torch.zeros(2, 64, dtype=torch.float64), None, torch.ones(64), 1e-6)
