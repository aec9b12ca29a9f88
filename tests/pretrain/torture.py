"""Kill a run again and again, resume it each time, and compare every loss with that of an undisturbed run.

    JE_ARROW_MALLOC_CONF=background_thread:false python tests/pretrain/torture.py SPEC.json

SPEC holds {"config": ..., "folder": ..., "kills": n, "seed": s}: n kills of runs that wait for their checkpoints, and
half as many of runs that write them in the background. Packages are imported once and every start is a fork of this
process, which saves 8 s per start. The forks run `lrnn pretrain` as torchrun would start it, as two processes.
Prints one JSON object: how often each moment was hit, and what followed.
"""

import copy
import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (for the forks, which import it late)
import pandas  # noqa: F401 (for the forks, too)
import torch

from lrnn import cli
from lrnn.pretrain import train as train_module
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint import writer as checkpoint_writer
from lrnn.pretrain.checkpoint.writer import CheckpointWriter
from lrnn.pretrain.launch import free_port, local_environment
from lrnn.pretrain.run import Run

RANKS = 2
# The parent sees what a rank is doing as one byte for the main thread and one for the writing thread.
PHASES = ["starting", "step", "between steps", "snapshot", "writing", "manifest", "rename", "latest", "deleting"]
# The calls before or after which a rank kills itself, or all ranks.
TRAPS = {
    "engine": (Run, "_start_engine"),
    "step": (train_module, "train_step"),
    "snapshot": (CheckpointWriter, "_snapshot"),
    "state file": (checkpoint_writer.safetensors.torch, "save_file"),
    "seal": (checkpoint, "seal"),
    "manifest": (checkpoint, "write_manifest"),
    "rename": (Path, "rename"),
    "latest": (checkpoint_writer, "write_atomically"),
    "delete": (checkpoint.shutil, "rmtree"),
}
MAIN_ONLY = {"manifest", "rename", "latest", "delete"}
TIMEOUT_S = 120


class Life:
    """The two processes of one start, in a process group of their own."""

    def __init__(self, config: Path, overrides: list[str], log: Path, trap: dict[str, Any] | None = None):
        self.board = mmap.mmap(-1, 2 * RANKS)  # shared with the forks
        port = free_port()
        self.pids: list[int] = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                self._become(rank, port, config, overrides, log, trap)
            if not self.pids:
                os.setpgid(pid, pid)  # set in the parent too, because the second fork joins the group
            self.pids.append(pid)
        self.statuses: dict[int, int] = {}

    def _become(self, rank: int, port: int, config: Path, overrides: list[str], log: Path, trap) -> None:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        os.environ.update(local_environment(rank, RANKS, port))
        self._watch(rank)
        if trap is not None and trap["rank"] == rank:
            set_trap(**trap)
        status = 1
        try:
            status = cli.main(["pretrain", str(config), *overrides])
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)

    def _watch(self, rank: int) -> None:
        """Wrap calls so that they keep the board up to date."""

        def during(holder, name: str, phase: str, slot: int, after: str) -> None:
            original = getattr(holder, name)

            def call(*args, **kwargs):
                self.board[2 * rank + slot] = PHASES.index(phase)
                try:
                    return original(*args, **kwargs)
                finally:
                    self.board[2 * rank + slot] = PHASES.index(after)

            setattr(holder, name, call)

        during(train_module, "train_step", "step", 0, "between steps")
        during(CheckpointWriter, "_snapshot", "snapshot", 0, "between steps")
        for holder, name, phase, after in (
            (CheckpointWriter, "_write", "writing", "starting"),
            (checkpoint, "write_manifest", "manifest", "manifest"),
            (Path, "rename", "rename", "rename"),
            (checkpoint_writer, "write_atomically", "latest", "starting"),
            (checkpoint, "retain", "deleting", "starting"),
        ):
            during(holder, name, phase, 1, after)

    def moment(self, rank: int) -> str:
        """Return what a rank is doing: its writing thread if that is busy, otherwise its main thread."""
        main, writer = self.board[2 * rank], self.board[2 * rank + 1]
        return PHASES[writer] if writer else PHASES[main]

    def reap(self) -> bool:
        """Return whether all processes have ended."""
        for pid in self.pids:
            if pid not in self.statuses and os.waitpid(pid, os.WNOHANG) != (0, 0):
                self.statuses[pid] = 1  # already reaped; the log says how it ended
        return len(self.statuses) == RANKS

    def end(self) -> None:
        """End the run as the launcher does when a process died: ask the others to stop, then kill them."""
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not self.reap() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._signal_all(signal.SIGKILL)
        while not self.reap():
            time.sleep(0.01)

    def _signal_all(self, number: int) -> None:
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, number)


def set_trap(rank: int, place: str, after: bool, count: int, everyone: bool) -> None:
    """Make the `count`-th call of a function the last thing that this process, or all of them, do."""
    holder, name = TRAPS[place]
    original, calls = getattr(holder, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls < count else None
        if calls >= count:
            os.killpg(0, signal.SIGKILL) if everyone else os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, call)


