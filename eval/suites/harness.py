"""The calls to lm-eval: load its tasks and its model, and run them."""

import functools
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.model_folder import default_device
from lrnn.eval.suites import report, sandbox
from lrnn.eval.suites.suites import CODE_TASKS, TASK_FOLDER


def silence_expected_warnings() -> None:
    """Drop two warnings of lm-eval that do not apply to these tasks.

    It warns that every task with `custom_dataset` could take arguments, and that the metrics of state-tracking tasks
    are means over different documents, which is intended: every length has its own.
    """
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())
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


def load_tasks(tasks: list[str]) -> dict[str, Any]:
    """Return lm-eval's task objects by name, with their data. A task object serves one run only.

    Raises:
        UserError: a package that a task needs is missing.
    """
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False).load(tasks)["tasks"]
    except ImportError as error:
        raise UserError(f"a task needs a package that is missing ({error}): pip install 'lrnn[eval]'") from error


def load_model(
    folder: Path, device: str | None, dtype: str | None, batch_size: int, max_length: int, add_bos_token: bool | None
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's own Hugging Face model of the folder, and the settings that it was loaded with.

    The folder is untrusted: none of its code is run, and nothing is unpickled.
    """
    from lrnn.eval.suites.model import Model

    device, dtype = default_device(device, dtype)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size, "max_length": max_length}
    settings["add_bos_token"] = add_bos_token
    settings["softmax_dtype"] = "float32"  # in bfloat16 a log-softmax is quantised to 0.005 nats per token
    print(f"loading {folder} on {device} in {dtype}", flush=True)
    try:
        options = {"backend": "causal", "trust_remote_code": False, "use_safetensors": True}  # no guess at the backend
        return Model(pretrained=str(folder), **options, **settings), settings
    except OSError as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def run_tasks(lm: Any, tasks: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Run lm-eval's `simple_evaluate` on one task after another, with a line each, and merge results and samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    describe_machine_once()
    os.environ["DISABLE_MULTIPROC"] = "1"  # otherwise lm-eval forks this process, GPU context and all, for a bootstrap
    leave_out_complaints_of_git()
    no_other_tasks = TaskManager(include_defaults=False)
    merged: dict[str, Any] = {}
    for number, (name, task) in enumerate(tasks.items(), start=1):
        start = time.time()
        print(f"[{number}/{len(tasks)}] {name} ...", flush=True)
        # Code tasks are in `tasks` only if the user allowed them. bootstrap_iters only switches standard errors on.
        with (
            sandbox.counting(min(len(task.eval_docs), limit or len(task.eval_docs)))
            if name in CODE_TASKS
            else nullcontext()
        ):
            raw = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=no_other_tasks,
                limit=limit,
                bootstrap_iters=100,
                log_samples=True,
                confirm_run_unsafe_code=True,
            )
        assert raw is not None  # it is None only on ranks other than 0, and this is the only process
        for key, value in raw.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        scores = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in report.metric_rows(raw))
        print(f"[{number}/{len(tasks)}] {name}: {scores} ({time.time() - start:.0f} s)", flush=True)
    return merged
