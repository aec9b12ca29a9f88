"""Compare the training step with plain PyTorch: one process, one batch, a loop that can be read in a minute."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_group import run_group

from lrnn.cli import main
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import build_model
from lrnn.pretrain.zero import zero_settings
from lrnn.records import read_metrics

STEPS, LR, DECAY, CLIP = 5, 0.01, 0.5, 0.8
DECAYED = {"embeddings", "lm_head", *(f"{x}_proj" for x in ("q", "k", "v", "g", "b", "a", "o", "gate", "up", "down"))}


@pytest.fixture
def short_documents(corpora, tmp_path):
    """Return a corpus of long and very short documents: the last token of a document has no label."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    texts = ["x"] * 600 + [text[i : i + 500] for i in range(0, 10_000, 500)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    source = ["json", "--data-files", str(tmp_path / "rows.jsonl"), "--tokenizer", str(corpora / "a" / "tokenizer")]
    assert main(["corpus", *source, "--processes", "1", "--out", str(tmp_path / "short")]) == 0
    return tmp_path / "short"


def plain_training(raw):
    """Train on whole batches with AdamW (arXiv 1711.05101, algorithm 2); return losses, norms, model and labels."""
    config = parse_config(raw, "test")
    data = open_data(config, load_model_of(config), Ranks(0, 1, torch.device("cpu"), None))
    model = build_model(load_model_of(config), config.seed, activation_checkpointing=False)
    m, v = ({n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2))
    losses, norms, labels = [], [], []
    with Loader(data.source, Batching(config.global_batch_size, config.global_batch_size)) as loader:
        for step in range(1, STEPS + 1):
            (batch,) = next(loader)
            logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())  # the mean over all labels
            model.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            losses.append(loss.item())
            norms.append(norm.item())
            labels.append((batch.labels != -100).sum(-1).tolist())
            lr = LR * min(1, step / 2)  # two steps of warm-up, then constant
            with torch.no_grad():
                for name, p in model.named_parameters():
                    grad = p.grad * min(1, CLIP / norm)
                    m[name] = 0.9 * m[name] + 0.1 * grad
                    v[name] = 0.95 * v[name] + 0.05 * grad**2
                    if name.split(".")[-2] in DECAYED:
                        p *= 1 - lr * DECAY
                    p -= lr * (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
    return losses, norms, model, labels


def test_steps_are_those_of_plain_pytorch(base, short_documents, tmp_path):
    """Two processes with two micro-batches each in float32: sharding, accumulation, recomputation change nothing."""
    runs = []
    for stage, recompute in ((2, False), (3, True)):
        engine = zero_settings(stage)
        engine["torch_autocast"]["enabled"] = False
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(engine))
        changes = {
            "zero": None,
            "precision": None,
            "deepspeed": str(tmp_path / f"zero{stage}.json"),
            "steps": STEPS,
            "data": {"seq_len": 64, "reset_at_document_boundaries": True, "corpora": [{"path": str(short_documents)}]},
            "log": {"every": 1, "tensorboard": False},
            "optim": {"lr": LR, "weight_decay": DECAY, "clip": CLIP},
            "schedule": {"name": "wsd", "warmup_steps": 2},
            "activation_checkpointing": recompute,
        }
        runs.append(base(f"run-{stage}", **changes))
    losses, norms, model, labels = plain_training(runs[0])
    shares = [sum(counts[i : i + 2]) for counts in labels for i in range(0, 8, 2)]
    assert min(shares) < 0.8 * max(shares), "a mean of the micro-batches' means would be the same"
    assert max(norms) > 1.5 * CLIP and losses[-1] < losses[0] - 0.3

    assert run_group(tmp_path, [{"config": raw} for raw in runs]) == [0] * len(runs)
    for raw in runs:
        records = [r for r in read_metrics(Path(raw["run_dir"])) if "event" not in r]
        assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-5)
        assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
        assert records[-1]["tokens"] == sum(map(sum, labels))
        state = SavedState(checkpoint.find_newest(Path(raw["run_dir"])))
        for name, p in model.named_parameters():
            found = state.read("param", name, 0, p.numel()).view_as(p)
            assert (found - p).norm() < 1e-3 * p.norm(), name
