"""Put the results of `lrnn eval` and `lrnn position` into the model card of the exported folder that they are in."""

import shutil
from pathlib import Path
from typing import Any

from lrnn.eval.export.model_card import RESULTS_BEGIN, RESULTS_END
from lrnn.eval.result_folder import read_results
from lrnn.eval.suites import report
from lrnn.files import write_atomically

SOFTWARE = ("lrnn", "lm-eval", "transformers", "torch")


def update_card(model: Path) -> None:
    """Rewrite the section of results in the README.md of an exported folder, from `eval/*/results.json` below it.

    A README.md without the marks that `lrnn export` writes is left alone, and so is everything outside them. If it
    cannot be written, this says so: the results themselves are complete.
    """
    card = model / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        before, begin, rest = text.partition(RESULTS_BEGIN)
        _, end, after = rest.partition(RESULTS_END)
        if begin and end:
            write_atomically(card, f"{before}{begin}\n{results_section(model)}{end}{after}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"the results are not in the model card {card}: {error!r}", flush=True)


def copy_results(results: Path, model: Path) -> None:
    """Copy the tables of result folders `results/*` into an exported folder, and put them into its model card."""
    for file in sorted(results.glob("*/results.json")):
        folder = model / "eval" / file.parent.name
        folder.mkdir(parents=True)
        for name in ("results.json", "table.md"):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    update_card(model)


def results_section(model: Path) -> str:
    """Return all results below the folder as a section of Markdown, empty if there are none."""
    parts = []
    for file in sorted(model.glob("eval/*/results.json")):
        results = read_results(file)
        name = file.parent.name
        if "metrics" in results:
            parts.append(f"### {name}\n\n{_suite(results)}")
        elif (file.parent / "table.md").is_file():
            parts.append(f"### {name}\n\nSee [eval/{name}/table.md](eval/{name}/table.md).\n")
    return "\n".join(["## Evaluation results\n", *parts]) if parts else ""


def _suite(results: dict[str, Any]) -> str:
    settings, facts = results["settings"], results["environment"]
    versions = ", ".join(f"{name} {facts[name]}" for name in SOFTWARE if name in facts)
    lines = report.metrics_table(results)
    return "\n".join(
        [
            *lines,
            "",
            f"`+-` is one standard error over documents. Computed in {settings['dtype']} on {facts['device']}, with a "
            f"context of {settings['max_length']:,} tokens, by {versions}.",
            "",
        ]
    )
