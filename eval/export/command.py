"""Write a checkpoint as a model folder that transformers (or fla) loads without lrnn.

Before the folder appears under its name it is read back, with lrnn and in a process that cannot import lrnn. Its logits
must equal those of the trained model. Formats: hf, with the model's code beside the weights; olmo_hybrid, a class of
transformers, which vLLM has too; fla, for flash-linear-attention.
"""

import argparse
import sys
from pathlib import Path

from lrnn.errors import UserError

EXAMPLES = """examples:
  lrnn export runs/340m exports/340m                       # the newest intact checkpoint of a run
  lrnn export runs/340m/checkpoints/step-00010000 exports/340m-10k --dtype bfloat16
  lrnn export runs/340m exports/340m-fla --format fla      # for flash-linear-attention
  lrnn export runs/hybrid exports/olmo --format olmo_hybrid --dtype bfloat16  # a class of transformers, for vLLM
  lrnn export --from-fla downloads/gdn-1.3b exports/gdn    # from flash-linear-attention"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder, checkpoint folder or, with --from-fla, model folder of fla")
    parser.add_argument("out", help="folder to write; must be new or empty")
    parser.add_argument("--format", choices=("hf", "fla", "olmo_hybrid"), default="hf", help="default: hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights; default: float32")
    parser.add_argument("--license", metavar="SPDX", help="licence named by the model card, such as apache-2.0")
    parser.add_argument("--from-fla", action="store_true", help="convert a model folder of fla to the hf format")
    parser.add_argument(
        "--tokenizer", help="with --from-fla: SentencePiece .model or tokenizer folder (default: the source's own)"
    )
    parser.epilog = EXAMPLES


def main(args: argparse.Namespace) -> None:
    from lrnn.eval.export.read import read_checkpoint, read_fla_folder
    from lrnn.eval.export.write import check_out, export

    if args.from_fla and args.format != "hf":
        raise UserError(f"--from-fla writes the hf format; leave out --format {args.format}")
    if args.tokenizer is not None and not args.from_fla:
        raise UserError(f"--tokenizer {args.tokenizer}: a checkpoint holds the tokenizer of its run; leave it out")
    out = Path(args.out)
    check_out(out)  # before the source is read, which can take long
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # one would be drawn into the log file
    source = Path(args.source)
    trained = read_fla_folder(source, args.tokenizer) if args.from_fla else read_checkpoint(source)
    export(trained, out, args.format, args.dtype, args.license)
