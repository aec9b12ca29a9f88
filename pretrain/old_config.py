"""Convert what earlier versions wrote, each with one line of notice on stderr.

- `deepspeed: .../deepspeed/zeroN.json`, one of the three files that were shipped in `configs/`, becomes `zero: N`,
  whether the file is still there or not. A file of that name with other content stays a DeepSpeed JSON.
- `gradient_clipping` of a DeepSpeed JSON becomes `optim.clip` if that is not given. A JSON without it turned clipping
  off, so `optim.clip` becomes 0.
- `max_position_embeddings` of a model's JSON gives way to `data.seq_len`, and so does that of a checkpoint's
  `config.json`.
- `activation_checkpointing: true` becomes `full`, and `false` becomes `none`; both are still fine to write, so there is
  no notice.
"""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.launch import LAUNCHER, is_first
from lrnn.pretrain.zero import zero_settings
from lrnn.settings import read_json

SHIPPED = re.compile(r"(?:^|/)deepspeed/zero([123])\.json$")
SHIPPED_CLIP = 1.0  # of all three files


def convert(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the parsed YAML of a run in its present form. The schema later refuses values that do not fit it."""
    if isinstance(recomputed := raw.get("activation_checkpointing"), bool):
        raw = {**raw, "activation_checkpointing": "full" if recomputed else "none"}
    path, optim = raw.get("deepspeed"), raw.get("optim")
    if not isinstance(path, str) or not isinstance(optim, dict):
        return raw
    given = _read(path)
    stage = _shipped_stage(path, given)
    if stage is None and given is None:
        return raw
    clip = SHIPPED_CLIP if given is None else given.get("gradient_clipping")
    changed = dict(raw)
    said = []
    if stage is not None:
        if raw.get("zero") not in (None, stage):
            raise UserError(f"{origin}: zero is {raw['zero']!r}, and deepspeed: {path} is stage {stage}; remove one")
        del changed["deepspeed"]
        changed["zero"] = stage
        said.append(f"deepspeed: {path} is now zero: {stage}")
    if "clip" not in optim:
        changed["optim"] = {**optim, "clip": 0.0 if clip is None else clip}
        said.append(f"its gradient_clipping is now optim.clip: {changed['optim']['clip']}")
    elif stage is not None and clip not in (None, optim["clip"]):
        raise UserError(
            f"{origin}: optim.clip is {optim['clip']!r}, and gradient_clipping of deepspeed: {path} is {clip!r}; "
            "remove one"
        )
    if said:
        about = "" if stage is not None else f"deepspeed: {path} stays, "
        notice(f"{origin}: {about}{', '.join(said)}")
    return changed


def check_sequence_length(model: dict[str, Any], seq_len: int, origin: str | Path, *, in_workers: bool = False) -> None:
    """Give notice if the `config.json` of a model or checkpoint has another training length than `data.seq_len`."""
    length = model.get("max_position_embeddings", seq_len)
    if length != seq_len:
        notice(f"{origin}: max_position_embeddings {length} gives way to data.seq_len {seq_len}", in_workers=in_workers)


@functools.cache
def notice(text: str, *, in_workers: bool = False) -> None:
    """Print a line to stderr, once per run: in the launcher, or in the main process if no launcher started it.

    Args:
        text: the line.
        in_workers: the launcher does not come to this call, so the main process prints even if it was launched.
    """
    if is_first() and (in_workers or LAUNCHER not in os.environ):
        print(f"lrnn: notice: {text}", file=sys.stderr)


def _read(path: str) -> dict[str, Any] | None:
    """Return a DeepSpeed JSON, or None if it cannot be read; `deepspeed_config` says why."""
    try:
        return read_json(path, "DeepSpeed configuration")
    except UserError:
        return None


def _shipped_stage(path: str, given: dict[str, Any] | None) -> int | None:
    """Return the stage of a DeepSpeed JSON that was shipped; `given` is its content if it is still there."""
    if given is None:
        match = SHIPPED.search(path)
        return int(match[1]) if match and not Path(path).exists() else None
    rest = {key: value for key, value in given.items() if key != "gradient_clipping"}
    return next((stage for stage in (1, 2, 3) if rest == zero_settings(stage)), None)
