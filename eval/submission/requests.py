"""Suites, tasks and options of `lrnn eval` become requests, which are checked before anything is submitted."""

import argparse
from pathlib import Path
from typing import NoReturn

from lrnn.errors import UserError
from lrnn.eval.suites import task_objects
from lrnn.eval.suites.command import add_arguments
from lrnn.eval.suites.options import make_request, words
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.suites import choose_tasks
from lrnn.files import expand

ELSEWHERE = {  # options of `lrnn eval` that the table of jobs sets, or that do something else
    "model": "name models with --eval",
    "suite": "name suites before --",
    "tasks": "name tasks before --",
    "out": "results go to DIR/eval and to RUN/eval/step-N",
    "fetch": "it is a command of its own: lrnn eval --fetch",
    "collect": "a job that follows the array collects",
    "html": "a job that follows the array writes the page",
    "published": "it is for `lrnn eval --collect` and `--compare`",
    "compare": "it is a command of its own: lrnn eval --compare",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"options after --: {message}; `lrnn eval --help` describes them")


def make_requests(suites: list[str], tasks: list[list[str]], options: list[str]) -> list[Request]:
    """Return a request for every suite, and one for every list of tasks. They name no model.

    Args:
        suites: names of suites, possibly several in a text, separated by commas.
        tasks: lists of lm-eval's tasks; the tasks of a list are run together.
        options: words of the command line of `lrnn eval`.

    Raises:
        UserError: nothing is asked for, an option is wrong, a suite or task is unknown or not allowed to run code, or
            two requests have one result folder.
    """
    parser = _Parser(prog="lrnn eval", add_help=False)
    add_arguments(parser)
    given = parser.parse_args(options)
    for name, reason in ELSEWHERE.items():
        if getattr(given, name) is not None:
            shown = f"--{name}" if name != "model" else str(given.model)
            raise UserError(f"options after --: {shown} cannot be given: {reason}")
    for name in ("heldout", "haystack", "data_folder"):
        path = getattr(given, name)
        if path is not None and not Path(expand(str(path), f"--{name}")).exists():
            raise UserError(f"--{name.replace('_', '-')} {path} does not exist")
    asked = [{"suite": suite} for suite in dict.fromkeys(words(suites))] + [{"tasks": words(each)} for each in tasks]
    if not asked:
        raise UserError("name what to run: --suite NAME,NAME or --tasks TASK,TASK")
    requests = [make_request(argparse.Namespace(**{**vars(given), "model": Path(), **each})) for each in asked]
    for request in requests:
        _check(request)
    names = [request.name for request in requests]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--tasks: two of them would write the result folder {twice}; name them once")
    return requests


def _check(request: Request) -> None:
    request.check()
    if request.suite:
        allow, skip = request.allow_code_execution, request.skip_code_execution
        choose_tasks(request.suite, request.heldout is not None, allow, skip)
    else:
        task_objects.choose(request.tasks, request.include_path, code=request.code)
