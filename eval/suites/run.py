"""Run an evaluation suite of lm-eval on an exported model, offline.

The suites are `quick`, `fast`, `code_math` and `state_tracking`; `--heldout FILE` adds the bits per byte of held-out
documents. The data is fetched once with `lrnn eval --fetch`; `state_tracking` makes its own. Results go to
DIR/eval/SUITE: results.json, table.md, lm-eval's own results and its samples. Suites with pass@1 run code that the
model wrote, in a sandbox, only with --allow-code-execution.

The tasks are ordinary lm-eval tasks, so lm-eval's own command line runs them on the same folder:

  HF_HUB_OFFLINE=1 python -m lm_eval run --model hf \\
    --model_args pretrained=DIR,trust_remote_code=True,dtype=float32,softmax_dtype=float32,max_length=2048 \\
    --include_path "$(python -c 'from lrnn.eval.suites.suites import TASK_FOLDER; print(TASK_FOLDER)')" \\
    --tasks lrnn_humaneval_bpb,lrnn_gsm8k_bpb --output_path out --log_samples

(`lrnn_heldout_bpb` reads the file named by LRNN_EVAL_HELDOUT; code tasks want --confirm_run_unsafe_code; the groups
`state_tracking`, `state_tracking_mc` and `state_tracking_gen` name all tasks of that suite, but lm-eval cuts a prompt
longer than max_length without a word, where `lrnn eval` refuses it. Unlike that
line, `lrnn eval` itself runs no code of the folder: it has lrnn's own.)
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.state_tracking import text_report
from lrnn.eval.suites import fetch_data, report, sandbox
from lrnn.eval.suites.suites import (
    CODE_TASKS,
    GENERATION_TOKENS,
    HELDOUT_TASK,
    STATE_TRACKING,
    SUITES,
    TASK_FOLDER,
    find_suite,
)

EXAMPLE = """examples:
  lrnn eval --fetch
  lrnn eval runs/tiny/hf --suite quick --heldout corpora/tiny/heldout.jsonl --limit 50
  lrnn eval runs/1.3b/hf --suite code_math --allow-code-execution --batch-size 32
  lrnn eval runs/1.3b/hf --suite state_tracking --max-length 8192
  lrnn eval --compare runs/a/hf/eval/fast runs/b/hf/eval/fast
  lrnn eval --collect runs/1.3b/eval
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "; ".join(f"{suite.name}: {suite.purpose}" for suite in SUITES.values())
    parser.epilog = EXAMPLE
    parser.add_argument("model", nargs="?", type=Path, metavar="DIR", help="exported Hugging Face model folder")
    parser.add_argument("--suite", help=suites)
    parser.add_argument("--out", type=Path, help="result folder (default: DIR/eval/SUITE)")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help='held-out documents, jsonl rows {"text": ...}')
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of every task")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", help="of the weights (default: bfloat16 on cuda, float32 on cpu)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument(
        "--max-length", type=int, help="tokens of context at most (default: max_position_embeddings of the model)"
    )
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--allow-code-execution", action="store_true", help="run model-written code in the sandbox")
    code.add_argument("--skip-code-execution", action="store_true", help="leave out the tasks that run code")
    parser.add_argument("--fetch", action="store_true", help="download the benchmark data (86 MB, once)")
    parser.add_argument("--collect", nargs="+", type=Path, metavar="FOLDER", help="one table of all results below")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", help="compare two result folders, paired")


def main(args: argparse.Namespace) -> int:
    if args.collect:
        from lrnn.eval.suites.collect import collect

        print(collect(args.collect))
        return 0
    if args.compare:
        from lrnn.eval.suites.compare import compare

        print(compare(*args.compare))
        return 0
    if args.fetch:
        fetch_data.fetch()
        if args.model is None:
            return 0
    if args.model is None or args.suite is None:
        raise UserError(f"name a model folder and a suite: lrnn eval DIR --suite {{{','.join(SUITES)}}}")
    results = evaluate(
        args.model,
        args.suite,
        out=args.out,
        heldout=args.heldout,
        limit=args.limit,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        allow_code_execution=args.allow_code_execution,
        skip_code_execution=args.skip_code_execution,
    )
    print("\n" + report.markdown_table(results))
    print(f"results in {results['out']}")
    return 0


