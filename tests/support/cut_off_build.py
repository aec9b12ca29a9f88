"""A build of a corpus that takes minutes, in a process to be killed, which leads its own group."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lrnn.cli import main
from lrnn.pretrain.corpus import build, source
from lrnn.pretrain.corpus.shard_writer import write_part

FAST_PARTS = 2  # the others take a minute


def slow_write_part(part: Any, index: int, work: Path, heldout: float) -> dict[str, Any]:
    if index >= FAST_PARTS:
        time.sleep(60)
    return write_part(part, index, work, heldout)


def run(arguments: list[str], part_bytes: int) -> None:
    """Run `lrnn corpus` with parts of `part_bytes` bytes, of which only the first ones are ever written."""
    os.setpgid(0, 0)
    fork = multiprocessing.get_context("fork")  # it starts faster than "spawn", and no thread runs yet
    with (
        patch("multiprocessing.get_context", lambda kind: fork),
        patch.object(source, "MIN_PART_BYTES", part_bytes),
        patch.object(build, "write_part", slow_write_part),
    ):
        main(["corpus", *arguments])
