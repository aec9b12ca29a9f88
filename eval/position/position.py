"""Perplexity by position, far past the training length, of one or several exported models on the same documents.

Every document is read from its beginning, `--piece` tokens at a time with the state passed on, so memory does not grow
with length, but for the transformer's, whose cache holds all tokens. A token's position is the number of tokens before
it. Positions are binned on a logarithmic scale, with the training length as an edge; by default all documents are as
long as the longest position, so that every bin has the same documents. Bands are the 95% interval of a bootstrap over
documents, and further models are compared with the first by a paired one. The folder has position.csv, difference.csv,
position.png, table.md and results.json.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrnn.errors import UserError
from lrnn.eval.documents import Document, find_documents, join_documents, load_ids
from lrnn.eval.position import report as position_report
from lrnn.eval.position.bins import log_edges
from lrnn.eval.suites import report
from lrnn.eval.suites.run import check_export, prepare_environment

if TYPE_CHECKING:
    import torch

    from lrnn.tokenizer import Tokenizer

TIMES = 16  # how far to go by default, in training lengths
FEW = 20  # a percentile interval over fewer documents is too narrow

EXAMPLE = """examples:
  lrnn position runs/1.3b/hf --documents corpora/books/heldout.jsonl
  lrnn position runs/1.3b/hf runs/1.3b-positive/hf --documents corpora/books/heldout.jsonl --out runs/ranges
  lrnn position runs/tiny/hf --documents corpora/tiny/heldout.jsonl --max-length 4096 --join
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("models", nargs="+", type=Path, metavar="DIR", help="exported Hugging Face model folders")
    parser.add_argument(
        "--documents", type=Path, required=True, metavar="FILE", help='long documents, jsonl rows {"text": ...}'
    )
    parser.add_argument("--out", type=Path, help="result folder (default for a single model: DIR/eval/position)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"longest position (default: {TIMES} times the models' largest max_position_embeddings)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--min-tokens",
        type=int,
        metavar="N",
        help="take documents of at least N tokens (default: --max-length; with fewer, late bins have fewer documents)",
    )
    which.add_argument(
        "--join",
        action="store_true",
        help="join documents, in the file's order, into texts of --max-length tokens: says how a model reads on past "
        "a document's end, not whether it uses what is far back",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents that are long enough")
    parser.add_argument("--bins-per-octave", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--piece", type=int, default=2048, metavar="N", help="tokens read at a time (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="documents at a time (default: 4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", help="of the weights (default: bfloat16 on cuda, float32 on cpu)")


def main(args: argparse.Namespace) -> int:
    results = evaluate(
        args.models,
        args.documents,
        out=args.out,
        max_length=args.max_length,
        min_tokens=args.min_tokens,
        join=args.join,
        limit=args.limit,
        bins_per_octave=args.bins_per_octave,
        piece=args.piece,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )
    print("\n" + position_report.markdown_table(results))
    print(f"results in {results['out']}")
    return 0


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
    """Measure the exported folders `models` on the documents of `path`; returns what results.json holds.

    Everything that can be wrong with the request raises UserError before a model is loaded.
    """
    sizes = {"--max-length": max_length, "--min-tokens": min_tokens, "--bins-per-octave": bins_per_octave}
    for name, value in {**sizes, "--piece": piece, "--batch-size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if limit is not None and limit < 2:
        raise UserError(f"--limit must be at least 2, got {limit}: a band over documents takes two or more")
    prepare_environment()
    configs = [check_export(model) for model in models]
    if out is None and len(models) > 1:
        raise UserError("name a folder for the results of several models: --out FOLDER")
    out = out or models[0] / "eval" / "position"
    report.check_output(out)
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
    means, differences = position_report.curves(names, np.stack(sums), counts)
    results = {
        "schema_version": report.SCHEMA_VERSION,
        "suite": "position",
        "out": str(out),
        "models": [
            {"name": name, "training_length": length, **report.describe_model(model)}
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
            "resamples": position_report.RESAMPLES,
            "seed": report.SEED,
        },
        "data": {
            "documents": str(path),
            "documents_sha256": report.sha256(path),
            "taken": len(documents),
            "tokens": int(counts.sum()),
        },
        "notes": notes(documents, join, names, sums),
        "curves": [position_report.rows(curve, edges, counts, ppl=True) for curve in means],
        "differences": [position_report.rows(curve, edges, counts, ppl=False) for curve in differences],
        "seconds": round(time.time() - start, 1),
        "environment": report.describe_environment(),
    }
    position_report.write(out, results)
    return results


def choose_device(device: str | None, dtype: str | None) -> tuple["torch.device", "torch.dtype"]:
    """torch's objects for the names; raises UserError for what there is not."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    as_type = getattr(torch, dtype, None)
    if not isinstance(as_type, torch.dtype) or not as_type.is_floating_point:
        raise UserError(f"--dtype {dtype} is none; give float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device), as_type


def load_tokenizer(folder: Path, config: dict[str, Any]) -> "Tokenizer":
    """The folder's tokenizer as a corpus uses it; raises UserError where it cannot be loaded or fits another model."""
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
    """Raises UserError where two tokenizers cut a document differently: then perplexities cannot be compared."""
    if first.fingerprint == second.fingerprint:
        return
    for document in documents:
        if not np.array_equal(load_ids(path, document, first)[0], load_ids(path, document, second)[0]):
            raise UserError(f"{which} have other tokenizers: their perplexities a token cannot be compared")


def load_model(folder: Path, device: "torch.device", dtype: "torch.dtype") -> Any:
    """The model, in eval mode. The folder may be a stranger's: none of its code is run, and nothing is unpickled."""
    from transformers import AutoModelForCausalLM

    print(f"loading {folder} on {device} in {str(dtype).removeprefix('torch.')}", flush=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise UserError(f"{folder} holds no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.to(device).eval()


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
    """`sum_by_bin` of a model folder, which is loaded for this alone, with a bar of progress."""
    import torch
    from tqdm import tqdm

    from lrnn.eval.position.nll import sum_by_bin

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
    """What a reader of the numbers has to know."""
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
