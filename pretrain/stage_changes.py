"""Compare the stages of a run that resumes with those that its checkpoint was trained with.

Stages that the run has not reached may change. Those that are over may not, because they say which samples were
consumed. The stage that the run is in may change with `--allow-change`, as the data of a run without stages may.
"""

from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.parsing import parse_yaml
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.config import Config, parse_config
from lrnn.pretrain.schedule import learning_rate
from lrnn.pretrain.stages import Stage, stages_of

Facts = dict[str, Any]

OF_STAGE = {"stages", "seq_len", "corpora", "weights"}  # facts of data that are those of stages
OF_SCHEDULE = ("steps", "schedule.", "stages")  # begin the keys that decide the learning rates


def check_reached(saved: Path, now: list[Facts], allow_change: bool) -> set[str]:
    """Check that the stages that a checkpoint has reached have the same lengths and data now.

    Args:
        saved: folder of the checkpoint, of a run with or without stages.
        now: of each stage its steps, global_batch_size, seq_len, corpora (as fingerprints) and weights.
        allow_change: accept changes of the stage that the run is in.

    Returns:
        The facts of that stage that differ.

    Raises:
        UserError: a stage is another one.
    """
    if not now:
        raise UserError(f"{saved} was trained on stages of corpora, now there is a stream: choose another run_dir")
    progress = checkpoint.read_progress(saved)
    samples = progress["progress"]["samples"]
    before = _stages_before(saved, progress["data"])
    first, changed = 0, set[str]()
    for number, facts in enumerate(before, start=1):
        if first >= samples:
            break
        first += facts["steps"] * facts["global_batch_size"]
        is_over = number < len(before) and first < samples
        if number > len(now):
            raise UserError(f"{saved} has reached stage {number}, and the run has only {len(now)} now: restore it")
        changed = {key for key in facts if facts[key] != now[number - 1].get(key)}
        if changed and (is_over or not allow_change):
            key = min(changed, key=list(facts).index)
            remedy = "" if is_over else "add --allow-change to continue all the same, "
            raise UserError(
                f"{saved} has reached stage {number}, which had {key} = {facts[key]!r}, now it is "
                f"{now[number - 1].get(key)!r}; only later stages may change: restore it, {remedy}or choose another "
                "run_dir"
            )
    return changed


def _stages_before(saved: Path, data: Facts) -> list[Facts]:
    """Return the facts of the stages that a checkpoint was trained with: one, if its run had no stages."""
    if "stages" in data:
        return data["stages"]
    if "corpora" not in data:
        raise UserError(f"{saved} was trained on a stream, which is not one of the stages: choose another run_dir")
    config = _config(saved)
    sizes = {"steps": config.steps, "global_batch_size": config.global_batch_size}
    return [sizes | {key: data[key] for key in ("seq_len", "corpora", "weights")}]


def refused_with_stages(changes: Facts, refused: Facts, saved: Path, before: Facts, config: Config) -> Facts:
    """Return those of the changed keys that change results, where the run has stages, or had.

    The schedule counts by the learning rates of the stages that the run has reached, and `check_reached` compares the
    batch sizes.

    Args:
        changes: the keys that changed, and their values before and now.
        refused: those of them that would change the results of a run without stages.
        saved: folder of the checkpoint.
        before: the configuration in it.
        config: the configuration now.
    """
    of_schedule = {key for key in changes if key.startswith(OF_SCHEDULE)}
    refused = {key: values for key, values in refused.items() if key != "global_batch_size"}
    if not of_schedule:
        return refused
    then = parse_config(before, str(saved / "run.yaml"))
    reached = _reached(saved, then)
    if [s.steps for s in reached] != [s.steps for s in stages_of(config)[: len(reached)]]:
        rates = []  # `check_reached` says so.
    else:
        steps = range(reached[-1].first_step + reached[-1].steps)
        rates = [(learning_rate(step, then), learning_rate(step, config)) for step in steps]
    step = next((step for step, (old, new) in enumerate(rates, start=1) if old != new), None)
    if step is None:
        return {key: values for key, values in refused.items() if key not in of_schedule}
    return refused if refused else {f"the learning rate of step {step}": rates[step - 1]}


def _reached(saved: Path, config: Config) -> list[Stage]:
    """Return the stages of a run up to the one that a checkpoint is in."""
    samples = checkpoint.read_progress(saved)["progress"]["samples"]
    return [stage for stage in stages_of(config) if stage.first_sample < max(samples, 1)]


def _config(saved: Path) -> Config:
    """Return the configuration in a checkpoint."""
    file = saved / "run.yaml"
    return parse_config(parse_yaml(file.read_text(encoding="utf-8"), str(file)).value, str(file))
