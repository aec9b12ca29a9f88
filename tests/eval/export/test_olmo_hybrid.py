"""Test exports as transformers' class `olmo_hybrid`: names and keys, logits, generation, and what is refused."""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import clean_process
import other_transformers
import pytest
import torch
from export_checkpoints import random_model, write_checkpoint
from safetensors.torch import load_file
from transformers import OlmoHybridConfig

from lrnn import LrnnConfig, LrnnForCausalLM, cli, shipped
from lrnn.errors import UserError
from lrnn.eval import model_class
from lrnn.eval.export import check, write
from lrnn.formats.olmo_hybrid import olmo_names, olmo_shapes, to_olmo_config
from lrnn.model_config import load_model_config
from lrnn.tokenizer import load_tokenizer

ATTENTION = {"mixer": "attention", "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": 500}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
ATTENTION |= {"qk_norm": "projection", "norm_position": "post", "rope_scaling": YARN}
LINEAR = {"num_heads": 2, "head_dim": 8, "num_value_heads": 4, "head_v_dim": 12, "gated_norm_eps": 1e-5}
HYBRID = {**LINEAR, "num_hidden_layers": 4, "mixer": ["gated_deltanet", "gated_deltanet", ATTENTION]}
TIED = {"tie_word_embeddings": True, "allow_neg_eigval": False, "conv_size": 3, "num_hidden_layers": 2}
TIED |= {"mixer": ["gated_deltanet", {**ATTENTION, "rope_theta": None, "rope_scaling": None, "num_kv_heads": None}]}
MODELS = {"hybrid": (HYBRID, "float32"), "tied": (HYBRID | TIED, "bfloat16")}
# What vLLM's class reads: vllm/model_executor/models/olmo_hybrid.py and layers/mamba/gdn/olmo_gdn_linear_attn.py.
READ_BY_VLLM = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "linear_allow_neg_eigval"),
}
PROMPTS = ["def f(x):\n    return", "import os"]


def environment(modules: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}


def config_of(**changes) -> LrnnConfig:
    sizes = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 48}
    return LrnnConfig(**{**sizes, **HYBRID, **changes})


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sentencepiece_model):
    """Return a folder of exports by name. The exporter reads one of them back; `used` reads both."""
    root = tmp_path_factory.mktemp("exported")
    for name, (fields, dtype) in MODELS.items():
        write_checkpoint(root / "runs" / name, random_model("gated", **fields), sentencepiece_model)
        options = ["--format", "olmo_hybrid", "--dtype", dtype]
        with pytest.MonkeyPatch.context() as patch:
            if name == "hybrid":
                patch.setattr(write, "check_class_folder", lambda *arguments: 0.0)
            assert cli.main(["export", str(root / "runs" / name), str(root / name), *options]) == 0
    return root


# Uses the folders with transformers alone, in float32. Prints one JSON object per folder.
USE = """
import json, sys
sys.modules.update(dict.fromkeys(("lrnn", "fla", "causal_conv1d")))
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    options = dict(dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    r = {"module": type(model).__module__}
    r["unread"] = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
    r["positions"] = model.model.rotary_emb is not None
    free = dict(eos_token_id=-1, pad_token_id=tok.pad_token_id, max_new_tokens=7, do_sample=False)
    batch = tok(prompts, return_tensors="pt", padding=True)
    r["generated"] = model.generate(**batch, **free)[:, batch.input_ids.shape[1]:].tolist()
    with torch.no_grad():
        r["ids"] = tok(prompts[0]).input_ids
        r["logits"] = model(torch.tensor([r["ids"]])).logits[0].tolist()
    print("RESULT", json.dumps(r))
"""


def results(done: subprocess.CompletedProcess) -> list[dict]:
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def used(exported, tmp_path_factory):
    """Return what a process without lrnn found, by name."""
    env = environment(tmp_path_factory.mktemp("modules"))
    command = [sys.executable, "-I", "-c", USE, json.dumps(PROMPTS), *(str(exported / name) for name in MODELS)]
    done = clean_process.run(command, cwd=tmp_path_factory.mktemp("work"), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(MODELS, results(done), strict=True))