def losses_in(file: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every record, in order, without lines that a kill cut short."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record and "event" not in record:
            found.append((record["step"], record["loss"]))
    return found


class Torture:
    """A run folder, with a count of what has been done to it."""

    def __init__(self, spec: dict[str, Any], name: str, background: bool, truth: dict[int, float], rng: random.Random):
        self.folder, self.truth, self.rng = Path(spec["folder"]) / name, truth, rng
        self.config, self.every = Path(spec["folder"]) / f"{name}.yaml", spec["config"]["checkpoint"]["every"]
        settings = copy.deepcopy(spec["config"])
        settings["run_dir"] = str(self.folder)
        settings["checkpoint"]["background"] = background
        self.config.write_text(json.dumps(settings))
        self.log = Path(spec["folder"]) / f"{name}.log"
        self.hit: Counter[str] = Counter()
        self.repeated: list[int] = []
        self.seen = 0  # number of records compared

    def steps(self) -> int:
        return max((step for step, _ in losses_in(self.folder / "metrics.jsonl")), default=0)

    def kill_once(self) -> bool:
        """Start the run, kill it at a random moment, and check it. Return False if the run finished instead."""
        rng = self.rng
        before = self.steps()
        trap = None
        if rng.random() < 0.5:
            place = rng.choice(list(TRAPS))
            rank = 0 if place in MAIN_ONLY else rng.randrange(RANKS)
            count = {"step": rng.randint(1, 2 * self.every), "engine": 1}.get(place, rng.choice([1, 1, 2, 3]))
            sides = {"after": rng.random() < 0.5, "everyone": rng.random() < 0.5}
            trap = {"rank": rank, "place": place, "count": count, **sides}
        life = Life(self.config, [], self.log, trap)
        deadline = time.monotonic() + TIMEOUT_S
        if trap is None:
            target = before + rng.randint(-1, 2 * self.every)
            while self.steps() < target and not life.reap():
                time.sleep(0.002)
                assert time.monotonic() < deadline, f"no progress: {self.log.read_text()[-3000:]}"
            if target < before:
                time.sleep(rng.uniform(0, 2))  # while it starts
            time.sleep(rng.uniform(0, 0.03))
            victims = [rng.randrange(RANKS)] if rng.random() < 0.5 else list(range(RANKS))
            moment = life.moment(victims[0])
            if not life.reap():
                for rank in victims:
                    os.kill(life.pids[rank], signal.SIGKILL)
                self.hit[f"{moment}, {'all' if len(victims) > 1 else 'one rank'}"] += 1
                life.end()
                self.check(before)
                return True
        while not life.statuses:  # of the first process that ends
            life.reap()
            time.sleep(0.005)
            assert time.monotonic() < deadline, f"neither killed nor done: {self.log.read_text()[-3000:]}"
        life.end()
        self.check(before)
        if self.finished():
            return False
        assert trap is not None, self.log.read_text()[-3000:]
        when = f"{'after' if trap['after'] else 'before'} {trap['place']}"
        self.hit[f"{when}, {'all' if trap['everyone'] else 'one rank'}"] += 1
        return True

    def finished(self) -> bool:
        return (self.folder / "checkpoints" / f"step-{max(self.truth):08d}").is_dir()

    def check(self, before: int) -> None:
        """Check that every new loss is bitwise that of the undisturbed run, and that few steps were repeated."""
        records = losses_in(self.folder / "metrics.jsonl")
        fresh = records[self.seen :]
        self.seen = len(records)
        for step, loss in fresh:
            assert loss == self.truth[step], f"step {step}: loss {loss}, undisturbed {self.truth[step]}"
        if fresh:
            assert [step for step, _ in fresh] == list(range(fresh[0][0], fresh[0][0] + len(fresh)))
            self.repeated.append(before + 1 - fresh[0][0])
            assert self.repeated[-1] >= 0, "a step is missing"


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    rng = random.Random(spec["seed"])
    started = time.monotonic()
    straight = Torture(spec, "undisturbed", False, {spec["config"]["steps"]: 0.0}, rng)
    life = Life(straight.config, [], straight.log)
    while not life.reap():
        time.sleep(0.1)
    truth = dict(losses_in(straight.folder / "metrics.jsonl"))
    assert list(truth) == list(range(1, spec["config"]["steps"] + 1)), straight.log.read_text()[-3000:]

    result: dict[str, Any] = {}
    for background, kills in ((False, spec["kills"]), (True, spec["kills"] // 2)):
        hit: Counter[str] = Counter()
        repeated: list[int] = []
        runs = finished = 0
        while hit.total() < kills:
            torture = Torture(spec, f"background-{background}-{runs}", background, truth, rng)
            runs += 1
            while hit.total() + torture.hit.total() < kills and torture.kill_once():
                done = hit.total() + torture.hit.total()
                if done % 10 == 0:
                    print(f"{done} kills, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            last = Life(torture.config, [], torture.log)  # and to its end
            before = torture.steps()
            while not last.reap():
                time.sleep(0.05)
            torture.check(before)
            finished += torture.finished()
            assert torture.finished(), torture.log.read_text()[-3000:]
            assert not list((torture.folder / "checkpoints").glob(".step*"))
            hit += torture.hit
            repeated += torture.repeated
        # Training continues while a checkpoint is written in the background; the next checkpoint waits for it.
        limit = 2 * torture.every if background else torture.every
        assert max(repeated) <= limit, f"{max(repeated)} steps were repeated, at most {limit} may be"
        result["in the background" if background else "waited for"] = {
            "kills": hit.total(), "moments": dict(sorted(hit.items())), "runs": runs, "finished": finished,
            "save interval": torture.every, "steps repeated at most": max(repeated),
            "steps repeated on average": round(sum(repeated) / len(repeated), 2),
        }  # fmt: skip
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
