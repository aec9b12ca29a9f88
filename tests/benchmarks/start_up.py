"""Measure the time before the first step of `lrnn pretrain`: nothing compiled, everything compiled, and resumed.

    python tests/benchmarks/start_up.py WORK_FOLDER CORPUS configs/1.3b.yaml [key.sub=value ...]

The first start has an empty cache of compiled kernels in WORK_FOLDER. The second does the same in a new folder. Both
are killed after their first step. A third one does one step and writes a checkpoint, from which the last resumes. Files
that the system has read before come from its page cache, so a machine is fresh only at its first start.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(work: Path, run: str, arguments: list[str], steps: int, until_first_step: bool = True) -> dict[str, float]:
    """Run up to the first step or to the end.

    Returns:
        The seconds that the run recorded, and those from the command to the first step.
    """
    run_dir = work / run
    fixed = [f"run_dir={run_dir}", f"steps={steps}", "log.every=1", "log.tensorboard=false", "log.heldout_every=0"]
    fixed += ["checkpoint.every=1000000", "schedule.warmup_steps=0"]
    command = [sys.executable, "-m", "lrnn.cli", "pretrain", *arguments, *fixed, "--allow-change"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(work / "cache")}
    began = time.time()
    output = (work / f"{run}.txt").open("a")
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    metrics, known, seconds = run_dir / "metrics.jsonl", _lines(run_dir / "metrics.jsonl"), {}
    while process.poll() is None and not (seconds and until_first_step):
        time.sleep(0.05)
        records = _lines(metrics)[len(known) :]
        ready = [record["seconds"] for record in records if record.get("event") == "ready"]
        if not seconds and ready and any("loss" in record for record in records):
            seconds = {**ready[0], "first step": time.time() - began}
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    elif process.returncode or not seconds:
        raise SystemExit(f"{run} ended with status {process.returncode}; see {output.name}")
    return seconds


def _lines(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().split("\n")[:-1]] if metrics.exists() else []


def main() -> None:
    work, corpus, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    arguments.append(f"data.corpora=[{{path: {corpus}}}]")
    for name in ("cache", "first", "second", "third"):
        shutil.rmtree(work / name, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    show("nothing compiled", start(work, "first", arguments, 1000))
    show("compiled", start(work, "second", arguments, 1000))
    start(work, "third", arguments, 1, until_first_step=False)
    show("resumed", start(work, "third", arguments, 1000))


def show(name: str, seconds: dict[str, float]) -> None:
    """Print the seconds of a start."""
    parts = "  ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    print(f"{name}: {parts}", flush=True)


if __name__ == "__main__":
    main()
