"""Test exported folders: their use in a process without lrnn, their content, and fla both ways."""

import json
import os
import shutil
import sys
from pathlib import Path

import clean_process
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from export_checkpoints import HYBRIDS, PRODUCTS, SIZES_OF_THEIR_OWN, VARIANTS, random_model, sha256, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers.cli.serving.model_manager import ModelManager

import lrnn
from lrnn import LrnnConfig, LrnnForCausalLM, cli
from lrnn.errors import UserError
from lrnn.eval.export import check as export_check
from lrnn.eval.export import write
from lrnn.eval.export.check_fla import _attention_without_flash_attn
from lrnn.formats.fla import to_fla_config
from lrnn.formats.folder import ModelFolder
from lrnn.model.code_files import AUTO_MAP
from lrnn.tokenizer import load_tokenizer

EXPORTED = {"gated-tied": "bfloat16", "mlstm": "bfloat16"}
# The exporter starts no process without lrnn to read these back; `without_lrnn` reads all folders back in one.
NOT_RELOADED = {
    "deltanet": "float32",
    "gated_deltaproduct": "float32",
    "attention": "float32",
    "deltaproduct": "float32",
    "gla": "bfloat16",
    "mamba": "bfloat16",
    "mamba2": "float32",
    "rwkv7": "float32",
    "slstm": "bfloat16",
    "gated-hybrid": "float32",
    "deltanet-hybrid": "bfloat16",
}
DTYPES = EXPORTED | NOT_RELOADED


def load_with_lrnn(folder: Path, batch: torch.Tensor, texts: list[str]) -> tuple[dict[str, torch.Tensor], list]:
    """Return what the exporter reads back without lrnn, but from this process."""
    return export_check._load_with_lrnn(folder, batch), load_tokenizer(folder).encode_batch(texts)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sentencepiece_model):
    """Return a folder of exported models: tied gated DeltaNet in bfloat16, DeltaNet in float32, all other mixers."""
    root = tmp_path_factory.mktemp("exported")
    for variant, dtype in DTYPES.items():
        write_checkpoint(root / "runs" / variant, random_model(variant), sentencepiece_model)
        options = ["--dtype", dtype, "--license", "apache-2.0"]
        with pytest.MonkeyPatch.context() as patch:
            if variant in NOT_RELOADED:
                patch.setattr(export_check, "_load_without_lrnn", load_with_lrnn)
            assert cli.main(["export", str(root / "runs" / variant), str(root / variant), *options]) == 0
    return root


# Uses folders as a user does, in float32 arithmetic. Prints one JSON object per folder.
USE = """
import json, sys
if sys.argv[1] == "blocked":
    sys.modules["lrnn"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["def f(x):\\n    return", "import os", "class Parser:\\n    def __init__(self, prog=None, usage=None):\\n"]
for folder in sys.argv[2:]:
    r = {}
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    r["module"] = type(model).__module__
    r["dtypes"] = {n: str(p.dtype).removeprefix("torch.") for n, p in model.named_parameters()}
    r["tied"] = model.lm_head.weight is model.model.embeddings.weight
    r["base"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
    model = model.float().eval()
    with torch.no_grad():
        e = tok(PROMPTS[2], return_tensors="pt")
        r["ids"], r["logits"] = e.input_ids.tolist(), model(**e).logits[0, -1].tolist()
    free = dict(eos_token_id=-1, pad_token_id=tok.pad_token_id, max_new_tokens=7)
    singles = []
    r["cached"] = True
    for prompt in PROMPTS:
        e = tok(prompt, return_tensors="pt")
        a = model.generate(**e, do_sample=False, **free)
        r["cached"] &= torch.equal(a, model.generate(**e, do_sample=False, use_cache=False, **free))
        singles.append(a[0, e.input_ids.shape[1]:].tolist())
    r["distinct tokens"] = len({t for s in singles for t in s})
    e = tok(PROMPTS, return_tensors="pt", padding=True)
    r["left padded"] = model.generate(**e, do_sample=False, **free)[:, e.input_ids.shape[1]:].tolist() == singles
    beams = model.generate(**e, num_beams=3, do_sample=False, **free)
    r["beam"] = list(beams.shape)
    r["one beam per prompt"] = [
        model.generate(**tok(p, return_tensors="pt"), num_beams=3, do_sample=False, **free)[0, -7:].tolist()
        == beams[i, -7:].tolist() for i, p in enumerate(PROMPTS)
    ]
    torch.manual_seed(0)
    r["sample"] = list(model.generate(**e, do_sample=True, num_return_sequences=2, **free).shape)
    try:
        model.generate(**tok("a", return_tensors="pt"), assistant_model=model, do_sample=False, **free)
        r["assisted"] = "ran"
    except ValueError as error:
        r["assisted"] = str(error)
    with torch.no_grad():
        rows = [torch.tensor([tok(p).input_ids]) for p in PROMPTS]
        alone = [model(x).logits[0] for x in rows]
        T = e.input_ids.shape[1]
        right = model(torch.cat([torch.nn.functional.pad(x, (0, T - x.shape[1]), value=2) for x in rows])).logits
        r["right padded"] = max((right[i, : len(a)] - a).abs().max().item() for i, a in enumerate(alone))
        left = model(**e).logits
        r["left padded logits"] = max((left[i, -len(a):] - a).abs().max().item() for i, a in enumerate(alone))
        unmasked = model(input_ids=e.input_ids).logits
        r["unmasked logits"] = max((unmasked[i, -len(a):] - a).abs().max().item() for i, a in enumerate(alone))
        x = rows[2]
        first = model(x[:, :5], use_cache=True)
        rest = model(x[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        r["continued"] = (torch.cat([first.logits, rest.logits], 1) - alone[2]).abs().max().item()
    print("RESULT", json.dumps(r))
"""


