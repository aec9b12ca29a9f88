"""Test that models of transformers and fla are evaluated too, with lm-eval's own numbers, and which are refused."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, FalconMambaConfig, GPT2Config, T5Config

from lrnn.errors import UserError
from lrnn.eval import model_folder
from lrnn.eval.suites.model import Model
from lrnn.eval.suites.prompts import context_length, load_tokenizer

TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
SIZES = {
    "gpt2": (GPT2Config, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}, 64),
    # fla, which other tests import, has its own class for Mamba, which needs a GPU.
    "falcon_mamba": (FalconMambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, 2048),
}


def folder_of(tiny_model, config, path):
    """Return the folder of a random model with the tokenizer of the tiny model."""
    ignored = shutil.ignore_patterns("model*", "config.json", "generation*", "eval")
    shutil.copytree(tiny_model, path, ignore=ignored)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SIZES)
def test_numbers_and_texts_are_those_of_hflm(tiny_model, tmp_path, name, monkeypatch):
    kind, size, length = SIZES[name]
    vocab_size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    folder = folder_of(tiny_model, kind(vocab_size=vocab_size, **TOKENS, **size), tmp_path / name)
    assert model_folder.describe_model(folder)["model_type"] == name
    assert context_length(folder, load_tokenizer(folder)) == length
    imported = []
    monkeypatch.setattr("lrnn.eval.loading.import_class", lambda *given: imported.append(given))
    ours = Model(folder, device="cpu", batch_size=2)
    assert imported == [(name, "cpu")]
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)
    pairs = [SimpleNamespace(args=pair) for pair in (("def f", "(x) return"), ("x", "y"))]
    found, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (ours, theirs))
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
    settings = {"until": ["zz"], "max_gen_toks": 5}
    prompts = [SimpleNamespace(args=(text, settings)) for text in ("def f(", "x")]
    found, expected = (lm.generate_until(prompts, disable_tqdm=True) for lm in (ours, theirs))
    assert found == expected
    (found,), (expected,) = (
        lm.loglikelihood_rolling(prompts[:1] and [SimpleNamespace(args=("def f(x):\n" * 9,))]) for lm in (ours, theirs)
    )
    assert found == pytest.approx(expected, rel=1e-5)


FLA = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "stand_in_of_fla"
class Model(LlamaForCausalLM):
    config_class = Config
AutoConfig.register("stand_in_of_fla", Config)
AutoModelForCausalLM.register(Config, Model)
"""


def test_fla_registers_its_models_if_it_is_installed(tiny_model, tmp_path, monkeypatch):
    """A stand-in is imported here, because fla itself takes seconds."""
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("eval"))
    (folder / "config.json").write_text('{"model_type": "stand_in_of_fla"}')
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'stand_in_of_fla', and code that comes with a model is not run"):
        model_folder.check_export(folder)
    monkeypatch.undo()
    (tmp_path / "fla.py").write_text(FLA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    assert model_folder.check_export(folder)["model_type"] == "stand_in_of_fla"
    monkeypatch.delitem(sys.modules, "fla")


def test_what_is_no_causal_language_model_with_a_tokenizer_is_refused(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("eval"))

    def check(**config):
        (folder / "config.json").write_text(json.dumps(config))
        return model_folder.check_export(folder)

    assert check(model_type="olmo_hybrid")
    with pytest.raises(UserError, match="a 't5' is not a causal language model"):
        check(**T5Config().to_dict())
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)  # fla takes seconds
    with pytest.raises(UserError, match="has the model_type 'own', and code that comes with a model is not run"):
        check(model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer_config.json\)"):
        (folder / "tokenizer_config.json").unlink()
        check(model_type="llama")


def test_lm_eval_knows_the_model(tiny_model, monkeypatch, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    import lrnn.eval.lm_eval as program

    assert get_model("lrnn") is Model
    lm = get_model("lrnn").create_from_arg_string(
        f"pretrained={tiny_model},bos=always,max_length=32", {"device": "cpu"}
    )
    assert lm.bos.ids == (0,) and lm.max_length == 32 and str(lm.softmax_dtype) == "torch.float32"
    with pytest.raises(UserError, match="the model lrnn has no argument trust_remote_code; it has pretrained, bos"):
        get_model("lrnn").create_from_arg_obj({"pretrained": str(tiny_model), "trust_remote_code": True})
    monkeypatch.setattr(
        program, "cli_evaluate", lambda: simple_evaluate("lrnn", {"pretrained": "/nowhere"}, tasks=["x"])
    )
    assert program.main() == 2
    assert capsys.readouterr().err.strip().endswith("lrnn: error: model folder not found: /nowhere")
