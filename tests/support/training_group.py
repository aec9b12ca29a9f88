"""Run trainings in groups of processes."""

import json
import time
from pathlib import Path

import torch
import training_worker
from fork_server import CONTEXT

from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.launch import free_port, local_environment
from lrnn.records import read_metrics


def run_group(tmp_path, specs, processes=2, context=CONTEXT):
    """Run the specs (see training_worker.py) one after the other in one group of processes. Return their statuses.

    `context` starts the processes. A process that uses a GPU must not be forked from one that has asked for GPUs.
    """
    path = tmp_path / f"spec-{len(list(tmp_path.glob('spec-*')))}.json"
    path.write_text(json.dumps(specs))
    workers = _start(training_worker.main, [path], processes, context)
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):  # the others would wait for the failed one
            for worker in workers:
                worker.kill()
        time.sleep(0.02)
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * processes, f"workers ended with {codes}"
    return [json.loads(line)["status"] for line in Path(f"{path}.status").read_text().splitlines()]


def run_command(tmp_path, arguments, processes=2):
    """Run a command of `lrnn` in a group of processes, as `srun` does. Return their statuses, and stderr of all."""
    errors = tmp_path / "errors"
    workers = _start(training_worker.command, [arguments, errors], processes, CONTEXT)
    for worker in workers:
        worker.join(300)
    return [worker.exitcode for worker in workers], errors.read_text()


def _start(target, arguments, processes, context):
    """Start processes of a group that call `target` with these arguments and the environment of their rank."""
    port = free_port()
    workers = [
        context.Process(target=target, args=(*arguments, local_environment(rank, processes, port)))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    return workers


def losses(config):
    """Return (loss, gradient norm, held-out loss) by step, from the last record of each step."""
    records = {r["step"]: r for r in read_metrics(Path(config["run_dir"])) if "event" not in r}
    return {step: (r["loss"], r["grad_norm"], r.get("heldout_loss")) for step, r in sorted(records.items())}


def state_of(folder) -> dict[tuple[str, str], torch.Tensor]:
    """Return everything that a checkpoint keeps of each parameter, by kind and name."""
    state = SavedState(folder)
    return {key: state.read(*key, 0, max(end for _, end, *_ in pieces)) for key, pieces in state._index.items()}
