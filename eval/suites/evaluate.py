"""Evaluate one exported model on one suite: check the request, run the tasks, write the result folder."""

import os
import time
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval import result_folder
from lrnn.eval.model_folder import check_export, describe_model, says_add_bos
from lrnn.eval.offline import go_offline
from lrnn.eval.suites import fetch_data, harness, hub_data, report, sandbox, sections
from lrnn.eval.suites.card_results import update_card
from lrnn.eval.suites.suites import CODE_TASKS, GENERATION_TOKENS, HELDOUT_TASK, STATE_TRACKING, find_suite
from lrnn.files import sha256


def evaluate(
    model: Path,
    suite: str,
    *,
    out: Path | None = None,
    heldout: Path | None = None,
    data_folder: Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    allow_code_execution: bool = False,
    skip_code_execution: bool = False,
    skip_missing_data: bool = False,
) -> dict[str, Any]:
    """Run `suite` on the exported folder `model`, write the result folder, and return the content of results.json.

    A text begins with bos if `add_bos_token` is true. None follows the folder's tokenizer_config.json, or the tokenizer
    itself if that does not say.

    Raises:
        UserError: something is wrong with the request; this is found before the model is loaded.
    """
    tasks, left_out = choose_tasks(suite, heldout is not None, allow_code_execution, skip_code_execution)
    if heldout is not None:
        os.environ["LRNN_EVAL_HELDOUT"] = str(heldout.resolve())
    if data_folder is not None:
        os.environ[hub_data.FOLDER] = str(data_folder.resolve())
    config = check_export(model)
    for name, value in (("--limit", limit), ("--batch-size", batch_size), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    out = model / "eval" / suite if out is None else out
    result_folder.check_output(out)
    max_length = max_length or config.get("max_position_embeddings") or 2048
    if add_bos_token is None:
        add_bos_token = says_add_bos(model)
    go_offline()
    harness.silence_expected_warnings()
    missing = hub_data.missing_tasks(tasks)
    if missing and not skip_missing_data:
        raise UserError(hub_data.describe_missing(missing, suite))
    tasks, left_out = [task for task in tasks if task not in missing], left_out + missing
    loaded = harness.load_tasks(tasks)
    check_lengths(model, loaded, max_length, limit)
    if CODE_TASKS.intersection(tasks):
        sandbox.run("")  # fails now, not after hours of generation, if this system cannot isolate programs
    lm, settings = harness.load_model(model, device, dtype, batch_size, max_length, add_bos_token)
    start = time.time()
    raw = harness.run_tasks(lm, loaded, limit)
    rows = report.metric_rows(raw)
    results: dict[str, Any] = {
        "schema_version": result_folder.SCHEMA_VERSION,
        "suite": suite,
        "out": str(out),
        "left_out": left_out,
        "limit": limit,
        "metrics": [*sections.score_rows(rows), *rows],
        "by_length": sections.length_rows(raw),
        "seconds": round(time.time() - start, 1),
        "model": describe_model(model),
        "settings": settings,
        "data": {
            "manifest_sha256": fetch_data.manifest_sha256(),
            "heldout": str(heldout) if heldout else None,
            "heldout_sha256": sha256(heldout) if heldout else None,
        },
        "environment": result_folder.describe_environment(settings["device"]),
    }
    report.write(out, results, raw)
    update_card(model)
    return results


def choose_tasks(suite: str, heldout: bool, allow_code: bool, skip_code: bool) -> tuple[list[str], list[str]]:
    """Return the tasks to run and those left out.

    Raises:
        UserError: the suite runs code, and the user has neither allowed nor skipped that.
    """
    tasks = [*([HELDOUT_TASK] if heldout else []), *find_suite(suite).tasks]
    code = [task for task in tasks if task in CODE_TASKS]
    if not code or allow_code:
        return tasks, []
    if not skip_code:
        raise UserError(
            f"suite {suite!r} runs code written by the model ({', '.join(code)}): add --allow-code-execution to run it "
            "in a sandbox, or --skip-code-execution to leave these tasks out"
        )
    return [task for task in tasks if task not in code], code


def check_lengths(folder: Path, tasks: dict[str, Any], max_length: int, limit: int | None) -> None:
    """Raise UserError if a gold answer, or what a task may generate, does not fit into `max_length` tokens.

    lm-eval truncates a longer prompt from the left. In a state-tracking question that would change the right answer,
    so there the prompt has to fit too.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded, or needs code of its own ({reason})") from error
    needs = {name: _tokens_needed(name, task, tokenizer, limit) for name, task in tasks.items()}
    name, (needed, what) = max(needs.items(), key=lambda item: item[1][0])
    if needed > max_length:
        raise UserError(
            f"{name} {what} up to {needed} tokens, more than the model's max_position_embeddings or --max-length, "
            f"{max_length}: give --max-length {max(2048, needed)} (a linear RNN has no hard limit of its own)"
        )


def _tokens_needed(name: str, task: Any, tokenizer: Any, limit: int | None) -> tuple[int, str]:
    """Return how many tokens must fit into the context for a task, and which ones, as the verb of a message."""

    def longest(texts: list[str]) -> int:
        return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    generated = GENERATION_TOKENS.get(name, 0) + 1  # 1 more for a tokenizer that adds a BOS in front
    if name in STATE_TRACKING:
        docs = task.test_docs()[:limit]
        pairs = zip(docs["context"], docs["choices"], strict=True)
        answered = [f"{context} {max(choices, key=len)}" for context, choices in pairs]
        return longest(answered) + generated, "has prompts with answers of"
    if task.OUTPUT_TYPE == "loglikelihood" and "continuation" in task.test_docs().column_names:
        # 8 more, because the context can change how an answer's first characters are tokenised.
        return longest(task.test_docs()[:limit]["continuation"]) + 8, "has gold answers of"
    return generated, "generates"
