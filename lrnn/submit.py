"""Submit a pretraining run, or evaluations of its checkpoints, to SLURM. The same command again submits what is left.

`lrnn submit CONFIG` starts a run or resumes it. The command fills in `slurm/train.sbatch`, shows it, writes it to
RUN_DIR/train.sbatch and gives it to sbatch. A run that is queued or running is not submitted a second time, not even by
two commands at the same moment.

`lrnn submit --eval RUN --suite fast` evaluates all checkpoints of a run in one array of jobs, and then collects: a job
that starts after the array writes RUN/eval/table.md and RUN/eval/results.html. RUN may also be one checkpoint or a
model folder, and there may be several of them. Pairs of model and suite that have results, or that are queued or
running, are left out. Options of `lrnn eval` follow after --.

Variables that sbatch reads from its environment (SBATCH_ACCOUNT, SBATCH_PARTITION) apply here too.
"""

import argparse
from pathlib import Path

from lrnn import container
from lrnn.errors import UserError

EXAMPLES = """examples:
  lrnn submit configs/1.3b.yaml --nodes 4 run_dir=runs/1.3b
  lrnn submit configs/340m.yaml --time 12:00:00 --sbatch partition=h100 --sbatch account=nlp --dry-run
  lrnn submit --eval runs/1.3b --suite fast,code_math -- --allow-code-execution --batch-size 32
  lrnn submit --eval runs/1.3b runs/340m/hf --checkpoints every:10000 --tasks hellaswag,arc_easy --max-concurrent 8"""
OF_EVAL = ("suite", "tasks", "checkpoints", "max_concurrent")
OF_TRAINING = ("nodes", "allow_change")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn submit`."""
    parser.usage = (
        "lrnn submit CONFIG [key.sub=value ...] [options]\n"
        "       lrnn submit --eval RUN [RUN ...] [--suite NAME,NAME] [--tasks TASK,TASK] [options] [-- OPTIONS OF EVAL]"
    )
    parser.epilog = EXAMPLES
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="training: one task per GPU; 0: one task per node, on CPU. --eval: GPUs of each evaluation, 0 for none "
        "(default: as in the template)",
    )
    parser.add_argument(
        "--time",
        metavar="LIMIT",
        help="time limit in the format of sbatch, such as 12:00:00 (default: as in the template)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other long option of sbatch; may be repeated",
    )
    parser.add_argument(
        "--template", type=Path, metavar="FILE", help="batch script to fill in (default: the one that comes with lrnn)"
    )
    container.add_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    training = parser.add_argument_group("training")
    training.add_argument("--nodes", type=int, metavar="N", help="default: as in the template")
    training.add_argument(
        "--allow-change", action="store_true", help="resume with changed settings although they change the results"
    )
    _add_eval_arguments(parser.add_argument_group("evaluation"))


def _add_eval_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--eval", nargs="+", type=Path, metavar="RUN", help="run folders, checkpoints and model folders to evaluate"
    )
    group.add_argument(
        "--suite",
        nargs="+",
        default=[],
        metavar="NAME",
        help="suites of `lrnn eval`, by spaces or commas; each is a job of its own for every model",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        action="append",
        default=[],
        metavar="TASK",
        help="tasks of lm-eval, as `lrnn eval --tasks` takes them; together they are one job for every model, and a "
        "second --tasks is another",
    )
    group.add_argument(
        "--checkpoints",
        metavar="WHICH",
        help="all (default), last, every:N (steps that are multiples of N), or steps such as 1000,5000",
    )
    group.add_argument("--max-concurrent", metavar="N", help="evaluations that run at the same time (default: all)")


def main(args: argparse.Namespace) -> int:
    if args.eval is None:
        _refuse(args, OF_EVAL, "is for evaluations: name what to evaluate with --eval RUN")
        if args.config is None:
            raise UserError(
                "name the YAML file of a run, or what to evaluate: lrnn submit CONFIG, lrnn submit --eval RUN"
            )
        from lrnn.pretrain.submit import submit

        return submit(args)
    _refuse(args, OF_TRAINING, "is for training; leave it out beside --eval")
    from lrnn.eval.submission.submit import submit_evaluations

    return submit_evaluations(args, [word for word in (args.config, *args.overrides) if word is not None])


def _refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raise UserError if one of some options was given."""
    for name in names:
        if getattr(args, name) not in (None, False, []):
            raise UserError(f"--{name.replace('_', '-')} {reason}")
