"""Results of a suite on disk: results.json (ours), table.md, and lm-eval's own results and samples, all or nothing.

State-tracking tasks have by_length.csv and by_length.png too.
"""

import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import lrnn
from lrnn.errors import UserError
from lrnn.eval.state_tracking import text_report
from lrnn.files import sha256

SCHEMA_VERSION = 1
RESAMPLES = 1000
SEED = 0

Raw = dict[str, Any]


def bits_per_byte(pairs: np.ndarray) -> np.ndarray:
    """Bits per byte of (log-likelihood in nats, bytes) pairs, `[..., n, 2]` float64, over the axis n: sum over sum."""
    nats, n_bytes = pairs[..., 0].sum(-1), pairs[..., 1].sum(-1)
    return -nats / n_bytes / math.log(2)


def bits_per_byte_stderr(pairs: np.ndarray) -> float | None:
    """Standard error of `bits_per_byte` by bootstrap over documents (`[n, 2]`); None for a single document."""
    if len(pairs) < 2:
        return None
    rng = np.random.default_rng(SEED)
    means = [float(bits_per_byte(pairs[rng.integers(len(pairs), size=len(pairs))])) for _ in range(RESAMPLES)]
    return float(np.std(means, ddof=1))


def metric_rows(raw: Raw) -> list[Raw]:
    """One row a task, metric and filter, with a standard error, from the result of lm-eval's `simple_evaluate`.

    Metrics of one length of a state-tracking task are left to `text_report.length_rows`.
    """
    rows = []
    for task, values in raw["results"].items():
        config = raw["configs"][task]
        shots = (config.get("metadata") or {}).get("shots", raw["n-shot"][task])
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or text_report.is_by_length(metric):
                continue
            stderr: Any = values.get(f"{metric}_stderr,{filter_name}")
            if metric == "bits_per_byte":
                pairs = [s["bits_per_byte"] for s in raw["samples"][task] if s["filter"] == filter_name]
                stderr = bits_per_byte_stderr(np.array(pairs, dtype=np.float64))
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
                    "n": raw["n-samples"][task]["effective"],
                    "shots": shots,
                    "higher_is_better": raw["higher_is_better"][task].get(metric),
                }
            )
    return rows


def describe_model(folder: Path) -> Raw:
    """Fingerprints of an exported folder: sha256 of configuration, tokenizer and every weights file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "path": str(folder.resolve()),
        "model_type": config.get("model_type"),
        "config_sha256": sha256(folder / "config.json"),
        "tokenizer_sha256": sha256(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None,
        "weights_sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "training": config.get("lrnn_training"),
    }


def describe_environment() -> Raw:
    """Versions of what the numbers rest on."""
    packages = ("lm-eval", "torch", "transformers", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version(), "lrnn": lrnn.__version__, **{name: version(name) for name in packages}}


def markdown_table(results: Raw) -> str:
    """The results as Markdown; `+-` is one standard error over documents."""
    lines = [f"# {results['suite']}: {results['model']['path']}", ""]
    if results["limit"] is not None:
        lines += [f"Only the first {results['limit']} documents of every task: not comparable with whole runs.", ""]
    if results["left_out"]:
        lines += [f"Left out: {', '.join(results['left_out'])}.", ""]
    lines += ["| task | metric | | value | +- | n | shots |", "|---|---|---|---:|---:|---:|---:|"]
    for row in results["metrics"]:
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        arrow = {True: "higher is better", False: "lower is better", None: ""}[row["higher_is_better"]]
        stderr = "n/a" if row["stderr"] is None else f"{row['stderr']:.4f}"
        cells = (row["task"], name, arrow, f"{row['value']:.4f}", stderr, row["n"], row["shots"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if results["by_length"]:
        lines += ["", text_report.markdown_table(results["by_length"]).rstrip()]
    return "\n".join(lines) + "\n"


def check_output(out: Path) -> None:
    """Raise UserError unless `out` can be written: absent, empty, or results of an earlier run, which are replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; it must be a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "results.json").is_file():
        raise UserError(f"--out {out} holds other files and no results.json; choose a new or empty folder")


def write(out: Path, results: Raw, raw: Raw) -> None:
    """Write the folder `out`, whole or not at all."""
    replace_folder(out, lambda new: _fill(new, results, raw))


def replace_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `out` of what `fill` writes into an empty one.

    That one stands beside it and is renamed when it is done, so that `out` is never half there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f".{out.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    new.mkdir()
    try:
        fill(new)
    except BaseException:
        shutil.rmtree(new)
        raise
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _fill(new: Path, results: Raw, raw: Raw) -> None:
    for task, samples in raw["samples"].items():
        with (new / f"samples_{task}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(_dump(sample) for sample in samples)
    (new / "lm_eval_results.json").write_text(
        _dump({k: v for k, v in raw.items() if k != "samples"}, indent=2), encoding="utf-8"
    )
    if results["by_length"]:
        text_report.write(new, results["by_length"])
    (new / "table.md").write_text(markdown_table(results), encoding="utf-8")
    (new / "results.json").write_text(_dump(results, indent=2), encoding="utf-8")


def _dump(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options) + "\n"
