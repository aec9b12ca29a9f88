"""Test that states are passed on from sample to sample: losses, gradients, order of the samples, resumes, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.model.cache import LrnnCache
from lrnn.model.layers import Mixer
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.data.chains import Chains
from lrnn.pretrain.data.micro_batch import build_micro_batch, model_inputs
from lrnn.pretrain.state_passing import CarriedStates, check_states
from lrnn.pretrain.step import compute

ROWS, PIECES, T = 3, 3, 10  # T tokens in each of the pieces of a row
CPU = torch.device("cpu")
# Positions in a row of PIECES * T tokens at which documents start: inside of pieces, near their ends, at their start.
STARTS = [[0], [0, 4, 9, 12, 19], [3, 8, 10, 11, 20, 29]]
MIXERS = [
    "gated_deltanet", "deltanet", "gated_deltaproduct", "gla", "mamba", "mamba2", "mlstm", "rwkv7", "slstm",
    {"mixer": "attention", "sliding_window": 7},
    {"mixer": "attention", "sliding_window": 15, "num_kv_heads": 1},
]  # fmt: skip


def tiny(mixer, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16}
    model = LrnnForCausalLM(LrnnConfig(**sizes, num_hidden_layers=2, mixer=[mixer], state_size=4, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that every part of a layer counts
    return model.train()


def pieces_of(resets):
    """Return a long micro-batch of ROWS rows, and the micro-batches of its pieces as a run has them."""
    tokens = np.random.default_rng(0).integers(0, 50, (ROWS, PIECES * T + 1))
    starts = [np.array(positions) for positions in STARTS]
    whole = build_micro_batch(list(zip(tokens, starts, strict=True)), PIECES * T, np.arange(ROWS), resets)
    pieces = []
    for piece in range(PIECES):
        first = piece * T
        rows = [(row[first : first + T + 1], s[(s >= first) & (s <= first + T)] - first)
                for row, s in zip(tokens, starts, strict=True)]  # fmt: skip
        batch = build_micro_batch(rows, T, np.arange(ROWS) + piece * ROWS, resets)
        begins = [resets and first in positions for positions in STARTS]
        batch.continues = torch.tensor([piece > 0 and not b for b in begins])
        pieces.append(batch)
    return whole, pieces


def carried_states(model):
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return CarriedStates(mixers, Chains(ROWS, PIECES), Batching(ROWS, ROWS), T)


def summed_loss(model, carried, batch):
    return compute(model, model_inputs(batch, CPU), 0, batch, carried, num_items_in_batch=torch.tensor(1))


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_pieces_have_the_losses_of_the_whole(mixer, resets):
    model = tiny(mixer)
    whole, pieces = pieces_of(resets)
    inputs = model_inputs(whole, CPU)
    labels = inputs.pop("shift_labels")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        truth = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(ROWS, PIECES, T)
        carried = carried_states(model)
        found = [float(summed_loss(model, carried, batch)) for batch in pieces]
    assert found == pytest.approx(truth.sum((0, 2)).tolist(), rel=1e-5)
    fresh = float(summed_loss(model, None, pieces[-1]))
    assert abs(fresh - found[-1]) > 1e-3, "the state ahead of a piece should matter"


@pytest.mark.parametrize("mixer", ["gated_deltanet", "rwkv7", {"mixer": "attention", "sliding_window": 7}], ids=str)
def test_gradients_are_those_of_truncated_backpropagation(mixer):
    """The truth is a cache of generation whose tensors are detached by hand. Layers are recomputed in a second run."""
    _, pieces = pieces_of(False)
    model = tiny(mixer)
    cache = LrnnCache(2)
    for batch in pieces:
        inputs = model_inputs(batch, CPU)
        model(**inputs, past_key_values=cache, use_cache=True, num_items_in_batch=1).loss.backward()
        for layer in cache.layers:
            layer._apply(torch.Tensor.detach)
    truth = {name: p.grad for name, p in model.named_parameters()}
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        carried = carried_states(model)
        losses = [summed_loss(model, carried, batch) for batch in pieces]  # a backward pass may come later
        for loss in losses:
            loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, truth[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_that_are_not_finite_begin_with_fresh_states():
    model = tiny("slstm")
    _, pieces = pieces_of(False)
    carried, spoilt = carried_states(model), carried_states(model)
    with torch.no_grad():
        for states in (carried, spoilt):
            summed_loss(model, states, pieces[0])
        spoilt._kept[0][1][1][0][1].fill_(float("nan"))  # one of the states of the second layer in row 1
        spoilt.drop_bad_rows()
        continues = pieces[1].continues
        summed_loss(model, spoilt, pieces[1])
        pieces[1].continues = continues & torch.tensor([True, False, True])
        summed_loss(model, carried, pieces[1])
    a, b = (states.tensors(2 * ROWS) for states in (carried, spoilt))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert carried.tensors(PIECES * ROWS) == {}, "where all rows begin, nothing is saved"


def test_attention_without_a_window_is_refused():
    config = tiny("gated_deltanet").config
    check_states(config)
    fields = {"num_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    with pytest.raises(UserError, match=r"layer 1 of the model, attention.*sliding_window"):
        check_states(LrnnConfig(**fields, mixer=["gla", "attention"]))
    check_states(LrnnConfig(**fields, mixer=["gla", {"mixer": "attention", "sliding_window": 4}]))
