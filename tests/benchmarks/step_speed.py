"""Measure `lrnn pretrain` as it runs, from its start, on a real corpus and with several settings in turn.

`lrnn bench step` shows where the time of such a step goes.

    python tests/benchmarks/step_speed.py WORK_FOLDER CORPUS STEPS "340m: configs/340m.yaml zero=1" ...

A run is killed after STEPS steps, so that no checkpoint is written. Figures are medians of records of 5 steps each, the
first two records left out; the first step's time is that from the start of the command.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

EVERY = 5  # steps per record


def measure(name: str, arguments: list[str], work: Path, corpus: str, steps: int) -> dict:
    """Return what a run records; it is empty if the run fails."""
    run_dir = work / name
    fixed = [f"run_dir={run_dir}", f"data.corpora=[{{path: {corpus}}}]", "log.heldout_every=0", "log.tensorboard=false"]
    fixed += [f"log.every={EVERY}", "checkpoint.every=1000000", "schedule.warmup_steps=10"]
    log = work / f"{name}.log"
    start = time.time()
    with log.open("w") as output:
        command = [sys.executable, "-m", "lrnn.cli", "pretrain", *arguments, *fixed]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return _watch(process, run_dir / "metrics.jsonl", steps, start)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.returncode not in (0, -signal.SIGKILL):
                print(f"{name} ended with {process.returncode}:\n{log.read_text()[-2500:]}", flush=True)


def _watch(process: subprocess.Popen, metrics: Path, steps: int, start: float) -> dict:
    records: list[dict] = []
    first = None
    while process.poll() is None and len(records) * EVERY < steps:
        time.sleep(0.05)
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        records = [r for r in map(json.loads, lines) if "loss" in r]
        if records and first is None:
            first = time.time() - start - EVERY * records[0]["step_seconds"]
    if len(records) < 3:
        return {}
    kept = records[2:]
    result = {key: statistics.median(r[key] for r in kept) for key in ("step_seconds", "tokens_per_second_per_gpu")}
    speeds = [r["tokens_per_second_per_gpu"] for r in kept]
    result |= {"mfu": statistics.median(r["mfu"] or 0 for r in kept), "memory_gb": max(r["memory_gb"] for r in kept)}
    return result | {"first": first, "least": min(speeds), "most": max(speeds), "losses": [r["loss"] for r in records]}


def main() -> None:
    work, corpus, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for text in sys.argv[4:]:
        name, _, arguments = text.partition(":")
        rows.append((name, measure(name, arguments.split(), work, corpus, steps)))
        print(rows[-1], flush=True)
    print(f"\n{'run':32} {'tokens/s':>9} {'range':>17} {'MFU':>6} {'GB':>6} {'first step':>10}  losses")
    for name, r in rows:
        if not r:
            print(f"{name:32} failed")
            continue
        spread = f"{r['least']:,.0f}-{r['most']:,.0f}"
        losses = " ".join(f"{x:.6f}" for x in r["losses"][-2:])
        print(
            f"{name:32} {r['tokens_per_second_per_gpu']:9,.0f} {spread:>17} {r['mfu']:6.3f} {r['memory_gb']:6.1f} "
            f"{r['first']:8.0f} s  {losses}"
        )


if __name__ == "__main__":
    main()
