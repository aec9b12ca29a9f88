"""Test that a damaged model folder, or a device or dtype that cannot be, is refused instead of scored."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrnn import LrnnConfig, LrnnForCausalLM, cli
from lrnn.errors import UserError, first_line
from lrnn.eval import loading, model_folder
from lrnn.eval.suites import harness
from lrnn.eval.suites.model import Model
from lrnn.eval.suites.prompts import load_tokenizer

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("eval"))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: change_weights(folder, lambda w: w.pop(UP)), f"holds no weights for {UP}"),
        (lambda folder: change_weights(folder, lambda w: w[UP][3].fill_(torch.nan)), f"{UP} has values that are"),
        (lambda folder: change_weights(folder, lambda w: w[NORM][:1].fill_(torch.inf)), f"{NORM} has values that are"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded: Error while deserializing"),
        (
            lambda folder: change_config(folder, intermediate_size=65),
            r"mlp\.down_proj\.weight has shape \[32, 64\]; config\.json asks for \[32, 65\]",
        ),
    ],
    ids=["missing", "nan", "infinite", "empty", "shape"],
)
def test_damaged_weights_are_not_evaluated(copy, harm, message):
    """transformers fills missing weights with random numbers, and a model of NaN picks the first choice everywhere."""
    harm(copy)
    with pytest.raises(UserError, match=message):
        Model(copy, device="cpu")
    with pytest.raises(UserError, match=message):
        loading.load_model(copy, torch.device("cpu"), torch.float32)


def test_weights_that_are_left_over(tiny_model, tmp_path):
    """The configuration of an export with fewer layers than it has weights for. Others may hold more than a model."""
    size = {"hidden_size": 16, "num_heads": 1, "head_dim": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    folder = tmp_path / "gated"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("eval", "model*", "config.json"))
    LrnnForCausalLM(LrnnConfig(vocab_size=300, **size)).save_pretrained(folder)
    assert loading.load_model(folder, torch.device("cpu"), torch.float32).config.num_hidden_layers == 2
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"holds weights that the model of config\.json lacks: model\.layers\.1\."):
        loading.load_model(folder, torch.device("cpu"), torch.float32)


def test_a_model_that_computes_no_numbers_has_no_scores(tiny_model, monkeypatch):
    lm = Model(tiny_model, device="cpu")
    monkeypatch.setattr(lm, "_model_call", lambda *args, **kwargs: torch.full((1, 64, lm.vocab_size + 2), torch.nan))
    request = SimpleNamespace(args=("def f", "(x)"))
    with pytest.raises(UserError, match="log-likelihoods that are infinite or NaN"):
        lm.loglikelihood([request], disable_tqdm=True)
    with pytest.raises(UserError, match="log-likelihoods that are infinite or NaN"):
        lm.loglikelihood_rolling([SimpleNamespace(args=("def f(x):",))], disable_tqdm=True)


def test_a_configuration_that_its_type_refuses(copy):
    change_config(copy, hidden_size="x")
    with pytest.raises(UserError, match=r"config\.json cannot be read as a configuration of 'llama': .*hidden_size"):
        model_folder.check_export(copy)


@pytest.mark.parametrize("content", ["", '{"a": 1}', "[]"])
def test_a_damaged_tokenizer(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu7"), "--device gpu7 cannot be used"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used"),
        (("--dtype", "floot32"), "--dtype floot32 is not a floating-point dtype; give float32, bfloat16 or float16"),
        (("--dtype", "int8"), "--dtype int8 is not a floating-point dtype"),
    ],
)
def test_a_device_or_dtype_that_cannot_be(tiny_model, heldout, capsys, monkeypatch, options, message):
    """HFLM evaluates on another device if it does not know the name."""
    monkeypatch.setattr(harness, "load_tasks", lambda *args: pytest.fail("tasks were loaded"))
    tasks = ["--tasks", "lrnn_heldout_bpb", "--heldout", str(heldout)]
    assert cli.main(["eval", str(tiny_model), *tasks, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    with pytest.raises(UserError, match=message):
        Model(tiny_model, **{name.removeprefix("--"): value for name, value in [options]})


def test_the_model_is_where_it_was_asked_to_be(tiny_model):
    """HFLM does not know the name cpu:0, and would take a GPU if there is one."""
    lm = Model(tiny_model, device="cpu:0", dtype="bfloat16")
    assert lm.device == torch.device("cpu:0") and lm.model.dtype == torch.bfloat16 and not lm.model.training
    assert lm.settings["device"] == "cpu:0"


def test_the_first_line_of_an_error():
    assert first_line(OSError("\n one\ntwo")) == "one"
    assert first_line(OSError()) == "OSError"
