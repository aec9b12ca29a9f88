"""Test runs that begin with weights that were trained before: of a model folder, of a run, of a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_checkpoints import random_model, write_checkpoint
from safetensors.torch import save_file
from training_group import losses, run_group

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.export import model_card
from lrnn.eval.export.read import read_checkpoint
from lrnn.files import sha256
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.init_from.weights import InitialWeights
from lrnn.pretrain.launch import STOPPED
from lrnn.records import read_metrics
from lrnn.tokenizer import load_tokenizer

NO_UPDATE = 1e-30  # a learning rate whose updates are lost in float32


def write_folder(folder: Path, model: LrnnForCausalLM, tokenizer: Path, config: dict) -> Path:
    """Write a model folder in bfloat16, in two shards with an index, and nothing of lrnn's own exporter."""
    folder.mkdir(parents=True)
    state = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        shutil.copy(tokenizer / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def model():
    """Return a hybrid with eigenvalues in [0, 1], which is not lrnn's default, and weights that bfloat16 holds."""
    model = random_model("gated-hybrid", allow_neg_eigval=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(model, corpora, tmp_path_factory):
    """Return a model folder. `tests/formats` reads those of other formats, one of which takes seconds to import."""
    root = tmp_path_factory.mktemp("downloads")
    return write_folder(root / "gdn", model, corpora / "a" / "tokenizer", model.config.to_dict())


@pytest.fixture
def begun(base, folder):
    """`begun(name, **changes)` returns the configuration of a run that begins with the weights of the folder."""

    def make(name="run", stage=2, **changes):
        config = base(name, stage, **{"init_from": str(folder), "steps": 3, **changes})
        return {key: value for key, value in config.items() if key != "model" or "model" in changes}

    return make


def test_a_run_begins_with_the_weights_of_the_folder_and_resumes_without_it(begun, folder, model, tmp_path):
    alike = {"steps": 1, "optim": {"lr": NO_UPDATE, "weight_decay": 0.0}, "schedule": {}}
    still = [begun(f"stage{n}", n, **alike) for n in (1, 3)]  # `from_run` is in stage 2
    moved = shutil.copytree(folder, tmp_path / "moved")
    straight, stopped = begun("straight"), begun("stopped", init_from=str(moved))
    specs = [*({"config": config} for config in still), {"config": straight}, {"config": stopped, "stop_at": 2}]
    assert run_group(tmp_path, specs) == [0, 0, 0, STOPPED]

    shutil.rmtree(moved)
    from_run = begun("from_run", init_from=still[1]["run_dir"], **alike)
    other = {**stopped, "init_from": str(folder)}
    found = run_group(tmp_path, [{"config": other}, {"config": stopped}, {"config": from_run}])
    assert "of a run that began from" in found[0] and str(folder) in found[0] and found[1:] == [0, 0]
    assert losses(stopped) == losses(straight) and len(losses(straight)) == 3

    for config in (*still, from_run):
        saved = SavedState(Path(config["run_dir"]) / "checkpoints" / "step-00000001")
        for name, parameter in model.named_parameters():
            held = saved.read("param", name, 0, parameter.numel())
            assert torch.equal(held.view_as(parameter), parameter), (config["run_dir"], name)
    (event,) = (r for r in read_metrics(Path(stopped["run_dir"])) if r.get("event") == "init_from")
    record = json.loads((Path(stopped["run_dir"]) / "checkpoints/step-00000003/init_from.json").read_text())
    assert record == {name: value for name, value in event.items() if name in record}
    assert record["format"] == "lrnn" and record["folder"] == str(moved)
    assert record["sha256"]["config.json"] == sha256(folder / "config.json") and len(record["sha256"]) == 3
    training = read_checkpoint(Path(stopped["run_dir"])).training
    assert training["init_from"] == {name: record[name] for name in ("format", "name", "sha256")}  # but for its paths
    card = model_card._training(training, None, None, None)
    assert (
        "It began with the weights of `moved` (`lrnn`). SHA-256: `config.json` " + record["sha256"]["config.json"]
        in card
    )


def weights_of(config: dict) -> InitialWeights:
    """Return the weights of a run that would begin now."""
    parsed = parse_config(config, "test")
    changed = set(parsed.model) - {"base"} if isinstance(parsed.model, dict) else set()
    return InitialWeights(parsed.init_from, load_model_of(parsed), changed)


def test_the_model_is_that_of_the_folder(begun, model):
    found = load_model_of(parse_config(begun(), "test"))
    assert found.max_position_embeddings == 64 and not found.allow_neg_eigval
    before, now = model.config.to_dict(), found.to_dict()
    assert {x: (before[x], now[x]) for x in before if x in now and before[x] != now[x]} == {}


def test_a_change_of_the_model_is_made_where_it_is_written(begun, model, tmp_path):
    changes = {"allow_neg_eigval": True, "mixer": [model.config.mixer[0], {**model.config.mixer[1], "rope_theta": 5e5}]}
    differences = weights_of(begun(model=changes)).differences
    assert differences == {"layer 0 allow_neg_eigval": (False, True), "layer 1 rope_theta": (10_000.0, 5e5)}
    assert weights_of(begun(model={"sliding_window": 9})).differences == {"layer 1 sliding_window": (None, 9)}
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({**model.config.to_dict(), "allow_neg_eigval": True}))
    with pytest.raises(UserError, match=r"has layer 0 allow_neg_eigval = True, .* has False; .* model.allow_neg_eigv"):
        weights_of(begun(model=str(whole)))
    assert weights_of(begun(model={"base": str(whole), "allow_neg_eigval": False})).differences == {}
    whole.write_text(json.dumps({**model.config.to_dict(), "norm_eps": 1e-3}))  # which no mixer has
    with pytest.raises(UserError, match=r"has norm_eps = 0.001, .* has 1e-06; .* as model.norm_eps"):
        weights_of(begun(model={"base": str(whole), "mixer": model.config.mixer}))
    with pytest.raises(UserError, match=r"changed intermediate_size = 32, does not fit .*down_proj.weight of shape"):
        weights_of(begun(model={"intermediate_size": 32}))


def test_a_change_holds_for_layers_with_a_value_of_their_own(begun, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(random_model("deltanet-hybrid").config.to_dict()))
    found = load_model_of(parse_config(begun(init_from=str(tmp_path), model={"rope_theta": 9e5}), "test"))
    assert [found.layer(i).rope_theta for i in (0, 2)] == [9e5, 9e5] and found.layer(2).sliding_window == 5


def test_a_larger_vocabulary_begins_as_the_mean_of_the_tokens(begun, model):
    weights = weights_of(begun(model={"vocab_size": 704}))
    grown = LrnnForCausalLM(LrnnConfig(**{**model.config.to_dict(), "vocab_size": 704}))
    weights.load_into(grown)
    for name in ("model.embeddings.weight", "lm_head.weight"):
        before, now = model.get_parameter(name), grown.get_parameter(name)
        assert torch.equal(now[:640], before)
        assert (now[640:] - before.mean(0)).abs().max() < 1e-6
    with pytest.raises(UserError, match="vocab_size = 512, does not fit"):
        weights_of(begun(model={"vocab_size": 512}))


def test_a_tokenizer_that_does_not_fit(begun, sentencepiece_model, corpora, tmp_path, model):
    weights = weights_of(begun())
    assert weights.check_tokenizer(load_tokenizer(corpora / "b" / "tokenizer"), "corpora/b") is None
    with pytest.raises(UserError, match=r"the tokenizer of mine is not that of init_from .*gdn: the ids of .* are \["):
        weights.check_tokenizer(load_tokenizer(sentencepiece_model), "mine")
    bare = write_folder(tmp_path / "bare", model, None, model.config.to_dict())
    said = weights_of(begun(init_from=str(bare))).check_tokenizer(load_tokenizer(sentencepiece_model), "mine")
    assert said is not None and "has no tokenizer, so whether the ids of mine mean the same" in said


def test_a_run_needs_a_model(base):
    config = base()
    del config["model"]
    with pytest.raises(UserError, match="key model is missing; give it, or init_from"):
        parse_config(config, "test")
    with pytest.raises(UserError, match="nowhere does not exist; give a model folder"):
        load_model_of(parse_config({**config, "init_from": "nowhere"}, "test"))


def test_init_from_with_a_checkpoint_of_another_run_is_refused(begun, model, corpora):
    config = begun("other")
    write_checkpoint(Path(config["run_dir"]), model, corpora / "a" / "tokenizer" / "tokenizer.model")
    with pytest.raises(UserError, match=r"other has checkpoints \(the newest is step-00000010\) .* began with random"):
        load_model_of(parse_config(config, "test"))
