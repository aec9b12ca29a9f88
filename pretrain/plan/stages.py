"""The plan of a run, stage by stage if it has stages."""

from collections.abc import Sequence
from typing import Any

from lrnn.pretrain.config import Config, load_model_of
from lrnn.pretrain.gpus import Gpu
from lrnn.pretrain.plan import report
from lrnn.pretrain.plan.setup import Links, setup_of
from lrnn.pretrain.stages import model_in, naming, stages_of


def plan_of(
    config: Config, gpu: Gpu, gpus: Sequence[int], gpus_per_node: int, links: Links, capacity: float
) -> tuple[dict[str, Any], str]:
    """Return what a run takes, as a JSON object and as a table. Of a run with stages, each has a table.

    Args:
        config: the run.
        gpu, gpus_per_node, links: see `Setup`.
        gpus: one number of GPUs to plan for, or several to compare.
        capacity: bytes of memory of a GPU.

    Raises:
        UserError: see `setup_of`, `plan` and `scaling`. The message names the stage.
    """
    model = load_model_of(config)
    make = report.plan if len(gpus) == 1 else report.scaling
    records: list[dict[str, Any]] = []
    texts = []
    for stage in stages_of(config):
        with naming(stage, config):
            sizes = model_in(stage, model)
            setups = [setup_of(stage.config, gpu, count, gpus_per_node, links, sizes) for count in gpus]
            record, text = make(stage.config, setups, capacity)
        if not config.stages:
            return record, text
        of_stage = {"stage": stage.number, "name": stage.name, "first_step": stage.first_step + 1, "steps": stage.steps}
        records.append(of_stage | record)
        texts.append(f"{stage}\n{text}")
    whole: dict[str, Any] = {"stages": records}
    if len(gpus) == 1:
        for column in ("configured", "suggested"):
            parts = [record[column] for record in records]
            whole[f"days_{column}"] = None if None in parts else sum(part["days"] for part in parts)
        days = whole["days_configured"]
        if days is not None:
            texts.append(f"all {len(records)} stages as configured: {days:,.2f} days")
    return whole, "\n\n".join(texts)
