"""Run an evaluation suite of lm-eval on an exported model, offline.

The suites are `quick`, `fast`, `code_math`, `commonsense` and `state_tracking`; `--heldout FILE` adds the bits per byte
of held-out documents. `lrnn eval --fetch` downloads the benchmark data once; `state_tracking` generates its own. With
`--suite commonsense` it also puts two data sets of the Hugging Face hub into the cache of `datasets`; `--data-folder`
reads local copies instead. Results are written to DIR/eval/SUITE: results.json, table.md, lm-eval's own results and its
samples. Suites with pass@1 run code written by the model, in a sandbox, and only with --allow-code-execution.

The tasks are ordinary lm-eval tasks, so lm-eval's own command line runs them on the same folder:

  HF_HUB_OFFLINE=1 python -m lm_eval run --model hf \\
    --model_args pretrained=DIR,trust_remote_code=True,dtype=float32,softmax_dtype=float32,max_length=2048 \\
    --include_path "$(python -c 'from lrnn.eval.suites.suites import TASK_FOLDER; print(TASK_FOLDER)')" \\
    --tasks lrnn_humaneval_bpb,lrnn_gsm8k_bpb --output_path out --log_samples

`lrnn_heldout_bpb` reads the file named by LRNN_EVAL_HELDOUT, and code tasks need --confirm_run_unsafe_code. The groups
`state_tracking`, `state_tracking_mc` and `state_tracking_gen` name all tasks of that suite; lm-eval silently truncates
a prompt longer than max_length, whereas `lrnn eval` refuses it. With --no-add-bos-token, `lrnn eval` gives the numbers
of that line. To begin prompts with bos there, add add_bos_token=True; this needs a tokenizer.json, and is not for
lrnn_heldout_bpb, which lm-eval would then begin with two. The line above runs the code in the model folder;
`lrnn eval` uses the code of the installed lrnn instead.
"""

import argparse
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.published.beside import published_table
from lrnn.eval.suites import fetch_data, hub_data, report
from lrnn.eval.suites.evaluate import evaluate
from lrnn.eval.suites.suites import SUITES, find_suite

EXAMPLES = """examples:
  lrnn eval --fetch
  lrnn eval runs/tiny/hf --suite quick --heldout corpora/tiny/heldout.jsonl --limit 50
  lrnn eval runs/1.3b/hf --suite code_math --allow-code-execution --batch-size 32
  lrnn eval runs/1.3b/hf --suite state_tracking --max-length 8192
  lrnn eval --fetch --suite commonsense
  lrnn eval runs/1.3b/hf --suite commonsense --batch-size 32
  lrnn eval --compare runs/a/hf/eval/fast runs/b/hf/eval/fast
  lrnn eval --collect runs/1.3b/eval --published 2412.06464
  lrnn eval --collect runs/a runs/b --html results.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "; ".join(f"{suite.name}: {suite.purpose}" for suite in SUITES.values())
    parser.epilog = EXAMPLES
    parser.add_argument("model", nargs="?", type=Path, metavar="DIR", help="exported Hugging Face model folder")
    parser.add_argument("--suite", help=suites)
    parser.add_argument("--out", type=Path, help="result folder (default: DIR/eval/SUITE)")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help='held-out documents, jsonl rows {"text": ...}')
    parser.add_argument(
        "--data-folder", type=Path, metavar="FOLDER", help="copies of data sets of the hub, e.g. FOLDER/allenai/sciq"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of every task")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", help="dtype of the weights (default: bfloat16 on cuda, float32 on cpu)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per batch (default: 8)")
    parser.add_argument(
        "--max-length", type=int, help="maximum tokens of context (default: the model's max_position_embeddings)"
    )
    parser.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help="begin every prompt with bos (default: add_bos_token of DIR/tokenizer_config.json; true in exports)",
    )
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--allow-code-execution", action="store_true", help="run code written by the model in a sandbox")
    code.add_argument("--skip-code-execution", action="store_true", help="leave out the tasks that run code")
    parser.add_argument("--skip-missing-data", action="store_true", help="leave out tasks whose data set is missing")
    parser.add_argument(
        "--fetch",
        action="store_true",
        help="download the benchmark data (86 MB, once); with --suite also its data sets of the Hugging Face hub",
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
    if args.collect:
        return _collect(args)
    if args.compare:
        from lrnn.eval.suites.collect import results_below
        from lrnn.eval.suites.compare import compare

        print(compare(*args.compare))
        if args.published is not None:
            print(published_table(args.published, [results for _, results in results_below(args.compare[1])]))
        return 0
    for name in ("html", "published"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} shows results that are there: add --collect FOLDER")
    if args.fetch:
        fetch_data.fetch()
        if args.suite is not None:
            hub_data.fetch(hub_data.TASKS[task] for task in find_suite(args.suite).tasks if task in hub_data.TASKS)
        if args.model is None:
            return 0
    if args.model is None or args.suite is None:
        raise UserError(f"name a model folder and a suite: lrnn eval DIR --suite {{{','.join(SUITES)}}}")
    results = evaluate(
        args.model,
        args.suite,
        out=args.out,
        heldout=args.heldout,
        data_folder=args.data_folder,
        limit=args.limit,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        add_bos_token=args.add_bos_token,
        allow_code_execution=args.allow_code_execution,
        skip_code_execution=args.skip_code_execution,
        skip_missing_data=args.skip_missing_data,
    )
    print("\n" + report.markdown_table(results))
    print(f"results in {results['out']}")
    return 0
