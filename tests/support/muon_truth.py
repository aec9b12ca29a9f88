"""Training with Muon as it is written in papers, in float64, one matrix at a time and in one process."""

import torch
import torch.nn.functional as F

from lrnn.pretrain.batching import Batching
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import build_model

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
