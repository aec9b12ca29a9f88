"""Test the fused layers on a GPU: their loss and gradients are as near to float64 as those of the plain layers."""

import copy

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.pretrain.fused.layers import fuse, refresh

SIZES = {"vocab_size": 700, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 384, "num_heads": 2}


def gradients(model, ids, labels, cu_seqlens, autocast):
    """Return the loss and the gradients of two micro-batches."""
    model.zero_grad()
    losses = []
    for rows, targets in zip(ids.chunk(2), labels.chunk(2), strict=True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses.append(model(rows, shift_labels=targets, cu_seqlens=cu_seqlens, num_items_in_batch=1000).loss)
        losses[-1].backward()
    return sum(losses).item(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("mixer", "heads"),
    [
        ("gated_deltanet", {}),
        ("gated_deltanet", {"head_dim": 96, "head_v_dim": 192}),
        ("gated_deltanet", {"num_value_heads": 4}),
        ("deltanet", {}),
        ("gla", {}),
        ("attention", {"norm_position": "post", "qk_norm": "projection"}),
    ],
)
def test_as_exact_as_the_plain_layers(mixer, heads, packed):
    torch.manual_seed(0)
    config = LrnnConfig(**{**SIZES, "head_dim": 128, **heads}, mixer=mixer)
    model = LrnnForCausalLM(config).train()
    ids, labels = torch.randint(0, 700, (2, 4, 300)).unbind()
    labels[:, ::7] = -100
    cu_seqlens = torch.tensor([0, 100, 133, 300, 600], dtype=torch.int32) if packed else None
    loss, truth = gradients(copy.deepcopy(model).double(), ids, labels, cu_seqlens, autocast=False)

    model = model.cuda()
    fused = copy.deepcopy(model)
    fuse(fused, torch.bfloat16)
    refresh(fused)
    on_gpu = [x if x is None else x.cuda() for x in (ids, labels, cu_seqlens)]
    plain_loss, plain = gradients(model, *on_gpu, autocast=True)
    fused_loss, found = gradients(fused, *on_gpu, autocast=True)
    assert abs(fused_loss - loss) < max(2 * abs(plain_loss - loss), 1e-4)
    errors = {n: [((g[n] - truth[n]).norm() / truth[n].norm()).item() for g in (found, plain)] for n in truth}
    print("\n".join(f"{name:45} fused {a:.2e}  plain {b:.2e}" for name, (a, b) in errors.items()))
    # A vector of two numbers may be off by more by chance.
    assert all(a < (1.3 * b + 1e-3 if truth[n].numel() > 100 else 0.1) for n, (a, b) in errors.items()), errors


def test_gradients_are_the_same_every_time():
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**SIZES, mixer="gated_deltanet", head_dim=128)).train().cuda()
    fuse(model, torch.bfloat16)
    refresh(model)
    ids, labels = torch.randint(0, 700, (2, 8, 2048), device="cuda").unbind()
    first = gradients(model, ids, labels, None, autocast=True)
    for _ in range(3):
        again = gradients(model, ids, labels, None, autocast=True)
        assert again[0] == first[0] and all(torch.equal(again[1][n], g) for n, g in first[1].items())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products in float8"
)
@pytest.mark.parametrize("mixer", ["gated_deltanet", "deltanet"])
def test_float8(mixer):
    """Gradients differ from those of bfloat16 by what float8 rounds, the same every time; NaN is seen.

    At these sizes, exact sums of the same float8 numbers in the interpreter are off by 0.15 (head) to 0.25 too.
    """
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**SIZES, mixer=mixer, head_dim=128)).train().cuda()
    ids, labels = torch.randint(0, 700, (2, 8, 2048), device="cuda").unbind()
    models = [copy.deepcopy(model) for _ in range(2)]
    for m, float8 in zip(models, (False, True), strict=True):
        fuse(m, torch.bfloat16, float8=float8)
        refresh(m)
    (loss, truth), found, again = (gradients(m, ids, labels, None, autocast=True) for m in (*models, models[1]))
    assert abs(found[0] - loss) < 2e-3 * loss
    errors = {name: ((found[1][name] - d).norm() / d.norm()).item() for name, d in truth.items()}
    print(errors)
    assert all(error < 0.3 for name, error in errors.items() if truth[name].numel() > 100), errors
    assert again[0] == found[0] and all(torch.equal(again[1][name], d) for name, d in found[1].items())
    with torch.no_grad():
        models[1].model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    refresh(models[1])
    assert torch.tensor(gradients(models[1], ids, labels, None, autocast=True)[0]).isnan()


def test_memory_and_recomputation():
    """`recompute_mlp` changes no number, and takes less memory."""
    torch.manual_seed(0)
    plain = LrnnForCausalLM(LrnnConfig(**SIZES, mixer="gated_deltanet", head_dim=128)).train().cuda()
    ids, labels = torch.randint(0, 700, (2, 8, 2048), device="cuda").unbind()
    found = []
    for recompute in (False, True):
        model = copy.deepcopy(plain)
        fuse(model, torch.bfloat16, recompute_mlp=recompute)
        refresh(model)
        torch.cuda.reset_peak_memory_stats()
        found.append((gradients(model, ids, labels, None, autocast=True), torch.cuda.max_memory_allocated()))
    (kept, more), (again, less) = found
    assert kept[0] == again[0] and all(torch.equal(again[1][n], g) for n, g in kept[1].items())
    assert less < more - 8 * 1024 * 2 * 384  # half of the projections of a layer
