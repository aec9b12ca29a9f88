"""The command `lrnn pretrain`: the training loop, with what evaluates the model between its steps.

Rooms import only downwards, and the loop is below the evaluation. So the two meet here.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lrnn.pretrain import command

if TYPE_CHECKING:  # They import the model, which a process that starts others does without.
    from lrnn import LrnnConfig
    from lrnn.pretrain.config import Config
    from lrnn.pretrain.distributed import Ranks
    from lrnn.pretrain.watch.protocol import Evaluator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = command.__doc__
    command.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return command.main(args, make_evaluator)


def make_evaluator(
    config: "Config", model_config: "LrnnConfig", save_tokenizer: Callable[[Path], object], ranks: "Ranks"
) -> "Evaluator":
    """Return what finds the scores and samples of a run; see `lrnn.pretrain.watch.protocol.MakeEvaluator`."""
    from lrnn.eval.in_run.evaluator import InRun

    return InRun(config, model_config, save_tokenizer, ranks)
