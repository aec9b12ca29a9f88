"""A run as a job of the test cluster: submit it with `lrnn submit`, watch it, and end it in the ways that SLURM has."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cluster import Cluster

from lrnn.cli import main

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
SLURM_S = 0.5  # between two questions to SLURM, which cost more processor time than a look at a file
TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # the long form of these tests
# Each way asks a running job to stop so that it can resume. The comments describe SLURM 22.05.
ENDINGS = {
    "usr1": ["scancel", "--signal=USR1"],  # to the tasks alone
    "usr1 --batch": ["scancel", "--batch", "--signal=USR1"],  # to the shell of the batch script alone
    "usr1 --full": ["scancel", "--full", "--signal=USR1"],  # to both
    "term": ["scancel", "--signal=TERM"],  # to the tasks alone
    "requeue": ["scontrol", "requeue"],  # SIGCONT and SIGTERM to both, SIGKILL after KillWait
    "time limit": [],  # as --signal says, to the tasks alone
    # SIGCONT and SIGTERM to both, and the end after the partition's GraceTime.
    "pre-empted": [
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--output=/dev/null",
        "--wrap=true",
    ],
    "usr1 at start": ["scancel", "--signal=USR1"],  # while Python loads its packages
}


class RunningJob:
    """A run on two nodes with one process each. `job` is its newest job."""

    def __init__(self, slurm: Cluster, folder: Path, corpus: Path, steps: int):
        self.slurm, self.folder, self.job = slurm, folder, ""
        self.arguments = [
            str(ROOT / "configs/tiny.yaml"), "--nodes", "2", "--gpus-per-node", "0", "--time", "30",
            # SLURM looks for jobs to signal every 30 s, so a signal 50 s before a limit of one minute is sent in time.
            "--sbatch", "signal=USR1@50", "--sbatch", "cpus-per-task=1",
            f"run_dir={folder}", f"steps={steps}", f"model={ROOT / 'configs/models/tiny.json'}",
            f"data.corpora=[{{path: {corpus}}}]",
            "data.seq_len=128", "global_batch_size=4", "micro_batch_size=2", "checkpoint.every=100000", "log.every=1",
            "log.heldout_every=0", "log.tensorboard=false", "schedule.warmup_steps=5",
            "precision=float32",  # many times as fast as bf16 on CPUs without AVX-512
        ]  # fmt: skip

    def submit(self, *more: str) -> subprocess.CompletedProcess:
        """Run `lrnn submit` in this process, and note the job if one was submitted."""
        out, err = io.StringIO(), io.StringIO()
        command = ["submit", *self.arguments, *more]
        with self._environment(), redirect_stdout(out), redirect_stderr(err):
            status = main(command)
        submitted = re.search(r"^submitted job (\d+):", out.getvalue(), re.MULTILINE)
        self.job = submitted[1] if submitted else self.job
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    def sbatch(self, script: Path) -> str:
        """Give a batch script to sbatch, and return the job."""
        with self._environment():
            done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Return the environment of a job: its folder, and the variables by which it finds the lrnn under test."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.slurm.env['PATH']}"
        env = {**self.slurm.env, "PATH": path, "PYTHONPATH": str(ROOT)}
        with patch.dict(os.environ, env, clear=True), chdir(self.folder.parent):
            yield

    def end(self, kind: str) -> None:
        """End the job as `kind` says, and wait until it is in the queue again."""
        before = int(self.show()["Restarts"])
        if kind == "time limit":
            self.slurm.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=1")
        elif kind == "pre-empted":
            self.slurm.run(*ENDINGS[kind])
        else:
            self.slurm.run(*ENDINGS[kind], self.job)
        self._wait(lambda: self.show()["Restarts"] == str(before + 1), f"{kind} does not requeue the job", SLURM_S)
        # After `scontrol requeue` the tasks may still be running.
        self._wait(lambda: self.show()["JobState"] != "COMPLETING", "the tasks do not end", SLURM_S)
        if kind == "time limit":
            self.slurm.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=30")

    def wait_for_start(self) -> None:
        """Wait until the job's tasks run again."""
        steps = ["squeue", "-h", "--steps", "-o", "%i", "-j", self.job]
        self._wait(lambda: self.slurm.run(*steps) != "", "no start", SLURM_S)

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.last_step() >= step, f"step {step} is not reached")

    def wait_for_end(self) -> dict[str, str]:
        """Wait until the job has ended, and return what SLURM knows of it."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self._wait(lambda: self.show()["JobState"] in over, "the job does not end", SLURM_S)
        return self.show()

    def show(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.run("scontrol", "--oneliner", "show", "job", self.job)))

    def process_of_task(self, task: int) -> int:
        """Return the process number of a running task. It is on this machine, as all nodes are."""
        wanted = {f"SLURM_JOB_ID={self.job}", f"SLURM_PROCID={task}", "SLURM_STEP_ID=0"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((folder / "environ").read_text().split("\0"))
                command = (folder / "cmdline").read_text().split("\0")
            except OSError:  # it has just ended
                continue
            if wanted <= environment and "pretrain" in command:
                return int(folder.name)
        raise AssertionError(f"task {task} of job {self.job} does not run")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records in the order they were written. Unlike `read_metrics`, keep broken lines."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[tuple[int, float]]:
        """Return (step, loss) of every step, in the order of the file."""
        return [(record["step"], record["loss"]) for record in self.metrics() if "loss" in record]

    def last_step(self) -> int:
        losses = self.losses()
        return losses[-1][0] if losses else 0

    def log(self) -> str:
        """Return everything that the jobs of the run have printed."""
        return (self.folder / "slurm.log").read_text()

    def newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint, or 0 if there is none."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return max((int(folder.name.removeprefix("step-")) for folder in folders), default=0)

    def wait_for_checkpoint(self) -> None:
        """Wait until there is a checkpoint of the last step."""
        self._wait(lambda: 0 < self.newest_checkpoint() == self.last_step(), "no checkpoint of the last step")

    def _wait(self, condition, failure: str, pause_s: float = 0.1) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            log = self.folder / "slurm.log"
            assert time.monotonic() < deadline, f"{failure}: {self.show()}\n{log.read_text() if log.exists() else ''}"
            time.sleep(pause_s)
