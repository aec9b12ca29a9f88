"""Test `lrnn import`: what it reads, that export gives the same tensors back, and what is refused.

`test_exported_folders.py` reads what fla writes, since only it imports fla.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_checkpoints import random_model
from safetensors.torch import load_file, save_file

from lrnn import LrnnForCausalLM, cli
from lrnn.errors import UserError
from lrnn.eval import model_class
from lrnn.eval.export import write
from lrnn.files import LFS_POINTER
from lrnn.formats.config import read_config
from lrnn.formats.folder import ModelFolder
from lrnn.formats.olmo_hybrid import olmo_names, to_olmo_config
from lrnn.model_config import load_model_config, model_config_from
from lrnn.shipped import MODELS, find
from lrnn.tokenizer import load_tokenizer

ATTENTION = {"mixer": "attention", "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": None}
ATTENTION |= {"qk_norm": "projection", "norm_position": "post"}
HYBRID = {"num_value_heads": 4, "head_v_dim": 12, "gated_norm_eps": 1e-5, "num_hidden_layers": 3}
HYBRID |= {"mixer": ["gated_deltanet", ATTENTION], "allow_neg_eigval": False}
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model() -> LrnnForCausalLM:
    """Return a hybrid that `olmo_hybrid` has, with weights that bfloat16 holds."""
    model = random_model("gated", **HYBRID)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture(scope="module")
def source(model, tmp_path_factory, sentencepiece_model) -> Path:
    """Return a folder of `olmo_hybrid` in bfloat16, in two shards, written with safetensors alone."""
    folder = tmp_path_factory.mktemp("downloads") / "olmo"
    folder.mkdir()
    content = to_olmo_config(model.config)
    names = olmo_names(model, content)
    state = {names[name]: p.detach().bfloat16() for name, p in model.named_parameters()}
    shards = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    files = {name: shards[number % 2] for number, name in enumerate(sorted(state))}
    for shard in shards:
        save_file({name: x for name, x in state.items() if files[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(content))
    shutil.copy(sentencepiece_model, folder / "tokenizer.model")
    return folder


def test_export_after_import_gives_the_same_tensors_back(source, model, sentencepiece_model, tmp_path, capsys):
    out, again = tmp_path / "imported", tmp_path / "again"
    assert cli.main(["import", str(source), str(out)]) == 0
    assert "logits in bfloat16 differ from the trained model's by at most" in capsys.readouterr().out
    content = json.loads((out / "config.json").read_text())
    assert (content["model_type"], content["dtype"], content["allow_neg_eigval"]) == ("lrnn", "bfloat16", False)
    assert load_model_config(out / "config.json").mixer == model.config.mixer  # as `model:` of a run reads it
    assert "Converted from a model folder of `olmo_hybrid`" in (out / "README.md").read_text()
    texts = ["def f(x):\n    return", "naïve 日本"]
    assert load_tokenizer(out).encode_batch(texts) == load_tokenizer(sentencepiece_model).encode_batch(texts)
    folder = ModelFolder(out)
    for name, parameter in model.named_parameters():
        assert torch.equal(folder.read(name).float(), parameter), name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "check_class_folder", lambda *arguments: 0.0)
        assert cli.main(["export", str(out), str(again), "--format", "olmo_hybrid", "--dtype", "bfloat16"]) == 0
    before = {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
    after = load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x.float(), after[name].float()), name
        assert after[name].dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    assert json.loads((again / "config.json").read_text()).items() >= to_olmo_config(model.config).items()


@torch.no_grad()
def test_logits_are_those_of_the_class_that_saved_the_folder(tmp_path):
    """The class saves norms under other names, and its joined convolution in three parts of one size."""
    model_class.import_class("olmo_hybrid", "cpu")
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = OlmoHybridForCausalLM(OlmoHybridConfig(pad_token_id=None, eos_token_id=2, **sizes, **heads)).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=2.0 if "conv1d" in name else 0.2)  # keys far from 0
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    saved = {name: entry.shape for name, entry in ModelFolder(tmp_path).tensors.entries.items()}
    assert "model.layers.0.attention_layer_norm.weight" in saved and len(list(tmp_path.glob("model-*"))) > 1
    assert {saved[f"model.layers.0.linear_attn.{x}_conv1d.weight"] for x in "qkv"} == {(32, 1, 4)}  # of 24, 24 and 48
    folder = ModelFolder(tmp_path)
    ours = LrnnForCausalLM(folder.config).eval()
    folder.load_into(ours)
    ids = torch.randint(64, (2, 70))
    truth = theirs(ids).logits
    assert (ours(ids).logits - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("name", ["340m-hybrid", "1.3b-hybrid", "7b-hybrid"])
def test_the_configuration_of_a_published_shape(name, tmp_path):
    """`7b-hybrid` has the shape of Olmo Hybrid 7B, whose padding token the class leaves out of its training."""
    config = load_model_config(find(name, MODELS, "model configuration"))
    (tmp_path / "config.json").write_text(json.dumps(to_olmo_config(config, config.pad_token_id)))
    kind, fields, content = read_config(tmp_path)
    again = model_config_from(fields, "test")
    before, after = config.to_dict(), again.to_dict() | {"pad_token_id": content["pad_token_id"]}
    assert kind == "olmo_hybrid" and {x: (before[x], after.get(x)) for x in before if before[x] != after.get(x)} == {}


def harmed(harm: str, folder: Path) -> None:
    """Harm a folder of one file."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    state = load_file(file)
    if harm == "missing":
        del state[NAME]
    elif harm == "left over":
        state["model.layers.0.attn.D"] = torch.zeros(2)
    elif harm == "shape":
        state[NAME] = state[NAME][:-1].clone()
    elif harm == "dtype":
        state[NAME] = state[NAME].to(torch.int8)
    elif harm == "nan":
        state[NAME][0, 0] = torch.nan
    elif harm == "other head":
        config["tie_word_embeddings"] = True
    save_file(state, file)
    if harm == "type":
        config["model_type"] = "llama"
    elif harm == "field":
        config["new_option"] = 3
    (folder / "config.json").write_text("[" if harm == "json" else json.dumps(config))
    if harm == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "pointer":
        file.write_bytes(LFS_POINTER + b"v1\n")
    elif harm in ("link to nothing", "folder"):
        file.unlink()
        file.mkdir() if harm == "folder" else file.symlink_to("gone")
    elif harm == "twice":
        save_file({NAME: state[NAME]}, folder / "model-extra.safetensors")
    elif harm in ("index of a pickle", "index outside", "both"):
        name = {"index of a pickle": "a.bin", "index outside": "../a.safetensors", "both": "a.safetensors"}[harm]
        (folder / "a.safetensors").touch()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: name}}))


