"""Measure how long training waits for its checkpoints, both written in the background and waited for.

    python tests/benchmarks/checkpoint_stall.py CORPUS WORK_FOLDER [--processes 2] [key.sub=value ...]

Trains a model of some 80M parameters (1 GB of state) for 24 steps with a checkpoint every 8, twice in each mode,
alternating, and prints a table. The last checkpoint is waited for in both modes and does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_type": "lrnn", "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 6, "num_heads": 6,
    "head_dim": 128, "intermediate_size": 2048,
}  # fmt: skip
SETTINGS = [
    "steps=24", "checkpoint.every=8", "checkpoint.keep_last=1", "data.seq_len=64", "global_batch_size=4",
    "micro_batch_size=2", "log.every=1", "log.heldout_every=0", "log.tensorboard=false", "schedule.warmup_steps=5",
]  # fmt: skip


def measure(run_dir: Path, corpus: str, model: Path, processes: int, background: bool, more: list[str]) -> dict:
    """Train once, and return the figures of its checkpoints."""
    overrides = [f"run_dir={run_dir}", f"model={model}"]
    overrides += [f"data.corpora=[{{path: {corpus}}}]", f"checkpoint.background={str(background).lower()}"]
    command = [sys.executable, "-m", "lrnn.cli", "pretrain", str(ROOT / "configs/tiny.yaml")]
    command += [*SETTINGS, *overrides, *more, "--nproc", str(processes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = [r for r in records if r.get("event") == "checkpoint"][:-1]
    folder = next((run_dir / "checkpoints").glob("step-*"))
    return {
        "stall": [r["stall_seconds"] for r in saved],
        "write": [r["write_seconds"] for r in saved],
        "step": statistics.median(r["step_seconds"] for r in records if "step_seconds" in r),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("work", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    model = args.work / "model.json"
    model.write_text(json.dumps(MODEL))
    found: dict[bool, list[dict]] = {False: [], True: []}
    for turn in range(2):
        for background in found:
            run_dir = args.work / f"{background}-{turn}"
            found[background].append(measure(run_dir, args.corpus, model, args.processes, background, args.overrides))
    size = found[True][0]["bytes"] / 1e9
    print(f"checkpoint of {size:.2f} GB by {args.processes} processes; seconds, minimum / median / maximum of all")
    for background, runs in found.items():
        stalls, writes = (sorted(x for run in runs for x in run[key]) for key in ("stall", "write"))
        print(
            f"{'in the background' if background else 'waited for':<18} training waits "
            f"{stalls[0]:.2f} / {statistics.median(stalls):.2f} / {stalls[-1]:.2f}, written in "
            f"{writes[0]:.2f} / {statistics.median(writes):.2f} / {writes[-1]:.2f}; a step takes "
            f"{statistics.median(run['step'] for run in runs):.2f}"
        )


if __name__ == "__main__":
    main()
