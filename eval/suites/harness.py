"""The calls to lm-eval: load its model, and run tasks."""

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.model_folder import default_device
from lrnn.eval.suites import report, sandbox
from lrnn.eval.suites.request import SEEDS
from lrnn.eval.suites.suites import CODE_TASKS
from lrnn.eval.suites.task_objects import Loaded
from lrnn.eval.suites.task_objects import load_tasks as load_tasks


def silence_expected_warnings() -> None:
    """Drop warnings of lm-eval that say nothing about a run.

    It warns that every task with `custom_dataset` could take arguments, that a task's file leaves a metric as it is by
    default, and that the metrics of state-tracking tasks are means over different documents, which is intended: every
    length has its own.
    """
    logging.getLogger("lm_eval.api.task").addFilter(
        lambda record: not any(text in record.getMessage() for text in ("Custom kwargs", "is defined, but"))
    )
    logging.getLogger("lm_eval.evaluator_utils").addFilter(
        lambda record: "not scored on the same number of documents" not in record.getMessage()
    )


def describe_machine_once() -> None:
    """Let lm-eval describe the machine once per process. It starts pip and others for that after every task: 1.5 s."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


def leave_out_complaints_of_git() -> None:
    """Let lm-eval ask for the commit of the current folder only in a repository. Elsewhere git prints an error."""
    from lm_eval import evaluator

    inside = any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
    if not inside:
        evaluator.get_git_commit_hash = lambda: None


def load_model(
    folder: Path, devices: list[str], dtype: str | None, batch_size: int | str, max_length: int, bos: str
) -> tuple[Any, list[Any]]:
    """Return lm-eval's model of the folder on the first device, and a process with it for each other device.

    The folder is untrusted: none of its code is run, and nothing is unpickled.
    """
    from lrnn.eval.suites.chunked import Helper, share_cores
    from lrnn.eval.suites.model import Model

    device, dtype = default_device(devices[0], dtype)
    print(f"loading {folder} on {', '.join(devices)} in {dtype}", flush=True)
    options: dict[str, Any] = {"bos": bos, "dtype": dtype, "batch_size": batch_size, "max_length": max_length}
    helpers = [Helper(folder, options | {"device": other}, len(devices)) for other in devices[1:]]
    if helpers:
        share_cores(len(devices))
    return Model(folder, device=device, **options), helpers


def choose_devices(device: str | None, processes: int | None) -> list[str]:
    """Return the device of each process: all visible GPUs, or the given device.

    Raises:
        UserError: there are not as many devices as processes.
    """
    import torch

    gpus = torch.cuda.device_count()
    if device is None and processes is None and gpus > 1:
        processes = gpus
    if processes in (None, 1):
        return [default_device(device, None)[0]]
    if device == "cpu" or (device is None and not gpus):
        return ["cpu"] * processes
    if device not in (None, "cuda"):
        raise UserError(f"--device {device} is one device; leave it out to use --num-processes {processes}")
    if processes > gpus:
        raise UserError(f"--num-processes {processes} needs as many GPUs, and {gpus} are visible")
    return ["cuda", *(f"cuda:{i}" for i in range(1, processes))]


def in_chunks(model: Any, helpers: list[Any], kept: Any) -> Any:
    """Return the model for lm-eval: `ChunkedModel`, whose module cannot be imported before the process is offline."""
    from lrnn.eval.suites.chunked import ChunkedModel

    return ChunkedModel(model, helpers, kept)


def start_no_processes() -> None:
    """Let lm-eval describe neither the machine nor the repository, for which it starts processes after every task.

    A process that trains should not fork.
    """
    from lm_eval import evaluator
    from torch.utils import collect_env

    collect_env.get_pretty_env_info = functools.cache(lambda: "")
    evaluator.get_git_commit_hash = lambda: None


def print_at_once(line: str) -> None:
    """Print a line."""
    print(line, flush=True)


def run_tasks(
    lm: Any,
    loaded: Loaded,
    limit: float | None = None,
    seeds: Sequence[int | None] = SEEDS,
    iterations: int = 100,
    say: Callable[[str], None] = print_at_once,
) -> dict[str, Any]:
    """Run lm-eval's `simple_evaluate` on one task after another, with a line each, and merge results and samples.

    Args:
        seeds: of random, numpy, torch and the few-shot examples.
        iterations: resamples for the standard error of metrics that lm-eval bootstraps; of a mean it has a formula.
        say: takes the lines.
    """
    from lm_eval import simple_evaluate
    from lm_eval.evaluator_utils import get_sample_size
    from lm_eval.tasks import TaskManager

    describe_machine_once()
    os.environ["DISABLE_MULTIPROC"] = "1"  # otherwise lm-eval forks this process, GPU context and all, for a bootstrap
    leave_out_complaints_of_git()
    no_other_tasks = TaskManager(include_defaults=False)
    of_random, of_numpy, of_torch, of_examples = seeds
    merged: dict[str, Any] = {}
    for number, (name, task) in enumerate(loaded.tasks.items(), start=1):
        start = time.time()
        say(f"[{number}/{len(loaded.tasks)}] {name} ...")
        documents = get_sample_size(task, limit) or len(task.eval_docs)
        with sandbox.counting(min(len(task.eval_docs), documents)) if name in CODE_TASKS else nullcontext():
            raw = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=no_other_tasks,
                limit=limit,
                bootstrap_iters=iterations,
                log_samples=True,
                confirm_run_unsafe_code=True,  # code tasks are in `loaded` only if the user allowed them
                random_seed=of_random,
                numpy_random_seed=of_numpy,
                torch_random_seed=of_torch,
                fewshot_random_seed=of_examples,
            )
        assert raw is not None  # it is None only on ranks other than 0, and this is the only process
        for key, value in raw.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        scores = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in report.metric_rows(raw))
        say(f"[{number}/{len(loaded.tasks)}] {name}: {scores} ({time.time() - start:.0f} s)")
    aggregate_groups(merged, loaded)
    return merged


def aggregate_groups(merged: dict[str, Any], loaded: Loaded) -> None:
    """Add `groups`, those that aggregate over their tasks, and `group_subtasks` to merged results, as lm-eval does.

    Add `weight_by_size` too: by group and metric, whether its mean is over documents instead of tasks.
    """
    for name, group in loaded.groups.items():
        merged.setdefault("group_subtasks", {})[name] = group.child_names
        if group.has_aggregation:
            merged.setdefault("groups", {})[name] = group.aggregate(merged["results"])
            by_size = {entry.metric: entry.weight_by_size for entry in group.aggregate_metric_list}
            merged.setdefault("weight_by_size", {})[name] = by_size
