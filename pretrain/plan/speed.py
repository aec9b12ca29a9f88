"""Time of a training step, by part.

Products take their FLOPs over what a card sustains, other kernels their bytes over the memory's bandwidth, the
recurrence its multiply-adds. Beside the GPU, the host takes its time to launch a micro-batch and a step; the longer of
the two is the step's time. The constants below were measured on H200 (`docs/results/training.md`, 29 November 2026);
other cards are scaled by their peak and bandwidth.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lrnn.pretrain.gpus import Gpu, find_gpu
from lrnn.pretrain.plan.activations import has_fused_loss
from lrnn.pretrain.plan.collectives import Traffic, traffic
from lrnn.pretrain.plan.setup import Setup
from lrnn.pretrain.plan.sizes import LayerSizes

MEASURED_ON = "H200"
# Of a card's peak in products: in bf16 in the step of 1.36B, at the card's limit of 700 W; in float8 from the products
# of 1.36B alone, 1,260 TFLOP/s.
SUSTAINED, SUSTAINED_FLOAT8 = 681 / 989, 1260 / 1979
COPIED = 0.9  # of the bandwidth in a copy: 4.3 of 4.8 TB/s, and 3.0 of 3.35 on an H100
# What kernels reach of a copy's rate: 1.36B fused, device time by kind. Casts to float8: 1.36B, casts alone.
CONVOLUTION, SWIGLU, NORM, GATED_NORM, ADAMW, CAST = 0.66, 0.97, 0.75, 0.79, 0.79, 0.85
PLAIN = 0.8  # the same of PyTorch's elementwise kernels, which plain layers run on: 1.36B, 53,700 tokens/s
# Seconds per multiply-add of the delta rule: 1.36B. On an H100 it takes 1.17 times as long (`docs/results/kernels.md`):
# part of it follows the peak, the rest the bandwidth.
RECURRENCE, RECURRENCE_FORWARD, RECURRENCE_BY_PEAK = 4.87e-14, 0.22, 0.6
ATTENTION = 0.35  # share of a card's peak that attention reaches: FlashAttention-2 on an H100 (arXiv 2407.08608)
RECURRENCE_PACKED = 1.6  # of this with packed documents: 1.36B, 61,700 tokens/s
RECURRENCE_PORTABLE = 1.29  # of this where the Hopper kernels do not run
SMALL_KERNELS = 0.15e-3  # seconds per layer and micro-batch for kernels too small to be bound by anything
IDLE = 16e-3  # seconds per step in which the GPU waits: 1.36B, 4 ms in each of four micro-batches
# Seconds of the host per layer: of a micro-batch with fused and with plain layers, and of a step. 344M, micro-batches
# of 8: 79 ms to launch one, and what 144,400 and 97,500 tokens/s leave.
HOST_FUSED, HOST_PLAIN, HOST_STEP = 79e-3 / 20, 134e-3 / 20, 138e-3 / 20


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, by part.

    Attributes:
        products: matrix products.
        recurrence: the delta rule, the recurrences of other mixers, and attention.
        kernels: everything else of the passes.
        update: the optimizer, the norm of the gradient, ZeRO's copies.
        collectives: what does not overlap.
        waiting: the GPU waits, for the host above all.
    """

    products: float
    recurrence: float
    kernels: float
    update: float
    collectives: float
    waiting: float

    @property
    def step(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_speed(setup: Setup) -> tuple[Speed, Traffic]:
    """Return the time of a step, and what its collectives send."""
    count = setup.micro_batches
    products, recurrence, kernels = _products(setup), _recurrence(setup), _kernels(setup)
    one = sum(products) + sum(recurrence) + sum(kernels)
    update = _update(setup)
    sent = traffic(setup, one / 3, 2 * one / 3)
    device = count * one + update + sent.exposed + IDLE
    waiting = IDLE + max(0.0, _host(setup) - device)
    speed = Speed(
        products=count * sum(products),
        recurrence=count * sum(recurrence),
        kernels=count * sum(kernels),
        update=update,
        collectives=sent.exposed,
        waiting=waiting,
    )
    return speed, sent


def product_rate(gpu: Gpu, precision: str) -> float:
    """Return the FLOP/s of products in a precision."""
    peak = {"bfloat16": gpu.bfloat16, "float16": gpu.bfloat16, "float32": gpu.float32}[precision]
    return SUSTAINED * 1e12 * peak


def _float8_rate(gpu: Gpu) -> float:
    assert gpu.float8 is not None
    return SUSTAINED_FLOAT8 * 1e12 * gpu.float8


def _copy_rate(gpu: Gpu) -> float:
    """Return the bytes/s that a copy reads and writes."""
    return COPIED * 1e9 * gpu.bandwidth


def _passes(setup: Setup, forward: float, backward: float) -> tuple[float, float]:
    """Return (forward, backward), with the forward pass of layers computed again in the backward pass if it is."""
    return forward, backward + forward * (setup.checkpointing == "full")


def _products(setup: Setup) -> tuple[float, float]:
    """Return the seconds of a micro-batch's products, forward and backward."""
    m = setup.model
    each = 2 * setup.tokens / product_rate(setup.gpu, setup.precision)
    each_float8 = 2 * setup.tokens / _float8_rate(setup.gpu) if setup.float8 else each
    float8 = m.float8 if setup.float8 else 0
    weights = sum(layer.matrices for layer in m.stack)
    # The gradient of the inputs takes as long as the forward pass. That of the weights is not in float8.
    one = each * (weights - float8) + each_float8 * float8
    forward, backward = _passes(setup, one, one + each * weights)
    if setup.checkpointing == "mlp":
        backward += each_float8 * sum(layer.mlp for layer in m.stack) * 2 / 3  # gate and up again
    head = each * m.vocab * m.hidden
    return forward + head, backward + (2 if has_fused_loss(setup) else 3) * head  # the plain loss has the logits again


def _recurrence(setup: Setup) -> tuple[float, float]:
    """Return the seconds of a micro-batch's recurrences and attention, forward and backward."""
    forward = backward = 0.0
    for layer, count in setup.model.kinds.items():
        one = _attention(setup, layer) if layer.attention else _recurrence_of(setup, layer)
        forward, backward = forward + count * one[0], backward + count * one[1]
    return _passes(setup, forward, backward)


def _recurrence_of(setup: Setup, layer: LayerSizes) -> tuple[float, float]:
    """Return the seconds of a layer's recurrence, forward and backward."""
    reference, gpu = find_gpu(MEASURED_ON), setup.gpu
    slower = RECURRENCE_BY_PEAK * reference.bfloat16 / gpu.bfloat16
    slower += (1 - RECURRENCE_BY_PEAK) * reference.bandwidth / gpu.bandwidth
    if setup.packed:
        slower *= RECURRENCE_PACKED
    elif gpu.capability[0] != 9 or (layer.factors and not layer.padded.K == layer.padded.V == 128):  # `Hopper.fits`
        slower *= RECURRENCE_PORTABLE
    if setup.itemsize == 4:
        slower *= 2
    if layer.factors:  # heads that are padded cost what the padded ones do
        slower *= layer.padded.K * layer.padded.V / (layer.heads.K * layer.heads.V)
    whole = setup.tokens * layer.cost.recurrence * RECURRENCE * slower
    return RECURRENCE_FORWARD * whole, (1 - RECURRENCE_FORWARD) * whole


def _attention(setup: Setup, layer: LayerSizes) -> tuple[float, float]:
    """Return the seconds of a layer's attention, forward and backward, which has five products for two."""
    rate = product_rate(setup.gpu, setup.precision) * ATTENTION / SUSTAINED
    forward = 2 * setup.tokens * layer.cost.recurrence / rate
    return forward, 2.5 * forward


def _kernels(setup: Setup) -> tuple[float, float]:
    """Return the seconds of a micro-batch's other kernels, forward and backward."""
    m, rate = setup.model, _copy_rate(setup.gpu)
    kinds = m.kinds.items()
    forward, backward = (
        setup.tokens
        * setup.itemsize
        / rate
        * sum(count * sum(kernel[way] / kernel[2] for kernel in _by_bytes(setup, layer)) for layer, count in kinds)
        for way in (0, 1)
    )
    forward, backward = _passes(setup, forward, backward)
    if setup.checkpointing == "mlp":
        again = 2 * m.hidden / NORM + 1.5 * m.hidden / CAST * setup.float8
        backward += setup.tokens * m.layers * setup.itemsize * again / rate
    matrices = 4.0 * m.matrices
    if not setup.fused:  # weights cast in each pass, their gradients widened and added
        casts = 0.0 if setup.itemsize == 4 else 1.5 * matrices
        forward += casts / rate
        backward += 4.5 * matrices / rate
    elif setup.zero == 3:  # weights cast in each pass
        forward, backward = forward + 2.5 * matrices / rate, backward + 2.5 * matrices / rate
    head, hidden = setup.tokens * m.vocab, setup.tokens * m.hidden
    ends = 6 * head + 60 * hidden + 32 * m.vocab * m.hidden if has_fused_loss(setup) else 50 * head + 60 * hidden
    return forward + SMALL_KERNELS * m.layers / 3, backward + ends / rate + SMALL_KERNELS * m.layers * 2 / 3


def _by_bytes(setup: Setup, layer: LayerSizes) -> Iterator[tuple[float, float, float]]:
    """Yield the kernels of a layer: numbers read and written per token forward and backward, and share of a copy."""
    convolved = layer.cost.channels
    fused_mixer = setup.fused and layer.mixer_is_fused
    if layer.factors:
        yield *_padding(layer), 1.0
    yield 2 * convolved, 3 * convolved, CONVOLUTION
    if fused_mixer:
        yield 2 * layer.hidden, 5 * layer.hidden, NORM
        yield 3 * layer.heads.values, 6 * layer.heads.values, GATED_NORM
        yield 3 * layer.hidden, 0, 1.0  # the residual
    else:
        yield 9 * layer.hidden, 13 * layer.hidden, PLAIN  # the norm in float32, and casts
        yield 3 * layer.heads.values, 5 * layer.heads.values, GATED_NORM
        yield 3 * layer.hidden, 18 * layer.hidden, PLAIN  # the residual, and the sum of the projections' gradients
    if setup.fused:
        yield 2 * layer.hidden, 5 * layer.hidden, NORM
        yield 3 * layer.intermediate, 6 * layer.intermediate, SWIGLU
        yield 3 * layer.hidden, 0, 1.0
        yield from _casts(setup, layer)
    else:
        yield 9 * layer.hidden, 13 * layer.hidden, PLAIN
        yield 5 * layer.intermediate, 9 * layer.intermediate, PLAIN
        yield 3 * layer.hidden, 6 * layer.hidden, PLAIN


def _padding(layer: LayerSizes) -> tuple[float, float]:
    """Return the numbers that are read and written where heads are padded, forward and backward."""
    heads, padded = layer.heads, layer.padded
    keys, values = padded.K > heads.K, padded.V > heads.V
    qk, v = (1 + layer.factors) * keys, layer.factors * values
    # PyTorch writes a padded tensor twice: zeros, and then what is padded. A slice of it is copied.
    pad = qk * (heads.keys + 2 * padded.keys) + v * (heads.values + 2 * padded.values)
    slices = 2 * qk * heads.keys + 2 * v * heads.values
    output, gradient = 2 * values * heads.values, values * (heads.values + 2 * padded.values)
    return pad + output, slices + gradient


def _casts(setup: Setup, layer: LayerSizes) -> Iterator[tuple[float, float, float]]:
    """Yield the casts to float8 of a layer, as `_by_bytes` does: 1.5 numbers of 16 bits for each that is cast."""
    if not setup.float8:
        return
    if layer.mixer_is_fused:  # norm(x) and the input of the last projection; their gradients
        yield 1.5 * (layer.hidden + layer.heads.values), 1.5 * (layer.projected + layer.hidden), CAST
    # norm(x); dz, and what SwiGLU writes in float8 besides. Forward, SwiGLU writes float8 alone.
    yield 1.5 * layer.hidden - 0.5 * layer.intermediate, 1.5 * layer.hidden + layer.intermediate, CAST


def _update(setup: Setup) -> float:
    """Return the seconds of what happens once per step on the GPU, without collectives."""
    whole, part = setup.model.parameters, setup.model.parameters / setup.gpus
    copied = 32 * (whole + part)  # into buckets and out of them; into this GPU's part, to the update and back
    float8 = setup.model.float8 if setup.float8 else 0
    # Weights are cast once. For float8, merged weights are made in float32 and cast, and again after transposing them.
    casts = setup.has_copies * (6 * (setup.model.matrices - float8) + (8 + 5 + 8 + 8 + 5) * float8)
    bytes_moved = copied + 4 * part + 28 * part / ADAMW + casts
    return bytes_moved / _copy_rate(setup.gpu)


def _host(setup: Setup) -> float:
    """Return the seconds that the host takes to launch a step."""
    micro_batch = HOST_FUSED if setup.fused else HOST_PLAIN
    again = {"none": 1.0, "mlp": 1.05, "full": 4 / 3}[setup.checkpointing]
    return setup.model.layers * (setup.micro_batches * micro_batch * again + HOST_STEP)
