"""Compare Muon under ZeRO with plain float64, one matrix at a time, and its state after skipped steps and elsewhere.

`test_training.py` and `test_bad_steps.py` resume and roll back with it.
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_group import run_group

from lrnn.pretrain.batching import Batching
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import build_model
from lrnn.records import read_metrics

STEPS, LR, RATIO, DECAY, CLIP, HEAD = 4, 0.01, 0.5, 0.5, 0.8, 16
MATRICES = {*(f"{x}_proj" for x in ("q", "k", "v", "g", "o", "gate", "up", "down"))}
DECAYED = {"lm_head", "b_proj", "a_proj"}  # of AdamW, without the embeddings


def newton_schulz(M):
    """Return the five iterations of Muon (arXiv 2502.16982, section 2.1) of a matrix, as they are written there."""
    X = M / M.norm()
    for _ in range(5):
        S = X @ X.T
        X = 3.4445 * X - 4.7750 * S @ X + 2.0315 * S @ S @ X
    return X


def blocks(name, M, per_head):
    """Return views of the matrices of a weight."""
    if not per_head or name not in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
        return [M]
    return M.split(HEAD, 1) if name == "o_proj" else M.split(HEAD)


def plain_training(raw, per_head, scale):
    """Train on whole batches in float64; return losses, gradient norms, z-losses, the model and its first moments."""
    config = parse_config(raw, "test")
    data = open_data(config, load_model_of(config), Ranks(0, 1, torch.device("cpu"), None))
    model = build_model(load_model_of(config), config.seed, activation_checkpointing=False).double()
    m, v = ({n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2))
    found, norms, zs = [], [], []
    with Loader(data.source, Batching(config.global_batch_size, config.global_batch_size)) as loader:
        for step in range(1, STEPS + 1):
            (batch,) = next(loader)
            logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            z = config.optim.z_loss * logits.logsumexp(-1)[batch.labels != -100].square().mean()
            model.zero_grad()
            (loss + z).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            found.append(loss.item())
            zs.append(z.item())
            norms.append(norm.item())
            lr = LR * min(1, step / 2)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    grad, last = p.grad * min(1, CLIP / norm), name.split(".")[-2]
                    if last in MATRICES:
                        m[name] = 0.95 * m[name] + 0.05 * grad
                        ahead = 0.05 * grad + 0.95 * m[name]
                        p *= 1 - RATIO * lr * DECAY
                        for W, M in zip(blocks(last, p, per_head), blocks(last, ahead, per_head), strict=True):
                            W -= RATIO * lr * scale(*M.shape) * newton_schulz(M)
                        continue
                    m[name] = 0.9 * m[name] + 0.1 * grad
                    v[name] = 0.95 * v[name] + 0.05 * grad**2
                    if last in DECAYED:
                        p *= 1 - lr * DECAY
                    p -= lr * (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
    return found, norms, zs, model, m


SCALES = {
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "original": lambda rows, columns: max(1, rows / columns) ** 0.5,
}


@pytest.mark.parametrize(
    ("adjust", "per_head", "z_loss", "stages"),
    [("match_rms_adamw", False, 0.0, (1, 3)), ("original", True, 0.01, (2,))],
)
def test_steps_are_those_of_plain_float64(base, tmp_path, adjust, per_head, z_loss, stages):
    """Two processes, so that ZeRO cuts some of the matrices (1, 2) or all of them (3)."""
    muon = {"lr": RATIO * LR, "adjust_lr_fn": adjust, "per_head": per_head}
    optim = {"name": "muon", "lr": LR, "weight_decay": DECAY, "clip": CLIP, "decay_embeddings": False}
    optim |= {"muon": muon, "z_loss": z_loss}
    changes = {"steps": STEPS, "optim": optim, "schedule": {"name": "wsd", "warmup_steps": 2}}
    runs = [base(f"run-{stage}", stage, **changes) for stage in stages]
    truth, norms, zs, model, kept = plain_training(runs[0], per_head, SCALES[adjust])
    assert max(norms) > 1.2 * CLIP and truth[-1] < truth[0]
    assert run_group(tmp_path, [{"config": raw} for raw in runs]) == [0] * len(runs)
    for raw in runs:
        records = [r for r in read_metrics(Path(raw["run_dir"])) if "event" not in r]
        assert [r["loss"] for r in records] == pytest.approx(truth, rel=1e-5)
        assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
        assert [r.get("z_loss") for r in records] == (pytest.approx(zs, rel=1e-5) if z_loss else [None] * STEPS)
        state = SavedState(checkpoint.find_newest(Path(raw["run_dir"])))
        for name, p in model.named_parameters():
            found = state.read("param", name, 0, p.numel()).view_as(p)
            assert (found - p).norm() < 1e-4 * p.norm(), name
            kind = "momentum_buffer" if name.split(".")[-2] in MATRICES else "exp_avg"
            found = state.read(kind, name, 0, p.numel()).view_as(p)
            assert (found - kept[name]).norm() < 1e-3 * kept[name].norm(), name


def state_of(folder):
    """Return everything that a checkpoint keeps of each parameter, by kind and name."""
    state = SavedState(folder)
    return {key: state.read(*key, 0, max(end for _, end, *_ in pieces)) for key, pieces in state._index.items()}


def test_a_skipped_step_and_another_number_of_processes(base, tmp_path):
    """A step with a gradient that is not finite leaves everything as it was; one process continues what two began."""

    def config(name, stage=2):
        optim = {"name": "muon", "lr": LR, "weight_decay": DECAY}
        changes = {"optim": optim, "schedule": {"name": "wsd", "warmup_steps": 1}}
        return base(name, stage, steps=STEPS, checkpoint={"every": 1, "keep_last": 9}, **changes)

    specs = [{"config": config("straight")}, {"config": config("poisoned"), "poison_at": STEPS}]
    assert run_group(tmp_path, specs) == [0, 0]
    two, before, last = (f"step-{step:08d}" for step in (2, STEPS - 1, STEPS))
    straight = tmp_path / "straight/checkpoints"
    found, truth = state_of(tmp_path / "poisoned/checkpoints" / last), state_of(straight / before)
    assert found.keys() == truth.keys() and all(found[key].equal(x) for key, x in truth.items())

    shutil.copytree(straight / two, tmp_path / "moved/checkpoints" / two)
    assert run_group(tmp_path, [{"config": config("moved", stage=3)}], processes=1) == [0]
    found, truth = state_of(tmp_path / "moved/checkpoints" / last), state_of(straight / last)
    assert found.keys() == truth.keys()
    for key, x in truth.items():
        assert (found[key] - x).norm() <= 1e-4 * x.norm(), key
