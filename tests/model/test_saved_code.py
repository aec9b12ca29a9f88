"""Test that a saved model has the code that its config.json names, in a form that every transformers can load."""

import json

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.code_files import AUTO_MAP, ENTRY_FILES
from lrnn.model_config import load_model_config

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model() -> LrnnForCausalLM:
    return LrnnForCausalLM(LrnnConfig(vocab_size=50, **SIZE))


@pytest.mark.parametrize("what", ["language model", "base model", "configuration"])
def test_the_code_is_saved(model, tmp_path, what):
    {"language model": model, "base model": model.model, "configuration": model.config}[what].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    code = {file.name for file in tmp_path.glob("*.py")}
    assert {"modeling_lrnn.py", "mixers.py", "mixer_gla.py", "delta_rule.py"} <= code and "__init__.py" not in code
    for entry in ENTRY_FILES:
        named = {f"{name}.py" for name in get_relative_imports(tmp_path / entry)}
        assert named == code - {entry}, "transformers before 5.10 copies only what an entry file names itself"
        assert {file.rpartition("/")[2] for file in get_relative_import_files(tmp_path / entry)} <= code


def test_auto_map_of_another_repository_is_replaced(tmp_path):
    """transformers writes the name of the repository into it that a model was loaded from."""
    config = LrnnConfig(**SIZE, auto_map={"AutoConfig": "someone/model--configuration_lrnn.LrnnConfig"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_saved_configuration_describes_a_model_to_train(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "lrnn_training": {"step": 1}}))
    config = load_model_config(tmp_path / "config.json")
    assert config.hidden_size == 32 and not hasattr(config, "auto_map") and not hasattr(config, "lrnn_training")


def test_pushing_uploads_the_code(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(LrnnConfig, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    LrnnConfig(**SIZE).save_pretrained(tmp_path / "name", push_to_hub=True)
    LrnnConfig(**SIZE).save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/model", private=True)
    assert pushed == [(("name",), {}), (("me/model",), {"private": True})]


@torch.no_grad()
def test_the_cache_has_two_names(model):
    """transformers 5.24 passes `cache` where earlier versions pass `past_key_values`."""
    ids = torch.arange(8)[None]
    model.eval()
    truth = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], cache=first.past_key_values, use_cache=True)
    assert (rest.logits - truth[:, 5:]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="cache and past_key_values are names of the same argument"):
        model(ids, cache=first.past_key_values, past_key_values=first.past_key_values)
