"""Write a checkpoint, or a model folder, as a model folder that transformers (or fla) loads without lrnn.

Before the folder appears under its name it is read back, with lrnn and in a process that cannot import lrnn. Its logits
must equal those of the trained model. Formats: hf, with the model's code beside the weights; olmo_hybrid, a class of
transformers, which vLLM has too; fla, for flash-linear-attention.

Nothing leaves this machine unless --push-to-hub names a repository of the Hugging Face hub. A checkpoint of step N
becomes its revision step-N, and the newest one is `main` too. The repository is private unless --public is given. With
--push-to-hub alone, SOURCE may be a folder that was exported before, with the results that `lrnn eval` put into it.
"""

import argparse
from pathlib import Path

from lrnn.errors import UserError

EXAMPLES = """examples:
  lrnn export runs/340m exports/340m                       # the newest intact checkpoint of a run
  lrnn export runs/340m/checkpoints/step-00010000 exports/340m-10k --dtype bfloat16
  lrnn export runs/340m exports/340m-fla --format fla      # for flash-linear-attention
  lrnn export runs/hybrid exports/olmo --format olmo_hybrid --dtype bfloat16  # a class of transformers, for vLLM
  lrnn export models/gdn exports/gdn --format fla          # a model folder, such as one of `lrnn import`
  lrnn export runs/340m exports/340m --push-to-hub me/gdn-340m  # private; exports/340m stays
  lrnn export exports/340m --push-to-hub me/gdn-340m       # again, with the results of lrnn eval exports/340m"""

# Options that a folder which was exported before cannot obey, and their defaults.
OF_AN_EXPORT = {"format": "hf", "dtype": "float32", "license": None, "tokenizer": None, "from_fla": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder, checkpoint folder or model folder")
    parser.add_argument(
        "out", nargs="?", help="folder to write; must be new or empty. Left out to push an exported folder as it is"
    )
    parser.add_argument("--format", choices=("hf", "fla", "olmo_hybrid"), default="hf", help="default: hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights; default: float32")
    parser.add_argument("--license", metavar="SPDX", help="licence named by the model card, such as apache-2.0")
    parser.add_argument("--from-fla", action="store_true", help="write a model folder in the hf format")
    parser.add_argument(
        "--tokenizer", help="of a model folder: SentencePiece .model or tokenizer folder (default: the source's own)"
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload the folder to this repository of the hub too")
    parser.add_argument(
        "--public", action="store_true", help="with --push-to-hub: a repository that everybody may read"
    )
    parser.epilog = EXAMPLES


def main(args: argparse.Namespace) -> None:
    if args.public and args.push_to_hub is None:
        raise UserError("--public is about a repository of the hub; name it with --push-to-hub")
    if args.out is None and args.push_to_hub is None:
        raise UserError("name the folder to write: lrnn export SOURCE OUT")
    if args.out is None:
        _check_exported(args)
    repository = None
    if args.push_to_hub is not None:
        from lrnn.eval.export.hub import Repository  # Only a command that asks for it can upload anything.

        repository = Repository(args.push_to_hub, args.public)  # before the export, which can take long
    if args.out is not None:
        _export(args)
    if repository is not None:
        print(repository.push(Path(args.out or args.source)), flush=True)


def _check_exported(args: argparse.Namespace) -> None:
    """Raise UserError unless the source is a folder that `lrnn export` wrote, and no option asks for another one."""
    from lrnn.eval.model_folder import check_export

    for name, default in OF_AN_EXPORT.items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for an export; name the folder to write after {args.source}")
    check_export(Path(args.source))


def _export(args: argparse.Namespace) -> None:
    from lrnn.eval.export.read import is_model_folder, read_checkpoint, read_model_folder
    from lrnn.eval.export.write import check_out, export, without_progress_bars

    if args.from_fla and args.format != "hf":
        raise UserError(f"--from-fla writes the hf format; leave out --format {args.format}")
    source = Path(args.source)
    from_folder = args.from_fla or is_model_folder(source)
    if args.tokenizer is not None and not from_folder:
        raise UserError(f"--tokenizer {args.tokenizer}: a checkpoint holds the tokenizer of its run; leave it out")
    out = Path(args.out)
    check_out(out)  # before the source is read, which can take long
    without_progress_bars()
    trained = read_model_folder(source, args.tokenizer) if from_folder else read_checkpoint(source)
    export(trained, out, args.format, args.dtype, args.license)
