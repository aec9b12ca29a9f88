"""Decoding on fixed tensors against transformers' own loop, token by token."""

import pytest
import torch
from mixer_models import VARIANTS, make_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList

from lrnn.eval.generation import steps
from lrnn.eval.generation.batch_size import largest_batch
from lrnn.eval.generation.decoding import GraphDecoding
from lrnn.eval.generation.prefill import prefill
from lrnn.eval.generation.steps import state_tensors
from lrnn.eval.generation.stop_strings import StopStrings

VOCAB = 97
EOS, PAD = 5, 0
EVERY_MIXER = [variant for variant in VARIANTS if not variant.endswith(("1", "3", "4"))]


def prompts(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return prompts of different lengths with padding on the left."""
    ids = torch.randint(6, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


def both(model, decoding, inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `generate` gives with its own loop and with ours."""
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS, **options}
    return model.generate(**inputs, **options), model.generate(**inputs, custom_generate=decoding, **options)


@pytest.fixture(scope="module", params=EVERY_MIXER)
def model(request):
    return make_model(request.param)


def test_tokens_are_those_of_generate(model):
    decoding = GraphDecoding(model, tokens_per_replay=3)
    for inputs in (prompts(3, 9), prompts(3, 7, seed=1), prompts(1, 1), prompts(3, 9)):  # kept, then new, tensors
        theirs, ours = both(model, decoding, inputs, max_new_tokens=11)
        assert torch.equal(theirs, ours)


@pytest.fixture(scope="module")
def gated():
    return make_model("gated_deltanet")


@pytest.mark.parametrize("new", [1, 2, 3, 4, 12])
def test_the_length_is_the_one_asked_for(gated, new):
    theirs, ours = both(gated, GraphDecoding(gated, 3), prompts(2, 6), max_new_tokens=new, eos_token_id=None)
    assert ours.shape == (2, 6 + new) and torch.equal(theirs, ours)


def test_rows_end_at_eos_and_are_padded(gated):
    inputs = prompts(3, 8)
    free = gated.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=PAD, eos_token_id=None)[:, 8:]
    for column in range(12):  # any token that a row generates may be the one that ends it
        eos = int(free[1, column])
        theirs, ours = both(gated, GraphDecoding(gated, 5), inputs, max_new_tokens=12, eos_token_id=eos)
        assert torch.equal(theirs, ours)


def test_a_prompt_in_pieces_gives_the_state_of_the_whole(gated):
    """Against a float64 model on the whole prompt: pieces of 64 tokens, the first of which is all padding in a row."""
    exact = make_model("gated_deltanet").double()
    inputs = prompts(2, 200)
    inputs["attention_mask"][1, :70] = 0
    whole = exact(**inputs, use_cache=True, logits_to_keep=1)
    pieces = prefill(gated, **inputs, piece_tokens=128)
    assert torch.allclose(pieces.logits.double(), whole.logits, atol=1e-4)
    states = zip(state_tensors(pieces.past_key_values), state_tensors(whole.past_key_values), strict=True)
    assert all(torch.allclose(ours.double(), theirs.double(), atol=1e-4) for ours, theirs in states)


@pytest.mark.parametrize(
    ("heads", "padded"),
    [
        ({"num_heads": 4, "head_dim": 128}, 4 * 128 * 128),
        ({"num_heads": 2, "num_value_heads": 64, "head_dim": 40, "head_v_dim": 20}, 64 * 64 * 64),
    ],
)
def test_a_batch_fits_into_the_memory(heads, padded):
    """Three copies of every state that a batch adds, as kernels pad it, fit into the memory that is added for it."""
    model = make_model("gated_deltanet", **heads)
    cache = model(**prompts(1, 5), use_cache=True).past_key_values
    state = sum(tensor.nbytes for tensor in state_tensors(cache) if tensor.ndim == 4)
    least, most = largest_batch(model, 0, 99), largest_batch(model, 2**60, 99)
    assert (least, most) == (1, 1024) and state <= 4 * padded
    free = next(free for free in range(0, 2**34, 2**28) if largest_batch(model, free, 99) > 1)
    added = largest_batch(model, free + 2**28, 99) - largest_batch(model, free, 99)
    assert 30 < added < 2**28 / (3 * 4 * padded)


def test_a_batch_leaves_room_for_keys_and_values():
    """Three copies of the keys and values of the longest text, as the cache of a hybrid holds them."""
    attention = {"mixer": "attention", "num_kv_heads": 1}
    model = make_model("gated_deltanet", mixer=["gated_deltanet", attention], num_hidden_layers=4)
    cache = model(**prompts(1, 5), use_cache=True).past_key_values
    of_a_token = sum(tensor.nbytes for layer in cache.layers[1::2] for tensor in layer.state[:2]) / 5
    tokens, free = 2**22, 2**36
    per_sequence = free * 0.8 / largest_batch(model, free, tokens)
    assert per_sequence == pytest.approx(3 * tokens * of_a_token, rel=0.05)
    assert largest_batch(model, free, 99) == 1024


