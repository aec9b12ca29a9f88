"""The command line `lrnn`: one subcommand per job, each in the module that does the work.

A command module has `add_arguments(parser)` and `main(args) -> int | None` (the exit status). Modules are imported only
when their command is named.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from lrnn import __version__, shipped
from lrnn.errors import UserError
from lrnn.files import expand
from lrnn.threads import wait_without_spinning

LOCAL_RANK = re.compile("--local[-_]rank=")
COMMANDS = {
    "init": ("lrnn.init", "lay out a project: a run, its model, batch scripts"),
    "corpus": ("lrnn.pretrain.corpus.build", "tokenise text or code into a corpus of Arrow shards"),
    "config": ("lrnn.show_config", "print a configuration with where each value comes from, or its JSON schema"),
    "plan": ("lrnn.pretrain.plan.command", "say what a run takes on given GPUs: memory, speed, days"),
    "import": ("lrnn.eval.export.import_folder", "write a model folder of fla or olmo_hybrid as one of lrnn"),
    "pretrain": ("lrnn.pretraining", "pretrain a model, or resume a run"),
    "submit": ("lrnn.submit", "submit a run or evaluations to SLURM"),
    "export": ("lrnn.eval.export.command", "write a checkpoint as a Hugging Face model folder"),
    "eval": ("lrnn.eval.suites.command", "run an evaluation suite of lm-eval on an exported model"),
    "track": ("lrnn.track.track", "train small models on state-tracking tasks and compare their lengths"),
    "ladder": (
        "lrnn.ladder.ladder",
        "train, measure and compare models over sizes, kinds, eigenvalue ranges and seeds",
    ),
    "position": (
        "lrnn.eval.position.command",
        "measure perplexity by position, far past the training length",
    ),
    "plot": ("lrnn.pretrain.metrics.plot", "plot the metrics of one or several runs"),
    "bench": ("lrnn.bench.bench", "measure the data loader, the training loop, the training step and the kernels"),
    "quickstart": ("lrnn.quickstart", "the whole job on a laptop CPU: corpus, pretraining, resume, export, evaluation"),
}

# Triton's cache of compiled kernels, by the name of its class, so that only Triton imports it.
COMPILE_ONCE = "lrnn.kernels.common.compile_once:CompileOnce"
PATHS_OR_NAMES = {"source", "out", "tokenizer", "data_files"}  # arguments that are texts, because some are no paths
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


class PrintCompletion(argparse.Action):
    """Print the completion script of a shell, made from the parsers of all commands, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace, shell, option_string=None) -> None:
        from lrnn import completion  # here, because nothing else needs shtab

        print(completion.script(build_parser(COMMANDS), shell))
        parser.exit()


def build_parser(full: Container[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line. Commands outside `full` have a name and a summary, but no arguments."""
    parser = argparse.ArgumentParser(
        prog="lrnn",
        description="Pretrain linear RNNs that can track state.",
        epilog=f"`lrnn COMMAND --help` describes a command. The documentation is in {shipped.docs()}.",
    )
    parser.add_argument("--version", action="version", version=f"lrnn {__version__}", help="print the version")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=SHELLS, help="print the completion script of a shell"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in full:
            command = importlib.import_module(module)
            sub.description = command.__doc__
            command.add_arguments(sub)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """Parse the command line. Return the namespace and the name of the command's module."""
    if argv and LOCAL_RANK.match(argv[0]):  # DeepSpeed's launcher puts it before the command
        argv = [*argv[1:], argv[0]]
    parser = build_parser({next((a for a in argv if not a.startswith("-")), "")})
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes no more of them after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _expand_paths(args)
    return args, COMMANDS[args.command][0]


def _expand_paths(args: argparse.Namespace) -> None:
    """Replace `~` and `$VARIABLES` in every path, as in `--out=~/x`, where shells leave them alone."""

    def expanded(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [expanded(item, name) for item in value]
        if isinstance(value, Path):
            return Path(expand(str(value), f"command line: {name}"))
        return expand(value, f"command line: {name}") if isinstance(value, str) and name in PATHS_OR_NAMES else value

    for name, value in vars(args).items():
        setattr(args, name, expanded(value, name))


def main(argv: list[str] | None = None) -> int:
    """Run the `lrnn` program. Return the exit status (2 for bad input)."""
    if sys.platform != "linux":
        print(
            f"lrnn: error: lrnn needs Linux, and this is {sys.platform}; use a Linux machine, WSL 2 or the Docker "
            "image",
            file=sys.stderr,
        )
        return 2
    wait_without_spinning()  # before a command loads torch
    os.environ.setdefault("TRITON_CACHE_MANAGER", COMPILE_ONCE)
    try:
        args, module = parse(sys.argv[1:] if argv is None else argv)
        return importlib.import_module(module).main(args) or 0
    except UserError as error:
        print(f"lrnn: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