def evaluate(
    model: Path,
    suite: str,
    *,
    out: Path | None = None,
    heldout: Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    allow_code_execution: bool = False,
    skip_code_execution: bool = False,
) -> dict[str, Any]:
    """Run `suite` on the exported folder `model`, write the result folder, return what results.json holds.

    Everything that can be wrong with the request raises UserError before the model is loaded.
    """
    tasks, left_out = choose_tasks(suite, heldout is not None, allow_code_execution, skip_code_execution)
    if heldout is not None:
        os.environ["LRNN_EVAL_HELDOUT"] = str(heldout.resolve())
    config = check_export(model)
    for name, value in (("--limit", limit), ("--batch-size", batch_size), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    out = model / "eval" / suite if out is None else out
    report.check_output(out)
    max_length = max_length or config.get("max_position_embeddings") or 2048
    prepare_environment()
    loaded = load_tasks(tasks)
    check_lengths(model, loaded, max_length, limit)
    if CODE_TASKS.intersection(tasks):
        sandbox.run("")  # says now, not after hours of generation, if this system cannot isolate programs
    lm, settings = load_model(model, device, dtype, batch_size, max_length)
    start = time.time()
    raw = run_tasks(lm, loaded, limit)
    rows = report.metric_rows(raw)
    results: dict[str, Any] = {
        "schema_version": report.SCHEMA_VERSION,
        "suite": suite,
        "out": str(out),
        "left_out": left_out,
        "limit": limit,
        "metrics": [*text_report.score_rows(rows), *rows],
        "by_length": text_report.length_rows(raw),
        "seconds": round(time.time() - start, 1),
        "model": report.describe_model(model),
        "settings": settings,
        "data": {
            "manifest_sha256": fetch_data.manifest_sha256(),
            "heldout": str(heldout) if heldout else None,
            "heldout_sha256": report.sha256(heldout) if heldout else None,
        },
        "environment": report.describe_environment(),
    }
    report.write(out, results, raw)
    return results


def choose_tasks(suite: str, heldout: bool, allow_code: bool, skip_code: bool) -> tuple[list[str], list[str]]:
    """The tasks to run and those left out; raises UserError if the suite runs code and nobody decided about that."""
    tasks = [*([HELDOUT_TASK] if heldout else []), *find_suite(suite).tasks]
    code = [task for task in tasks if task in CODE_TASKS]
    if not code or allow_code:
        return tasks, []
    if not skip_code:
        raise UserError(
            f"suite {suite!r} runs code that the model wrote ({', '.join(code)}): add --allow-code-execution to run it "
            "in a sandbox, or --skip-code-execution to leave these tasks out"
        )
    return [task for task in tasks if task not in code], code


def check_export(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises UserError if it is not a complete exported model.

    The weights have to be safetensors: other formats are pickles. A model that needs code of its own is refused.
    """
    from transformers import CONFIG_MAPPING

    if not folder.is_dir():
        raise UserError(f"model folder not found: {folder}")
    wanted = {"config.json": "config.json", "tokenizer_config.json": "a tokenizer", "model.safetensors*": "weights"}
    for pattern, what in wanted.items():
        if not any(folder.glob(pattern)):
            raise UserError(
                f"{folder} is not an exported model: it holds no {what} ({pattern}); "
                "`lrnn export` makes one from a checkpoint"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type: not an exported model")
    if config["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"{folder / 'config.json'}: neither lrnn nor transformers has the model_type {config['model_type']!r}, and "
            "code that comes with a model is not run; export the checkpoint with --format hf"
        )
    check_shards(folder / "model.safetensors.index.json")
    return config


def check_shards(index: Path) -> None:
    """Raises UserError where the index of weights in several files is no JSON, or names other files than safetensors,
    which transformers would unpickle."""
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weights: {error!r}") from None
        for name in names:
            if not str(name).endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}; only weights in safetensors are read")


def prepare_environment() -> None:
    """No network, and no bars in log files.

    Environment variables serve what is imported later; what `import lrnn` has already imported is set directly.
    """
    import huggingface_hub.constants

    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # Every task has `custom_dataset`, and lm-eval warns for each that it could take arguments. It also warns for every
    # state-tracking task that the metrics of the lengths are means over other documents, which they are meant to be.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())
    logging.getLogger("lm_eval.evaluator_utils").addFilter(
        lambda record: "not scored on the same number of documents" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        plain_progress()


def plain_progress() -> None:
    """Let every tqdm bar, lm-eval's too, write a plain line each half minute instead of redrawing itself."""
    import tqdm

    original = tqdm.tqdm.__init__
    style = {"delay": 30, "mininterval": 30, "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"}

    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, **style})

    if original.__name__ != "plain":
        setattr(tqdm.tqdm, "__init__", plain)  # noqa: B010 (mypy forbids to assign a method)


