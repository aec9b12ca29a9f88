"""Write checkpoints (see `format`) while training continues: a step waits for a copy in memory, not for the disk.

All ranks call the same methods in the same order. `begin` copies what the rank holds of the training state into host
memory, and a thread writes it into a hidden folder. When the threads of all ranks are done, that of the main process
writes the manifest and renames the folder; until then the checkpoint is not visible. `advance` learns from a vote,
which the training loop holds once per step anyway, whether all are done.

If the storage fails (a full disk, a quota, a mount that went away), the checkpoint fails and the run continues: the
hidden folder is deleted, the failure is reported, and the next attempt follows after a tenth of the interval.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.files import sync, use_default_mode, write_atomically
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.zero_state import local_fragments
from lrnn.pretrain.config import CheckpointConfig
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine

READY, BUSY, FAILED = 0, 1, 2  # votes of a rank; the largest vote of all ranks counts
# These are failures of storage. Any other error is a bug and ends the run.
STORAGE_ERRORS = (OSError, safetensors.SafetensorError)


@dataclass
class Outcome:
    """The outcome of one checkpoint.

    Attributes:
        step: step of the checkpoint.
        folder: where it is, or would have been.
        error: why it could not be written, or None if it is written.
        warning: what went wrong after it was written: `latest` or older checkpoints are not as they should be (on the
            main process).
        stall_s: how long training waited: for the copy, for the checkpoint before, and, if it was not written in the
            background, for all of it.
        write_s: time from the copy to the end.
    """

    step: int
    folder: Path
    error: str | None
    warning: str | None
    stall_s: float
    write_s: float


@dataclass
class _Pending:
    step: int
    partial: Path
    stall_s: float
    begun: float = field(default_factory=time.monotonic)
    committing: bool = False
    warning: str | None = None


class CheckpointWriter:
    """The writer of one rank.

    Args:
        run_dir: folder of the run; `checkpoints/` is created in it.
        ranks: this process among all.
        settings: how often checkpoints are written, how many are kept, and whether training continues meanwhile.
        save_tokenizer: writes the tokenizer's files into a folder that it creates.
        report: called on all ranks with the outcome of every checkpoint, in order.

    Attributes:
        saved_step: step of the newest checkpoint that this writer has completed, or None if there is none yet.
        error: why the last checkpoint failed, or None if it did not fail.

    Raises:
        UserError: the folder of checkpoints cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        settings: CheckpointConfig,
        save_tokenizer: Callable[[Path], object],
        report: Callable[[Outcome], None],
    ):
        self._root, self._ranks, self._settings = run_dir / "checkpoints", ranks, settings
        self._save_tokenizer, self._report = save_tokenizer, report
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future | None = None
        self._pending: _Pending | None = None
        self._buffers: dict[str, Tensor] = {}
        self.error: str | None = None
        self.saved_step: int | None = None
        # The token is in the names of hidden folders: a rank that outlived an earlier run cannot write into them.
        self._token = ranks.gather(secrets.token_hex(4))[0]
        ranks.together(self._prepare_root if ranks.is_main else lambda: None)

    def _prepare_root(self) -> None:
        try:
            self._root.mkdir(exist_ok=True)
            for leftover in self._root.glob(".step-*"):  # a process was killed while it wrote them
                shutil.rmtree(leftover)
        except OSError as error:
            raise UserError(f"{self._root} cannot be written ({error.strerror}: {error.filename})") from None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint should be started after `step` steps."""
        every = self._settings.every
        return step % every == 0 or (self.error is not None and step % max(1, every // 10) == 0)

    def begin(
        self,
        engine: Engine,
        progress: dict[str, Any],
        texts: dict[str, str],
        carried: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Start a checkpoint of step `progress["step"]`. Waits for the one before, if it is not written yet.

        Args:
            engine: the engine, whose state is copied.
            progress: content of `progress.json`.
            texts: other small files (`config.json`, `run.yaml`), name to content.
            carried: states of this rank's rows, see `lrnn.pretrain.state_passing`.
        """
        start = time.monotonic()
        self.wait()
        tensors = self._snapshot(engine, carried)
        step = progress["step"]
        files = {**texts, "progress.json": json.dumps(progress, indent=1)}
        self._pending = _Pending(step, self._root / f".step-{step:08d}.{self._token}", time.monotonic() - start)
        self._future = self._executor.submit(self._write, self._pending.partial, tensors, files)
        if not self._settings.background:
            self.wait()

    @property
    def vote(self) -> int:
        """Return this rank's vote for `advance`: `READY`, `BUSY` or `FAILED`."""
        if self._future is None:
            return READY
        if not self._future.done():
            return BUSY
        return FAILED if self._future.exception() is not None else READY

    def advance(self, worst: int) -> None:
        """Continue the pending checkpoint, given the largest vote of all ranks. All ranks make the same call."""
        pending = self._pending
        if pending is None or worst == BUSY:
            return
        results = self._ranks.gather(self._result())
        errors = [error for _, error in results if error is not None]
        if not errors and not pending.committing:
            pending.committing = True
            if self._ranks.is_main:
                files = {name: entry for written, _ in results for name, entry in written.items()}
                self._future = self._executor.submit(self._commit, pending, files)
            return
        self._pending = None
        self.error = errors[0] if errors else None
        if not errors:
            self.saved_step = pending.step
        elif self._ranks.is_main:
            self._executor.submit(shutil.rmtree, pending.partial, ignore_errors=True)
        write_s = time.monotonic() - pending.begun
        self._report(
            Outcome(
                step=pending.step,
                folder=self._folder(pending.step),
                error=self.error,
                warning=pending.warning,
                stall_s=pending.stall_s + (0 if self._settings.background else write_s),
                write_s=write_s,
            )
        )

    def wait(self) -> None:
        """Wait until nothing is pending."""
        while self._pending is not None:
            if self._future is not None:
                wait_for([self._future])
            self.advance(max(self._ranks.gather(self.vote)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After an error other ranks may not get here, so this rank waits for its own thread only.
        self._executor.shutdown(wait=True)

    def _folder(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"

    def _snapshot(self, engine: Engine, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the rank's fragments and states into buffers that are kept from one checkpoint to the next."""
        sources = {
            f"{kind}:{fragment.name}:{fragment.start}": tensor.detach()
            for fragment in local_fragments(engine)
            for kind, tensor in fragment.tensors.items()
        }
        tensors = {}
        for key, source in {**sources, **carried}.items():
            if key not in self._buffers or self._buffers[key].shape != source.shape:
                self._buffers[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key].copy_(source, non_blocking=True)
            tensors[key] = self._buffers[key]
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return tensors

    def _write(self, partial: Path, tensors: dict[str, Tensor], files: dict[str, str]) -> dict[str, Any]:
        """Write this rank's state and, on the main process, the small files; return their entries.

        It runs in the thread.
        """
        partial.mkdir(exist_ok=True)  # not its parents: storage that went away must not be recreated as a folder
        name = f"state-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        safetensors.torch.save_file(tensors, partial / name)
        use_default_mode(partial / name)
        entries = {name: checkpoint.seal(partial / name)}
        if self._ranks.is_main:
            for text_name, text in files.items():
                (partial / text_name).write_text(text)
                entries[text_name] = checkpoint.seal(partial / text_name)
            self._save_tokenizer(partial / "tokenizer")
            for file in sorted((partial / "tokenizer").iterdir()):
                entries[f"tokenizer/{file.name}"] = checkpoint.seal(file)
            sync(partial / "tokenizer")
        return entries

    def _commit(self, pending: _Pending, files: dict[str, Any]) -> None:
        """Make the checkpoint visible and delete those that need not be kept; runs in the main process's thread."""
        checkpoint.write_manifest(pending.partial, pending.step, files)
        folder = self._folder(pending.step)
        if folder.exists():  # a broken checkpoint of the same step
            shutil.rmtree(folder.rename(pending.partial.with_name(f"{pending.partial.name}.old")))
        pending.partial.rename(folder)
        sync(self._root)
        try:
            write_atomically(self._root / "latest", folder.name + "\n")
            checkpoint.retain(folder, self._settings.keep_last, self._settings.keep_every)
        except OSError as error:
            pending.warning = str(error)

    def _result(self) -> tuple[dict[str, Any], str | None]:
        """Return what the thread returned, and why it failed. Raises any error that is not a failure of storage."""
        if self._future is None:
            return {}, None
        future, self._future = self._future, None
        try:
            return future.result() or {}, None
        except STORAGE_ERRORS as error:
            where = f" (rank {self._ranks.rank})" if self._ranks.world_size > 1 else ""
            return {}, f"{error}{where}"
