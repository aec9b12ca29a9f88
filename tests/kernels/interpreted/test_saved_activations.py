"""Count what fused layers keep for their backward pass, and compare it with what `lrnn plan` counts."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.kernels.delta_rule.api import saving_states
from lrnn.pretrain.fused.layers import fuse
from lrnn.pretrain.gpus import find_gpu
from lrnn.pretrain.plan import activations
from lrnn.pretrain.plan.setup import Links, Setup
from lrnn.pretrain.plan.sizes import ModelSizes

BATCH, TOKENS = 1, 64
SIZES = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 80, "num_heads": 1}


def saved_bytes(compute, model) -> int:
    """Return the bytes of tensors that autograd saves, each memory counted once, without the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def built(mixer: str, fields: dict[str, Any] | None = None, **options) -> tuple[LrnnForCausalLM, Setup]:
    """Return a model with fused layers, and the same for the planner."""
    config = LrnnConfig(**{**SIZES, "head_dim": 64, **(fields or {})}, mixer=mixer)
    model = LrnnForCausalLM(config).train()
    fuse(model, torch.float32, **options)
    plan = Setup(
        model=ModelSizes.of(config), gpu=find_gpu("H100"), gpus=1, gpus_per_node=1, links=Links(1, 1), zero=1, bucket=1,
        micro_batch=BATCH, seq_len=TOKENS, global_batch=BATCH, precision="float32", fused=True, packed=False,
        checkpointing="mlp" if options.get("recompute_mlp") else "none", float8=options.get("float8", False),
        muon=False, offloads=False,
    )  # fmt: skip
    return model, plan


@pytest.mark.parametrize(
    ("mixer", "saving", "options"),
    [
        ("deltanet", True, {}),
        ("gated_deltanet", False, {"recompute_mlp": True, "float8": True}),
        ("gated_deltanet", False, {"fields": {"num_value_heads": 2, "head_dim": 12, "head_v_dim": 80}}),
    ],
)
def test_what_a_layer_keeps(mixer, saving, options):
    """With `saving`, as where the whole layer is computed again just before its backward pass."""
    model, plan = built(mixer, **options)
    x = torch.randn(BATCH, TOKENS, 48, requires_grad=True)
    (layer,) = plan.model.stack
    expected = activations.kept_by_mixer(plan, layer) + activations.kept_by_mlp(plan, layer)
    expected += activations.saved_states(plan, layer) if saving else 0
    with saving_states() if saving else nullcontext():
        found = saved_bytes(lambda: model.model.layers[0].fused(x, None, None, None), model)
    assert found == BATCH * TOKENS * expected


@pytest.mark.parametrize("recompute", [False, True])
def test_what_an_mlp_keeps_whose_output_is_normed(recompute):
    model, plan = built("attention", {"norm_position": "post"}, recompute_mlp=recompute)
    x = torch.randn(BATCH, TOKENS, 48, requires_grad=True)
    (layer,) = plan.model.stack
    found = saved_bytes(lambda: model.model.layers[0].fused.mlp(x), model)
    assert found == BATCH * TOKENS * activations.kept_by_mlp(plan, layer)


def test_what_a_model_keeps():
    """A layer, the final norm and the loss; and the ids, which are not planned."""
    model, plan = built("gated_deltanet")
    ids = torch.randint(0, 32, (BATCH, TOKENS))
    (sizes,) = plan.model.stack
    layer = BATCH * TOKENS * (activations.kept_by_mixer(plan, sizes) + activations.kept_by_mlp(plan, sizes))
    found = saved_bytes(lambda: model(ids, shift_labels=ids, num_items_in_batch=100.0).loss, model)
    # On a CPU, PyTorch's norm keeps its result besides.
    result = BATCH * TOKENS * 48 * 4
    assert found - ids.nbytes - result == layer + activations.kept_by_ends(plan)
