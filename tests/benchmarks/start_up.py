"""Measure the time before the first step of `lrnn pretrain`: nothing compiled, everything compiled, and resumed.

    python tests/benchmarks/start_up.py WORK_FOLDER CORPUS configs/1.3b.yaml [key.sub=value ...]

The first start has an empty cache of compiled kernels in WORK_FOLDER. It does two steps and writes a checkpoint of the
first; the second start does the same in a new folder; the third resumes from the checkpoint. Files that the system has
read before come from its page cache, so a machine is fresh only at its first start.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def start(work: Path, run: str, arguments: list[str], steps: int) -> dict[str, float]:
    """Run to the end, and return the seconds that the run recorded and those from the command to the first step."""
    run_dir = work / run
    fixed = [f"run_dir={run_dir}", f"steps={steps}", "log.every=1", "log.tensorboard=false", "log.heldout_every=0"]
    fixed += ["checkpoint.every=1", "schedule.warmup_steps=0"]
    command = [sys.executable, "-m", "lrnn.cli", "pretrain", *arguments, *fixed, "--allow-change"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(work / "cache")}
    began = time.time()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics, known, first = run_dir / "metrics.jsonl", _lines(run_dir / "metrics.jsonl"), None
    while process.poll() is None:
        time.sleep(0.05)
        if first is None and any("loss" in record for record in _lines(metrics)[len(known) :]):
            first = time.time() - began
    if process.returncode or first is None:
        raise SystemExit(f"{run} ended with status {process.returncode}")
    (ready,) = (record for record in _lines(metrics)[len(known) :] if record.get("event") == "ready")
    return {**ready["seconds"], "first step": first}


def _lines(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().split("\n")[:-1]] if metrics.exists() else []


def main() -> None:
    work, corpus, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    arguments.append(f"data.corpora=[{{path: {corpus}}}]")
    for name in ("cache", "first", "second"):
        shutil.rmtree(work / name, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    rows = {"nothing compiled": start(work, "first", arguments, 2), "compiled": start(work, "second", arguments, 2)}
    rows["resumed"] = start(work, "second", arguments, 3)
    parts = list(rows["resumed"])
    print("| start | " + " | ".join(parts) + " |\n|---" + "|---" * len(parts) + "|")
    for name, seconds in rows.items():
        print(f"| {name} | " + " | ".join(f"{seconds[part]:.1f}" if part in seconds else "" for part in parts) + " |")


if __name__ == "__main__":
    main()
