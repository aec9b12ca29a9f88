"""Write a model folder of flash-linear-attention (fla), or of transformers' class olmo_hybrid, as one of lrnn.

What is written is what `lrnn export` writes: a configuration that `model:` of a run can name, the weights under lrnn's
names with the values of the folder, and the tokenizer. `init_from` of a run takes it, and `lrnn eval`, `lrnn export`
and transformers do too. Before the folder appears under its name it is read back, and its logits are compared with
those of the model that was read. Nothing is unpickled, and no code of the folder is run.
"""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  lrnn import downloads/gdn-1.3b models/gdn                       # fla: gated_deltanet, delta_net, gated_deltaproduct
  lrnn import downloads/Olmo-Hybrid-7B models/olmo                # the class olmo_hybrid of transformers
  lrnn import downloads/gdn models/gdn --tokenizer llama.model    # a folder without a tokenizer
  lrnn pretrain run.yaml init_from=models/gdn                     # train on from its weights"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lrnn import`."""
    parser.add_argument("source", help="model folder: config.json, and safetensors in one file or in shards")
    parser.add_argument("out", help="folder to write; must be new or empty")
    parser.add_argument("--tokenizer", help="SentencePiece .model or tokenizer folder (default: the source's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="weights; default: as in the source")
    parser.add_argument("--license", metavar="SPDX", help="licence named by the model card, such as apache-2.0")
    parser.epilog = EXAMPLES


def main(args: argparse.Namespace) -> None:
    """Run `lrnn import`."""
    from lrnn.eval.export.read import read_model_folder
    from lrnn.eval.export.write import check_out, export, without_progress_bars

    out = Path(args.out)
    check_out(out)  # before the source is read, which can take long
    without_progress_bars()
    trained = read_model_folder(Path(args.source), args.tokenizer)
    export(trained, out, "hf", args.dtype or trained.dtype, args.license)