def use(tmp_path: Path, mode: str, folders: list[Path]) -> list[dict]:
    """Run USE outside the repository, and return its results."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", USE, mode, *map(str, folders)]
    done = clean_process.run(command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def without_lrnn(exported, tmp_path_factory):
    """Return the results of a process that cannot import lrnn."""
    results = use(tmp_path_factory.mktemp("without_lrnn"), "blocked", [exported / v for v in DTYPES])
    return dict(zip(DTYPES, results, strict=True))


@pytest.mark.parametrize("variant", DTYPES)
class TestWithoutLrnn:
    def test_remote_code_runs(self, without_lrnn, variant):
        assert without_lrnn[variant]["module"].startswith("transformers_modules.")
        assert without_lrnn[variant]["base"] == "LrnnModel"

    def test_dtypes_and_tying(self, without_lrnn, variant):
        for name, dtype in without_lrnn[variant]["dtypes"].items():
            gate = name.endswith(("A_log", "dt_bias", "gate_bias"))
            assert dtype == ("float32" if gate else DTYPES[variant]), name
        assert without_lrnn[variant]["tied"] == (variant == "gated-tied")

    def test_generation(self, without_lrnn, variant):
        found = without_lrnn[variant]
        assert found["distinct tokens"] > 5  # otherwise equality says little
        assert found["cached"], "greedy generation with and without the cache differ"
        assert found["left padded"], "a left-padded batch generates other tokens than each prompt alone"
        assert found["beam"][0] == 3 and all(found["one beam per prompt"])
        assert found["sample"][0] == 6
        assert "assisted generation" in found["assisted"]

    def test_logits(self, without_lrnn, variant):
        found = without_lrnn[variant]
        model = random_model(variant)
        write.round_weights(model, getattr(torch, DTYPES[variant]))
        with torch.no_grad():
            ours = model.float()(torch.tensor(found["ids"])).logits[0, -1]
        assert (torch.tensor(found["logits"]) - ours).abs().max() < 1e-4
        for name in ("right padded", "left padded logits", "continued"):
            assert found[name] < 1e-4, name
        assert found["unmasked logits"] > 1e-2  # so it is the mask that keeps padding out


def test_a_process_with_lrnn_installed_that_has_not_imported_it(exported, tmp_path):
    """`lm_eval --model hf` in our own environment: remote code that imports lrnn's kernels."""
    (found,) = use(tmp_path, "free", [exported / "gated-tied"])
    assert found["cached"] and found["left padded"] and found["continued"] < 1e-4