def trained(name: str) -> LrnnForCausalLM:
    """Return the model of a checkpoint, with the weights of its export."""
    fields, dtype = MODELS[name]
    model = random_model("gated", **fields)
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_plain_transformers_computes_what_was_trained(used, name):
    found, model = used[name], trained(name)
    assert found["module"].startswith("transformers.models.olmo_hybrid.") and found["unread"] == []
    assert found["positions"] == (name == "hybrid")
    truth = model(torch.tensor([found["ids"]])).logits[0]
    assert (torch.tensor(found["logits"]) - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_left_padding(used, exported, name):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported / name), trained(name)
    free = {"eos_token_id": -1, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 7, "do_sample": False}
    rows = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in PROMPTS]
    alone = [model.generate(row, **free)[0, row.shape[1] :].tolist() for row in rows]
    assert used[name]["generated"] == alone
    assert len({token for row in alone for token in row}) > 4  # otherwise equality says little


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="long: LRNN_TORTURE=1 (make torture)")
@pytest.mark.parametrize("version", ["5.3.0", "5.17.0", "5.24.0"])
def test_other_versions_of_transformers(used, exported, version, tmp_path):
    folders = [str(exported / name) for name in MODELS]
    env = environment(tmp_path) | other_transformers.environment(version)
    code = f"{USE}\nimport transformers; assert transformers.__version__ == {version!r}"
    command = [sys.executable, "-P", "-c", code, json.dumps(PROMPTS), *folders]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in zip(MODELS, results(done), strict=True):
        assert {**found, "logits": None} == {**used[name], "logits": None}
        difference = torch.tensor(found["logits"]) - torch.tensor(used[name]["logits"])
        assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_contents_of_the_folder(exported, name):
    folder = exported / name
    content = json.loads((folder / "config.json").read_text())
    assert content["dtype"] == MODELS[name][1] and content["lrnn_training"]["tokens"] == 5000
    positions = YARN | {"rope_theta": 500.0}
    assert content["rope_parameters"] == (
        positions if name == "hybrid" else {"rope_type": "default", "rope_theta": None}
    )
    # The class would not train the embedding of a padding token, which here ends documents too.
    assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (1, 2, None)
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == 2
    written = load_file(folder / "model.safetensors")
    assert {n: list(x.shape) for n, x in written.items()} == olmo_shapes(content)
    assert {n for n, x in written.items() if x.dtype == torch.float32} == {
        n for n in written if MODELS[name][1] == "float32" or n.endswith(("A_log", "dt_bias"))
    }
    card = (folder / "README.md").read_text()
    assert "--mamba-ssm-cache-dtype float32" in card and "trust_remote_code=True" not in card
    assert not list(folder.glob("*.py"))


def test_keys_are_all_of_the_class_and_those_that_vllm_reads():
    content = to_olmo_config(config_of())
    assert content.keys() - {"architectures"} == OlmoHybridConfig.__annotations__.keys() | {"model_type"}
    assert content.keys() >= READ_BY_VLLM
    again = OlmoHybridConfig(**content)
    assert {name: getattr(again, name) for name in content} == content


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    # The last is the number of parameters of Olmo Hybrid 7B.
    [("340m-hybrid", 328, 338_650_224), ("1.3b-hybrid", 364, 1_334_387_360), ("7b-hybrid", 523, 7_430_870_688)],
)
def test_shipped_hybrids_can_be_expressed(name, tensors, parameters):
    config = load_model_config(shipped.find(name, shipped.MODELS, "model configuration"))
    shapes = olmo_shapes(to_olmo_config(config))
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, parameters)


def test_names_and_shapes_are_those_of_the_class():
    """The class joins the three convolutions in memory, and splits them on disk by their channels."""
    model_class.import_class("olmo_hybrid", "cpu")
    from transformers import OlmoHybridForCausalLM

    config = config_of()
    content = to_olmo_config(config)
    with torch.device("meta"):
        theirs, ours = OlmoHybridForCausalLM(OlmoHybridConfig(**content)), LrnnForCausalLM(config)
    expected = {name: list(p.shape) for name, p in theirs.state_dict().items()}
    for name in [name for name in expected if name.endswith(".conv1d.weight")]:
        rows, one, taps = expected.pop(name)
        sizes = {"q": 16, "k": 16, "v": 48}
        assert rows == sum(sizes.values())
        expected |= {name.replace("conv1d", f"{x}_conv1d"): [size, one, taps] for x, size in sizes.items()}
    assert olmo_shapes(content) == expected
    assert set(olmo_names(ours, content).values()) == expected.keys()
    content["num_key_value_heads"] = 4
    with pytest.raises(RuntimeError, match=r"self_attn.k_norm.weight is \[16\]; olmo_hybrid has \[32\]"):
        olmo_names(ours, content)


@pytest.mark.parametrize(("error", "is_wrong"), [(5e-4, False), (2e-3, True), (float("nan"), True)])
def test_other_logits_are_found(error, is_wrong, sentencepiece_model, tmp_path, monkeypatch):
    """Differences are relative to the largest logit, since the class norms queries and keys in another way."""
    tokenizer, model = load_tokenizer(sentencepiece_model), trained("tied")
    batch = check.sample_batch(tokenizer)[:, :9]
    truth = check.logits(model, batch)
    got = truth + error * truth.abs().max()
    ids = tokenizer.encode_batch(check.real_texts())
    monkeypatch.setattr(check, "_load_without_lrnn", lambda *arguments: ({"float32": got, "native": got}, ids))
    with pytest.raises(RuntimeError, match="its logits differ by") if is_wrong else nullcontext():
        assert check.check_class_folder(tmp_path, model, tokenizer, truth, batch) == (got - truth).abs().max()


def layers(*entries, **changes):
    return {"mixer": list(entries), "num_hidden_layers": len(entries), **changes}


