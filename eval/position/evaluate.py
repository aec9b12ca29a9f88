"""Measure perplexity by position: check the request, find documents, measure each model, write the results."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrnn.errors import UserError
from lrnn.eval import result_folder
from lrnn.eval.documents import Document, find_documents, join_documents, load_ids
from lrnn.eval.loading import choose_device, load_model
from lrnn.eval.model_folder import check_export, describe_model
from lrnn.eval.offline import go_offline
from lrnn.eval.position import report
from lrnn.eval.position.bins import log_edges
from lrnn.eval.statistics import RESAMPLES, SEED
from lrnn.eval.suites.card_results import update_card
from lrnn.files import sha256

if TYPE_CHECKING:
    import torch

    from lrnn.tokenizer import Tokenizer

TIMES = 16  # default longest position, in training lengths
FEW = 20  # with fewer documents a percentile interval is too narrow


def evaluate(
    models: list[Path],
    path: Path,
    *,
    out: Path | None = None,
    max_length: int | None = None,
    min_tokens: int | None = None,
    join: bool = False,
    limit: int | None = None,
    bins_per_octave: int = 4,
    piece: int = 2048,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measure the exported folders `models` on the documents of `path`, and return the content of results.json.

    Raises:
        UserError: something is wrong with the request; this is found before a model is loaded.
    """
    sizes = {"--max-length": max_length, "--min-tokens": min_tokens, "--bins-per-octave": bins_per_octave}
    check_sizes({**sizes, "--piece": piece, "--batch-size": batch_size}, limit)
    go_offline()
    configs = [check_export(model) for model in models]
    if out is None and len(models) > 1:
        raise UserError("name a folder for the results of several models: --out FOLDER")
    out = out or models[0] / "eval" / "position"
    result_folder.check_output(out)
    on, as_type = choose_device(device, dtype)
    trained = [config.get("max_position_embeddings") for config in configs]
    known = [length for length in trained if length]
    if not max_length and not known:
        raise UserError(f"{models[0]} does not say its training length (max_position_embeddings): give --max-length")
    max_length = max_length or TIMES * max(known)
    min_tokens = min_tokens or max_length
    tokenizers = [load_tokenizer(model, config) for model, config in zip(models, configs, strict=True)]
    print(f"looking for long documents in {path}", flush=True)
    if join:
        documents = join_documents(path, tokenizers[0], max_length, limit)
    else:
        documents = find_documents(path, tokenizers[0], min_tokens, max_length, limit)
    for model, tokenizer in zip(models[1:], tokenizers[1:], strict=True):
        check_same_tokens(path, documents, tokenizers[0], tokenizer, f"{models[0]} and {model}")
    edges = log_edges(max(document.length for document in documents), known[0] if known else 1, bins_per_octave)
    start = time.time()
    sums = []
    for model in models:
        one, counts = measure(model, path, documents, tokenizers[0], edges, piece, batch_size, on, as_type)
        sums.append(one)
    names = list(map(str, models))
    means, differences = report.curves(names, np.stack(sums), counts)
    results = {
        "schema_version": result_folder.SCHEMA_VERSION,
        "suite": "position",
        "out": str(out),
        "models": [
            {"name": name, "training_length": length, **describe_model(model)}
            for name, length, model in zip(names, trained, models, strict=True)
        ],
        "settings": {
            "max_length": max_length,
            "min_tokens": None if join else min_tokens,
            "join": join,
            "limit": limit,
            "bins_per_octave": bins_per_octave,
            "piece": piece,
            "batch_size": batch_size,
            "device": str(on),
            "dtype": str(as_type).removeprefix("torch."),
            "resamples": RESAMPLES,
            "seed": SEED,
        },
        "data": {
            "documents": str(path),
            "documents_sha256": sha256(path),
            "taken": len(documents),
            "tokens": int(counts.sum()),
        },
        "notes": notes(documents, join, names, sums),
        "curves": [report.rows(curve, edges, counts, ppl=True) for curve in means],
        "differences": [report.rows(curve, edges, counts, ppl=False) for curve in differences],
        "seconds": round(time.time() - start, 1),
        "environment": result_folder.describe_environment(str(on)),
    }
    report.write(out, results)
    for model in models:
        update_card(model)
    return results


def check_sizes(sizes: dict[str, int | None], limit: int | None) -> None:
    """Raise UserError for an option of `sizes` below 1, or a `limit` of documents below 2."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if limit is not None and limit < 2:
        raise UserError(f"--limit must be at least 2, got {limit}: a band over documents needs two or more")


def load_tokenizer(folder: Path, config: dict[str, Any]) -> "Tokenizer":
    """Return the folder's tokenizer as a corpus uses it. Raise UserError if it cannot be loaded or does not fit."""
    from lrnn.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.get("vocab_size", tokenizer.vocab_size):
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model only {config['vocab_size']}: "
            "they do not belong together"
        )
    return tokenizer


def check_same_tokens(
    path: Path, documents: list[Document], first: "Tokenizer", second: "Tokenizer", which: str
) -> None:
    """Raise UserError if two tokenizers tokenise a document differently, so that perplexities cannot be compared."""
    if first.fingerprint == second.fingerprint:
        return
    for document in documents:
        if not np.array_equal(load_ids(path, document, first)[0], load_ids(path, document, second)[0]):
            raise UserError(f"{which} have different tokenizers: their perplexities per token cannot be compared")


def measure(
    folder: Path,
    path: Path,
    documents: list[Document],
    tokenizer: "Tokenizer",
    edges: np.ndarray,
    piece: int,
    batch_size: int,
    device: "torch.device",
    dtype: "torch.dtype",
) -> tuple[np.ndarray, np.ndarray]:
    """Load a model folder, and return `sum_by_bin` of it. Show a progress bar."""
    import torch
    from tqdm import tqdm

    from lrnn.eval.position.nll import sum_by_bin

    print(f"loading {folder} on {device} in {str(dtype).removeprefix('torch.')}", flush=True)
    model = load_model(folder, device, dtype)
    total = sum(document.length for document in documents)
    with tqdm(total=total, unit="token", unit_scale=True, desc=str(folder)) as bar:
        try:
            return sum_by_bin(
                model,
                path,
                documents,
                tokenizer,
                edges,
                piece=piece,
                batch_size=batch_size,
                progress=bar.update,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{device} has too little memory for {batch_size} x {piece:,} tokens: "
                "give a smaller --batch-size or --piece"
            ) from error


def notes(documents: list[Document], join: bool, names: list[str], sums: list[np.ndarray]) -> list[str]:
    """Return what a reader of the numbers must know."""
    found = []
    if join:
        count = sum(len(document.offsets) for document in documents)
        found.append(f"{count:,} documents were joined into {len(documents):,} (--join); seams are not scored")
    if len(documents) < FEW:
        found.append(f"with {len(documents)} documents the bands are too narrow; {FEW} or more are better")
    for name, one in zip(names, sums, strict=True):
        bad = int((~np.isfinite(one)).any(1).sum())
        if bad:
            found.append(f"{name}: log-likelihoods of {bad:,} documents are not finite; their bins are n/a")
    return found
