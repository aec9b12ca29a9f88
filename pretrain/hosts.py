"""What has to be the same on all hosts of a run: versions, configuration, and the folder that it writes."""

import secrets
import socket
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from lrnn import LrnnConfig
from lrnn.environment import source_checksum
from lrnn.errors import UserError
from lrnn.pretrain.changes import flatten
from lrnn.pretrain.config import Config
from lrnn.pretrain.data.training_data import TrainingData
from lrnn.pretrain.distributed import Ranks
from lrnn.settings import read_json

# Keys and sections of files and folders, which may have other paths on each host. What `model`, `data`, `deepspeed` and
# `stages` hold is compared.
PATHS = {"run_dir", "model", "data", "deepspeed", "init_from", "stages", "eval.include_path", "samples.prompt_file"}
SEEN_WITHIN_S = 15  # NFS may show a file of another host late


def check_same(config: Config, model: LrnnConfig, data: TrainingData, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, if a rank has other versions, settings, model or data than rank 0.

    Each host reads its own copy of packages, configuration and corpora, unless they are on a shared file system.

    Args:
        config: the run's configuration.
        model: the model's configuration.
        data: the training data.
        ranks: this process among all.
    """
    if ranks.world_size == 1:
        return
    facts = {"the checksum of lrnn's code": source_checksum()}
    facts |= {f"the version of {name}": version(name) for name in ("torch", "triton", "deepspeed")}
    settings = flatten(config.model_dump())
    facts |= {key: value for key, value in settings.items() if not {key, key.split(".")[0]} & PATHS}
    for number, stage in enumerate(config.stages):
        facts |= flatten(stage.model_dump(exclude={"corpora"}), f"stages.{number}.")
    if config.deepspeed is not None:
        facts |= flatten({"deepspeed": read_json(config.deepspeed, "DeepSpeed configuration")})
    facts |= flatten(model.to_diff_dict(), "model.") | flatten(data.description, "data.") | {"stages": data.stages}
    everybody = ranks.gather((socket.gethostname(), facts))
    main_host, expected = everybody[0]
    for rank, (host, found) in enumerate(everybody):
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"rank {rank} on {host} has another value of {name} than rank 0 on {main_host}: "
                    f"{found.get(name)!r} instead of {expected.get(name)!r}; start all hosts with the same packages, "
                    "files and arguments"
                )


def check_shared(run_dir: Path, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, if `run_dir` is not the same folder for every rank.

    Each rank writes its part of a checkpoint, which would be in pieces on the disks of the hosts. All ranks call this
    while the main process holds the folder.
    """
    if ranks.world_size == 1:
        return
    # The name is new, so that no host can remember that there is no such file.
    mark = run_dir / f".shared-{ranks.gather(secrets.token_hex(8))[0]}"
    ranks.together(partial(_touch, mark) if ranks.is_main else lambda: None)
    everybody = ranks.gather((socket.gethostname(), _appears(mark)))
    if ranks.is_main:
        mark.unlink(missing_ok=True)
    for rank, (host, seen) in enumerate(everybody):
        if not seen:
            raise UserError(
                f"run_dir {run_dir} is not one folder for all: rank {rank} on {host} does not see what rank 0 on "
                f"{everybody[0][0]} writes there; choose a folder of a file system that all hosts share"
            )


def _touch(mark: Path) -> None:
    try:
        mark.touch()
    except OSError as error:
        raise UserError(f"run_dir {mark.parent} cannot be written ({error.strerror}: {mark})") from None


def _appears(file: Path) -> bool:
    """Return whether a file can be seen, at once or soon."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
