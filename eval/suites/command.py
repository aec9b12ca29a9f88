"""Evaluate a model on a suite, or on any tasks of lm-eval.

`--suite` runs one of lrnn's suites, offline; `--heldout FILE` adds the bits per byte of held-out documents. `lrnn eval
--fetch` downloads the benchmark data once; with `--suite commonsense` it also puts two data sets of the Hugging Face
hub into the cache of `datasets`, and `--data-folder` reads local copies instead. `--tasks` runs tasks, groups and tags
by lm-eval's own names; their data comes from the hub, or from the cache that `lrnn eval --fetch TASK` fills. DIR is an
export, or any causal language model that transformers knows, with safetensors and a tokenizer.

Results are written to DIR/eval/NAME: results.json, table.md, lm-eval's own results and its samples. NAME is the suite
or the tasks, with what differs from the defaults. Suites with pass@1 run code written by the model, in a sandbox, and
only with --allow-code-execution; lm-eval's own tasks run it without a sandbox.

lm-eval's own command line runs the same tasks with the same model, rule for bos included:

  python -m lrnn.eval.lm_eval run --model lrnn --model_args pretrained=DIR --tasks hellaswag,arc_easy --batch_size 32

lrnn's tasks need `--include_path "$(python -c 'from lrnn.eval.suites.suites import TASK_FOLDER; print(TASK_FOLDER)')"`.
`lrnn_heldout_bpb` reads the file named by LRNN_EVAL_HELDOUT, and code tasks need --confirm_run_unsafe_code. lm-eval
silently truncates a prompt longer than max_length, whereas `lrnn eval` refuses it.

Plain lm-eval gives the numbers of `--bos never` for an export, and runs the code in its folder:

  lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True,dtype=float32,softmax_dtype=float32 \\
    --tasks hellaswag
"""

import argparse
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.published.beside import published_table
from lrnn.eval.suites import bos, fetch_data, hub_data, report
from lrnn.eval.suites.options import add_task_arguments, batch_size, limit, make_request, words
from lrnn.eval.suites.suites import SUITES, find_suite

