"""Everything that the golden record uses of lrnn: imports of its modules, and forms of files that lrnn reads.

If a module, an option or a form of configuration changes, only this file needs to follow.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed  # noqa: F401  imported before the fork, because a training needs it when it starts
import numpy as np
import pandas  # noqa: F401  likewise
import torch
import yaml

import lrnn
from lrnn import cli
from lrnn.eval.export import tokenizer as export_tokenizer
from lrnn.eval.export import write as export_write
from lrnn.eval.state_tracking.documents import documents
from lrnn.eval.state_tracking.tasks import TEXT_TASKS
from lrnn.model.mixers import MIXERS
from lrnn.model.registry import canonical_name
from lrnn.pretrain import train  # noqa: F401  what the command imports, before the fork
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.order import MixedOrder, window_index
from lrnn.track.tasks.counter_rng import split_seed
from lrnn.track.tasks.registry import TASKS, make_task

LOCATION = Path(lrnn.__file__)
RECORDED = (  # mixers in the record; one that is added later has tests of its own
    "gated_deltanet", "deltanet", "gated_deltaproduct", "deltaproduct", "gla", "mamba2", "mamba", "mlstm", "rwkv7",
    "slstm", "transformer",
)  # fmt: skip
HAS_RANGE = {name: MIXERS[canonical_name(name)].ranges is not None for name in RECORDED}
TRACK_TASKS = tuple(TASKS)
TEXT_TASK_NAMES = tuple(TEXT_TASKS)
EXPORT_LRNN, EXPORT_FLA = ("--format", "hf"), ("--format", "fla")
IMPORT_FLA = ("--from-fla",)
FLA_MIXERS = ("gated_deltanet", "deltanet")


def command(*arguments: str | Path) -> None:
    """Run a command line of `lrnn` in this process.

    Leave the group of processes that a training makes, because DeepSpeed cannot begin a second one.

    Raises:
        RuntimeError: If the command ends with a status other than 0.
    """
    environment = dict(os.environ)
    try:
        with patch.object(torch.distributed, "destroy_process_group", lambda: None):
            status = cli.main([str(argument) for argument in arguments])
    finally:  # a training adds its place in the group of processes
        os.environ.clear()
        os.environ.update(environment)
    if status:
        raise RuntimeError(f"lrnn {' '.join(map(str, arguments))} ended with status {status}")


@contextmanager
def without_checks() -> Iterator[None]:
    """Keep `lrnn export` from reading back what it writes, which takes one process per folder and much text.

    The record reads all folders in one process.
    """
    with (
        patch.object(export_write, "sample_batch", lambda tokenizer: torch.zeros(1, 2, dtype=torch.int64)),
        patch.object(export_write, "check_hf_folder", lambda *args: 0.0),
        patch.object(export_tokenizer, "compare_tokenizers", lambda *args: None),
    ):
        yield


def write_run(folder: Path, model: dict[str, Any], run: dict[str, Any], zero_stage: int) -> Path:
    """Write the configuration of a run into `folder`. Return the YAML file."""
    folder.mkdir(parents=True)
    engine = {
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 500,
        },
        "gradient_clipping": 1.0,
    }
    (folder / "deepspeed.json").write_text(json.dumps(engine))
    (folder / "model.json").write_text(json.dumps({"model_type": "lrnn", **model}))
    paths = {"model": str(folder / "model.json"), "deepspeed": str(folder / "deepspeed.json")}
    (folder / "config.yaml").write_text(yaml.safe_dump({**run, **paths}, sort_keys=False))
    return folder / "config.yaml"


def read_corpus(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the tokens of a split, the positions at which its documents start, and its fingerprint."""
    corpus = TokenCorpus(path, split)
    n = corpus.num_tokens
    return corpus.tokens(0, n), corpus.document_starts(0, n), corpus.fingerprint


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of the `n` windows of a corpus in an epoch."""
    return window_index(seed, epoch, np.arange(n), n)


def mixed_order(
    num_windows: list[int], weights: list[float], seed: int, samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return corpus, epoch and window of each sample."""
    return MixedOrder(num_windows, weights, seed)(samples)


def track_samples(
    task: str, parameters: dict[str, Any], seed: int, split: str, count: int, lengths: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return the first `count` samples of a state-tracking task."""
    batch = make_task(task, **parameters).batch(split_seed(seed, split), torch.arange(count), *lengths)
    return {"input_ids": batch.input_ids, "labels": batch.labels, "lengths": batch.lengths}


def text_documents(task: str) -> list[dict[str, Any]]:
    """Return the documents of a task of the evaluation suite `state_tracking`."""
    return [dict(document) for document in documents(task)]
