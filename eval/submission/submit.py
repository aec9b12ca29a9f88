"""Submit evaluations as one array of jobs, and a job that collects when they have ended."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from lrnn import container, sbatch, shipped
from lrnn.errors import UserError
from lrnn.eval.submission.models import find_models
from lrnn.eval.submission.requests import make_requests
from lrnn.eval.submission.table import Evaluation, comment, evaluations, queued
from lrnn.files import write_atomically

EVAL, COLLECT = shipped.BATCH_SCRIPTS / "eval.sbatch", shipped.BATCH_SCRIPTS / "collect.sbatch"
RESERVED = {
    "array": "the table of jobs sets it; --max-concurrent limits how many run at the same time",
    "comment": "it names the table of jobs, so that the next lrnn submit finds them",
    "gpus-per-node": "use --gpus-per-node",
    "time": "use --time",
}


def submit_evaluations(args: argparse.Namespace, options: list[str]) -> int:
    """Submit the evaluations of the parsed arguments of `lrnn submit`. Return the exit status.

    Args:
        args: the parsed arguments.
        options: options of `lrnn eval`.

    Raises:
        UserError: something is wrong, or SLURM refuses the jobs. Nothing stays submitted then.
    """
    template = sbatch.read_template(args.template or EVAL)
    directives = sbatch_options(args)
    requests = make_requests(args.suite, args.tasks, options)
    every = evaluations(find_models(args.eval, args.checkpoints), requests)
    roots = list(dict.fromkeys(evaluation.model.root for evaluation in every))
    left = [evaluation for evaluation in every if not evaluation.is_done]
    done = f"{len(every) - len(left)} with results"
    if args.dry_run:
        plan = sbatch.Submission.next(roots[0], "jobs.tsv")
        print(_script(template, directives, args, plan, left, options) if left else "# nothing to submit")
        print("".join(f"# {evaluation.line}" for evaluation in left), end="")
        print(f"# {len(left)} to evaluate, {done}; not submitted, and SLURM not asked what is queued (--dry-run)")
        return 0
    if not left:
        print(f"nothing to submit: {done}; `lrnn eval --collect {' '.join(map(str, roots))}` shows them")
        return 0
    with ExitStack() as locks:
        for root in sorted(roots):
            locks.enter_context(sbatch.only_one(root, "the folder of results"))
        waiting = queued()
        left = [evaluation for evaluation in left if evaluation.out not in waiting and not evaluation.is_done]
        done += f", {sum(evaluation.out in waiting for evaluation in every)} queued or running"
        if not left:
            print(f"nothing to submit: {done}")
            return 0
        plan = sbatch.Submission.next(roots[0], "jobs.tsv")
        script = _script(template, directives, args, plan, left, options)
        jobs = _submit(plan, script, left, _collecting(directives, args, plan, roots))
    print(
        f"submitted job {jobs[0]}: {len(left)} to evaluate, {done}; listed in {plan.file('jobs.tsv')}, logs beside it\n"
        f"submitted job {jobs[1]}, which starts after it and writes {plan.root / 'table.md'} and results.html"
    )
    return 0


def sbatch_options(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the options of sbatch that the user asked for; an option of value None is left out of the template.

    Raises:
        UserError: a value is not allowed, or an option cannot be set.
    """
    options: dict[str, str | None] = {}
    if args.gpus_per_node is not None:
        gpus = sbatch.count("--gpus-per-node", str(args.gpus_per_node), 0)
        options |= {"gpus": None, "nodes": "1", "gpus-per-node": str(gpus) if gpus else None}
    if args.time is not None:
        options["time"] = args.time
    if args.max_concurrent is not None:
        sbatch.count("--max-concurrent", args.max_concurrent, 1)
    return options | sbatch.other_options(args.sbatch, RESERVED)


def _script(
    template: str,
    directives: dict[str, str | None],
    args: argparse.Namespace,
    plan: sbatch.Submission,
    left: list[Evaluation],
    options: list[str],
) -> str:
    """Return the batch script of the array."""
    limit = f"%{args.max_concurrent}" if args.max_concurrent is not None else ""
    table = plan.file("jobs.tsv")
    own = {
        "job-name": f"lrnn-eval-{plan.root.parent.name}",
        "comment": comment(table),
        "chdir": sbatch.pattern(Path.cwd()),
        "output": plan.log("%A-%a.log"),
        "array": f"0-{len(left) - 1}{limit}",
    }
    return sbatch.fill(template, {**own, **directives}, [str(table), *options], _container(args, left, options))


def _container(args: argparse.Namespace, left: list[Evaluation], options: list[str]) -> list[str]:
    """Return the words that start the container of the evaluations, if they are to run in one."""
    folders = [folder for evaluation in left for folder in (evaluation.model.folder, evaluation.model.root)]
    # A folder of results may not exist yet, and is made by the job.
    wanted = [folder if folder.is_dir() else folder.parent for folder in folders]
    return container.words(args.container, [*wanted, *container.paths_in(options)])


def _collecting(
    directives: dict[str, str | None], args: argparse.Namespace, plan: sbatch.Submission, roots: list[Path]
) -> str:
    """Return the batch script of the job that collects, without its dependency."""
    own = {
        "job-name": f"lrnn-collect-{plan.root.parent.name}",
        "chdir": sbatch.pattern(Path.cwd()),
        "output": plan.log("collect-%j.log"),
    }
    shared = {name: value for name, value in directives.items() if name in sbatch.OF_FOLLOWING}
    arguments = [str(plan.root), *map(str, roots)]
    return sbatch.fill(
        sbatch.read_template(COLLECT), {**own, **shared}, arguments, container.words(args.container, roots)
    )


def _submit(plan: sbatch.Submission, script: str, left: list[Evaluation], collecting: str) -> tuple[str, str]:
    """Write the files, submit both jobs, and return their numbers. If the second is refused, the first is cancelled."""
    texts = {
        "jobs.tsv": "".join(evaluation.line for evaluation in left),
        "eval.sbatch": script,
        "collect.sbatch": collecting,
    }
    try:
        (plan.root / "slurm").mkdir(exist_ok=True)
        for name, text in texts.items():
            write_atomically(plan.file(name), text)
    except OSError as error:
        raise sbatch.not_writable(plan.root, "the folder of results", error) from None
    array = sbatch.submit(plan.file("eval.sbatch"))
    try:
        return array, sbatch.submit(plan.file("collect.sbatch"), f"--dependency=afterany:{array}")
    except UserError as error:
        sbatch.call("scancel", array)
        raise UserError(f"{error}; this was the job that collects, and the array {array} is cancelled") from None
