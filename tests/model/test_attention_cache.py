"""Test the keys and values that attention keeps while it generates: padding, beams, pieces of a prompt, windows."""

import pytest
import torch
import torch.nn.functional as F
from mixer_models import largest, make_model, tokens

from lrnn.model import key_values
from lrnn.model.cache import LrnnCache

HYBRID = [
    "gated_deltanet",
    {
        "mixer": "attention",
        "num_kv_heads": 1,
        "sliding_window": 7,
        "qk_norm": "head",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
    {"mixer": "attention", "rope_theta": None, "attention_gate": True},
]


@pytest.fixture(scope="module")
def model():
    return make_model("gated_deltanet", mixer=HYBRID, num_hidden_layers=3, max_position_embeddings=16).double()


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_of_a_padded_batch_are_those_of_each_alone(model, beams):
    """Longer than in training. The beams of a text change places, and their keys with them."""
    prompts = [tokens(1, length, seed=length) for length in (3, 9, 20)]
    batch = torch.cat([F.pad(prompt, (20 - prompt.shape[1], 0), value=5) for prompt in prompts])
    mask = torch.cat([F.pad(torch.ones_like(prompt), (20 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, 20:]
    for row, prompt in zip(together, prompts, strict=True):
        for use_cache in (True, False):
            mask = torch.ones_like(prompt)
            alone = model.generate(prompt, attention_mask=mask, use_cache=use_cache, **options)
            assert torch.equal(row, alone[0, prompt.shape[1] :]), (prompt.shape, use_cache)


@pytest.mark.parametrize("cuts", [[4, 3, 13], [1, 18, 1], [2, 2, 2, 14]])
@pytest.mark.parametrize("largest_mask", [2**26, 400])
def test_a_padded_prompt_in_pieces(model, cuts, largest_mask, monkeypatch):
    """Pieces shorter and longer than the window. The first may be nothing but padding in a row.

    With small masks, blocks have one to five queries, the last of which do not see the cache through the window.
    """
    monkeypatch.setattr(key_values, "LARGEST_MASK", largest_mask)
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :4], mask[1, :3] = 0, 0
    cache, logits = None, []
    with torch.no_grad():
        for piece, of_piece in zip(ids.split(cuts, 1), mask.split(cuts, 1), strict=True):
            out = model(piece, attention_mask=of_piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        for row, start in enumerate((4, 3, 0)):
            alone = model(ids[row : row + 1, start:]).logits[0]
            assert largest(torch.cat(logits, 1)[row, start:] - alone) < 1e-6


def test_a_window_keeps_so_many_tokens_however_long_the_text(model):
    ids, cache = tokens(2, 60), LrnnCache(3)
    with torch.no_grad():
        expected = model(ids).logits
        for position, token in enumerate(ids.split(1, 1)):
            found = model(token, past_key_values=cache).logits[:, 0]
            assert largest(found - expected[:, position]) < 1e-6
    slots = [layer.state[0].shape[2] for layer in cache.layers[1:]]
    assert slots[0] == 7 and slots[1] >= 60


def test_a_cache_that_autograd_follows_is_not_overwritten(model):
    """A token is written in place only where no backward pass needs the keys as they were."""
    ids = tokens(1, 6)
    gradients = []
    for cuts in ([6], [3, 1, 1, 1]):
        cache, logits = LrnnCache(3), []
        for piece in ids.split(cuts, 1):
            logits.append(model(piece, past_key_values=cache).logits)
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        model.zero_grad()
        torch.cat(logits, 1).square().sum().backward()
        gradients.append(model.model.layers[1].attn.k_proj.weight.grad.clone())
    assert largest(gradients[0] - gradients[1]) < 1e-6 * largest(gradients[0])
