"""Test that nothing in untrusted model folders and checkpoints is executed.

This holds for `lrnn eval`, `lrnn export`, and transformers after `import lrnn`. Every hostile file is also loaded
carelessly, in a separate process, to show that its code would have run.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hostile import (
    add_hostile_code,
    hostile_pickle,
    hostile_python,
    hostile_yaml,
    load_carelessly,
    pickle_carelessly,
    tokenizer_carelessly,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from lrnn import LrnnConfig, LrnnForCausalLM, LrnnModel, cli
from lrnn.environment import PACKAGE
from lrnn.eval.suites import harness
from lrnn.model.code_files import AUTO_MAP, code_files
from lrnn.pretrain.checkpoint.format import manifest_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL_CODE = {file.name for file in (PACKAGE / "model").glob("*.py")}  # not the kernels' reference files
ALL_CODE = {file.removesuffix(".py") for file in MODEL_CODE} | {"tokenizer", "generate"}


@pytest.fixture(autouse=True)
def somebody_says_yes(monkeypatch):
    """On a terminal transformers asks whether to run the code; lrnn must not get that far."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")


@pytest.fixture
def marks(tmp_path) -> Path:
    """Return the folder in which hostile code leaves files."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def found(marks: Path) -> set[str]:
    return {path.name for path in marks.iterdir()}


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    vocab_size = len(AutoTokenizer.from_pretrained(tiny_model))
    return LrnnForCausalLM(LrnnConfig(vocab_size=vocab_size, max_position_embeddings=2048, **size))


@pytest.fixture
def exported(model, tiny_model, marks, tmp_path) -> Path:
    """Return a folder that looks exported, but whose modules, and some more files, leave marks when they run."""
    folder = tmp_path / "exported"
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_model / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    for file, text in code_files().items():
        mark = "\n" + hostile_python(marks / Path(file).stem) if file in MODEL_CODE else ""
        (folder / file).write_text(text + mark)
    add_hostile_code(folder, marks / "tokenizer", known_class=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(
        hostile_python(marks / "generate") + "def generate(model, **kwargs): pass\n"
    )
    return folder


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def evaluate(folder: Path) -> int:
    return cli.main(["eval", str(folder), "--suite", "quick", "--limit", "1", "--device", "cpu"])


def test_the_folder_would_run_code_if_it_were_trusted(exported, marks, tmp_path):
    load_carelessly(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"AutoTokenizer.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        f"AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True)",
        tmp_path,
    )
    assert found(marks) == ALL_CODE


def test_lrnn_eval_loads_a_folder_with_its_own_classes(exported, marks, eval_data, monkeypatch):
    loaded = []
    original = harness.in_chunks
    monkeypatch.setattr(harness, "in_chunks", lambda model, *rest: loaded.append(model) or original(model, *rest))
    assert evaluate(exported) == 0
    assert type(loaded[0].model) is LrnnForCausalLM
    assert found(marks) == set()


def test_transformers_after_import_lrnn_has_its_classes(exported, marks):
    assert type(AutoConfig.from_pretrained(exported)) is LrnnConfig
    assert type(AutoModel.from_pretrained(exported)) is LrnnModel
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert type(model) is LrnnForCausalLM
    model.generate(**tokenizer("def f(x):", return_tensors="pt"), max_new_tokens=2)
    assert found(marks) == set()


def test_a_model_that_needs_its_own_code_is_not_evaluated(exported, marks, eval_data, capsys, tmp_path):
    add_hostile_code(exported, marks / "tokenizer", known_class=False)
    assert evaluate(exported) == 2
    assert "its tokenizer cannot be loaded, or needs code of its own" in capsys.readouterr().err
    edit_json(exported / "config.json", model_type="own")
    assert evaluate(exported) == 2
    assert "has the model_type 'own', and code that comes with a model is not run" in capsys.readouterr().err
    assert found(marks) == set()
    load_carelessly(tokenizer_carelessly(exported), tmp_path)
    assert {"tokenizer", "configuration_lrnn"} <= found(marks)


@pytest.mark.parametrize("decoy", [None, "model.safetensors.index.json", "model.safetensors.old"])
def test_pickled_weights_are_refused(exported, marks, eval_data, capsys, tmp_path, decoy):
    """This holds even if another file looks like safetensors."""
    weights = exported / "pytorch_model.bin"
    (exported / "model.safetensors").unlink()
    weights.write_bytes(hostile_pickle(marks / "pickle"))
    if decoy is not None:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (exported / decoy).write_text(json.dumps(index))
    assert evaluate(exported) == 2
    error = capsys.readouterr().err
    assert "safetensors" in error and str(exported) in error
    with pytest.raises(Exception):  # noqa: B017 (an error of transformers, of any type)
        AutoModelForCausalLM.from_pretrained(exported)
    assert found(marks) == set()
    load_carelessly(pickle_carelessly(weights), tmp_path)
    assert found(marks) == {"pickle"}


def test_pickled_weights_of_an_fla_folder_are_refused(exported, marks, capsys, tmp_path):
    fla = tmp_path / "fla"
    fla.mkdir()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "expand_v": 1.0}
    auto_map = {"AutoConfig": "configuration_own.Own"}
    (fla / "config.json").write_text(json.dumps({"model_type": "gated_deltanet", "auto_map": auto_map, **size}))
    (fla / "configuration_own.py").write_text(hostile_python(marks / "configuration"))
    (fla / "pytorch_model.bin").write_bytes(hostile_pickle(marks / "pickle"))
    for command in (["export", "--from-fla"], ["import"]):
        assert cli.main([*command, str(fla), str(tmp_path / "out")]) == 2
        said = "pytorch_model.bin is a pickle, which can run code when it is read"
        assert said in capsys.readouterr().err and found(marks) == set()
    load_carelessly(pickle_carelessly(fla / "pytorch_model.bin"), tmp_path)
    assert found(marks) == {"pickle"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def seal(checkpoint: Path) -> None:
    """Write a manifest that fits the files, as an attacker can."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"):
        content = path.read_bytes()
        files[str(path.relative_to(checkpoint))] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (checkpoint / "manifest.json").write_text(manifest_text(1, files))


