"""Write the tables and plots of a grid: best and median over seeds beside the papers' figures, accuracy by length."""

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from lrnn.files import write_atomically
from lrnn.track.grid import RANGE_NAMES, Cell, GridConfig
from lrnn.track.papers import reported
from lrnn.track.pictures import Results, draw_eigenvalues, draw_lengths, grouped

HOLDS = 0.9  # lowest accuracy that counts as right
RWKV7_NOTE = (
    "(1) Where RWKV-7 forgets, its eigenvalues fall below 0 in this range too, down to -0.46 (see its docstring)."
)


def write_report(grid: GridConfig, cells: list[Cell], results: list[dict[str, Any]]) -> str:
    """Write `results.csv`, `table.md` and plots into the grid's folder, and return the table."""
    out = Path(grid.out)
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "model", "range", "seed", "length", "accuracy"])
        for result in results:
            for length, accuracy in result["by_length"].items():
                writer.writerow([*(result[k] for k in ("task", "model", "range", "seed")), length, f"{accuracy:.6f}"])
    by_task: dict[str, Results] = {task: [] for task in grid.tasks}
    for cell, result in zip(cells, results, strict=True):
        by_task[cell.task_name].append((cell, result))
    sections = [_summary(by_task)] if len(by_task) > 1 else []
    for task, of_task in by_task.items():
        sections.append(_table(grid, task, of_task))
        draw_lengths(task, of_task, grid.train.max_length).savefig(out / f"accuracy-{task}.png", dpi=120)
        eigenvalues = draw_eigenvalues(of_task)
        if eigenvalues is not None:
            eigenvalues.savefig(out / f"eigenvalues-{task}.png", dpi=120)
    text = "\n".join([*sections, _origin(results)])
    write_atomically(out / "table.md", text)
    return text


def holds_to(by_length: dict[str, float]) -> int:
    """Return the longest length up to which the accuracy at all lengths is at least `HOLDS`, or 0 if there is none.

    Keys are lengths in ascending order, as in result.json.
    """
    longest = 0
    for length, accuracy in by_length.items():
        if accuracy < HOLDS:
            break
        longest = int(length)
    return longest


def _summary(by_task: dict[str, Results]) -> str:
    """Return the papers' table of all tasks: a row per model and range, a column per task."""
    rows: dict[tuple[str, str], list[str]] = {}
    for of_task in by_task.values():
        for (model, _), members in grouped(of_task).items():
            scores = rows.setdefault((model, _eigenvalues(members[0][0])), [])
            scores.append(_best([result["scaled_accuracy"] for _, result in members]))
    lines = [
        "## All tasks",
        "",
        "Scaled accuracy, best [median] of the seeds.",
        "",
        f"| model | eigenvalues | {' | '.join(by_task)} |",
        f"|---|---|{'---|' * len(by_task)}",
    ]
    lines += [f"| {model} | {eigenvalues} | {' | '.join(scores)} |" for (model, eigenvalues), scores in rows.items()]
    return "\n".join(lines + _notes(lines)) + "\n"


def _eigenvalues(cell: Cell) -> str:
    """Return the name of the range, with a mark if it is not exact; `_notes` explains the mark."""
    is_exact = cell.range != "positive" or "rwkv7" not in cell.model_config.mixers
    return RANGE_NAMES[cell.range] + ("" if is_exact else " (1)")


def _notes(lines: list[str]) -> list[str]:
    """Return the notes below a table with these lines."""
    return ["", RWKV7_NOTE] if any("] (1) |" in line for line in lines) else []


def _best(scores: list[float]) -> str:
    return f"{max(scores):.3f} [{median(scores):.3f}]"