class Letters:
    """A tokenizer of letters: token 6 is a, 7 is b and so on."""

    def batch_decode(self, rows):
        return ["".join(chr(ord("a") + (int(i) - 6) % 26) for i in row) for row in rows]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_a_row_ends_soon_after_its_stop_string(every):
    text = torch.tensor([[6, 6, 6, 7, 8, 6, 6, 6, 6, 6, 6, 6], [7, 8, 6, 6, 6, 6, 6, 6, 7, 8, 6, 6]])  # "bc" is to stop
    stop = StopStrings(Letters(), ["bc"], prompt_length=2, every=every)
    done_at = [None, None]
    for length in range(3, 13):
        for row, done in enumerate(stop(text[:, :length], None).tolist()):
            if done and done_at[row] is None:
                done_at[row] = length
    ends = [5, 10]  # the "bc" of the second row's prompt does not count
    assert all(end <= at < end + every for end, at in zip(ends, done_at, strict=True) if at is not None)
    assert done_at[0] is not None and (done_at[1] is not None or every == 8)


def test_stop_strings_end_generation_in_both_loops(gated):
    inputs = prompts(3, 8)
    free = gated.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=PAD, eos_token_id=None)
    stop = Letters().batch_decode(free[:1, 11:13])
    texts = []
    for decoding in (None, GraphDecoding(gated, 4)):
        criteria = StoppingCriteriaList([StopStrings(Letters(), stop, 8, every=4)])
        out = gated.generate(
            input_ids=inputs["input_ids"][:1], do_sample=False, max_new_tokens=20, pad_token_id=PAD, eos_token_id=None,
            stopping_criteria=criteria, custom_generate=decoding,
        )  # fmt: skip
        texts.append(Letters().batch_decode(out[:, 8:])[0])
    assert texts[0] == texts[1] and stop[0] in texts[0] and len(texts[0]) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "leave out do_sample"),
        ({"num_beams": 2}, "leave out num_beams"),
        ({"repetition_penalty": 1.5}, "leave out RepetitionPenaltyLogitsProcessor"),
        ({"return_dict_in_generate": True}, "leave out return_dict_in_generate"),
    ],
)
def test_other_modes_are_refused(gated, options, message):
    config = GenerationConfig(max_new_tokens=2, pad_token_id=PAD, **options)
    with pytest.raises(ValueError, match=message):
        gated.generate(**prompts(1, 3), generation_config=config, custom_generate=GraphDecoding(gated))


@pytest.mark.parametrize(("window", "expected"), [(None, [32, 64, 64]), (50, [32, 50, 50]), (5, [5, 5, 5])])
def test_attention_gets_room_for_longer_texts(window, expected, monkeypatch):
    """Keys and values have room for 32 tokens, then for more; a shorter window never needs more."""
    monkeypatch.setattr(steps, "ROOM", 32)
    model = make_model("transformer", sliding_window=window)
    decoding = GraphDecoding(model, 3)
    slots = []
    for inputs, new in ((prompts(2, 9), 12), (prompts(2, 40, seed=1), 10), (prompts(2, 30), 3)):
        theirs, ours = both(model, decoding, inputs, max_new_tokens=new, eos_token_id=None)
        assert torch.equal(theirs, ours)
        slots.append(state_tensors(decoding._steps._cache)[0].shape[2])
    assert slots == expected


def test_attention_gets_more_room_if_a_text_has_no_largest_length(monkeypatch):
    monkeypatch.setattr(steps, "ROOM", 8)
    model, ids = make_model("transformer"), prompts(2, 3)["input_ids"]
    stop = StoppingCriteriaList([lambda ids, scores: torch.full((2,), ids.shape[1] >= 40)])
    found = GraphDecoding(model, 3)(model, ids, LogitsProcessorList(), stop, GenerationConfig())
    assert torch.equal(found, model.generate(ids, do_sample=False, max_length=40, eos_token_id=None))


def test_keys_are_written_in_place():
    """A CUDA graph needs the tensors where they were, and no copy of all keys for a token."""
    model = make_model("attention", sliding_window=None)
    decoding = GraphDecoding(model, 3)
    both(model, decoding, prompts(2, 9), max_new_tokens=4)
    places = [tensor.data_ptr() for tensor in decoding._steps._kept]
    held = state_tensors(decoding._steps._cache)
    assert [tensor.data_ptr() for tensor in held[:2]] == places[:2]
    both(model, decoding, prompts(2, 30), max_new_tokens=12)
    assert [tensor.data_ptr() for tensor in decoding._steps._kept] == places


def test_a_hybrid_decodes_as_generate_does():
    pattern = ["gated_deltanet", {"mixer": "attention", "num_kv_heads": 1, "sliding_window": 7}, "gla", "attention"]
    model = make_model("gated_deltanet", mixer=pattern, num_hidden_layers=4)
    decoding = GraphDecoding(model, 3)
    for inputs in (prompts(3, 9), prompts(3, 5, seed=1)):
        theirs, ours = both(model, decoding, inputs, max_new_tokens=11)
        assert torch.equal(theirs, ours)


def test_another_model_is_refused():
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match="GraphDecoding needs a model of lrnn; this one is of llama"):
        GraphDecoding(model)
