"""Floating-point operations of the model, for MFU."""

import math

from lrnn.model.configuration_lrnn import LrnnConfig
from lrnn.model.mixer_gla import LOW_RANK as GLA_RANK
from lrnn.model.mixer_rwkv7 import LOW_RANK as RWKV7_RANK

# Dense bf16 matrix FLOP/s by the vendors' datasheets, first match of the device's name.
PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def train_flops_per_token(config: LrnnConfig) -> float:
    """FLOPs of forward and backward for one token: three times the forward pass.

    Forward, a multiply-add counting as two:
        2 x every weight of a linear map (projections, MLP, head; the embedding is a look-up),
        2 x taps for each channel of the short convolutions,
        the products of the recurrence with the state or with the other tokens, see `_mixer`. This is what the
        recurrence needs, whatever the chunk size; the chunkwise form and recomputation do more, which does not count.
    """
    linear, channels, recurrence = _mixer(config)
    linear += 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * (linear + channels * config.conv_size + recurrence)
    return 3 * 2 * float(layers + config.vocab_size * config.hidden_size)


def _mixer(config: LrnnConfig) -> tuple[int, int, int]:
    """Of a token mixer: weights of linear maps, channels of short convolutions, multiply-adds of the recurrence.

    The recurrence of K V numbers a head takes K V for each read (with k, with q) and each write of a product k v^T:
    DeltaNet reads with k, writes, reads with q. The elementwise decay of the state does not count.
    """
    hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
    inner = heads * dim
    state = inner * dim
    if config.mixer in ("gated_deltanet", "deltanet", "gated_deltaproduct", "deltaproduct"):
        factors = config.num_householder if config.mixer.endswith("deltaproduct") else 1
        gated = config.mixer.startswith("gated")
        large = 2 + 2 * factors + gated  # q and o, k and v of each factor, the output gate
        small = factors + gated  # b of each factor, a
        linear = large * hidden * inner + small * hidden * heads
        return linear, (1 + 2 * factors) * inner, (2 * factors + 1) * state
    if config.mixer == "gla":
        return 5 * hidden * inner + GLA_RANK * (hidden + inner), 0, 2 * state
    if config.mixer == "mamba2":
        return 3 * hidden * inner + 2 * hidden * dim + hidden * heads, inner + 2 * dim, 2 * state
    if config.mixer == "mamba":
        rank = math.ceil(hidden / 16)
        size = config.state_size
        return 3 * hidden * inner + inner * (2 * rank + 2 * size), inner, 2 * inner * size
    if config.mixer == "mlstm":  # the normaliser is one more column of the state
        return 5 * hidden * inner + 2 * hidden * heads, 2 * inner, 2 * (state + inner)
    if config.mixer == "rwkv7":  # reads with kappa and r, writes with a kappa and k
        return 4 * hidden * inner + 3 * RWKV7_RANK * (hidden + inner), 0, 4 * state
    if config.mixer == "slstm":  # h times the recurrent matrices
        return 5 * hidden * inner, 0, 4 * state
    if config.mixer == "transformer":  # scores and sums over the tokens before: half the sequence on average
        return 4 * hidden * inner, 0, (config.max_position_embeddings + 1) * inner
    raise NotImplementedError(f"the FLOPs of the mixer {config.mixer} are not known")


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
