"""Run many commands on the GPUs of a machine at the same time, each within its own limit, and lose nothing if cut off.

    python tests/benchmarks/gpu_parts.py tests/benchmarks/parts/recipes.yaml WORK RESULTS [--limit 570] [--only NAME]

The YAML file lists parts:

    parts:
      - {name: corpus, run: python -m lrnn.cli corpus ..., gpus: 0, limit: 120}
      - {name: speed, run: python ..., after: [corpus], limit: 300}

A part starts when those of `after` have ended well, as soon as `gpus` GPUs (default 1) are free; with 0 it takes none.
Parts that may start do so in the order of the file: none overtakes one that waits for GPUs. The GPUs of a part are in
CUDA_VISIBLE_DEVICES. A part is a line for bash in the current folder; $WORK is a folder that all share, and $RESULTS
one for files to keep. What it prints is on disk at once.

RESULTS holds two files that are renewed every few seconds: `outputs.txt`, with what each part printed, and
`files.tar.gz`, with $RESULTS. The table of the parts is printed last. The exit status is 1 if a part failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import yaml

RENEWED_S = 15.0  # seconds between two renewals of the files in RESULTS
SHOWN = 4  # last lines of a part that are printed when it ends


@dataclass
class Part:
    """A command, and what became of it.

    Attributes:
        name, run, limit, gpus, after: as in the YAML file; seconds.
        status: exit status; None before it ends.
        note: why there is no status, or that it was stopped.
        taken: the GPUs that it holds.
    """

    name: str
    run: str
    limit: float
    gpus: int = 1
    after: list[str] = field(default_factory=list)
    status: int | None = None
    note: str = ""
    taken: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    began: float = 0.0
    seconds: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.status is not None or bool(self.note)


def read_parts(file: Path, only: list[str]) -> list[Part]:
    """Return the parts of a file; with `only`, those and what they come after. Raises SystemExit for a wrong file."""
    try:
        parts = [Part(**entry) for entry in yaml.safe_load(file.read_text())["parts"]]
    except (TypeError, KeyError) as error:
        raise SystemExit(f"{file}: {error}") from None
    known = {part.name: part for part in parts}
    for name in (*only, *(name for part in parts for name in part.after)):
        if name not in known:
            raise SystemExit(f"{file}: there is no part {name!r}; it has {', '.join(known)}")
    wanted = set(only or known)
    for part in reversed(parts):  # a part comes after earlier ones alone
        if part.name in wanted:
            wanted |= set(part.after)
    return [part for part in parts if part.name in wanted]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number in range(listed.count("GPU "))]


class Parts:
    """The parts of a call on the GPUs of this machine."""

    def __init__(self, parts: list[Part], gpus: list[str], work: Path, results: Path, limit: float):
        self.parts, self.free, self.limit = parts, list(gpus), limit
        self.work, self.results, self.kept = work, results, work / "results"
        self.outputs = work / "outputs"
        for folder in (results, self.kept, self.outputs):
            folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            if part.gpus > len(gpus):
                part.note = f"left out: needs {part.gpus} GPUs"
        self._start, self._renewed, self._is_stopped = time.monotonic(), 0.0, False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Stop soon; a handler of signals, which may come while a part starts."""
        self._is_stopped = True

    def run(self) -> None:
        """Run all parts, until they have ended or the time is up."""
        try:
            while not (all(part.has_ended for part in self.parts) or self.seconds > self.limit or self._is_stopped):
                self._start_parts()
                for part in self.parts:
                    self._look_at(part)
                if self.seconds - self._renewed > RENEWED_S:
                    self.renew()
                time.sleep(0.05)
        finally:
            reason = "a signal came" if self._is_stopped else "the time of all is up"
            for part in self.parts:
                if part.process is not None and not part.has_ended:
                    self._stop(part, f"cut off: {reason}")
                elif not part.has_ended:
                    part.note = f"not started: {reason}"
            self.renew()

    def _start_parts(self) -> None:
        by_name = {part.name: part for part in self.parts}
        for part in self.parts:
            if part.process is not None or part.has_ended:
                continue
            before = [by_name[name] for name in part.after]
            if failed := next((p.name for p in before if p.has_ended and p.status != 0), None):
                part.note = f"left out: {failed} failed"
            elif all(p.has_ended for p in before):
                if part.gpus > len(self.free):
                    return
                self._begin(part)

    def _begin(self, part: Part) -> None:
        part.taken, self.free = self.free[: part.gpus], self.free[part.gpus :]
        own = {"CUDA_VISIBLE_DEVICES": ",".join(part.taken), "PYTHONUNBUFFERED": "1"}
        own |= {"WORK": str(self.work), "RESULTS": str(self.kept)}
        with self._output(part).open("wb") as output:
            part.process = subprocess.Popen(
                ["bash", "-c", part.run], env=os.environ | own, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        part.began = time.monotonic()

    def _look_at(self, part: Part) -> None:
        if part.process is None or part.has_ended:
            return
        if (status := part.process.poll()) is not None:
            part.status = status
            self._end(part)
        elif time.monotonic() - part.began > part.limit:
            self._stop(part, f"cut off after its {part.limit:.0f} s")

    def _stop(self, part: Part, note: str) -> None:
        assert part.process is not None
        os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
        part.note = note
        self._end(part)

    def _end(self, part: Part) -> None:
        part.seconds = time.monotonic() - part.began
        self.free = sorted(self.free + part.taken)
        print(f"{self.seconds:4.0f} s  {line_of(part)}", flush=True)
        for line in self._output(part).read_text(errors="replace").splitlines()[-SHOWN:]:
            print(f"        {line[:200]}", flush=True)
        self.renew()

    def _output(self, part: Part) -> Path:
        return self.outputs / f"{part.name}.txt"

    def renew(self) -> None:
        """Write what there is to the files that are kept. Each is replaced at once."""
        self._renewed = self.seconds
        texts = [f"{'=' * 20} {line_of(part)}\n" + _text(self._output(part)) for part in self.parts]
        new = self.results / "new"
        new.write_text("\n".join(texts))
        new.replace(self.results / "outputs.txt")
        with tarfile.open(new, "w:gz") as tar:
            tar.add(self.kept, "results")
        new.replace(self.results / "files.tar.gz")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def line_of(part: Part) -> str:
    """Return what became of a part, in a line."""
    on = f" on {','.join(part.taken)}" if part.taken else ""
    status = part.note or ("running" if part.status is None else f"status {part.status}")
    return f"{part.name:24} {status}, {part.seconds:.0f} s{on}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for all parts together (default 570)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these, and what they come after")
    args = parser.parse_args()
    parts = Parts(read_parts(args.file, args.only), visible_gpus(), args.work.resolve(), args.results, args.limit)
    signal.signal(signal.SIGTERM, parts.stop)
    parts.run()
    print(f"\n{parts.seconds:.0f} s in all; what was printed is in {args.results / 'outputs.txt'}")
    print("\n".join(line_of(part) for part in parts.parts), flush=True)
    sys.exit(any(part.status != 0 for part in parts.parts))


if __name__ == "__main__":
    main()
