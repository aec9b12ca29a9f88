"""Show plans as tables and JSON, for `lrnn plan`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.plan.choose import STAGES, choose, largest_micro_batch, smallest
from lrnn.pretrain.plan.estimate import GB, Estimate
from lrnn.pretrain.plan.memory import Memory
from lrnn.pretrain.plan.setup import Setup
from lrnn.pretrain.plan.speed import MEASURED_ON

FLOAT32, BFLOAT16 = 4, 2  # bytes of a number

PARTS_OF_MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "copies": "weights in 16 or 8 bits",
    "activations": "activations",
    "logits": "logits",
    "workspace": "a layer's backward pass",
    "buckets": "ZeRO's buckets",
}
PARTS_OF_TIME = {
    "products": "matrix products",
    "recurrence": "recurrence",
    "kernels": "other kernels",
    "update": "update and ZeRO's copies",
    "collectives": "collectives that nothing hides",
    "waiting": "GPU waits",
}
WIDTH = 34  # of the first column


def plan(config: Config, setups: list[Setup], capacity: float) -> tuple[dict[str, Any], str]:
    """Return the plan of a run on one number of GPUs, as a JSON object and as a table.

    Args:
        config: the run.
        setups: how it trains; the first counts.
        capacity: bytes of memory of a GPU.

    Raises:
        UserError: the samples of a step cannot be split among the GPUs.
    """
    setup = setups[0]
    stages = STAGES if config.deepspeed is None else (setup.zero,)
    suggested = choose(setup, capacity, stages)
    configured, warnings = None, []
    try:
        config.batching(0, setup.gpus)
        configured = Estimate(setup, capacity)
    except UserError as error:
        warnings.append(f"as configured, the run would not start: {error}")
    if configured is not None and not configured.fits:
        warnings.append(f"as configured, the run will not fit: {configured.need}")
    if suggested is None:
        warnings.append(f"nothing fits: at the least, {smallest(setup, capacity, stages).need}")
    notes = list(notes_on(setup))
    record = {
        "gpu": _gpu_record(setup, capacity),
        "gpus": setup.gpus,
        "parameters": setup.model.parameters,
        "state_numbers": setup.model.state,
        "cache_numbers_per_token": setup.model.cache_per_token,
        "tokens": config.steps * setup.tokens_per_step,
        "configured": None if configured is None else _record(configured, config.steps),
        "suggested": None if suggested is None else _record(suggested, config.steps),
        "notes": notes,
        "warnings": warnings,
    }
    same = configured is not None and suggested is not None and configured.setup == suggested.setup
    columns = {"configured, and fastest" if same else "configured": configured}
    columns |= {} if same else {"suggested": suggested}
    lines = [*_head(config, setup, capacity), ""]
    lines += _table({name: estimate for name, estimate in columns.items() if estimate is not None}, config.steps)
    if suggested is not None and not same:
        lines += ["", f"to train as suggested, append: {suggested.setup.changes}"]
    lines += [""] * bool(notes or warnings) + [*notes, *(f"warning: {warning}" for warning in warnings)]
    return record, "\n".join(lines)


def scaling(config: Config, setups: list[Setup], capacity: float) -> tuple[dict[str, Any], str]:
    """Return how the three ZeRO stages scale over several numbers of GPUs, as a JSON object and as a table.

    Where the configured micro-batch is too large for the samples of a GPU, the largest that fits them is taken.

    Raises:
        UserError: the samples of a step cannot be split among some number of GPUs.
    """
    setup, largest = setups[0], max(setups, key=lambda setup: setup.gpus)
    stages = STAGES if config.deepspeed is None else (setup.zero,)
    one_gpu = setup.changed(gpus=1, zero=stages[0])
    size = largest_micro_batch(one_gpu, setup.micro_batch)
    alone = Estimate(one_gpu.changed(micro_batch=size), capacity)
    rows = []
    for one in setups:
        size = largest_micro_batch(one, one.micro_batch)
        for stage in stages:
            estimate = Estimate(one.changed(zero=stage, micro_batch=size), capacity)
            share = estimate.tokens_per_second / one.gpus / alone.tokens_per_second
            rows.append(_record(estimate, config.steps) | {"to_one_gpu": share})
    record = {"gpu": _gpu_record(setup, capacity), "rows": rows}
    header = f"{'GPUs':>5} {'ZeRO':>4} {'micro-batches':>13} {'sent':>8} {'alone':>9} {'exposed':>9} {'step':>10}"
    lines: list[str] = [
        *_head(config, setup, capacity, counts=False),
        "",
        f"{header} {'tokens/s':>16} {'to one':>6} {'memory':>9}",
    ]
    for row in rows:
        sent = row["collectives"]
        lines.append(
            f"{row['gpus']:5} {row['zero']:4} {row['micro_batches']:>8} of {row['micro_batch_size']:<2} "
            f"{sent['sent_gb']:5.1f} GB {sent['seconds'] * 1e3:6.1f} ms {sent['exposed_seconds'] * 1e3:6.1f} ms "
            f"{row['step_seconds'] * 1e3:7.0f} ms {row['tokens_per_second_per_gpu']:8,.0f} per GPU "
            f"{row['to_one_gpu']:6.2f} {row['memory_gb']:6.1f} GB{'' if row['fits'] else ' (does not fit)'}"
        )
    notes = list(notes_on(largest))
    return record | {"notes": notes}, "\n".join([*lines, *[""] * bool(notes), *notes])


def _head(config: Config, setup: Setup, capacity: float, counts: bool = True) -> Iterator[str]:
    """Yield the lines above a table."""
    size, step = setup.model.parameters / 1e6, setup.tokens_per_step
    total = config.steps * step / 1e9
    yield f"{config.run_dir}: {size:,.0f}M parameters, {step:,} tokens per step, {total:,.1f}B tokens"
    number = f"{setup.gpus} x " if counts else ""
    links = "" if counts and setup.gpus == 1 else f"; {_links(setup)}"
    yield f"{number}{setup.gpu.name}, {capacity / GB:g} GB{links}"
    if setup.model.cache_per_token:
        state, cache = setup.model.state * FLOAT32 / 1e6, setup.model.cache_per_token * BFLOAT16 / 1e3
        yield f"in generation, a text carries {state:,.1f} MB of state, and {cache:,.1f} KB per token in bfloat16"


def _links(setup: Setup) -> str:
    inside, between = setup.links.inside / GB, setup.links.between / GB
    return f"collectives at {inside:.0f} GB/s within {setup.gpus_per_node} GPUs, {between:.0f} GB/s between nodes"


def notes_on(setup: Setup) -> Iterator[str]:
    """Yield notes on figures that no measurement supports."""
    if setup.gpu.name != MEASURED_ON:
        yield (
            f"Speed was measured on {MEASURED_ON}. For {setup.gpu.name} it is scaled by peak and bandwidth: "
            f"{setup.gpu.bfloat16:g} TFLOP/s in bf16, {setup.gpu.bandwidth:,} GB/s."
        )
    if setup.gpus > 1:
        yield (
            "Nothing was measured beyond two GPUs. There, an earlier version was slower than its estimate: 1.16 times "
            "with ZeRO-2, 1.83 times with ZeRO-3 (docs/planning.md)."
        )
    if any(layer.attention for layer in setup.model.stack):
        yield "Attention was measured in one model, 340m-hybrid (docs/planning.md)."
    others = list(dict.fromkeys(x.mixer for x in setup.model.stack if not x.factors and not x.attention))
    if others:
        yield (
            f"Memory and speed with {' and '.join(others)} were not measured. They are estimated from weights and "
            "multiply-adds."
        )
    if any(layer.factors > 1 for layer in setup.model.stack):
        yield "Memory and speed with several factors per token were not measured."
    heads = {(layer.heads.K, layer.heads.V) for layer in setup.model.stack if layer.factors}
    if heads - {(128, 128)}:
        yield "Speed with heads of other sizes than 128 was not measured. The delta rule is counted with padded heads."
    if setup.precision != "bfloat16":
        yield f"Memory and speed in {setup.precision} were not measured."
    if setup.offloads:
        yield "The DeepSpeed JSON keeps states in the host's memory. The figures are those without it."


def _table(columns: dict[str, Estimate], steps: int) -> Iterator[str]:
    """Yield the lines of a table with one column per estimate."""

    def row(name: str, cells: list[str]) -> str:
        widths = (max(12, len(title) + 2) for title in columns)
        return f"{name:{WIDTH}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    estimates = list(columns.values())
    yield row("", list(columns))
    yield row("zero", [str(e.setup.zero) for e in estimates])
    yield row("micro_batch_size", [str(e.setup.micro_batch) for e in estimates])
    yield row("activation_checkpointing", [e.setup.checkpointing for e in estimates])
    yield "GB per GPU, when they are most"
    for part, title in PARTS_OF_MEMORY.items():
        yield row(f"  {title}", [f"{getattr(e.memory, part) / GB:.1f}" for e in estimates])
    yield row("  sum", [f"{e.memory.total / GB:.1f}" for e in estimates])
    yield row("  at the time of", [e.memory.moment for e in estimates])
    yield row("  at the loss, sum", [f"{e.memory_at_loss.total / GB:.1f}" for e in estimates])
    yield row("    of which logits", [f"{e.memory_at_loss.logits / GB:.1f}" for e in estimates])
    yield "ms per step"
    for part, title in PARTS_OF_TIME.items():
        yield row(f"  {title}", [f"{getattr(e.speed, part) * 1e3:,.0f}" for e in estimates])
    yield row("  sum", [f"{e.speed.step * 1e3:,.0f}" for e in estimates])
    yield row("tokens/s per GPU", [f"{e.tokens_per_second / e.setup.gpus:,.0f}" for e in estimates])
    yield row("tokens/s", [f"{e.tokens_per_second:,.0f}" for e in estimates])
    yield row("days", [f"{e.days(steps):,.2f}" for e in estimates])


def _record(estimate: Estimate, steps: int) -> dict[str, Any]:
    """Return an estimate as a JSON object."""
    setup, sent = estimate.setup, estimate.traffic
    return {
        "gpus": setup.gpus,
        "zero": setup.zero,
        "micro_batch_size": setup.micro_batch,
        "micro_batches": setup.micro_batches,
        "activation_checkpointing": setup.checkpointing,
        "memory_gb": estimate.memory.total / GB,
        "memory_gb_by_part": _memory_by_part(estimate.memory),
        "memory_gb_by_part_at_loss": _memory_by_part(estimate.memory_at_loss),
        "fits": estimate.fits,
        "step_seconds": estimate.speed.step,
        "step_seconds_by_part": {part: getattr(estimate.speed, part) for part in PARTS_OF_TIME},
        "collectives": {
            "sent_gb": (sent.gradients + sent.weights) / GB,
            "seconds": sent.seconds,
            "exposed_seconds": sent.exposed,
        },
        "tokens_per_second": estimate.tokens_per_second,
        "tokens_per_second_per_gpu": estimate.tokens_per_second / setup.gpus,
        "days": estimate.days(steps),
    }


def _memory_by_part(memory: Memory) -> dict[str, float]:
    return {part: getattr(memory, part) / GB for part in PARTS_OF_MEMORY}


def _gpu_record(setup: Setup, capacity: float) -> dict[str, Any]:
    """Return the kind of GPU as a JSON object, with the memory that is planned for in GB."""
    record = asdict(setup.gpu) | {"memory": capacity / GB}
    return {key: value for key, value in record.items() if key != "device"}
