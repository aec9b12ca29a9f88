"""The whole job on a laptop CPU, in the commands a real run uses: corpus, pretraining, a stop half-way as a pre-empted
job would, resume, export, evaluation, picture.

The corpus is the source of the running Python's standard library; a tenth of its files is held out.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from lrnn.errors import UserError
from lrnn.pretrain.launch import STOPPED
from lrnn.records import read_metrics

CONFIG = "configs/tiny.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="a new folder, or a number is added")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300)")
    parser.add_argument("--processes", type=int, default=2, help="processes to train with (default 2)")
    parser.epilog = "example:\n  lrnn quickstart"


def main(args: argparse.Namespace) -> int:
    if not Path(CONFIG).is_file():
        raise UserError(f"{CONFIG} is not here: run lrnn quickstart in the folder of the repository")
    out = _unused(args.out)
    corpus, run, export = out / "corpus", out / "run", out / "model"
    started = time.monotonic()
    stdlib = sysconfig.get_paths()["stdlib"]
    build = ["corpus", stdlib, "--include", "*.py", "--exclude", "site-packages/*", "--skip-bad-files"]
    _lrnn(*build, "--train-tokenizer", "4096", "--heldout", "0.1", "--out", str(corpus))

    overrides = [f"run_dir={run}", f"data.corpora=[{{path: {corpus}}}]", f"steps={args.steps}"]
    pretrain = ["pretrain", CONFIG, *overrides, "--nproc", str(args.processes)]
    _lrnn(*pretrain, stop_at=(run, args.steps // 2))
    _lrnn(*pretrain)
    _lrnn("plot", str(run), "--out", str(out / "loss.png"))
    _lrnn("export", str(run), str(export))
    evaluate = ["eval", str(export), "--suite", "quick", "--heldout", str(corpus / "heldout.jsonl")]
    # 164 documents: all held-out files and all of HumanEval, the first part of GSM8K.
    _lrnn(*evaluate, "--limit", "164", "--max-length", "2048", "--out", str(out / "eval"))
    _summary(out, run, time.monotonic() - started)
    return 0


def _lrnn(*arguments: str, stop_at: tuple[Path, int] | None = None) -> None:
    """Run an lrnn command; with `stop_at` (run, step), send it the signal of a pre-emption once it reached the step."""
    print(f"\n$ lrnn {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "lrnn.cli", *arguments])
    expected = 0
    if stop_at is not None:
        expected = STOPPED
        run, step = stop_at
        while process.poll() is None and _last_step(run) < step:
            time.sleep(0.2)
        if process.poll() is None:
            print(f"\n$ kill -USR1 {process.pid}  # as SLURM does before it takes the nodes away", flush=True)
            process.send_signal(signal.SIGUSR1)
    code = process.wait()
    if code != expected:
        raise UserError(f"lrnn {arguments[0]} ended with status {code}, expected {expected}; its message stands above")


def _last_step(run: Path) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((r["step"] for r in read_metrics(run) if "event" not in r), default=0)


def _summary(out: Path, run: Path, seconds: float) -> None:
    records = [r for r in read_metrics(run) if "event" not in r]
    losses = [r["loss"] for r in records]
    heldout = [r["heldout_loss"] for r in records if "heldout_loss" in r]
    resumed = [r["step"] for r in read_metrics(run) if r.get("event") == "start" and r["resumed"]]
    negative = records[-1]["eigenvalues"]["negative_fraction"].values()
    print(f"\nDone in {seconds / 60:.1f} minutes.\n")
    print(
        f"training loss            {losses[0]:.3f} -> {losses[-1]:.3f} nats a token, {records[-1]['tokens']:,} tokens"
    )
    print(f"held-out loss            {heldout[0]:.3f} -> {heldout[-1]:.3f}")
    print(f"resumed at step          {', '.join(map(str, resumed))}")
    print(f"eigenvalues below zero   {', '.join(f'{100 * x:.0f}%' for x in negative)} by layer\n")
    print((out / "eval" / "table.md").read_text())
    print(json.dumps({"loss curve": str(out / "loss.png"), "model": str(out / "model"), "all": str(out)}, indent=1))


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(p for p in candidates if not p.exists())