def _table(grid: GridConfig, task: str, of_task: Results) -> str:
    """Return the section of a task: scaled accuracy, best [median] of the seeds, and the papers' figures."""
    train, test = grid.train, grid.test
    floor = round(of_task[0][1]["scaled_floor"], 3) + 0.0  # no -0
    lines = [
        f"## {task}",
        "",
        f"Trained on lengths {train.min_length} to {train.max_length} for {train.steps} steps of {train.batch_size}, "
        f"tested on {test.min_length} to {test.max_length} ({test.samples} sequences per seed). Scaled accuracy is the "
        f"best [median] of {len(grid.seeds)} seeds; always giving the most frequent answer scores {floor:.3f}. A model "
        f"holds to a length if its accuracy is at least {HOLDS} at that length and at all shorter lengths tested.",
        "",
    ]
    if of_task[0][0].task.answers_along_the_way:
        lines += [
            "The scaled accuracy counts every position by itself. In the other columns and in the plot, a sequence is "
            "right at a length if every position up to there is right.",
            "",
        ]
    lines += _curriculum_lines(grid)
    if train.state_passing or any(stage.state_passing for stage in train.curriculum):
        often = f"With probability {train.state_passing:g}" if train.state_passing else "Where states were passed on,"
        lines += [
            f"{often} a sequence continued, in state and answers, from the end of the previous one in its row, if all "
            "answers there were right. Gradients and convolutions stay within these lengths; states do not.",
            "",
        ]
    for model, fields in grid.models.items():
        if own := fields.get("train"):
            lines += [f"{model} was trained with {', '.join(f'{k} {v}' for k, v in own.items())}.", ""]
    lines += [
        "| model | eigenvalues | scaled accuracy | at the longest length | holds to | papers | steps/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, _), members in grouped(of_task).items():
        scores = [result["scaled_accuracy"] for _, result in members]
        last = [list(result["by_length"].values())[-1] for _, result in members]
        cell = members[0][0]
        paper = "-" if cell.model_config.is_hybrid else _reported(grid.tasks[task], cell)
        holds = [holds_to(result["by_length"]) for _, result in members]
        lines.append(
            f"| {model} | {_eigenvalues(cell)} | {_best(scores)} | {_best(last)} | {max(holds)} [{median(holds):.0f}] "
            f"| {paper} | {_speed(result for _, result in members)} |"
        )
    return "\n".join(lines + _notes(lines)) + "\n"


def _reported(parameters: dict[str, Any], cell: Cell) -> str:
    """Return the papers' finding for a task and the mixer that all layers have."""
    layer = cell.model_config.layer(0)
    return reported(parameters, layer.mixer, cell.range, layer.num_householder, layer.num_hidden_layers)


def _curriculum_lines(grid: GridConfig) -> list[str]:
    """Return a line per stage that was trained before the task itself."""
    lines = []
    for stage in grid.train.curriculum:
        settings = grid.train.model_copy(update=stage.model_dump(exclude={"task"}, exclude_none=True))
        changes = "".join(f", {name} {value}" for name, value in stage.task.items())
        if settings.state_passing:
            changes += f", states passed on with probability {settings.state_passing:g}"
        lines += [
            f"Before that: lengths {settings.min_length} to {settings.max_length} for {settings.steps} steps of "
            f"{settings.batch_size}, lr {settings.lr:g}{changes}.",
            "",
        ]
    return lines


def _speed(results: Iterable[dict[str, Any]]) -> str:
    """Return the median speed over the seeds, or "-" if none is known. Cells that shared a device slowed each other."""
    speeds = [result["steps_per_second"] for result in results if result.get("steps_per_second")]
    return f"{median(speeds):.0f}" if speeds else "-"


def _origin(results: list[dict[str, Any]]) -> str:
    """Return on which device the results were computed, how many cells at a time, and with which software."""
    lines = set()
    for result in results:
        if facts := result.get("environment"):
            labels = {"torch": "torch", "triton": "triton", "commit": "commit", "source": "SHA-256 of the source"}
            names = ", ".join(f"{label} {facts[name]}" for name, label in labels.items() if name in facts)
            lines.add(f"Run on {facts['device']}, {result['concurrent']} at a time, with {names}.")
    return "\n".join(sorted(lines)) + "\n"
