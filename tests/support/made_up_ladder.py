"""Results of a ladder as they might come out, with a known truth: for the tests of the report. Nothing is trained."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lrnn.ladder.cells import Cell, load_ladder
from lrnn.ladder.config import LadderConfig
from lrnn.ladder.results import CellResult, Figure

PARAMETERS = {"15m": 15_420_000, "30m": 30_270_000, "60m": 61_580_000, "120m": 124_000_000}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "vocab_size": 512}
TITLES = {"delta": "gated DeltaNet", "hybrid": "3:1 hybrid", "attention": "transformer"}
MIXERS = {"delta": "gated_deltanet", "hybrid": ["gated_deltanet", "attention"], "attention": "attention"}
DOMAINS = {"code": (0.7, 0.65, 300), "mathematics": (0.3, 0.8, 200)}  # weight, nats relative to the mean, documents
BYTES_PER_TOKEN = 2.9


@dataclass
class Truth:
    """How results come about. Losses are nats per token, `offsets` by (arm, range), noise standard deviations.

    `data_noise` is shared by all cells of a size and seed, `noise` is a cell's own.
    """

    shape: tuple[float, float, float, float, float] = (1.6, 480.0, 0.40, 1.1e4, 0.45)  # E, A, a, B, b
    offsets: dict[tuple[str, str], float] = field(default_factory=dict)
    noise: float = 0.002
    data_noise: float = 0.003
    with_documents: bool = True

    def loss(self, n: float, d: float, kind: tuple[str, str]) -> float:
        e, a_, a, b_, b = self.shape
        return e + a_ / n**a + b_ / d**b + self.offsets.get(kind, 0.0)


def make_ladder(folder: Path, grids: list[dict[str, Any]], **changes: Any) -> tuple[LadderConfig, list[Cell]]:
    """Return a ladder of these grids, whose sizes are keys of `PARAMETERS` and whose arms are keys of `MIXERS`."""
    sizes = {
        name: {"model": SHAPE | {"intermediate_size": 96}, "tokens": [20 * n], "lr": 2e-3}
        for name, n in PARAMETERS.items()
    }
    written = {
        "out": "out",
        "question": "What do negative eigenvalues buy a language model?",
        "reference": "delta",
        "run": {
            "data": {"seq_len": 2048, "corpora": [{"path": "corpora/code"}]},
            "schedule": {"name": "wsd", "min_lr_ratio": 0.0},
            "global_batch_size": 32,
            "micro_batch_size": 32,
        },
        "sizes": sizes,
        "arms": {name: {"title": TITLES[name], "model": {"mixer": MIXERS[name]}} for name in MIXERS},
        "grids": grids,
        "measure": {
            "heldout": [
                {"name": name, "documents": f"{name}.jsonl", "weight": weight}
                for name, (weight, _, _) in DOMAINS.items()
            ]
        },
        **changes,
    }
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return load_ladder(path)


def make_results(cells: list[Cell], truth: Truth, seed: int = 0, rich: bool = False) -> list[CellResult]:
    """Return a result for each cell; `rich` ones have all measures and a training curve, the others losses alone."""
    return [_result(cell, truth, seed, rich) for cell in cells]


def _rng(*parts: object) -> np.random.Generator:
    """Return a generator of its own for these parts."""
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def _result(cell: Cell, truth: Truth, seed: int, rich: bool) -> CellResult:
    n = PARAMETERS[cell.size]
    kind = (cell.arm, cell.range)
    own = _rng(seed, "cell", cell.name)
    shared = _rng(seed, "data", cell.size, cell.budget, cell.seed).normal()
    level = truth.loss(n, cell.tokens, kind) + truth.noise * own.normal() + truth.data_noise * shared
    level += 0.02 * np.log(cell.lr / 2e-3) ** 2
    figures, documents = _heldout(level, truth, seed, own)
    metrics = []
    if rich:
        more, of_more = _questions(cell, seed, own)
        figures, documents = figures + more + _by_step(cell, level, own), documents | of_more
        metrics = _curve(cell, level, own)
    return CellResult(
        name=cell.name, size=cell.size, arm=cell.arm, range=cell.range, seed=cell.seed, tokens=cell.tokens, lr=cell.lr,
        parameters=n + 6_300_000, non_embedding_parameters=n, steps=cell.steps, tokens_per_step=cell.tokens_per_step,
        settings=cell.settings, corpora={"code": "ab12" * 16}, figures=tuple(figures),
        training={
            "seconds": cell.tokens / 8e5, "gpu_seconds": cell.tokens / 8e5,
            "tokens_per_second": 8e5 * own.uniform(0.97, 1), "peak_gb": 41.0, "loss": level - 0.1,
            "spikes": int(own.random() < 0.2), "skipped_steps": 0,
        },
        environment={"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "source": "0123456789ab"},
        documents=documents if truth.with_documents else {}, metrics=metrics,
    )  # fmt: skip


def _heldout(
    level: float, truth: Truth, seed: int, own: np.random.Generator
) -> tuple[list[Figure], dict[str, np.ndarray]]:
    """Return losses by domain whose weighted mean is `level`, and documents with exactly these losses."""
    figures, documents = [], {}
    scale = sum(weight * relative for weight, relative, _ in DOMAINS.values())
    mix = {"heldout_nats_per_token": 0.0, "heldout_bits_per_byte": 0.0}
    for name, (weight, relative, n) in DOMAINS.items():
        of_all = _rng(seed, "documents", name)
        tokens = of_all.integers(200, 4000, n).astype(float)
        by_document = level * relative / scale + 0.4 * of_all.normal(size=n) + 0.02 * own.normal(size=n)
        nats = tokens * (by_document - (tokens @ by_document) / tokens.sum() + level * relative / scale)
        loss = nats.sum() / tokens.sum()
        values = {"heldout_nats_per_token": loss, "heldout_bits_per_byte": loss / BYTES_PER_TOKEN / np.log(2)}
        for (measure, value), units in zip(values.items(), (tokens, tokens * BYTES_PER_TOKEN), strict=True):
            key = f"{measure}/{name}"
            figures.append(Figure(measure, name, None, float(value), 0.01, key if truth.with_documents else None))
            documents[key] = np.stack([-nats, units], 1)
            mix[measure] += weight * float(value)
    return figures + [Figure(measure, "mix", None, value, 0.01) for measure, value in mix.items()], documents


def _questions(cell: Cell, seed: int, own: np.random.Generator) -> tuple[list[Figure], dict[str, np.ndarray]]:
    """Return accuracies by length, in which the wider range does better on traces and on needles."""
    figures, documents = [], {}
    wide = cell.range != "positive"
    size = np.log2(PARAMETERS[cell.size] / 15e6)
    asked = [("traces_accuracy", of, (4, 8, 16, 32, 64, 128, 256, 512), 60) for of in ("swaps", "modular", "switch")]
    asked += [("recall_accuracy", "pairs", (4, 16, 64, 256), 120)]
    asked += [("needle_accuracy", of, (1024, 2048, 4096), 120) for of in ("multikey_1", "multikey_2")]
    for measure, of, lengths, n in asked:
        for i, at in enumerate(lengths):
            chance = 0.2 if measure == "traces_accuracy" else 0.0
            reach = (5.0 if wide else 2.5) + 0.5 * size + 0.3 * own.normal()
            if of == "switch":
                reach += 3 if wide else 0
            p = chance + (1 - chance) / (1 + np.exp(1.6 * (i - reach + (0 if measure[0] == "t" else 3))))
            right = (_rng(seed, measure, of, at).random(n) * 0.7 + own.random(n) * 0.3 < p).astype(float)
            key = f"{measure}/{of}/{at}"
            error = float(right.std(ddof=1) / n**0.5)
            figures.append(Figure(measure, of, float(at), float(right.mean()), error, key))
            documents[key] = right
            if measure != "traces_accuracy":
                more = measure.replace("accuracy", "bits_per_byte")
                n_bytes = _rng(seed, more, of, at).integers(3, 9, n).astype(float)
                nats = n_bytes * (2.2 - 1.5 * p + 0.5 * _rng(seed, more, of, at).random(n) + 0.1 * own.random(n))
                value = float(nats.sum() / n_bytes.sum() / np.log(2))
                figures.append(Figure(more, of, float(at), value, 0.01, f"{more}/{of}/{at}"))
                documents[f"{more}/{of}/{at}"] = np.stack([-nats, n_bytes], 1)
    for of in ("humaneval", "gsm8k"):
        n_bytes = _rng(seed, of).integers(40, 400, 80).astype(float)
        nats = n_bytes * (1.1 + 0.1 * _rng(seed, of).normal(size=80) + 0.01 * own.normal(size=80) + 0.01 * own.normal())
        pairs = np.stack([-nats, n_bytes], 1)
        value = float(nats.sum() / pairs[:, 1].sum() / np.log(2))
        figures.append(Figure("gold_bits_per_byte", of, None, value, 0.01, f"gold/{of}"))
        documents[f"gold/{of}"] = pairs
    return figures, documents


def _by_step(cell: Cell, level: float, own: np.random.Generator) -> list[Figure]:
    """Return the loss by position to 16 training lengths, and eigenvalues by layer over training."""
    far = {k: -k / 9 if cell.arm == "attention" else 0.1 for k in (1, 2, 4, 8, 16)}
    figures = [
        Figure("position_nats", "code", float(2048 * k), level + 0.2 * 2.0**-k - worth, 0.02)
        for k, worth in far.items()
    ]
    if cell.range == "none":
        return figures
    for layer in range(4):
        for step in np.linspace(0, cell.steps, 8).astype(int).tolist():
            way = step / cell.steps
            low = -0.9 * way * (layer + 1) / 4 if cell.range == "negative" else 0.3 - 0.25 * way
            values = {"smallest_eigenvalue": low, "median_eigenvalue": 0.8, "negative_eigenvalues": max(0.0, -low / 2)}
            for measure, value in values.items():
                figures.append(Figure(measure, f"layer {layer}", float(step), value + 0.01 * own.normal()))
    return figures


def _curve(cell: Cell, level: float, own: np.random.Generator) -> list[dict[str, Any]]:
    steps = np.unique(np.linspace(1, cell.steps, 80).astype(int)).tolist()
    losses = [level + 6 * (1 + step) ** -0.5 + 0.02 * own.normal() for step in steps]
    return [
        {"step": step, "loss": loss, "tokens": step * cell.tokens_per_step}
        for step, loss in zip(steps, losses, strict=True)
    ]
