"""Bytes that layers keep for their backward pass, and that they take while it runs.

Counts are those of the tensors that the layers save: `lrnn/pretrain/fused/` for the fused form, `lrnn/model/` under
autocast for the plain one. They are per token of a micro-batch and per layer, unless a function says otherwise. The
incomplete chunks at the ends of packed documents are left out. Mixers other than DeltaNet, DeltaProduct and attention
are counted by their weights, which is an estimate.
"""

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule.call import can_save_states
from lrnn.kernels.delta_rule.cut import count_segments
from lrnn.pretrain.fused.loss import CHUNK as FUSED_LOSS_CHUNK
from lrnn.pretrain.plan.setup import DTYPES, Setup
from lrnn.pretrain.plan.sizes import LayerSizes

FLOAT32 = 4
LOSS_CHUNK = 4096  # of `lrnn.model.modeling_lrnn`: tokens whose logits exist at a time in the plain loss


def kept_by_mixer(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that x + mixer(norm(x)) keeps."""
    e = setup.itemsize
    if layer.attention:
        return _plain_norm(setup, layer) + layer.attention.kept(e, setup.packed)
    if not layer.factors:
        # Its norm, the inputs and outputs of its projections, and those of what follows the projections.
        return _plain_norm(setup, layer) + e * (2 * layer.cost.weights / layer.hidden + 2 * layer.cost.channels)
    rows = (layer.factors + layer.gated) * layer.heads.HV  # b of each factor, a
    projected = layer.projected + rows
    qkv = (1 + layer.factors) * layer.padded.keys + layer.factors * layer.padded.values
    if not (setup.fused and layer.mixer_is_fused):
        # The output of the delta rule and that of the norm are kept for what follows them.
        outputs = layer.padded.values + layer.heads.values
        return _plain_norm(setup, layer) + e * (projected + qkv + outputs) + _kept_by_delta_rule(setup, layer)
    # x, what the merged product returns, its columns b and a again, q k v, and the output of the delta rule.
    return e * (layer.hidden + projected + rows + qkv + layer.heads.values) + _kept_by_delta_rule(setup, layer)


def kept_by_mlp(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that x + mlp(norm(x)) or x + norm(mlp(x)) keeps."""
    e = setup.itemsize
    if not setup.fused:  # gate, up, silu(gate), and the product of the last two
        return _plain_norm(setup, layer) + 4 * e * layer.intermediate
    kept = 2 * layer.intermediate + layer.norms_outputs * layer.hidden  # gate and up, and an output that is normed
    return e * (layer.hidden + (0 if setup.checkpointing == "mlp" else kept))


def kept_by_whole_layer(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes of its input, which a layer that is computed again as a whole keeps."""
    return setup.itemsize * layer.hidden


def saved_states(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that a recomputed delta rule saves besides, for the states of its chunks and the errors Y."""
    if not layer.factors or not can_save_states(layer.padded.K, DTYPES[setup.precision]):
        return 0.0
    return _states_and_errors(setup, layer)


def used_by_mixer(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that the backward pass of a mixer holds at once, besides those that the layer kept.

    These are the gradients of its projections and of q, k, v, the recomputed norm, and what the delta rule computes
    again.
    """
    e = setup.itemsize
    if layer.attention:
        return e * layer.hidden + layer.attention.used(e, setup.packed)
    if not layer.factors:
        return e * (2 * layer.cost.weights / layer.hidden + layer.hidden)
    heads = layer.padded
    # Each value head has its own gradients of q and k. They are added up where key heads are fewer.
    dqk = (1 + layer.factors) * (heads.HV * heads.K + (heads.keys if heads.HV > heads.H else 0))
    dstates = layer.factors * heads.values * heads.K / CHUNK
    numbers = layer.projected + dqk + layer.factors * heads.values + 2 * layer.heads.values + dstates + layer.hidden
    states = 0.0 if setup.checkpointing == "full" else _states_and_errors(setup, layer)
    float8 = layer.projected * (setup.float8 and layer.mixer_is_fused)  # the gradients of the projections, cast
    return e * numbers + states + float8


def used_by_mlp(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that the backward pass of an MLP holds at once, besides those that the layer kept."""
    e = setup.itemsize
    again = 2 * layer.intermediate + layer.hidden if setup.checkpointing == "mlp" else 0
    float8 = 2 * layer.intermediate * setup.float8  # the gradients of gate and up, cast
    return e * (4 * layer.intermediate + 2 * layer.hidden + again) + float8


def kept_by_ends(setup: Setup) -> float:
    """Return the bytes that the final norm and the loss keep for a whole micro-batch."""
    m, e, tokens = setup.model, setup.itemsize, setup.tokens
    norm = tokens * (FLOAT32 * m.hidden + FLOAT32)  # its input in float32, and a number per row
    if has_fused_loss(setup):  # the gradients of the hidden states and of the head
        return norm + e * tokens * m.hidden + FLOAT32 * m.vocab * m.hidden
    return norm + e * tokens * m.hidden


def used_by_loss(setup: Setup) -> float:
    """Return the bytes that the loss takes besides, in the pass in which it takes more."""
    m, e = setup.model, setup.itemsize
    if has_fused_loss(setup):
        # Forward: the logits of two chunks. Backward: both gradients again, times a number.
        forward = 2 * e * min(setup.tokens, FUSED_LOSS_CHUNK) * m.vocab
        return max(forward, FLOAT32 * m.vocab * m.hidden + (2 * FLOAT32 + e) * setup.tokens * m.hidden)
    # log softmax, its gradient, and that of the logits
    return 3 * FLOAT32 * min(setup.tokens, LOSS_CHUNK) * m.vocab


def has_fused_loss(setup: Setup) -> bool:
    """Return whether the head and the loss are fused; see `lrnn.pretrain.fused.layers.fuse`."""
    return setup.fused and setup.zero < 3


def _plain_norm(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that a plain norm and the products after it keep, for the input in float32 and the output."""
    return FLOAT32 * (layer.hidden + 1) + setup.itemsize * layer.hidden


def _states_and_errors(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes of the states of the delta rule's chunks, and of the errors Y."""
    heads = layer.padded
    return setup.itemsize * layer.factors * heads.values * (1 + heads.K / CHUNK)


def _kept_by_delta_rule(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that the operator keeps besides its inputs: C, four numbers per token and head, and states."""
    dtype = DTYPES[setup.precision]
    heads = layer.padded
    sizes = (heads.HV, heads.K, heads.V)
    segments = 1 if setup.packed else count_segments(setup.micro_batch, setup.seq_len, *sizes, dtype)
    states = setup.micro_batch * segments * heads.HV * heads.K * (2 * heads.V + heads.K) if segments > 1 else 0
    matrices = setup.itemsize * CHUNK + 4 * FLOAT32  # float32 keeps C in float32, 16 bits in float16
    return layer.factors * heads.HV * matrices + FLOAT32 * states / setup.tokens