GDN = "gated_deltanet"
REFUSED = {
    "mixer = 'gated_deltanet' in all layers: it has both": layers(GDN, GDN),
    "mixer = 'attention' in all layers: it has both": layers(
        ATTENTION, ATTENTION, num_value_heads=None, head_v_dim=None, gated_norm_eps=None
    ),
    "mixer = 'deltanet' in layer 0: its layers are": layers("deltanet", ATTENTION),
    "mixer = 'gated_deltaproduct' in layer 1: its layers are": layers(GDN, "gated_deltaproduct", ATTENTION),
    "mixer = 'gla' in layer 2: its layers are": layers(GDN, ATTENTION, "gla"),
    "norm_position = 'post' in layer 0, gated_deltanet: it has 'pre' there": layers(
        {"mixer": GDN, "norm_position": "post"}, ATTENTION
    ),
    "norm_position = 'pre' in layer 1, attention: it has 'post' there": layers(
        GDN, {**ATTENTION, "norm_position": "pre"}
    ),
    "gated_norm_eps = 1e-06 in layer 0, gated_deltanet: it has 1e-05 there": layers(
        GDN, ATTENTION, gated_norm_eps=None
    ),
    "qk_norm = None in layer 1, attention: it has 'projection' there": layers(GDN, {**ATTENTION, "qk_norm": None}),
    "qk_norm = 'head' in layer 1, attention: it has 'projection' there": layers(GDN, {**ATTENTION, "qk_norm": "head"}),
    "sliding_window = 9 in layer 1, attention: it has None there": layers(GDN, {**ATTENTION, "sliding_window": 9}),
    "attention_gate = True in layer 1, attention: it has False there": layers(
        GDN, {**ATTENTION, "attention_gate": True}
    ),
    "num_heads = 2 and head_dim = 8 in layer 1, attention: their product is hidden_size, 32, there": layers(
        GDN, {**ATTENTION, "num_heads": 2}
    ),
    "allow_neg_eigval = True in layer 0 and False in layer 2: it has one": layers(
        GDN, ATTENTION, {"mixer": GDN, "allow_neg_eigval": False}
    ),
    "head_v_dim = 12 in layer 0 and 8 in layer 1: it has one": layers(GDN, {"mixer": GDN, "head_v_dim": 8}, ATTENTION),
    "num_value_heads = 4 in layer 0 and 2 in layer 1: it has one": layers(
        GDN, {"mixer": GDN, "num_value_heads": None}, ATTENTION
    ),
    "conv_size = 4 in layer 0 and 3 in layer 2: it has one": layers(GDN, ATTENTION, {"mixer": GDN, "conv_size": 3}),
    "num_kv_heads = 2 in layer 1 and 4 in layer 2: it has one": layers(
        GDN, ATTENTION, {**ATTENTION, "num_kv_heads": None}
    ),
    "rope_theta = 500 in layer 1 and None in layer 2: it has one": layers(
        GDN, ATTENTION, {**ATTENTION, "rope_theta": None}
    ),
    f"rope_scaling = {YARN!r} in layer 1 and None in layer 2: it has one": layers(
        GDN, ATTENTION, {**ATTENTION, "rope_scaling": None}
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_class_cannot_express_is_refused(said):
    config = config_of(**REFUSED[said])
    with pytest.raises(UserError) as error:
        to_olmo_config(config)
    assert str(error.value).startswith(f"the olmo_hybrid format cannot express {said}")
    assert str(error.value).endswith("; use --format hf")


def test_the_command_refuses_before_anything_is_written(tmp_path, sentencepiece_model, capsys):
    checkpoint = write_checkpoint(tmp_path / "run", random_model("gated"), sentencepiece_model)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out"), "--format", "olmo_hybrid"]) == 2
    assert "lrnn: error: the olmo_hybrid format cannot express mixer = 'gated_deltanet'" in capsys.readouterr().err
    assert cli.main(["export", "--from-fla", "x", str(tmp_path / "out"), "--format", "olmo_hybrid"]) == 2
    assert "--from-fla writes the hf format; leave out --format olmo_hybrid" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


# A stand-in for fla, whose kernels cannot run; argv: model_class.py, device.
CHOICE = """
import runpy, sys, types
def fail(*arguments, **options):
    raise RuntimeError("0 active drivers")
fla = sys.modules["fla"] = types.ModuleType("fla")
fla.chunk_gated_delta_rule = fla.fused_recurrent_gated_delta_rule = fail
runpy.run_path(sys.argv[1])["import_class"]("olmo_hybrid", sys.argv[2])
assert sys.modules["fla"] is fla and "mamba_ssm" not in sys.modules
import torch
from transformers import AutoModelForCausalLM, OlmoHybridConfig
sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
config = OlmoHybridConfig(**sizes, pad_token_id=None)
print(AutoModelForCausalLM.from_config(config)(torch.arange(4)[None]).logits.shape)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_class_that_is_imported_for_a_cpu_calls_no_kernels(device, tmp_path):
    command = [sys.executable, "-I", "-c", CHOICE, str(Path(model_class.__file__)), device]
    done = clean_process.run(command, cwd=tmp_path, env=environment(tmp_path))
    assert (done.returncode == 0) == (device == "cpu"), done.stderr[-2000:]
    assert "torch.Size([1, 4, 9])" in done.stdout or "0 active drivers" in done.stderr
