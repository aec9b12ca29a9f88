"""Floating-point operations of the model, for MFU."""

from lrnn.configuration_lrnn import LrnnConfig

# Dense bf16 matrix FLOP/s by the vendors' datasheets, first match of the device's name.
PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def train_flops_per_token(config: LrnnConfig) -> float:
    """FLOPs of forward and backward for one token: three times the forward pass.

    Forward, a multiply-add counting as two:
        2 x every weight of a linear map (projections, MLP, head; the embedding is a look-up),
        2 x taps for each channel of the three short convolutions,
        6 K V a head for the recurrence: reading the state with k, writing k (v - S^T k)^T, reading it with q. This is
        what the recurrence needs, whatever the chunk size; the chunkwise form and recomputation do more, which does
        not count.
    """
    inner = config.num_heads * config.head_dim
    projections = 5 if config.mixer == "gated_deltanet" else 4  # q, k, v, o and the output gate
    small = 2 if config.mixer == "gated_deltanet" else 1  # b and a
    linear = (
        projections * config.hidden_size * inner
        + small * config.hidden_size * config.num_heads
        + 3 * config.hidden_size * config.intermediate_size
    )
    convolutions = 3 * inner * config.conv_size
    recurrence = 3 * config.num_heads * config.head_dim**2
    layers = config.num_hidden_layers * (linear + convolutions + recurrence)
    return 3 * 2 * float(layers + config.vocab_size * config.hidden_size)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
