"""Decoding on CUDA graphs against transformers' own loop on a GPU, for the mixers that run on kernels there."""

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.eval.generation.decoding import GraphDecoding

SIZES = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "head_dim": 64, "num_heads": 4}
MIXERS = ["gated_deltanet", "deltanet", "gated_deltaproduct", "gla", "mamba", "mamba2", "mlstm", "rwkv7", "attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_are_those_of_generate(mixer, dtype):
    """The kernels are the same, and so are their bits: tokens agree even where the two largest logits are close."""
    torch.manual_seed(0)
    fields = {"num_householder": 2} if "product" in mixer else {}
    if mixer == "attention":
        fields = {"num_kv_heads": 2, "qk_norm": "head", "attention_gate": True}
    model = LrnnForCausalLM(LrnnConfig(**SIZES, intermediate_size=512, mixer=mixer, **fields)).cuda().to(dtype).eval()
    decoding = GraphDecoding(model)
    for rows, length in ((4, 200), (4, 64), (1, 300), (4, 130)):  # a graph is recorded, replayed, and recorded again
        ids = torch.randint(6, 500, (rows, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = rows == 1
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
        theirs = model.generate(ids, eos_token_id=7, **options)
        ours = model.generate(ids, eos_token_id=7, custom_generate=decoding, **options)
        assert torch.equal(theirs, ours)
    assert decoding._steps is not None and decoding._steps._graph is not None


def test_a_long_prompt_takes_bounded_memory():
    config = LrnnConfig(**SIZES, intermediate_size=512)
    model = LrnnForCausalLM(config).cuda().bfloat16().eval()
    decoding = GraphDecoding(model)
    peaks = []
    for length in (2**17, 2**20):
        ids = torch.randint(6, 500, (1, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=0, custom_generate=decoding)
        peaks.append(torch.cuda.max_memory_allocated() - ids.nbytes)
    assert peaks[1] < 1.1 * peaks[0] + 2**26  # transformers itself makes masks as long as the prompt
