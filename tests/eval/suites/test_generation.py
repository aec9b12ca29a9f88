"""Texts that a model of lrnn generates in an evaluation, against lm-eval's own loop."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from lrnn import LrnnConfig, LrnnForCausalLM


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Return the folder of a random gated DeltaNet with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("gated") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(1)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    config = LrnnConfig(vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)), **size)
    config.bos_token_id, config.eos_token_id = 0, 1
    model = LrnnForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)  # texts that change instead of a token that repeats
    model.save_pretrained(folder)
    return folder


def test_texts_are_those_of_lm_eval(folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from lrnn.eval.suites.model import Model

    lm = Model(folder, device="cpu", dtype="float32", batch_size=3)
    prompts = ["def f(x):", "x = 1\ny = 2\n", "a", "return x + 1 +", "import os"]
    free = lm.generate_until(make(prompts, {"until": ["never"], "max_gen_toks": 24}), disable_tqdm=True)
    stops = [free[0][4:6], free[1][9:10], free[4][2:4]]  # strings that the texts contain
    wanted = make(prompts, {"until": stops, "max_gen_toks": 24})
    ours = lm.generate_until(wanted, disable_tqdm=True)
    assert lm._decoding is not None, "the loop of lrnn was not used"
    monkeypatch.setattr(Model, "_model_generate", HFLM._model_generate)
    assert ours == lm.generate_until(wanted, disable_tqdm=True)
    assert all(text == whole[: len(text)] for text, whole in zip(ours, free, strict=True)) and ours != free


def test_other_modes_are_left_to_transformers(folder, monkeypatch):
    from lrnn.eval.suites.model import Model

    lm = Model(folder, device="cpu", dtype="float32", batch_size=2)
    beams = make(["def f(x):", "a"], {"until": ["\n"], "max_gen_toks": 5, "num_beams": 2})
    assert len(lm.generate_until(beams, disable_tqdm=True)) == 2 and lm._decoding is None


def make(prompts, settings):
    return [SimpleNamespace(args=(prompt, dict(settings))) for prompt in prompts]