@pytest.mark.parametrize(
    ("harm", "said"),
    {
        "missing": f"the tensor {NAME} is missing, of shape [48, 32]",
        "left over": "model.safetensors holds the tensor model.layers.0.attn.D, which the model of config.json lacks",
        "shape": f"the tensor {NAME} has shape [47, 32]; config.json asks for [48, 32]",
        "dtype": f"the tensor {NAME} is I8; weights are read in float32, bfloat16, float16",
        "nan": f"the tensor {NAME} has values that are infinite or NaN",
        "other head": "has tie_word_embeddings, but the tensor lm_head.weight is not model.embeddings.weight",
        "type": "model_type 'llama' cannot be read; lrnn reads lrnn, gated_deltanet, delta_net, gated_delt",
        "field": "unknown field new_option",
        "json": "config.json is not",
        "pickle": "has no model.safetensors, and pytorch_model.bin is a pickle, which can run code when it is read",
        "cut": "model.safetensors cannot be read as safetensors",
        "link to nothing": "model.safetensors cannot be read as safetensors",
        "folder": "model.safetensors cannot be read as safetensors",
        "pointer": "model.safetensors is a pointer of Git LFS in place of the file; fetch it with `git lfs pull`",
        "twice": f"model-extra.safetensors and model.safetensors both hold the tensor {NAME}",
        "index of a pickle": "names 'a.bin'; only safetensors files of the folder itself are read",
        "index outside": "names '../a.safetensors'; only safetensors files of the folder itself are read",
        "both": "has both model.safetensors and model.safetensors.index.json, which does not name it",
    }.items(),
)
def test_a_folder_that_is_not_as_it_should_be_is_refused(harm, said, tmp_path):
    folder, model = tmp_path / "folder", random_model("gated", num_heads=1)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "model.safetensors")
    harmed(harm, folder)
    with pytest.raises(UserError) as error:
        found = ModelFolder(folder)
        found.load_into(model)
    assert said in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "attention_bias": True,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0},
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
        "eos_token_id": [1, 2],
        "linear_use_gate": False,
        "head_dim": 16,
        "hidden_size": "wide",
    }.items(),
)
def test_a_setting_of_the_class_that_lrnn_lacks(field, value, source, tmp_path):
    content = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match="num_attention_heads" if field == "head_dim" else field):
        read_config(tmp_path)


def test_the_command_says_what_is_wrong(source, tmp_path, capsys):
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    for arguments, said in {
        ("nowhere", "out"): "nowhere does not exist; give a model folder",
        (str(tmp_path), "out"): "is not a model folder: it has no config.json",
        (str(bare), "out"): f"tokenizer {bare}: neither a SentencePiece .model file nor a folder with",
        (str(source), str(bare)): f"{bare} exists and is not an empty folder",
        (str(source), str(source / "config.json/out")): "config.json/out cannot be written (Not a directory: ",
    }.items():
        assert cli.main(["import", *arguments]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("lrnn: error: ") and said in captured and captured.count("\n") == 1