def load_tasks(tasks: list[str]) -> dict[str, Any]:
    """lm-eval's task objects by name, with their data; what is missing is said now. An object serves one run."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False).load(tasks)["tasks"]
    except ImportError as error:
        raise UserError(f"a task needs a package that is missing ({error}): pip install 'lrnn[eval]'") from error


def check_lengths(folder: Path, tasks: dict[str, Any], max_length: int, limit: int | None) -> None:
    """Raise UserError if a gold answer, or what a task may generate, does not fit into `max_length` tokens.

    Before those, lm-eval cuts a prompt from its left. With a state-tracking question that would change the right
    answer, so there the prompt has to fit too.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded, or needs code of its own ({reason})") from error
    too_long = {}
    for name, task in tasks.items():
        if name in STATE_TRACKING:
            docs = task.test_docs()[:limit]
            texts = [
                f"{context} {max(choices, key=len)}"
                for context, choices in zip(docs["context"], docs["choices"], strict=True)
            ]
            needed = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
            # 1 more for a tokenizer that sets a BOS in front.
            needed, what = needed + GENERATION_TOKENS.get(name, 0) + 1, "has prompts with answers of"
        elif task.OUTPUT_TYPE == "loglikelihood":
            answers = task.test_docs()[:limit]["continuation"]
            # 8 more, because a context before it can change how an answer's first characters are cut.
            needed = max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"])) + 8
            what = "has gold answers of"
        else:
            needed, what = GENERATION_TOKENS.get(name, 0) + 1, "generates"
        if needed > max_length:
            too_long[name] = (what, needed)
    if too_long:
        name, (what, needed) = max(too_long.items(), key=lambda item: item[1][1])
        raise UserError(
            f"{name} {what} up to {needed} tokens, more than the model's max_position_embeddings or --max-length, "
            f"{max_length}: give --max-length {max(2048, needed)} (a linear RNN has no hard limit of its own)"
        )


def load_model(
    folder: Path, device: str | None, dtype: str | None, batch_size: int, max_length: int
) -> tuple[Any, dict[str, Any]]:
    """lm-eval's own Hugging Face model on the folder, and the settings it was loaded with.

    The folder may be a stranger's: none of its code is run, and nothing is unpickled.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    settings = {"device": device, "dtype": dtype, "batch_size": batch_size, "max_length": max_length}
    settings["softmax_dtype"] = "float32"  # in bfloat16 a log-softmax is quantised to 0.005 nats a token
    print(f"loading {folder} on {device} in {dtype}", flush=True)
    try:
        return HFLM(pretrained=str(folder), trust_remote_code=False, use_safetensors=True, **settings), settings
    except OSError as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def run_tasks(lm: Any, tasks: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """lm-eval's `simple_evaluate` task by task with a line each; returns its results merged, with samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    no_other_tasks = TaskManager(include_defaults=False)
    merged: dict[str, Any] = {}
    for number, (name, task) in enumerate(tasks.items(), start=1):
        start = time.time()
        print(f"[{number}/{len(tasks)}] {name} ...", flush=True)
        # Code tasks are in `tasks` only if the user allowed them; bootstrap_iters only switches standard errors on.
        raw = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=no_other_tasks,
            limit=limit,
            bootstrap_iters=100,
            log_samples=True,
            confirm_run_unsafe_code=True,
        )
        assert raw is not None  # None only on ranks other than 0, and this is one process
        for key, value in raw.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        scores = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in report.metric_rows(raw))
        print(f"[{number}/{len(tasks)}] {name}: {scores} ({time.time() - start:.0f} s)", flush=True)
    return merged
