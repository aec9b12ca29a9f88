"""Test what callers of transformers pass to a model: right, or refused with a reason, never ignored.

The truth is the model run over the tokens of one document at a time, without padding and without a cache.
"""

import copy

import pytest
import torch
from mixer_models import every_variant, largest, make_model, tokens
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.utils.generic import find_labels

from lrnn import LrnnForCausalLM

A, B = tokens(1, 13, seed=1), tokens(1, 17, seed=2)
FREE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> LrnnForCausalLM:
    return make_model("gated_deltanet", num_hidden_layers=2)


def alone(model: LrnnForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def continued(model: LrnnForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return ids with the most likely tokens behind them, from whole passes."""
    for _ in range(count):
        ids = torch.cat([ids, alone(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


# ---- padding


@every_variant
def test_padding_anywhere_gives_the_logits_of_the_tokens_alone(variant):
    """Padding is ahead of, between and behind tokens, also in pieces read with a cache, and in single tokens."""
    model = make_model(variant, num_hidden_layers=2)
    ids = tokens(3, 16)
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 5, 9, 15]] = mask[1, [7, 8, 10, 11, 14]] = 0
    cache, pieces, end = None, [], 0
    for piece in ids.split([8, 1, 1, 6], 1):
        end += piece.shape[1]
        out = model(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    for whole in (torch.cat(pieces, 1), model(ids, attention_mask=mask).logits):
        for row, real, logits in zip(ids, mask.bool(), whole, strict=True):
            truth = alone(model, row[real][None])[0]
            assert largest(logits[real] - truth) < 1e-3 * largest(truth)


def test_hidden_states_of_padded_rows_are_in_their_columns(model):
    ids = tokens(1, 9)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1]])
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    truth = model(ids[mask.bool()][None], output_hidden_states=True).hidden_states
    for found, expected in zip(padded, truth, strict=True):
        assert largest(found[mask.bool()] - expected[0]) < 1e-5 * max(1, largest(expected))


# ---- packed documents


@pytest.mark.parametrize("variant", ["gated_deltanet", "mlstm", "attention"])
@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}])
def test_documents_that_transformers_packs_are_apart(variant, options):
    model = make_model(variant, num_hidden_layers=2)
    for positions in (True, False):
        collate = DataCollatorWithFlattening(return_position_ids=positions, **options)
        batch = collate([{"input_ids": x[0].tolist()} for x in (A, B)])
        if not options and not positions:
            continue  # nothing says where documents start
        out = model(**batch)
        assert largest(out.logits - torch.cat([alone(model, A), alone(model, B)], 1)) < 1e-4
        assert out.past_key_values is None
        parts = [model(x, labels=x, num_items_in_batch=1).loss for x in (A, B)]
        assert abs(out.loss - sum(parts) / (12 + 16)) < 1e-5


def test_documents_in_padded_rows(model):
    ids = torch.cat([A, tokens(1, 3), B], 1).expand(2, -1)
    mask, position = torch.ones_like(ids), torch.arange(33).expand(2, -1).clone()
    mask[:, 13:16] = mask[1, :2] = 0
    position[:, 16:] -= 16
    seq_idx = torch.tensor([0] * 13 + [-1] * 3 + [1] * 17).expand(2, -1)
    for documents in ({"position_ids": position}, {"seq_idx": seq_idx}, {"position_ids": position, "seq_idx": seq_idx}):
        logits = model(ids, attention_mask=mask, **documents).logits
        assert largest(logits[:, 16:] - alone(model, B)) < 1e-4
        assert largest(logits[0, :13] - alone(model, A)[0]) < 1e-4
        assert largest(logits[1, 2:13] - alone(model, A[:, 2:])[0]) < 1e-4


def test_positions_that_count_on_are_one_document(model):
    """`generate` passes such positions: of the tokens without padding, or of all columns."""
    ids, mask = tokens(1, 9), torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1]])
    truth = model(ids, attention_mask=mask).logits
    for position in ((mask.cumsum(1) - 1).clamp(min=0), torch.arange(9)[None], 7 + torch.arange(9)[None]):
        out = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
        assert torch.equal(out.logits, truth) and out.past_key_values.get_seq_length() == 9


BOUNDARIES = torch.tensor([0, 13, 30], dtype=torch.int32)
PACKED = {"input_ids": torch.cat([A, B], 1)}
RESTART = torch.cat([torch.arange(13), torch.arange(17)])[None]
REFUSED = {
    "a restart without boundary": (
        {"cu_seqlens": torch.tensor([0, 14, 30]), "position_ids": RESTART},
        "position_ids start a document where cu_seqlens has no boundary",
    ),
    "two boundaries": (
        {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": torch.tensor([0, 14, 30])},
        "cu_seq_lens_k and cu_seq_lens_q name different boundaries of documents",
    ),
    "boundaries of other tokens": ({"cu_seqlens": BOUNDARIES[:2]}, "cu_seqlens must rise from 0 to 30"),
    "falling boundaries": ({"cu_seq_lens_q": torch.tensor([0, 20, 13, 30])}, "cu_seq_lens_q must rise from 0 to 30"),
    "positions of other tokens": ({"position_ids": RESTART[:, 1:]}, r"position_ids must have shape \[1, 30\]"),
    "a cache of packed documents": ({"cu_seqlens": BOUNDARIES, "use_cache": True}, "documents are packed"),
    "a mask of other tokens": ({"attention_mask": torch.ones(1, 31)}, r"attention_mask must have shape \[1, 30\]"),
    "a mask of pairs": ({"attention_mask": torch.ones(1, 1, 30, 30)}, r"attention_mask must have shape \[1, 30\]"),
    "an additive mask": (
        {"attention_mask": torch.zeros(1, 30).index_fill(1, torch.tensor([3]), float("-inf"))},
        "1 at tokens and 0 at padding; got the value -inf",
    ),
    "a mask of numbered documents": ({"attention_mask": RESTART + 1}, "got the value 2"),
    "attentions": ({"output_attentions": True}, "does not support output_attentions"),
    "no causality": ({"is_causal": False}, "leave out is_causal"),
    "token types": ({"token_type_ids": torch.ones(1, 30)}, "has no token types"),
    "tokens twice": ({"inputs_embeds": torch.zeros(1, 30, 32)}, "exactly one of input_ids and inputs_embeds"),
    "no tokens": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    "one sequence": ({"input_ids": A[0]}, r"must be \[batch, tokens\]"),
    "labels of other tokens": ({"labels": A}, r"labels must have shape \[1, 30\]"),
    "keys and values": ({"past_key_values": ((A, A),)}, "got a tuple"),
    "a skipped position": ({"cache_position": torch.arange(1, 31)}, "cache_position must count on from the 0 tokens"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=list(REFUSED))
def test_what_the_model_cannot_do_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{**PACKED, **arguments})


def test_unknown_keywords_are_refused_and_neutral_ones_are_not(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        model(A, atention_mask=torch.ones_like(A))
    neutral = {"output_attentions": False, "head_mask": None, "is_causal": True, "token_type_ids": torch.zeros_like(A)}
    assert torch.equal(model(A, **neutral).logits, model(A).logits)


# ---- caches


@pytest.mark.parametrize("variant", ["gated_deltanet", "gla", "attention"])
def test_a_dynamic_cache_of_the_caller_is_filled(variant):
    model = make_model(variant, num_hidden_layers=2)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        steps = [model(x, past_key_values=cache, use_cache=False).logits for x in A.split(1, 1)]
        assert largest(torch.cat(steps, 1) - alone(model, A)) < 1e-4
        assert cache.get_seq_length() == 13
        with pytest.raises(ValueError, match="state of 1 sequences, the input has 2"):
            model(tokens(2, 1), past_key_values=cache)
        cache.reset()
        assert torch.equal(model(B, past_key_values=cache).logits, alone(model, B))


def test_other_caches_are_refused(model):
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    static = StaticCache(config=model.config, max_cache_len=40)
    for cache in (filled, static):
        with pytest.raises(ValueError, match=f"past_key_values is a {type(cache).__name__}, which holds keys"):
            model(A, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values has 1 layers, the model has 2"):
        model(A, past_key_values=make_model("gated_deltanet")(A, use_cache=True).past_key_values)


@torch.enable_grad()
def test_gradient_checkpointing_switches_the_cache_off():
    model = make_model("gated_deltanet").train()
    model(A, labels=A).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out = model(A, labels=A, use_cache=True)
    out.loss.backward()
    assert out.past_key_values is None
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="gradient checkpointing computes layers twice"):
        model(A, past_key_values=DynamicCache())
    assert model.eval()(A, use_cache=True).past_key_values.get_seq_length() == 13


# ---- outputs


def test_outputs_have_the_form_of_those_of_transformers(model):
    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
    # Numbers select among all states. They do so in transformers from 5.23 on; before, they meant layers.
    for options in ({}, {"labels": A}, {"labels": A, "use_cache": False}, {"logits_to_keep": 3}):
        for states, chosen in ((False, set()), (True, {0, 1, 2}), ([0, -1], {0, 2}), (1, {1})):
            found = model(A, output_hidden_states=states, **options)
            expected = llama(A, output_hidden_states=states is not False, **options)
            assert list(found) == list(expected)
            if states is not False:
                shapes = [h.shape if i in chosen else None for i, h in enumerate(expected.hidden_states)]
                assert [h if h is None else h.shape for h in found.hidden_states] == shapes
            as_tuple = model(A, output_hidden_states=states, return_dict=False, **options)
            assert isinstance(as_tuple, tuple) and len(as_tuple) == len(found)
            assert all(torch.equal(x, y) for x, y in zip(as_tuple, found.to_tuple(), strict=True) if torch.is_tensor(x))
    assert type(model.model(A, return_dict=False)) is tuple


def test_hidden_states_are_the_embeddings_the_blocks_outputs_and_the_normed_last(model):
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1])) for layer in model.model.layers]
    out = model(A, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(out.hidden_states[0], model.model.embeddings(A))
    assert torch.equal(out.hidden_states[1], outputs[0])
    assert torch.equal(out.hidden_states[2], model.model.norm(outputs[1]))
    assert torch.equal(model.lm_head(out.hidden_states[2]), out.logits)
    model.config.output_hidden_states = True
    try:
        assert len(model(A).hidden_states) == 3
    finally:
        model.config.output_hidden_states = False


def test_logits_of_chosen_tokens(model):
    ids = tokens(2, 10)
    full = model(ids).logits
    columns = torch.tensor([[1, 4], [2, 9]])
    assert torch.equal(model(ids, logits_to_keep=columns).logits, full.take_along_dim(columns[..., None], 1))
    assert torch.equal(model(ids, logits_to_keep=ids > 40).logits, full[ids > 40])
    assert torch.equal(model(ids, labels=ids, logits_to_keep=1).loss, model(ids, labels=ids).loss)


def test_trainer_finds_one_kind_of_labels():
    """With a second name the Trainer would wait for it in every batch, and compute no loss in evaluation."""
    assert find_labels(LrnnForCausalLM) == ["labels"]


# ---- generation


def test_generating_from_padded_prompts(model):
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), A], 1), B])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    truth = [continued(model, x, 6)[0, -6:] for x in (A, B)]
    for options in ({}, {"past_key_values": DynamicCache()}, {"use_cache": False}):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, **FREE, **options)[:, -6:]
        assert torch.equal(found, torch.stack(truth))
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=3, num_return_sequences=2, **FREE)
    for i, x in enumerate((A, B)):
        one = model.generate(x, max_new_tokens=4, num_beams=3, num_return_sequences=2, use_cache=False, **FREE)
        assert torch.equal(beams[2 * i : 2 * i + 2, -4:], one[:, -4:])
    with pytest.raises(ValueError, match=r"a prompt ends in padding.*padding_side='left'"):
        model.generate(ids, attention_mask=mask.flip(1), max_new_tokens=2, **FREE)


def test_generation_stops_at_strings(model):
    characters = Tokenizer(WordLevel({chr(33 + i): i for i in range(97)}))
    characters.pre_tokenizer, characters.decoder = Split("", "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    truth = continued(model, A, 6)
    stop = tokenizer.decode(truth[0, 14:16])
    options = {"max_new_tokens": 6, "stop_strings": stop, "tokenizer": tokenizer, **FREE}
    assert torch.equal(model.generate(A, **options), truth[:, : 13 + 3])


def test_a_conversation_and_a_prefix_in_a_cache(model):
    cache, ids = DynamicCache(), A
    for turn in (tokens(1, 3, seed=7), tokens(1, 1, seed=8)):
        ids = torch.cat([ids, turn], 1)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=4, **FREE)
        assert torch.equal(found, continued(model, ids, 4))
        ids = found
    prefix = DynamicCache()
    model(A, past_key_values=prefix)
    for seed in (3, 4):
        prompt = torch.cat([A, tokens(1, 5, seed=seed)], 1)
        found = model.generate(prompt, past_key_values=copy.deepcopy(prefix), max_new_tokens=4, **FREE)
        assert torch.equal(found, continued(model, prompt, 4))


def test_generating_with_hidden_states_and_from_embeddings(model):
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 3, **FREE}
    out = model.generate(A, **options)
    truth = model(out.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == 3 and all(len(step) == 3 for step in out.hidden_states)
    for i, whole in enumerate(truth):
        steps = torch.cat([step[i] for step in out.hidden_states], 1)
        assert largest(steps - whole) < 1e-4
    embedded = model.model.embeddings(A)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=3, **FREE), out.sequences[:, 13:])


# ---- where weights are


def test_weights_that_accelerate_keeps_on_disk(tmp_path):
    model = make_model("gated_deltanet", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embeddings", "model.layers.1", "model.norm", "lm_head"], "cpu")
    places["model.layers.0"] = "disk"
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    loaded = LrnnForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert loaded.model.layers[0].attn.q_conv1d.weight.is_meta
    assert torch.equal(loaded(A, labels=A).logits, model(A).logits)
    assert loaded.model.layers[0].attn.q_conv1d.weight.is_meta
