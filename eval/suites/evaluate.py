"""Evaluate one model on a suite or on tasks: check the request, run the tasks, write the result folder."""

import os
import time
from typing import Any

from lrnn.errors import UserError
from lrnn.eval import offline, result_folder
from lrnn.eval.loading import choose_device
from lrnn.eval.model_folder import check_export, describe_model, says_add_bos
from lrnn.eval.statistics import RESAMPLES
from lrnn.eval.suites import build, fetch_data, harness, hub_data, prompts, report, sandbox, sections
from lrnn.eval.suites.bos import decide
from lrnn.eval.suites.card_results import update_card
from lrnn.eval.suites.kept_answers import KeptAnswers
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.suites import CODE_TASKS, HELDOUT_TASK, choose_tasks, find_suite
from lrnn.eval.suites.task_objects import Loaded
from lrnn.files import sha256


def evaluate(request: Request) -> dict[str, Any]:
    """Run a suite or tasks on a model folder, write the result folder, and return the content of results.json.

    Raises:
        UserError: something is wrong with the request; this is found before the model is loaded.
    """
    request.check()
    names, left_out = choose_suite(request) if request.suite else (named(request), [])
    for variable, path in (("LRNN_EVAL_HELDOUT", request.heldout), (hub_data.FOLDER, request.data_folder)):
        if path is not None:
            os.environ[variable] = str(path.resolve())
    check_export(request.model)
    result_folder.check_output(request.folder)
    devices = harness.choose_devices(request.device, request.num_processes)
    choose_device(devices[0], request.dtype)  # fails now, not after the prompts are built
    if request.suite:
        offline.go_offline()
        names, left_out = leave_out_missing(request, names, left_out)
    else:
        offline.plain_progress()
    harness.silence_expected_warnings()
    tokenizer = prompts.load_tokenizer(request.model)
    bos = decide(request.bos, tokenizer, says_add_bos(request.model))
    max_length = request.max_length or prompts.context_length(request.model, tokenizer)
    render = prompts.chat_renderer(tokenizer, request.apply_chat_template)
    loaded = load(request, names, max_length)
    build.build(loaded, request, render)
    cut = build.check_lengths(loaded, tokenizer, len(bos.ids), max_length, request)
    if cut:
        print(report.cut_note(cut, max_length), flush=True)
    if CODE_TASKS.intersection(loaded.tasks):
        sandbox.check()  # fails now, not after hours of generation, if this system cannot isolate programs
    model, helpers = harness.load_model(
        request.model, devices, request.dtype, request.batch_size, max_length, request.bos
    )
    start = time.time()
    about = describe(request, model.settings)
    kept = KeptAnswers(request.folder, about)
    try:
        lm = harness.in_chunks(model, helpers, kept)
        raw = harness.run_tasks(lm, loaded, request.limit, request.seeds, RESAMPLES if request.tasks else 100)
    finally:
        kept.close()
        for helper in helpers:
            helper.close()
    left_out += loaded.left_out
    results = collect_results(request, raw, about, left_out, cut, round(time.time() - start, 1))
    report.write(request.folder, results, raw)
    kept.remove()
    update_card(request.model)
    return results


def load(request: Request, names: list[str], max_length: int) -> Loaded:
    """Return the task objects of a request, loaded with lm-eval's seeds."""
    build.seed(request)
    metadata = {"pretrained": str(request.model), "max_length": max_length}  # as lm-eval passes its model arguments
    if request.text is not None:
        metadata["haystack"] = str(request.text)
    if request.suite:
        return harness.load_tasks(names, metadata=metadata)
    metadata |= request.metadata
    return harness.load_tasks(names, request.include_path, metadata, request.code)


def describe(request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the results depend on: the part of results.json that an evaluation which continues must share."""
    heldout = request.heldout
    return {
        "suite": request.suite or request.name,
        "tasks": list(request.tasks),
        "protocol": request.protocol(),
        "limit": request.limit,
        "model": describe_model(request.model),
        "settings": settings,
        "data": {
            "manifest_sha256": fetch_data.manifest_sha256(),
            "heldout": str(heldout) if heldout else None,
            "heldout_sha256": sha256(heldout) if heldout else None,
            "haystack": str(request.text) if request.text else None,
            "haystack_sha256": sha256(request.text) if request.text else None,
        },
        "environment": result_folder.describe_environment(settings["device"]),
    }


def collect_results(
    request: Request,
    raw: dict[str, Any],
    about: dict[str, Any],
    left_out: list[str],
    cut: dict[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        request: what was asked for.
        raw: the result of `run_tasks`.
        about: what the results depend on.
        left_out: names of tasks.
        cut: by task, the number of prompts that were cut to fit into the context.
        seconds: wall time of the evaluation.
    """
    rows = report.metric_rows(raw)
    return {
        "schema_version": result_folder.SCHEMA_VERSION,
        **about,
        "out": str(request.folder),
        "left_out": left_out,
        "cut": cut,
        "metrics": [*sections.score_rows(rows), *rows],
        "by_length": sections.length_rows(raw),
        "seconds": seconds,
    }


def named(request: Request) -> list[str]:
    """Return the names of the request's tasks."""
    return [*([HELDOUT_TASK] if request.heldout is not None else []), *request.tasks]


def choose_suite(request: Request) -> tuple[list[str], list[str]]:
    """Return the tasks of the request's suite to run and those left out."""
    permission = request.allow_code_execution, request.skip_code_execution
    return choose_tasks(request.suite, request.heldout is not None, *permission)


def leave_out_missing(request: Request, names: list[str], left_out: list[str]) -> tuple[list[str], list[str]]:
    """Return the tasks to run and those left out, now also for lack of data. Raise UserError unless that is allowed."""
    missing = hub_data.missing_tasks(names)
    needed = [name for name in missing if name not in find_suite(request.suite).optional]
    if needed and not request.skip_missing_data:
        raise UserError(hub_data.describe_missing(needed, request.suite))
    if missing:
        print(f"left out for lack of data: {', '.join(missing)} (`lrnn eval --fetch --suite {request.suite}` gets it)")
    return [name for name in names if name not in missing], left_out + missing
