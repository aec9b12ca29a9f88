"""Pretraining executes nothing in untrusted checkpoints, configurations, tokenizers and data sets.

Every hostile file is also loaded carelessly, in a separate process, to show that its code would have run.
"""

import json
from pathlib import Path

import pytest
from hostile import (
    add_hostile_code,
    hostile_pickle,
    hostile_python,
    hostile_yaml,
    load_carelessly,
    pickle_carelessly,
    tokenizer_carelessly,
)
from training_group import run_group

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.corpus.dataset import load_rows
from lrnn.pretrain.corpus.source import SourceArguments

SHORT = {"log": {"heldout_every": 0}, "schedule": {"warmup_steps": 0}}


@pytest.fixture(autouse=True)
def somebody_says_yes(monkeypatch):
    """On a terminal, transformers asks whether to run the code; lrnn must not get that far."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")


@pytest.fixture
def mark(tmp_path) -> Path:
    """Return the path of the file that hostile code leaves."""
    return tmp_path / "mark"


@pytest.fixture
def tokenizer_folder(text_folder, tmp_path) -> Path:
    """Return the folder of a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [p.read_text() for p in text_folder.rglob("*.txt")],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def train(config: dict, tmp_path: Path) -> str | int:
    """Train in a separate process. Return what `train` returns there, or its error."""
    (status,) = run_group(tmp_path, [{"config": config, "allow_change": True}], processes=1)
    return status


def test_resume_executes_nothing_of_a_run(base, tmp_path, mark):
    """The run has pickles under the names of DeepSpeed, torch and transformers, a hostile run.yaml, and tokenizer code.

    Then a pickle replaces the state, with the checksum that the checkpoint's own manifest gives.
    """
    assert train(base(steps=1, **SHORT), tmp_path) == 0
    run = tmp_path / "run"
    folder = checkpoint.find_newest(run)
    for name in (
        "mp_rank_00_model_states.pt",
        "pytorch_model.bin",
        "optimizer.pt",
        "training_args.bin",
        "rng_state.pth",
    ):
        for place in (run, run / "checkpoints", folder):
            (place / name).write_bytes(hostile_pickle(mark))
    (run / "checkpoints/latest").write_text("mp_rank_00_model_states.pt")
    (run / "run.yaml").write_text(hostile_yaml(mark))
    for name in ("configuration_lrnn.py", "modeling_lrnn.py", "sitecustomize.py", "zero_to_fp32.py"):
        (folder / name).write_text(hostile_python(mark))
    assert train(base(steps=2, **SHORT), tmp_path) == 0
    newest = checkpoint.find_newest(run)
    assert newest is not None and newest.name == "step-00000002" and not mark.exists()

    state = newest / "state-00000-of-00001.safetensors"
    state.write_bytes(hostile_pickle(mark))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    files[state.name] = checkpoint.seal(state)
    (newest / "manifest.json").write_text(checkpoint.manifest_text(2, files))
    assert f"BrokenCheckpoint: {state} is not a safetensors file" in str(train(base(steps=3, **SHORT), tmp_path))
    assert not mark.exists()
    load_carelessly(pickle_carelessly(state), tmp_path)
    assert mark.exists()


def test_yaml_that_calls_python_is_refused(tmp_path, mark, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(hostile_yaml(mark))
    for command in ("pretrain", "submit"):
        assert main([command, str(file)]) == 2
        assert f"{file} is not YAML: could not determine a constructor" in capsys.readouterr().err
    override = f"run_dir={hostile_yaml(mark).removeprefix('run_dir: ').strip()}"
    assert main(["pretrain", str(Path(__file__).parents[2] / "configs/tiny.yaml"), override]) == 2
    assert not mark.exists()
    load_carelessly(f"import yaml\nyaml.unsafe_load(open({str(file)!r}))", tmp_path)
    assert mark.exists()


@pytest.mark.parametrize("known_class", [True, False])
def test_code_of_a_tokenizer_is_not_run(text_folder, tokenizer_folder, tmp_path, mark, capsys, known_class):
    """If transformers has the tokenizer's class, the code is not needed; otherwise the tokenizer is refused."""
    add_hostile_code(tokenizer_folder, mark, known_class=known_class)
    out = tmp_path / "corpus"
    options = ["--tokenizer", str(tokenizer_folder), "--out", str(out), "--processes", "1"]
    assert main(["corpus", str(text_folder), *options]) == (0 if known_class else 2)
    if known_class:
        assert not list(out.rglob("*.py"))
    else:
        assert "needs code of its own, which is not run" in capsys.readouterr().err
    assert not mark.exists()
    load_carelessly(tokenizer_carelessly(tokenizer_folder), tmp_path)
    assert mark.exists()


def test_a_data_set_that_is_a_program_or_a_pickle_is_refused(tmp_path, mark):
    """`datasets` no longer supports either. This test fails if they return, or if an older version is allowed."""
    script, frame = tmp_path / "data.py", tmp_path / "data.pkl"
    script.write_text(hostile_python(mark))
    frame.write_bytes(hostile_pickle(mark))
    for arguments in (SourceArguments(str(script)), SourceArguments("pandas", data_files=[str(frame)])):
        for streaming in (False, True):
            with pytest.raises(UserError, match="cannot be loaded"):
                load_rows(arguments, streaming)
    assert not mark.exists()
    for careless in (f"import runpy\nrunpy.run_path({str(script)!r})", pickle_carelessly(frame)):
        load_carelessly(careless, tmp_path)
        assert mark.exists()
        mark.unlink()