EXAMPLES = """examples:
  lrnn eval --fetch
  lrnn eval runs/tiny/hf --suite quick --heldout corpora/tiny/heldout.jsonl --limit 50
  lrnn eval runs/1.3b/hf --suite code_math --allow-code-execution --batch-size 32
  lrnn eval runs/1.3b/hf --suite state_tracking --max-length 8192
  lrnn eval runs/1.3b/hf --suite traces --max-length 32768
  lrnn eval runs/1.3b/hf --suite needle --haystack book.txt --max-length 32768
  lrnn eval --fetch --suite commonsense
  lrnn eval runs/1.3b/hf --suite commonsense --batch-size 32
  lrnn eval --fetch hellaswag mmlu
  lrnn eval runs/1.3b/hf --tasks hellaswag,arc_easy --batch-size auto
  lrnn eval downloads/llama-1b --tasks mmlu --num-fewshot 5
  lrnn eval runs/1.3b/hf --tasks my_task --include-path tasks/
  lrnn eval --compare runs/a/hf/eval/fast runs/b/hf/eval/fast
  lrnn eval --collect runs/1.3b/eval --published 2412.06464
  lrnn eval --collect runs/a runs/b --html results.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "; ".join(f"{suite.name}: {suite.purpose}" for suite in SUITES.values())
    parser.epilog = EXAMPLES
    parser.add_argument("model", nargs="?", type=Path, metavar="DIR", help="model folder, exported or of transformers")
    parser.add_argument("--suite", help=suites)
    parser.add_argument("--out", type=Path, help="result folder (default: DIR/eval/NAME)")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help='held-out documents, jsonl rows {"text": ...}')
    parser.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE",
        help='text to hide needles in, plain or jsonl rows {"text": ...} (default: that of --heldout, or generated)',
    )
    parser.add_argument(
        "--data-folder", type=Path, metavar="FOLDER", help="copies of data sets of the hub, e.g. FOLDER/allenai/sciq"
    )
    parser.add_argument(
        "--limit", type=limit, metavar="N", help="only the first N documents of every task, or a fraction of them"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes, each with a GPU of its own (default: all visible GPUs)",
    )
    parser.add_argument("--dtype", help="dtype of the weights (default: bfloat16 on cuda, float32 on cpu)")
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=8,
        metavar="N",
        help="sequences per batch; auto: as many as fit, auto:4: found again 4 times as prompts become shorter "
        "(default: 8)",
    )
    parser.add_argument(
        "--max-length", type=int, help="maximum tokens of context (default: the model's max_position_embeddings)"
    )
    rules = "; ".join(f"{rule}: {meaning}" for rule, meaning in bos.RULES.items())
    parser.add_argument("--bos", choices=bos.RULES, help=f"what a prompt begins with (default: auto). {rules}")
    parser.add_argument("--add-bos-token", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    add_task_arguments(parser.add_argument_group("any task of lm-eval"))
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--allow-code-execution", action="store_true", help="run code written by the model")
    code.add_argument("--skip-code-execution", action="store_true", help="leave out the tasks that run code")
    parser.add_argument("--skip-missing-data", action="store_true", help="leave out tasks whose data set is missing")
    parser.add_argument(
        "--fetch",
        nargs="*",
        metavar="NAME",
        help="download the benchmark data (86 MB, once), for a suite also its data sets of the Hugging Face hub; for "
        "tasks of lm-eval their data",
    )
    parser.add_argument(
        "--collect", nargs="+", type=Path, metavar="FOLDER", help="print one table of all results below the folders"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="with --collect: write a self-contained HTML page instead"
    )
    parser.add_argument(
        "--published",
        nargs="*",
        metavar="WORD",
        help="with --collect or --compare: add published results of the same metrics, of models and papers with a WORD "
        "in their name (default: all)",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="RESULTS", help="compare two result folders, paired by document"
    )


def _collect(args: argparse.Namespace) -> int:
    if args.html is not None:
        from lrnn.eval.report_page.page import write_page

        write_page(args.collect, args.html, args.published)
        print(f"page in {args.html}")
        return 0
    from lrnn.eval.suites.collect import collect, results_below

    print(collect(args.collect))
    if args.published is not None:
        found = [results for folder in args.collect for _, results in results_below(folder)]
        print(published_table(args.published, found))
    return 0


def main(args: argparse.Namespace) -> int:
    shown = {"html": ("collect",), "published": ("collect", "compare")}
    for name, places in shown.items():
        if getattr(args, name) is not None and not any(getattr(args, place) for place in places):
            needed = " or ".join(f"--{place}" for place in places)
            raise UserError(f"--{name} shows results that are there: it needs {needed}")
    if args.collect:
        return _collect(args)
    if args.compare:
        from lrnn.eval.suites.collect import results_below
        from lrnn.eval.suites.compare import compare

        print(compare(*args.compare))
        if args.published is not None:
            print(published_table(args.published, [results for _, results in results_below(args.compare[1])]))
        return 0
    _find_folder(args)
    if args.fetch is not None:
        _fetch(args)
        if args.model is None:
            return 0
    from lrnn.eval.suites.evaluate import evaluate

    results = evaluate(make_request(args))
    print("\n" + report.markdown_table(results))
    print(f"results in {results['out']}")
    return 0


def _fetch(args: argparse.Namespace) -> None:
    """Download the benchmark data, the data sets of suites, and those of tasks, as far as they are named."""
    names = words(args.fetch)
    suites = [name for name in names if name in SUITES] + ([args.suite] if args.suite else [])
    tasks = [name for name in names if name not in SUITES]
    if suites or not tasks:
        fetch_data.fetch()
    for suite in suites:
        hub_data.fetch(hub_data.TASKS[task] for task in find_suite(suite).tasks if task in hub_data.TASKS)
    if tasks:
        fetch_data.fetch_tasks(tasks, args.include_path, args.metadata)


def _find_folder(args: argparse.Namespace) -> None:
    """Take DIR from the end of `--tasks` or `--fetch`, which take all words that follow."""
    for taken in (args.tasks, args.fetch if args.suite or args.tasks else None):
        if args.model is None and taken and Path(taken[-1]).is_dir():
            args.model = Path(taken.pop())
