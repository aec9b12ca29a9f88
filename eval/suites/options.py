"""Options of `lrnn eval` that become a `Request`: those of any task of lm-eval, and the conversion of values."""

import argparse
import json
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.suites.request import SEEDS, Request
from lrnn.eval.suites.suites import SUITES


def add_task_arguments(group: Any) -> None:
    """Add the options that lm-eval has too to a group of the parser."""
    group.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks, groups, tags, patterns or task files, by spaces or commas"
    )
    group.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="FOLDER", help="a folder of task files"
    )
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    group.add_argument(
        "--apply-chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="ask in the tokenizer's chat template, or in one of several by name",
    )
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples as turns of the conversation (default: with a chat template)",
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="a text before every prompt")
    group.add_argument(
        "--gen-kwargs", type=settings, default={}, metavar="K=V,...", help="settings of generation, over the task's"
    )
    group.add_argument(
        "--metadata", type=settings, default={}, metavar="JSON", help="what tasks such as RULER's are made from"
    )
    group.add_argument(
        "--seed", type=seeds, default=SEEDS, metavar="N[,N,N,N]", help="of random, numpy, torch and the examples"
    )
    group.add_argument("--truncate", action="store_true", help="cut prompts that are too long from the left")


def limit(text: str) -> float:
    """Return a number of documents, or a fraction of them."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def batch_size(text: str) -> int | str:
    """Return a number of sequences, "auto" or "auto:N"."""
    word, _, times = text.partition(":")
    if word != "auto":
        return int(text)
    if text != "auto" and (not times.isdecimal() or int(times) == 0):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, auto, or auto:N with an N of at least 1")
    return text


def seeds(text: str) -> tuple[int | None, ...]:
    """Return four seeds from one, or from four separated by commas; `None` seeds nothing."""
    given = [None if word.strip().lower() == "none" else word.strip() for word in text.split(",")]
    if len(given) not in (1, len(SEEDS)) or not all(word is None or word.isdecimal() for word in given):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor four, separated by commas")
    numbers = [None if word is None else int(word) for word in given]
    return tuple(numbers * len(SEEDS) if len(numbers) == 1 else numbers)


def settings(text: str) -> dict[str, Any]:
    """Return settings from `key=value,key=value`, as lm-eval reads them, or from a JSON object."""
    from lm_eval._cli.utils import key_val_to_dict

    try:
        value = json.loads(text) if text.lstrip().startswith("{") else key_val_to_dict(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither key=value,... nor a JSON object: {error}") from None
    return value


def words(texts: list[str]) -> list[str]:
    """Return the words of texts that are separated by commas."""
    return [word for text in texts for word in text.split(",") if word]


def make_request(args: argparse.Namespace) -> Request:
    """Return what the parsed arguments ask for. Raise UserError if they contradict each other, or name nothing."""
    if args.suite and args.tasks:
        raise UserError("give --suite or --tasks, not both: their results go to different folders")
    tasks = tuple(words(args.tasks or []))
    if args.model is None or not (args.suite or tasks):
        raise UserError(
            f"name a model folder and a suite, or tasks: lrnn eval DIR --suite {{{','.join(SUITES)}}}, or "
            "lrnn eval DIR --tasks NAME,NAME"
        )
    rule = args.bos or "auto"
    if args.add_bos_token is not None:
        given, rule = ("--add-bos-token", "always") if args.add_bos_token else ("--no-add-bos-token", "never")
        if args.bos not in (None, rule):
            raise UserError(f"{given} contradicts --bos {args.bos}; give --bos alone")
        print(f"{given} is now --bos {rule}", flush=True)
    return Request(
        model=args.model,
        suite=args.suite or "",
        tasks=tasks,
        out=args.out,
        heldout=args.heldout,
        haystack=args.haystack,
        data_folder=args.data_folder,
        limit=args.limit,
        device=args.device,
        num_processes=args.num_processes,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        bos=rule,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        system_instruction=args.system_instruction,
        gen_kwargs=args.gen_kwargs,
        metadata=args.metadata,
        seeds=args.seed,
        include_path=tuple(args.include_path),
        truncate=args.truncate,
        allow_code_execution=args.allow_code_execution,
        skip_code_execution=args.skip_code_execution,
        skip_missing_data=args.skip_missing_data,
    )