@pytest.fixture
def checkpoint(model, tiny_model, tmp_path) -> Path:
    """Return a checkpoint of a run, with a Hugging Face tokenizer."""
    folder = tmp_path / "run/checkpoints/step-00000001"
    (folder / "tokenizer").mkdir(parents=True)
    save_file(
        {f"param:{name}:0": p.detach().flatten().clone() for name, p in model.named_parameters()},
        folder / "state-00000-of-00001.safetensors",
    )
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    progress = {"step": 1, "progress": {"step": 1, "tokens": 8}, "data": {"seed": 0, "corpora": [], "weights": []}}
    (folder / "progress.json").write_text(json.dumps(progress))
    (folder / "run.yaml").write_text("steps: 1\n")
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_model / name, folder / "tokenizer")
    seal(folder)
    return folder


def export(checkpoint: Path, out: Path) -> int:
    return cli.main(["export", str(checkpoint.parents[1]), str(out)])


def test_code_that_a_checkpoint_names_is_neither_run_nor_passed_on(checkpoint, marks, tmp_path):
    """The code is named by a path, so that it would be found from the exported folder as well."""
    add_hostile_code(checkpoint / "tokenizer", marks / "tokenizer", known_class=True, elsewhere=True)
    pipeline = {"text-generation": {"impl": "own.Pipeline", "pt": ["AutoModelForCausalLM"]}}
    edit_json(checkpoint / "config.json", auto_map={"AutoConfig": "own.Config"}, custom_pipelines=pipeline)
    (checkpoint / "pytorch_model.bin").write_bytes(hostile_pickle(marks / "pickle"))
    seal(checkpoint)
    assert export(checkpoint, tmp_path / "out") == 0
    assert found(marks) == set()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and "custom_pipelines" not in config
    assert "auto_map" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert not list((tmp_path / "out").glob("*own*")) and not list((tmp_path / "out").glob("*.bin"))
    exported_then_original = [tokenizer_carelessly(folder) for folder in (tmp_path / "out", checkpoint / "tokenizer")]
    note = f"import os\nopen('between', 'w').write(repr(os.listdir({str(marks)!r})))"
    load_carelessly(f"\n{note}\n".join(exported_then_original), tmp_path)
    assert (tmp_path / "between").read_text() == "[]" and found(marks) == {"tokenizer"}


def test_a_tokenizer_that_needs_its_own_code_is_not_exported(checkpoint, marks, capsys, tmp_path):
    add_hostile_code(checkpoint / "tokenizer", marks / "tokenizer", known_class=False)
    seal(checkpoint)
    assert export(checkpoint, tmp_path / "out") == 2
    assert "needs code of its own, which is not run" in capsys.readouterr().err and found(marks) == set()


def test_a_pickle_in_place_of_the_state_is_refused(checkpoint, marks, capsys, tmp_path):
    state = checkpoint / "state-00000-of-00001.safetensors"
    state.write_bytes(hostile_pickle(marks / "pickle"))
    seal(checkpoint)
    assert export(checkpoint, tmp_path / "out") == 2
    assert f"{state} is not a safetensors file" in capsys.readouterr().err and found(marks) == set()
    load_carelessly(pickle_carelessly(state), tmp_path)
    assert found(marks) == {"pickle"}


def test_yaml_that_calls_python_is_refused(checkpoint, marks, capsys, tmp_path):
    file = checkpoint / "run.yaml"
    file.write_text(hostile_yaml(marks / "yaml"))
    seal(checkpoint)
    assert export(checkpoint, tmp_path / "out") == 2
    assert f"{file} is not plain YAML" in capsys.readouterr().err and found(marks) == set()
    load_carelessly(f"import yaml\nyaml.unsafe_load(open({str(file)!r}))", tmp_path)
    assert found(marks) == {"yaml"}
