"""Make the completion script of a shell from the parser of the command line."""

import argparse
from pathlib import Path

import shtab


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script that completes commands, options and their choices, and files where a path is expected.

    Args:
        parser: the parser of `lrnn`, with the arguments of every command.
        shell: one of those that `lrnn --print-completion` takes.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command)
    return shtab.complete(parser, shell)


def _mark_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        is_word = not action.option_strings and action.type is None and action.choices is None  # CONFIG, or run_dir=...
        if action.type is Path or is_word:
            setattr(action, "complete", shtab.FILE)  # noqa: B010 (mypy knows no such attribute; shtab reads it)
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                _mark_files(nested)
