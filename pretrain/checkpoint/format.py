"""The format of checkpoints: whole or invisible, verified when read, independent of processes and ZeRO stage.

    RUN/checkpoints/step-00001000/
        state-00000-of-00002.safetensors   float32 parameters and the optimizer's state, in a file per process,
                                           and the states that rows of the batch carry on, if they do
        config.json                        the model, as transformers writes it
        run.yaml                           the run's resolved configuration
        deepspeed.json                     the DeepSpeed JSON that it names, if any, as the run read it
        init_from.json                     the folder whose weights the run began with, if any
        progress.json                      step, samples and tokens consumed, state of a streamed source
        tokenizer/                         the tokenizer of the corpus
        manifest.json                      size and SHA-256 of every file above, and its own SHA-256; written last
    RUN/checkpoints/latest                 name of the newest checkpoint

`writer` writes a checkpoint into a hidden folder, syncs it, and renames it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import sha256, sync
from lrnn.threads import usable_cores

FORMAT_VERSION = 2
NAME = re.compile(r"^step-(\d{8})$")
READERS = 16  # largest number of files that are read at a time


class BrokenCheckpoint(UserError):
    """The files of a checkpoint are not what its manifest says."""


def write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a checkpoint.

    Args:
        folder: the checkpoint, whose other files are all sealed.
        step: step of the checkpoint.
        files: maps the names of these files to what `seal` returned for them.
    """
    (folder / "manifest.json").write_text(manifest_text(step, files))
    sync(folder / "manifest.json")
    sync(folder)


def manifest_text(step: int, files: dict[str, dict[str, Any]]) -> str:
    """Return the content of `manifest.json`; `files` is as in `write_manifest`."""
    content = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    return json.dumps({**content, "sha256": _manifest_sha256(content)}, indent=1)


def seal(file: Path) -> dict[str, Any]:
    """Flush a file to the disk and return its entry in the manifest."""
    sync(file)
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, intact or not, oldest first."""
    root = run_dir / "checkpoints"
    return sorted(p for p in root.iterdir() if NAME.match(p.name)) if root.is_dir() else []


def find_newest(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """Return the newest checkpoint that passes `verify`, or None if the run has no checkpoint at all.

    Broken ones are passed over, each with a warning.

    Raises:
        UserError: all are broken. Starting again from step 0 would overwrite them and lose the run.
    """
    checkpoints = list_checkpoints(run_dir)
    errors = []
    for folder in reversed(checkpoints):
        try:
            verify(folder)
        except BrokenCheckpoint as error:
            errors.append(str(error))
            warn(f"checkpoint passed over: {error}")
        else:
            return folder
    if errors:
        raise UserError(f"no checkpoint of {run_dir} is intact: {errors[0]}; to start again, choose another run_dir")
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Raises:
        BrokenCheckpoint: the manifest is missing, or a file is missing, truncated, altered or unreadable. The message
            names the file.
    """
    manifest = _check_sizes(folder)
    entries = manifest["files"]
    with ThreadPoolExecutor(min(usable_cores(), READERS)) as pool:  # hashes leave Python's lock to other threads
        digests = {name: pool.submit(sha256, folder / name) for name in entries}
        for name, entry in entries.items():
            try:
                digest = digests[name].result()
            except OSError as error:
                raise BrokenCheckpoint(f"{folder / name} cannot be read ({error.strerror})") from None
            if digest != entry["sha256"]:
                raise BrokenCheckpoint(f"{folder / name} is altered: its SHA-256 differs from the manifest's")
    return manifest


def holds(folder: Path, name: str) -> bool:
    """Return whether one file of a checkpoint is as its manifest says. The other files are not read."""
    try:
        return sha256(folder / name) == read_manifest(folder)["files"][name]["sha256"]
    except (BrokenCheckpoint, OSError, KeyError):
        return False


def _check_sizes(folder: Path) -> dict[str, Any]:
    """Make the checks of `verify` that read the manifest only."""
    manifest = read_manifest(folder)
    for file in folder.glob("state-*"):
        if file.name not in manifest["files"]:
            raise BrokenCheckpoint(f"{folder}/manifest.json is damaged: it lacks {file.name}")
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{file} is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise BrokenCheckpoint(f"{file} has {size} bytes, the manifest says {entry['size']}")
    return manifest


def looks_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is there with the size that its manifest says. No file is read."""
    try:
        _check_sizes(folder)
    except (BrokenCheckpoint, OSError):
        return False
    return True


def retain(newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete old checkpoints, given the one just written.

    The last `keep_last` checkpoints that look whole are kept, with `newest` among them and everything between them. So
    are those at multiples of `keep_every` steps (0 keeps none of these). Checkpoints later than `newest`, which the run
    passed over as broken when it resumed, are left alone and do not count.
    """
    checkpoints = [p for p in list_checkpoints(newest.parent.parent) if p.name <= newest.name]
    oldest_kept = [p for p in reversed(checkpoints) if looks_whole(p)][:keep_last][-1]
    for folder in checkpoints[: checkpoints.index(oldest_kept)]:
        if not (keep_every and step_of(folder) % keep_every == 0):
            # It is renamed first, because a half-deleted folder must not look like a checkpoint.
            hidden = folder.rename(folder.with_name(f".{folder.name}"))
            shutil.rmtree(hidden)


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `progress.json`."""
    return json.loads((folder / "progress.json").read_text())


def samples_consumed(run_dir: Path) -> int:
    """Return the samples that a run has consumed by its newest checkpoint that looks whole; 0 if there is none.

    It is for checks before the checkpoint is read: if its content is damaged, `find_newest` says so.
    """
    newest = next((folder for folder in reversed(list_checkpoints(run_dir)) if looks_whole(folder)), None)
    try:
        return 0 if newest is None else int(read_progress(newest)["progress"]["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises BrokenCheckpoint if it is missing, damaged or of another format."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            if manifest["sha256"] != _manifest_sha256(manifest):
                raise ValueError("its own SHA-256 differs")
            if not all({"size", "sha256"} <= set(e) for e in manifest["files"].values()):
                raise ValueError("a file without size or sha256")
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{folder} is not a complete checkpoint: it has no manifest.json") from None
    except OSError as error:
        raise BrokenCheckpoint(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{file} is damaged: {error!r}") from None
    if version != FORMAT_VERSION:
        raise BrokenCheckpoint(f"{folder} has checkpoint format {version}, this program reads {FORMAT_VERSION}")
    for name in manifest["files"]:
        parts = name.removeprefix("tokenizer/").split("/")
        if len(parts) != 1 or parts[0] in ("", ".", ".."):  # an untrusted checkpoint must not read other files
            raise BrokenCheckpoint(f"{file} names {name!r}, which is outside the checkpoint")
    return manifest


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """Return the checksum over everything in a manifest except the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint, from the name of its folder."""
    match = NAME.match(folder.name)
    assert match is not None
    return int(match[1])