def test_the_model_manager_of_transformers_serve_loads_a_folder(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    manager = ModelManager(device="cpu", trust_remote_code=True, model_timeout=-1)
    name = manager.process_model_name(str(exported / "gated-tied"))
    model, processor = manager.load_model_and_processor(name)
    manager.shutdown()
    assert type(model).__name__ == "LrnnForCausalLM" and type(model).__module__.startswith("transformers_modules")
    assert manager.get_model_modality(model, processor).value == "LLM"


def test_contents_of_the_folder(exported, sentencepiece_model):
    folder = exported / "gated-tied"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "lrnn" and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["auto_map"] == AUTO_MAP
    training = config["lrnn_training"]
    assert (training["step"], training["tokens"], training["seed"]) == (10, 5000, 7)
    assert training["tokenizer_sha256"] == sha256(sentencepiece_model) == sha256(folder / "tokenizer.model")
    run = exported / "runs/gated-tied/checkpoints/step-00000010/run.yaml"
    assert training["run_config_sha256"] == sha256(run)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    assert "[-1, 1]" in card and "5,000 tokens" in card and "c0ffee" in card and sha256(sentencepiece_model) in card
    assert "[0, 1]" in (exported / "deltanet" / "README.md").read_text()
    product = (exported / "gated_deltaproduct" / "README.md").read_text()
    assert "2502.10297" in product and "factors per token | 3 |" in product
    assert "forget gate 2 f - 1" in (exported / "mlstm" / "README.md").read_text()
    attention = (exported / "attention" / "README.md").read_text()
    assert "eigenvalues" not in attention and "no attention" not in attention
    hybrid = (exported / "gated-hybrid" / "README.md").read_text()
    assert yaml.safe_load(hybrid.split("---")[1])["tags"][:3] == ["hybrid", "gated_deltanet", "attention"]
    assert "the cache of 1 of its 3 layers grows with the text" in hybrid and "| 1,024 numbers per sequence |" in hybrid
    first, second = (line for line in hybrid.splitlines() if line.startswith("| layer") and ";" in line)
    assert first.startswith("| layers 0, 2 | Gated DeltaNet (arXiv:2412.06464); eigenvalues") and "[-1, 1]" in first
    assert second.startswith("| layer 1 | Softmax attention") and "heads, head dimension: 4, 8" in second
    repository = Path(lrnn.__file__).parent
    for name in ("modeling_lrnn.py", "configuration_lrnn.py"):  # followed by the names of the other files
        assert (folder / name).read_text().startswith((repository / "model" / name).read_text())
    assert sha256(folder / "layers.py") == sha256(repository / "model/layers.py")
    for package in (lrnn, transformers, torch):
        assert f"{package.__name__} {package.__version__}" in card


def test_files_have_the_permissions_that_the_umask_gives(exported, tmp_path):
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {p.name for p in (exported / "deltanet").iterdir() if p.stat().st_mode != usual} == set()


def test_weights_are_those_of_the_checkpoint(exported):
    state = load_file(exported / "deltanet" / "model.safetensors")
    for name, p in random_model("deltanet").named_parameters():
        assert torch.equal(state[name], p), name
    tied = load_file(exported / "gated-tied" / "model.safetensors")
    assert "lm_head.weight" not in tied
    for name, p in random_model("gated-tied").named_parameters():
        gate = name.endswith(("A_log", "dt_bias"))
        assert torch.equal(tied[name], p if gate else p.bfloat16()), name
    mlstm = load_file(exported / "mlstm" / "model.safetensors")
    name = "model.layers.1.attn.gate_bias"
    assert torch.equal(mlstm[name], random_model("mlstm").get_parameter(name))


@pytest.mark.parametrize("variant", VARIANTS | SIZES_OF_THEIR_OWN | PRODUCTS | HYBRIDS)
@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_names_and_shapes_equal_those_of_fla(variant):
    from fla import models

    ours = random_model(variant)
    config = to_fla_config(ours.config)
    with torch.device("meta"), _attention_without_flash_attn():
        architecture = config["architectures"][0]
        its_config = getattr(models, architecture.replace("ForCausalLM", "Config"))
        theirs = getattr(models, architecture)(its_config(**config))
    shapes = {name: tuple(p.shape) for name, p in theirs.state_dict().items() if "rotary" not in name}
    assert shapes == {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert theirs.config.allow_neg_eigval == ours.config.allow_neg_eigval
    mixer = theirs.model.layers[0 if variant == "gated-hybrid" else 1].attn
    assert mixer.allow_neg_eigval == ours.config.allow_neg_eigval
    assert (mixer.head_k_dim, mixer.head_v_dim) == (
        ours.config.head_dim,
        ours.config.head_v_dim or ours.config.head_dim,
    )


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_logits_of_value_heads_equal_those_of_fla(allow_neg_eigval, monkeypatch):
    """fla's own layer computes with naive forms of its kernels, which need a GPU."""
    from fla.layers import gated_deltanet
    from fla.models import GatedDeltaNetConfig
    from fla.modules import FusedRMSNormGated, ShortConvolution
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    def rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **_):
        q, k = (F.normalize(x, dim=-1).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        g = -A_log.exp() * F.softplus(g + dt_bias)
        return naive_recurrent_gated_delta_rule(q, k, v, (1 + allow_neg_eigval) * beta.sigmoid(), g)

    def convolution(self, x, **_):
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return F.silu(F.conv1d(padded, self.weight, groups=x.shape[-1])).transpose(1, 2), None

    def norm(self, x, g):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(g)

    monkeypatch.setattr(gated_deltanet, "chunk_gated_delta_rule", rule)
    monkeypatch.setattr(gated_deltanet.GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)
    monkeypatch.setattr(ShortConvolution, "forward", convolution)
    monkeypatch.setattr(FusedRMSNormGated, "forward", norm)
    model = random_model("gated-sizes", allow_neg_eigval=allow_neg_eigval)
    ours = model.model.layers[0].attn
    config = GatedDeltaNetConfig(**to_fla_config(model.config))
    fields = ("expand_v", "head_dim", "num_heads", "num_v_heads", "allow_neg_eigval", "conv_size", "norm_eps")
    theirs = gated_deltanet.GatedDeltaNet(32, layer_idx=0, **{name: getattr(config, name) for name in fields})
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for layer, arguments in ((ours, (None, None, None, None)), (theirs, ())):
        y = layer(x.requires_grad_(), *arguments)
        y = y if isinstance(y, torch.Tensor) else y[0]
        found.append([y, *torch.autograd.grad(y, [x, *dict(sorted(layer.named_parameters())).values()], dy)])
    for mine, true in zip(*found, strict=True):
        assert (mine - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize(("variant", "layer"), [("gated-hybrid", 1), ("deltanet-hybrid", 0), ("deltanet-hybrid", 2)])
def test_outputs_of_attention_equal_those_of_fla(variant, layer, monkeypatch):
    """fla's own layer computes with forms of flash-attn and of its rotary kernel that need no GPU."""
    from fla.layers import attn
    from fla.modules.rotary import ops as rotary

    def rotate(x, cos, sin, interleaved, *_, **__):
        return rotary.rotary_embedding_ref(x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved)

    def flash_attn(q, k, v, causal, window_size):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        ahead = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        sees = (ahead >= 0) & ((ahead <= window_size[0]) if window_size[0] >= 0 else True)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees).transpose(1, 2)

    monkeypatch.setattr(rotary, "rotary_embedding", rotate)
    monkeypatch.setattr(attn, "flash_attn_func", flash_attn)
    model = random_model(variant)
    specs = to_fla_config(model.config)["attn"]
    (spec,) = (spec for spec in ([specs] if isinstance(specs, dict) else specs) if layer in spec["layers"])
    theirs = attn.Attention(32, **{name: value for name, value in spec.items() if name != "layers"}, layer_idx=layer)
    theirs.load_state_dict(model.model.layers[layer].attn.state_dict(), strict=False)
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    ours = model.model.layers[layer].attn(x, None, None, None, None)
    assert (ours - theirs(x)[0]).abs().max() < 1e-5 * ours.abs().max()


def test_sizes_of_values_are_those_that_fla_computes():
    """fla rounds head_dim times expand_v down, and 7 * (61 / 7) is below 61."""
    for K, V in ((7, 61), (96, 192), (128, 128), (12, 20)):
        expand = to_fla_config(LrnnConfig(head_dim=K, head_v_dim=V))["expand_v"]
        assert int(K * expand) == V and expand == pytest.approx(V / K)


@pytest.mark.parametrize("variant", VARIANTS | SIZES_OF_THEIR_OWN | PRODUCTS | HYBRIDS)
def test_round_trip_through_fla_is_bitwise(variant, tmp_path, sentencepiece_model):
    model = random_model(variant)
    run = tmp_path / "run"
    write_checkpoint(run, model, sentencepiece_model)
    assert cli.main(["export", str(run), str(tmp_path / "fla"), "--format", "fla"]) == 0
    folder = ModelFolder(tmp_path / "fla")
    before, after = model.config.to_dict(), folder.config.to_dict()
    assert folder.training is not None and folder.training["tokens"] == 5000
    for field in set(before) | set(after):
        if field not in ("architectures", "dtype"):
            assert after[field] == before[field], field
    assert set(folder.tensors.entries) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(folder.read(name), p), name


def test_a_model_made_by_fla_is_read(tmp_path, sentencepiece_model):
    """fla itself writes the folder, and --from-fla converts it to an hf folder."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_heads=2, num_v_heads=4, head_dim=16, expand_v=1.5
    )
    torch.manual_seed(0)
    theirs = GatedDeltaNetForCausalLM(config)
    theirs.save_pretrained(tmp_path / "fla")
    shutil.copy(sentencepiece_model, tmp_path / "fla" / "tokenizer.model")
    assert cli.main(["export", "--from-fla", str(tmp_path / "fla"), str(tmp_path / "out")]) == 0
    ours = LrnnForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.intermediate_size == theirs.model.layers[0].mlp.intermediate_size
    assert not ours.config.allow_neg_eigval and ours.config.norm_eps == config.norm_eps
    for name, p in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), p), name


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("gated_deltanet", "num_v_heads", 3),
        ("gated_deltanet", "expand_v", 1.3),
        ("gated_deltanet", "use_gate", False),
        ("gated_deltanet", "use_short_conv", False),
        ("gated_deltanet", "attn", {"layers": [0], "num_heads": 2, "qkv_bias": True}),
        ("gated_deltanet", "attn", [{"layers": [0], "num_heads": 2}, {"layers": [1], "num_heads": 3}]),
        ("gated_deltanet", "output_gate_activation", "sigmoid"),
        ("gated_deltanet", "hidden_act", "powlu"),
        ("delta_net", "qk_norm", "sum"),
        ("delta_net", "qk_activation", "relu"),
        ("delta_net", "use_gate", True),
        ("delta_net", "use_beta", False),
        ("delta_net", "expand_v", 1.3),
        ("gated_deltaproduct", "use_output_gate", False),
        ("gated_deltaproduct", "use_forget_gate", False),
        ("gated_deltaproduct", "use_short_conv", False),
        ("gated_deltaproduct", "num_householder", 5),
        ("gated_deltanet", "num_heads", 0),
        ("gated_deltanet", "head_dim", "x"),
        ("gated_deltanet", "num_hidden_layers", 0),
        ("gated_deltanet", "expand_v", None),
        ("delta_net", "num_heads", 0),
        ("delta_net", "expand_k", "1"),
        ("rwkv7", "model_type", "rwkv7"),
    ],
)
def test_settings_of_fla_that_lrnn_lacks(kind, field, value, tmp_path):
    config = {"model_type": kind, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 640}
    if kind != "delta_net":
        config |= {"head_dim": 16, "expand_v": 1.0, "use_forget_gate": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=field):
        ModelFolder(tmp_path)


def test_fla_weights_that_do_not_fit(tmp_path, sentencepiece_model):
    model = random_model("gated")
    (tmp_path / "config.json").write_text(json.dumps(to_fla_config(model.config)))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        ModelFolder(tmp_path)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file({**state, "model.layers.1.attn.D": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.attn\.D, which the model"):
        ModelFolder(tmp_path)
    save_file({**state, "model.layers.1.attn.A_log": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.attn\.A_log has shape \[3\]"):
        ModelFolder(tmp_path)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch, sentencepiece_model):
    save = write.save_torch_state_dict
    monkeypatch.setattr(
        write, "save_torch_state_dict", lambda *a, max_shard_size, **k: save(*a, max_shard_size="100KB", **k)
    )
    model = random_model("gated")
    write_checkpoint(tmp_path / "run", model, sentencepiece_model)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "fla"), "--format", "fla"]) == 0
    assert (tmp_path / "fla" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "fla").glob("model-*.safetensors"))) > 1
    folder = ModelFolder(tmp_path / "fla")
    assert all(torch.equal(folder.read(name), p) for name, p in model.named_parameters())
    next((tmp_path / "fla").glob("model-00001*")).unlink()
    with pytest.raises(UserError, match="model-00001"):
        ModelFolder(tmp_path / "fla")
