"""Submit a pretraining run to SLURM. The same command resumes a run that failed or was cancelled.

The script is `slurm/train.sbatch`, filled in. A run that is queued or running is not submitted a second time, not even
by two commands at the same moment.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lrnn import container, sbatch, shipped
from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.pretrain.checkpoint import format as checkpoint

if TYPE_CHECKING:
    from lrnn.pretrain.config import Config

TEMPLATE = shipped.BATCH_SCRIPTS / "train.sbatch"
RESERVED = {
    "comment": "it names the run, so that the next lrnn submit finds the job",
    "nodes": "use --nodes",
    "gpus-per-node": "use --gpus-per-node",
    "ntasks-per-node": "use --gpus-per-node: one task per GPU",
    "time": "use --time",
}


def submit(args: argparse.Namespace) -> int:
    """Submit the run of the parsed arguments of `lrnn submit`. Return the exit status.

    Raises:
        UserError: the run cannot be submitted. This is found before sbatch is called.
    """
    # These load transformers, which `lrnn submit --help` does without.
    from lrnn.pretrain.changes import check_changes
    from lrnn.pretrain.config import load_config, load_model_of
    from lrnn.pretrain.deepspeed_config import deepspeed_config
    from lrnn.pretrain.stages import naming, stages_left

    config = load_config(args.config, args.overrides)
    template = sbatch.read_template(args.template or TEMPLATE)
    options = sbatch_options(config, args, dict(sbatch.DIRECTIVE.findall(template)))
    load_model_of(config)  # errors that would stop the run are reported before it waits in a queue
    for stage in stages_left(config, checkpoint.samples_consumed(Path(config.run_dir))):
        with naming(stage, config):
            deepspeed_config(stage.config, int(options["nodes"] or 1) * int(options["ntasks-per-node"] or 1))
    saved = checkpoint.list_checkpoints(Path(config.run_dir))
    newest = next((folder for folder in reversed(saved) if checkpoint.holds(folder, "run.yaml")), None)
    if newest is not None:
        check_changes(newest, config, args.allow_change)
    allowed = ["--allow-change"] if args.allow_change else []
    run_dir = Path(config.run_dir).resolve()
    paths = [run_dir, *container.paths_in([args.config, config.model_dump()])]
    script = sbatch.fill(
        template, options, [args.config, *args.overrides, *allowed], container.words(args.container, paths)
    )
    status = describe(config)
    if args.dry_run:
        print(f"{script}\n# {status}; not submitted (--dry-run)")
        return 0
    with sbatch.only_one(run_dir, "run_dir"):
        refuse_second_job(run_dir)
        try:
            write_atomically(run_dir / "train.sbatch", script)
        except OSError as error:
            raise sbatch.not_writable(run_dir, "run_dir", error) from None
        job = sbatch.submit(run_dir / "train.sbatch")
    print(f"{script}\nsubmitted job {job}: {status}; output in {run_dir / 'slurm.log'}")
    return 0


def sbatch_options(config: "Config", args: argparse.Namespace, template: dict[str, str]) -> dict[str, str | None]:
    """Return the options to set in the template; an option of value None is left out.

    Raises:
        UserError: a value is not allowed, or an option cannot be set.
    """
    counts = {"nodes": 1, "gpus-per-node": 0}
    for name, lowest in counts.items():
        given = getattr(args, name.replace("-", "_"))
        value = str(given) if given is not None else template.get(name, str(lowest))
        counts[name] = sbatch.count(f"--{name}", value, lowest)
    gpus = counts["gpus-per-node"]
    run_dir = Path(config.run_dir).resolve()
    options: dict[str, str | None] = {
        "job-name": f"lrnn-{run_dir.name}",
        "comment": comment(run_dir),
        "chdir": sbatch.pattern(Path.cwd()),
        "output": sbatch.pattern(run_dir / "slurm.log"),
        "nodes": str(counts["nodes"]),
        "ntasks-per-node": str(max(1, gpus)),
        "gpus-per-node": str(gpus) if gpus else None,
    }
    if args.time is not None:
        options["time"] = args.time
    return options | sbatch.other_options(args.sbatch, RESERVED)


def comment(run_dir: Path) -> str:
    """Return the comment that marks the jobs of a run."""
    return f"lrnn run_dir={run_dir}"


def refuse_second_job(run_dir: Path) -> None:
    """Raise UserError if a job of the run may still write into its folder, now or later."""
    for job in sbatch.jobs():
        if job.comment != comment(run_dir):
            continue
        waits = f", {job.reason}" if job.reason != "None" else ""
        raise UserError(
            f"run_dir {run_dir} already has job {job.number} ({job.state}{waits}), which resumes by itself: wait for "
            f"its end, or end it with `scancel {job.number}`, or choose another run_dir"
        )


def describe(config: "Config") -> str:
    """Return what a job would do: start the run or resume it. Raises UserError if the run is finished."""
    run_dir = Path(config.run_dir)
    steps = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run_dir)]
    if not steps:
        return f"new run {run_dir}, {config.steps} steps"
    if steps[-1] >= config.steps:
        intact = checkpoint.find_newest(run_dir)  # reads all files, so it is called only if it matters
        if intact is not None and checkpoint.step_of(intact) >= config.steps:
            raise UserError(
                f"run_dir {run_dir} is finished: {intact} is step {steps[-1]} of {config.steps}; "
                "raise steps and add --allow-change, or choose another run_dir"
            )
    return f"resumes {run_dir} at its newest intact checkpoint (step {steps[-1]} of {config.steps})"
