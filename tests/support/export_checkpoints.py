"""Models for tests of the export, and checkpoints of them."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.checkpoint.format import manifest_text

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
VARIANTS = {
    "gated": {},
    "gated-tied": {"tie_word_embeddings": True, "num_heads": 3},  # the sizes of the heads do not add up to hidden_size
    "deltanet": {"mixer": "deltanet", "allow_neg_eigval": False},
    "deltanet-tied": {"mixer": "deltanet", "tie_word_embeddings": True, "num_heads": 3, "conv_size": 3},
}
# Key and value heads of different numbers and sizes, of which fla's DeltaNet has sizes alone.
SIZES_OF_THEIR_OWN = {
    "gated-sizes": {"num_value_heads": 4, "head_dim": 12, "head_v_dim": 24},
    "deltanet-sizes": {"mixer": "deltanet", "head_dim": 12, "head_v_dim": 20},
}
# fla's DeltaProduct has sizes alone too.
PRODUCTS = {
    "gated_deltaproduct-sizes": {"mixer": "gated_deltaproduct", "num_householder": 3, "head_dim": 12, "head_v_dim": 24},
    "deltaproduct-negative": {"mixer": "deltaproduct", "num_householder": 2},
}
# Attention beside a recurrent mixer: grouped keys and a window of its own, in two kinds of layers.
HYBRIDS = {
    "gated-hybrid": {
        "mixer": ["gated_deltanet", {"mixer": "attention", "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}],
        "num_hidden_layers": 3,
    },
    "deltanet-hybrid": {
        "mixer": [
            {"mixer": "attention", "rope_theta": 500.0},
            "deltanet",
            {"mixer": "attention", "num_heads": 1, "head_dim": 32, "sliding_window": 5},
        ],
        "num_hidden_layers": 3,
    },
}
OTHER_MIXERS = {
    "gated_deltaproduct": {"mixer": "gated_deltaproduct", "num_householder": 3, "delta_rule_precision": "split"},
    "deltaproduct": {"mixer": "deltaproduct", "num_householder": 4, "num_value_heads": 4, "head_v_dim": 24},
}
ATTENTION = {
    "num_kv_heads": 1,
    "qk_norm": "projection",
    "sliding_window": 9,
    "attention_gate": True,
    "rope_theta": None,
}
OTHER_MIXERS["attention"] = {"mixer": "attention", **ATTENTION}
# Every other mixer that fla does not have, as it is.
OTHER_MIXERS |= {
    name: {"mixer": name} for name, mixer in MIXERS.items() if mixer.fla_model_type is None and name not in OTHER_MIXERS
}


def random_model(variant: str, **fields) -> LrnnForCausalLM:
    """Return a model in which every parameter affects the logits."""
    torch.manual_seed(0)
    fields = SIZE | (VARIANTS | SIZES_OF_THEIR_OWN | PRODUCTS | HYBRIDS | OTHER_MIXERS)[variant] | fields
    model = LrnnForCausalLM(LrnnConfig(vocab_size=640, max_position_embeddings=64, **fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=0.2)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
            if name.endswith("gate_bias"):
                p.normal_()
    return model.eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: Path):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    files = {n: {"size": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in names}
    (folder / "manifest.json").write_text(manifest_text(10, files))


def write_checkpoint(run: Path, model: LrnnForCausalLM, tokenizer: Path, step: int = 10) -> Path:
    """Write a checkpoint in the format of lrnn.pretrain.checkpoint.format, as two processes would leave it."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    parts: list[dict] = [{}, {}]
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        cut = flat.numel() // 3
        for kind, x in (("param", flat), ("exp_avg", 0 * flat), ("exp_avg_sq", 0 * flat)):
            for part, start, piece in ((0, 0, x[:cut]), (1, cut, x[cut:])):
                if piece.numel():
                    parts[part][f"{kind}:{name}:{start}"] = piece.clone()
    for i, part in enumerate(parts):
        save_file(part, folder / f"state-{i:05d}-of-00002.safetensors")
    data = {"corpora": ["c0ffee"], "weights": [1.0], "seq_len": 64, "seed": 7}
    (folder / "tokenizer").mkdir()
    shutil.copy(tokenizer, folder / "tokenizer" / "tokenizer.model")
    progress = {"step": step, "progress": {"step": step, "samples": 80, "tokens": 5000}, "data": data}
    (folder / "progress.json").write_text(json.dumps(progress))
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "run.yaml").write_text("run_dir: runs/a\nsteps: 10\n")
    write_manifest(folder)
    return folder
