"""Record what lrnn computes: a golden record that guards it against changes that should not change it.

This program writes `golden.json`, and test_golden.py compares with it. If a change is meant to alter results, record
again, and look at the difference before committing it:

    python tests/golden/record.py tests/golden/golden.json

`old_checkpoint/` is never written again. Its folder `run/` was left by version 0.1.0 after step 8 of its `run.yaml`.
Later versions resume from it.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # splitting a sum differently would round differently
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PROCESSES = {"zero": 2}  # all other parts run in one process


def record(work: Path) -> Iterator[tuple[str, Any]]:
    """Compute the parts of the record in the folder `work`. Yield (name, result as JSON holds it) for each.

    Each part runs in processes forked from this one, which imports everything and computes nothing. A process therefore
    starts at once, and a training finds no traces of another one.

    Raises:
        RuntimeError: If a part fails.
    """
    os.environ.update(ENVIRONMENT)
    import measurements
    import surfaces

    print(f"recording {surfaces.LOCATION}", flush=True)
    context = multiprocessing.get_context("fork")
    for name in measurements.PARTS:
        before = _seconds()
        count = PROCESSES.get(name, 1)
        places = _places(count)
        logs = [work / f"{name}-{rank}.log" for rank in range(count)]
        outs = [work / f"{name}-{rank}.json" for rank in range(count)]
        children = [
            context.Process(target=_run, args=(measurements.PARTS[name], work, *of_rank))
            for of_rank in zip(places, logs, outs, strict=True)
        ]
        for child in children:
            child.start()
        while any(child.is_alive() for child in children):
            if any(child.exitcode for child in children):  # the others would wait for the failed one
                for child in children:
                    child.kill()
            time.sleep(0.02)
        if any(child.exitcode for child in children):
            text = "\n".join(log.read_text()[-4000:] for log in logs)
            raise RuntimeError(f"part {name!r} failed: {[child.exitcode for child in children]}\n{text}")
        print(f"{name}: {_seconds() - before:.1f} s of a processor", flush=True)
        yield name, json.loads(outs[0].read_text())


def _seconds() -> float:
    """Return the processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _places(count: int) -> list[dict[str, str]]:
    """Return a process's place in a group of `count`, as torchrun would set it. A single process has none."""
    if count == 1:
        return [{}]
    from lrnn.pretrain.launch import free_port

    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(part: Any, work: Path, place: dict[str, str], log: Path, out: Path) -> None:
    """Run a part in this process. Write its result into `out`, and its output into `log`."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(place)
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            out.write_text(json.dumps(part(work)))
        except BaseException:
            import traceback

            traceback.print_exc()
            raise


def dump(value: Any, indent: str = "") -> str:
    """Return JSON with one line per member of an object, and every list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    members = (f"{inner}{json.dumps(key, ensure_ascii=False)}: {dump(value[key], inner)}" for key in sorted(value))
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as work:
        found = dict(record(Path(work)))
    out.write_text(dump(found) + "\n", encoding="utf-8")
    print(f"wrote {out}, {out.stat().st_size:,} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
