"""Test which weights are Muon's, how they are shared among ranks, and the update of many matrices at a time."""

import random

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.config import OptimConfig
from lrnn.pretrain.muon import optimizer as muon_optimizer
from lrnn.pretrain.muon.matrices import Matrices, matrices_of
from lrnn.pretrain.muon.sharing import shared_weights
from lrnn.pretrain.optim import build_optimizer, parameter_groups

H, D, HIDDEN, INNER = 2, 8, 32, 40
SIZES = {"vocab_size": 50, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_heads": H, "head_dim": D}
SIZES |= {"intermediate_size": INNER}
OPTIONS = {"num_householder": 3, "num_kv_heads": 1, "state_size": 4, "attention_gate": True}
QKV = {"q_proj": [H * D], "k_proj": [H * D], "v_proj": [H * D]}
GATED = QKV | {"g_proj": [H * D]}
# Rows of each matrix of the linear layers that Muon updates, by mixer.
ROWS = {
    "deltanet": QKV,
    "gated_deltanet": GATED,
    "deltaproduct": QKV | {"k_proj": [H * D] * 3, "v_proj": [H * D] * 3},
    "gated_deltaproduct": GATED | {"k_proj": [H * D] * 3, "v_proj": [H * D] * 3},
    "attention": GATED | {"k_proj": [D], "v_proj": [D]},
    "gla": GATED,
    "mamba": {"v_proj": [H * D], "g_proj": [H * D], "x_proj": [2, 4, 4]},
    "mamba2": {"q_proj": [D], "k_proj": [D], "v_proj": [H * D], "g_proj": [H * D]},
    "mlstm": GATED,
    "rwkv7": {"r_proj": [H * D], "k_proj": [H * D], "v_proj": [H * D]},
    "slstm": {"zifo_proj": [D] * 4 * H},
}
MLP = {"gate_proj": [INNER], "up_proj": [INNER], "down_proj": [HIDDEN]}


def model_of(mixer, **fields):
    options = {name: value for name, value in OPTIONS.items() if name in MIXERS[mixer].options}
    with torch.device("meta"):
        return LrnnForCausalLM(LrnnConfig(**SIZES | options | fields, mixer=mixer))


@pytest.mark.parametrize("mixer", MIXERS)
def test_matrices_of_every_mixer(mixer):
    model = model_of(mixer)
    layers = {id(p): name.split(".")[-2] for name, p in model.named_parameters() if name.endswith(".weight")}
    found = {layers[id(p)]: matrices for p, matrices in matrices_of(model, per_head=False).items()}
    assert {name: list(m.rows) for name, m in found.items()} == ROWS[mixer] | {"o_proj": [HIDDEN]} | MLP
    for p, matrices in matrices_of(model, per_head=True).items():
        assert (sum(matrices.rows), sum(matrices.columns)) == p.shape
    per_head = {layers[id(p)]: matrices for p, matrices in matrices_of(model, per_head=True).items()}
    if mixer == "gated_deltaproduct":
        assert per_head["q_proj"].rows == (D,) * H and per_head["k_proj"].rows == (D,) * 3 * H
        assert per_head["o_proj"] == Matrices((HIDDEN,), (D,) * H) and per_head["up_proj"].rows == (INNER,)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_with_weight_decay(tied):
    """Without decay of embeddings, they leave the decayed parameters, and a tied head with them."""
    model = model_of("gated_deltanet", tie_word_embeddings=tied)
    names = {id(p): name for name, p in model.named_parameters()}

    def decayed(**options):
        return {names[id(p)] for p in parameter_groups(model, 0.1, **options)[0]["params"]}

    ends = {"model.embeddings.weight"} if tied else {"model.embeddings.weight", "lm_head.weight"}
    assert ends <= decayed() and decayed() - decayed(decay_embeddings=False) == {"model.embeddings.weight"}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, name="muon", decay_embeddings=False), torch.device("cpu"))
    kinds = [(group.get("matrices", False), group["weight_decay"] > 0) for group in optimizer.param_groups]
    assert kinds == [(True, True), (False, True), (False, False)]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_weight_has_one_worker(ranks):
    """Weights of random sizes are laid end to end and cut, as ZeRO-1 and 2 do. Who has most of a weight works on it."""
    rng = random.Random(ranks)
    matrices = [Matrices((rng.randint(1, 9),), (rng.randint(1, 9),)) for _ in range(20)]
    sizes = [m.rows[0] * m.columns[0] for m in matrices]
    part = -(-sum(sizes) // ranks)
    pieces, offset = [[] for _ in range(ranks)], 0
    for number, size in enumerate(sizes):
        for rank in range(ranks):
            low, high = max(offset, rank * part), min(offset + size, (rank + 1) * part)
            if low < high:
                pieces[rank].append((number, low - offset, high - low, low - rank * part))
        offset += size
    weights = shared_weights(pieces, matrices)
    assert [w.matrices for w in weights] == matrices
    for weight, size in zip(weights, sizes, strict=True):
        held = {rank: numel for rank, (_, numel, _) in weight.spans.items()}
        assert sum(held.values()) == size and weight.worker in held
        assert held[weight.worker] == max(held.values()) or max(held.values()) * 2 <= size


def test_work_is_spread_where_all_weights_are_cut():
    """Under ZeRO-3 each rank holds as much of every weight."""
    matrices = [Matrices((8,), (8,))] * 12
    pieces = [[(number, 16 * rank, 16, 0) for number in range(12)] for rank in range(4)]
    workers = [weight.worker for weight in shared_weights(pieces, matrices)]
    assert sorted(workers) == sorted([*range(4)] * 3)


def test_matrices_are_orthogonalized_in_batches(monkeypatch):
    """In batches of two, the last one of one, each matrix changes as `torch.optim.Muon` changes it in bfloat16."""
    monkeypatch.setattr(muon_optimizer, "BATCH", 2 * 24 * 16)
    torch.manual_seed(0)
    for adjust in muon_optimizer.ADJUST_LR:
        parameters = [torch.nn.Parameter(torch.randn(24, 16)) for _ in range(3)]
        gradients = [torch.randn(24, 16) for _ in parameters]
        changed = [p.detach().clone() for p in parameters]
        options = {"momentum": 0.0, "nesterov": False, "adjust_lr_fn": adjust}
        ours = muon_optimizer.MuonAdamW([torch.nn.Parameter(torch.zeros(1))], {}, dtype=torch.bfloat16, **options)
        ours._add_orthogonalized(list(zip(gradients, changed, strict=True)), -0.1 * ours._adjust(24, 16))
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        torch.optim.Muon(parameters, lr=0.1, weight_decay=0.0, **options).step()
        for p, x in zip(parameters, changed, strict=True):
            torch.testing.assert_close(x, p.detach(), rtol=0, atol=0.02 * ours._adjust(24, 16) / 4)
