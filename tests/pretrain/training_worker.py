"""One process of a group: runs trainings one after the other, as `training_worker.py SPEC.json` under `launch`.

SPEC is a list of {"config": {...}, "stop_at": step or null, "poison_at": step or null}. At `stop_at` the last rank gets
the signal that announces a pre-emption; at `poison_at` one gradient of the last rank becomes NaN.
"""

import json
import os
import signal
import sys

import torch

from lrnn.errors import UserError
from lrnn.pretrain import train as train_module
from lrnn.pretrain.config import validate
from lrnn.pretrain.distributed import init_ranks

original_step = train_module.train_step


def main() -> None:
    torch.set_num_threads(1)
    ranks = init_ranks()
    for i, spec in enumerate(json.load(open(sys.argv[1]))):  # noqa: SIM115
        config = validate(spec["config"], "test")

        def step(engine, micro_batches, ranks, probe, spec=spec, config=config):
            number = int(micro_batches[0].sample_indices.min()) // config.global_batch_size + 1
            last = ranks.rank == ranks.world_size - 1
            if last and number == spec.get("stop_at"):
                os.kill(os.getpid(), signal.SIGUSR1)
            handle = None
            if last and number == spec.get("poison_at"):
                parameter = engine.module.model.layers[0].mlp.up_proj.weight
                handle = parameter.register_hook(lambda grad: grad * float("nan"))
            result = original_step(engine, micro_batches, ranks, probe)
            if handle is not None:
                handle.remove()
            return result

        train_module.train_step = step
        try:
            status = train_module.train(config, ranks)
        except (UserError, RuntimeError) as error:
            status = f"{type(error).__name__}: {error}"
        if ranks.is_main:
            with open(f"{sys.argv[1]}.status", "a") as f:
                f.write(json.dumps({"run": i, "status": status}) + "\n")


main()
