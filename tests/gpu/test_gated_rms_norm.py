"""Test the kernels of the gated RMS norm on the GPU, at the sizes of training, against its formula in float64."""

import pytest
import torch
from gated_rms_norm_truth import check, make, output_and_gradients, true_output_and_gradients
from nan_buffers import fill_new_buffers_with_nan

from lrnn.kernels.gated_rms_norm import gated_rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]


@pytest.fixture(autouse=True)
def nan_buffers(request, monkeypatch):
    if "compile" not in request.node.name:  # the compiler allocates its own buffers
        fill_new_buffers_with_nan(monkeypatch)


def compare(shape, **options):
    inputs = make(shape, device="cuda", **options)
    check(output_and_gradients(gated_rms_norm, *inputs), true_output_and_gradients(*inputs), *inputs[:3])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 2048, 16, 128), (4, 1024, 8, 64), (2, 1000, 3, 256)])
def test_training_sizes(shape, dtype, gated):
    compare(shape, dtype=dtype, gated=gated)


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("D", [64, 72, 96, 128, 200, 256])
def test_sizes(D, T):
    compare((1, T, 3, D), dtype=BF16)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("gate_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, gate_dtype, weight_dtype):
    compare((2, 70, 2, 128), dtype=dtype, gate_dtype=gate_dtype, weight_dtype=weight_dtype)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("offset", [0, 64, 3])
def test_gate_as_slice_of_a_projection(offset, heads):
    """Read slices in place, aligned to 16 bytes or not. The channels on both sides are NaN."""
    x, gate, weight, dy = make((2, 300, heads, 128), dtype=BF16, device="cuda")
    width = heads * 128
    whole = torch.full((2, 300, width + 128), float("nan"), dtype=BF16, device="cuda")
    whole[..., offset : offset + width] = gate.detach().flatten(-2)
    view = whole[..., offset : offset + width].unflatten(-1, (heads, 128)).requires_grad_()
    found = output_and_gradients(gated_rms_norm, x, view, weight, dy)
    check(found, true_output_and_gradients(x, gate, weight, dy), x, gate, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hundred_runs_are_bitwise_equal(dtype):
    inputs = make((2, 2048, 16, 128), dtype=dtype, device="cuda")
    first = output_and_gradients(gated_rms_norm, *inputs)
    for _ in range(99):
        run = output_and_gradients(gated_rms_norm, *inputs)
        assert all(torch.equal(run[n], first[n]) for n in first)


def test_rows_do_not_touch_each_other():
    x, gate, weight, dy = make((1000, 128), dtype=BF16, device="cuda")
    clean = output_and_gradients(gated_rms_norm, x, gate, weight, dy)
    spoilt = torch.arange(1000, device="cuda") % 3 == 0
    x = x.detach().masked_fill(spoilt[:, None], float("nan")).requires_grad_()
    found = output_and_gradients(gated_rms_norm, x, gate, weight, dy)
    for name in ("y", "dx", "dgate"):
        assert torch.equal(found[name][~spoilt], clean[name][~spoilt]) and found[name][spoilt].isnan().all()


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1])
def test_eps(eps):
    inputs = make((37, 96), device="cuda")
    found = output_and_gradients(gated_rms_norm, *inputs, eps=eps)
    check(found, true_output_and_gradients(*inputs, eps=eps), *inputs[:3])


def test_constant_inputs():
    inputs = [torch.ones_like(t).requires_grad_() for t in make((300, 128), device="cuda")]
    check(output_and_gradients(gated_rms_norm, *inputs, 1.0), true_output_and_gradients(*inputs, 1.0), *inputs[:3])


@pytest.mark.parametrize("gated", [True, False])
def test_operators(gated):
    x, gate, weight, dy = make((2, 3, 2, 64), dtype=BF16, gated=gated, device="cuda")
    torch.library.opcheck(torch.ops.lrnn.gated_rms_norm_forward.default, (x, gate, weight, 1e-6))
    arguments = [None if t is None else t.detach() for t in (dy, x, gate, weight)]
    torch.library.opcheck(torch.ops.lrnn.gated_rms_norm_backward.default, (*arguments, 1e-6))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_compiled_in_one_graph(gated, autocast):
    """Compile it between other operations, also under autocast, which leaves the operator and its weight alone."""
    torch._dynamo.reset()
    inputs = make((2, 300, 4, 128), dtype=BF16, gated=gated, device="cuda")

    def step(x, gate, weight, eps):
        return gated_rms_norm(x * 1, gate, weight, eps) + 0

    with torch.autocast("cuda", BF16, enabled=autocast):
        found = output_and_gradients(torch.compile(step, fullgraph=True), *inputs)
    check(found, true_output_and_gradients(*inputs), *inputs[:3])


def test_more_than_2_to_the_31_elements():
    """At offsets above 2^31, the last rows of a tensor agree with the same rows alone."""
    R, D, tail = 2**24 + 1000, 128, 500
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    assert R * D > 2**31
    x, gate, dy = (torch.zeros(R, D, dtype=BF16, device="cuda") for _ in range(3))
    alone = make((tail, D), dtype=BF16, device="cuda")
    for whole, part in zip((x, gate, dy), (alone[0], alone[1], alone[3]), strict=True):
        whole[-tail:] = part.detach()
    found = output_and_gradients(gated_rms_norm, x.requires_grad_(), gate.requires_grad_(), alone[2], dy)
    assert not found["y"][:-tail].any() and not found["dx"][:-tail].any()
    found = {n: z if n == "dweight" else z[-tail:] for n, z in found.items()}
    check(found, true_output_and_gradients(*alone), *alone[:3])


def test_refuses_unsupported_inputs():
    x, gate, weight, _ = make((2, 257), device="cuda")
    with pytest.raises(ValueError, match="256"):
        gated_rms_norm(x, gate, weight, 1e-6)
    x = torch.zeros(2, 64, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match="bfloat16"):
        gated_rms_norm(x, None, torch.ones(64, device="cuda"), 1e-6)
    with pytest.raises(ValueError, match="one device"):
        gated_rms_norm(torch.zeros(2, 64, device="cuda"), None, torch.ones(64), 1e-6)
