"""Measure perplexity by position, far past the training length, of one or several exported models.

All models read the same documents, each from its beginning, `--piece` tokens at a time with the state passed on.
Memory therefore does not grow with length, except with attention without a window, whose cache holds all tokens. A
token's position is the number of tokens before it. Positions are binned on a logarithmic scale, with the training
length as an edge. By default all documents are as long as the longest position, so that every bin has the same
documents.

Bands are 95% intervals of a bootstrap over documents. Further models are compared with the first by a paired bootstrap.
Results are written to position.csv, difference.csv, position.png, table.md and results.json.
"""

import argparse
from pathlib import Path

from lrnn.eval.position import report
from lrnn.eval.position.evaluate import TIMES, evaluate

EXAMPLES = """examples:
  lrnn position runs/1.3b/hf --documents corpora/books/heldout.jsonl
  lrnn position runs/1.3b/hf runs/1.3b-positive/hf --documents corpora/books/heldout.jsonl --out runs/ranges
  lrnn position runs/tiny/hf --documents corpora/tiny/heldout.jsonl --max-length 4096 --join
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
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
        help="use documents of at least N tokens (default: --max-length; with a smaller N, late bins have fewer "
        "documents)",
    )
    which.add_argument(
        "--join",
        action="store_true",
        help="join documents, in the file's order, into texts of --max-length tokens: shows how a model continues past "
        "a document's end, not whether it uses distant context",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents that are long enough")
    parser.add_argument("--bins-per-octave", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--piece", type=int, default=2048, metavar="N", help="tokens read at a time (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="documents per batch (default: 4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", help="dtype of the weights (default: bfloat16 on cuda, float32 on cpu)")


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
    print("\n" + report.markdown_table(results))
    print(f"results in {results['out']}")
    return 0
