"""Test the kernels of the short convolution on the GPU, at training sizes, against PyTorch's own in float64."""

import pytest
import torch
from nan_buffers import fill_new_buffers_with_nan
from short_conv_truth import BARS, boundaries, check, make, outputs_and_gradients, true_outputs_and_gradients

from lrnn.kernels.reference import short_conv as reference
from lrnn.kernels.short_conv.api import short_conv

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]


@pytest.fixture(autouse=True)
def nan_buffers(request, monkeypatch):
    if "compile" not in request.node.name:  # the compiler allocates its own buffers
        fill_new_buffers_with_nan(monkeypatch)


def compare(B, T, widths, *, taps=4, dtype=BF16, weight_dtype=FP32, before=False, cu_seqlens=None):
    xs, weights, ahead, dys = make(B, T, widths, taps, dtype, weight_dtype, device="cuda", before=before)
    options = {"before": ahead, "cu_seqlens": cu_seqlens}
    found = outputs_and_gradients(short_conv, xs, weights, dys, **options)
    check(found, true_outputs_and_gradients(xs, weights, dys, **options), xs, weights)


def packed(tokens: int, seed: int, dtype=torch.int32, extra=()):
    """Return boundaries of documents of 0 to a few hundred tokens, of which many are short."""
    r = torch.Generator().manual_seed(seed)
    inner = torch.cat([torch.randint(0, tokens + 1, (tokens // 100,), generator=r)] * 2)  # each boundary appears twice
    near = (inner + torch.randint(1, 4, inner.shape, generator=r)).clamp(max=tokens)
    ends = torch.tensor([0, tokens, *extra])
    return torch.cat([inner, near, ends]).sort().values.to(dtype).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T"), [(8, 2048), (4, 4096), (1, 1000), (3, 127)])
def test_training_sizes(B, T, dtype):
    compare(B, T, [1024, 1024, 1024], dtype=dtype)


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 127, 128, 129, 130, 8193])
def test_lengths(T):
    compare(2, T, [256, 128, 640])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_taps(taps, dtype, before):
    compare(2, 70, [192, 64], taps=taps, dtype=dtype, before=before)


@pytest.mark.parametrize("widths", [[1], [7, 520], [2048, 1, 96], [192, 192, 192]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(widths, dtype):
    compare(2, 50, widths, dtype=dtype, weight_dtype=dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("B", "T"), [(1, 1200), (2, 4200)])
def test_documents(B, T, seed, dtype, index_dtype):
    """Taps do not reach into another row, whether or not there is a boundary at the ends of the rows."""
    cu_seqlens = packed(B * T, seed, index_dtype, extra=[T, 128, 256] if seed else [])
    compare(B, T, [96, 64], dtype=dtype, cu_seqlens=cu_seqlens)


def test_many_documents():
    compare(1, 9000, [64], cu_seqlens=boundaries([1, 0, 0, 2] * 3000, device="cuda"))


@pytest.mark.parametrize("T", [300, 9000])
def test_documents_do_not_touch_each_other(T):
    """NaN in every other document, and in its gradients, stays there."""
    xs, weights, _, dys = make(1, T, [96], dtype=BF16, device="cuda")
    cu_seqlens = packed(T, 0)
    clean = outputs_and_gradients(short_conv, xs, weights, dys, cu_seqlens=cu_seqlens)
    document = torch.searchsorted(cu_seqlens, torch.arange(T, device="cuda", dtype=torch.int32), right=True)
    for odd in (0, 1):
        spoilt = (document % 2 == odd)[None, :, None]
        x, dy = (t.detach().masked_fill(spoilt, float("nan")) for t in (xs[0], dys[0]))
        found = outputs_and_gradients(short_conv, [x.requires_grad_()], weights, [dy], cu_seqlens=cu_seqlens)
        for y, z in zip(found[:2], clean[:2], strict=True):
            assert torch.equal(y.masked_fill(spoilt, 0), z.masked_fill(spoilt, 0))


@pytest.mark.parametrize("offset", [0, 64, 3])
def test_slices_of_one_projection(offset):
    """Read slices in place, aligned to 16 bytes or not. The channels on both sides are NaN."""
    xs, weights, _, dys = make(2, 500, [256, 256, 128], dtype=BF16, device="cuda")
    whole = torch.full((2, 500, offset + 640 + 64), float("nan"), device="cuda", dtype=BF16)
    whole[..., offset : offset + 640] = torch.cat([x.detach() for x in xs], -1)
    whole.requires_grad_()
    views = whole[..., offset : offset + 640].split([256, 256, 128], -1)
    found = outputs_and_gradients(short_conv, views, weights, dys)
    check(found, true_outputs_and_gradients(xs, weights, dys), xs, weights)


def test_generation_token_by_token():
    """Computing one token at a time, given the inputs before it, gives the results of the whole sequence."""
    xs, weights, _, _ = make(2, 40, [256, 128], dtype=BF16, device="cuda")
    with torch.no_grad():
        whole = short_conv(xs, weights)
        padded = [torch.nn.functional.pad(x, (0, 0, 3, 0)) for x in xs]
        for t in range(40):
            before = [p[:, t : t + 3] for p in padded]
            step = short_conv([x[:, t : t + 1] for x in xs], weights, before=before)
            for y, z in zip(step, whole, strict=True):
                torch.testing.assert_close(y, z[:, t : t + 1], rtol=2**-7, atol=1e-6)  # one bit of bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_documents", [False, True])
def test_hundred_runs_are_bitwise_equal(dtype, with_documents):
    xs, weights, _, dys = make(4, 2048, [512, 512, 512], dtype=dtype, device="cuda")
    cu_seqlens = packed(4 * 2048, 0) if with_documents else None
    first = outputs_and_gradients(short_conv, xs, weights, dys, cu_seqlens=cu_seqlens)
    for _ in range(99):
        run = outputs_and_gradients(short_conv, xs, weights, dys, cu_seqlens=cu_seqlens)
        assert all(torch.equal(x, y) for x, y in zip(first, run, strict=True))


def test_constant_inputs():
    """All inputs are 1, so that no error averages out."""
    xs, weights, _, dys = make(2, 300, [128], device="cuda")
    xs, weights, dys = ([torch.ones_like(t) for t in group] for group in (xs, weights, dys))
    xs, weights = ([t.requires_grad_() for t in group] for group in (xs, weights))
    found = outputs_and_gradients(short_conv, xs, weights, dys)
    check(found, true_outputs_and_gradients(xs, weights, dys), xs, weights)


@pytest.mark.parametrize("kind", ["plain", "before", "packed"])
def test_operators(kind):
    xs, weights, before, dys = make(2, 6, [64, 32], dtype=BF16, device="cuda", before=kind == "before")
    cu_seqlens = boundaries([4, 2, 0, 6], device="cuda") if kind == "packed" else None
    arguments = (xs, weights, before or [], cu_seqlens)
    torch.library.opcheck(torch.ops.lrnn.short_conv_forward.default, arguments)
    detached = [[x.detach() for x in group] for group in (dys, xs, weights)]
    torch.library.opcheck(torch.ops.lrnn.short_conv_backward.default, (*detached, before or [], cu_seqlens))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_compiled_in_one_graph(with_documents, autocast):
    """Compile it between other operations, also under autocast, which leaves the operator and its weights alone."""
    torch._dynamo.reset()
    xs, weights, _, dys = make(2, 600, [256, 128], dtype=BF16, device="cuda")
    cu_seqlens = packed(1200, 0) if with_documents else None

    def step(xs, weights):
        return [y + 0 for y in short_conv([x * 1 for x in xs], weights, cu_seqlens=cu_seqlens)]

    with torch.autocast("cuda", BF16, enabled=autocast):
        found = outputs_and_gradients(torch.compile(step, fullgraph=True), xs, weights, dys)
    truth = true_outputs_and_gradients(xs, weights, dys, cu_seqlens=cu_seqlens)
    check(found, truth, xs, weights)


def test_the_length_is_not_compiled_in():
    """A new T uses the same compiled kernels."""
    from lrnn.kernels.short_conv.kernels import short_conv_backward_kernel, short_conv_forward_kernel

    def compiled():
        kernels = (short_conv_forward_kernel, short_conv_backward_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    counts = []
    for T in (16, 17, 33, 48, 1, 100):
        compare(1, T, [112])
        counts.append(compiled())
    assert counts[0] == counts[-1], counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype):
    """The kernel and the reference sum in float32 in different orders, and nearly always round to the same number."""
    xs, weights, _, dys = make(2, 512, [256], dtype=dtype, device="cuda")

    def rounded_reference(xs, weights):
        return [y.to(dtype) for y in reference.short_conv([x.float() for x in xs], weights)]

    pairs = zip(*(outputs_and_gradients(f, xs, weights, dys) for f in (short_conv, rounded_reference)), strict=True)
    for x, y in pairs:
        assert ((x.double() - y.double()).norm() / y.double().norm()).item() < BARS[x.dtype]


def test_more_than_2_to_the_31_elements():
    """At offsets above 2^31, the last rows of a tensor agree with the same rows alone."""
    B, T, D = 2, 2**19 + 100, 2112
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of GPU memory")
    assert B * T * D > 2**31
    x = torch.zeros(B, T, D, dtype=BF16, device="cuda")
    dy = torch.zeros_like(x)
    r = torch.Generator("cuda").manual_seed(0)
    _, weights, _, _ = make(1, 1, [D], dtype=BF16, device="cuda")
    tail = 700
    x[-1, -tail:] = torch.randn(tail, D, generator=r, device="cuda").to(BF16)
    dy[-1, -tail:] = torch.randn(tail, D, generator=r, device="cuda").to(BF16)
    x.requires_grad_()
    y, dx, dw = outputs_and_gradients(short_conv, [x], weights, [dy])
    short = [x.detach()[-1:, -tail:].clone().requires_grad_()]
    truth = true_outputs_and_gradients(short, weights, [dy[-1:, -tail:]])
    check([y[-1:, -tail:], dx[-1:, -tail:], dw], truth, short, weights)
    assert not y[0].any() and not dx[0].any()
    # Rows before the tail are zeros, except for gradients of the taps that reach back out of it.
    assert not y[1, :-tail].any() and not dx[1, : -tail - 3].any()


def test_tensors_on_the_cpu_take_the_reference():
    xs, weights, _, _ = make(1, 5, [8])
    assert torch.equal(short_conv(xs, weights)[0], reference.short_conv(xs, weights)[0])


def test_refuses_float64():
    xs, weights, _, _ = make(1, 5, [8], device="cuda")
    with pytest.raises(ValueError, match="float16"):
        short_conv([xs[0].double()], weights)
