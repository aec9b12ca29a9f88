"""How far a run is, and which checkpoint it may continue from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.model.configuration_lrnn import OPTIONS
from lrnn.model.pattern import entry_at
from lrnn.pretrain.changes import Changes
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.old_config import check_sequence_length
from lrnn.pretrain.stage_changes import OF_STAGE, check_reached

# Keys of `data.stream` that decide its samples, beside the tokenizer, whose content is compared.
OF_STREAM = ("path", "name", "split", "data_files", "text_column", "kind", "sample_by", "shuffle_buffer")


@dataclass
class Progress:
    """How far a run is. Every checkpoint stores it."""

    step: int = 0  # steps done, skipped ones included
    samples: int = 0  # samples consumed: the position in the data; after a rollback more than `step` would need
    tokens: int = 0  # labels that the loss was taken over
    skipped_steps: int = 0
    optimizer_step: int = 0  # updates applied
    stream: dict[str, Any] | None = None  # position in a streamed source
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)  # losses of the last steps, by which the guard finds a spike
    decay_by_shape: bool = False  # whether the run began before linear maps were told by meaning, see `optim`
    unrecorded: list[float] = field(default_factory=list)  # finite losses of the steps since the last record

    @classmethod
    def read(cls, saved: Path) -> "Progress":
        """Return the progress that the checkpoint in `saved` stores."""
        return cls(**{"decay_by_shape": True} | checkpoint.read_progress(saved)["progress"])


def check_same_run(
    saved: Path,
    model_config: LrnnConfig,
    description: dict[str, Any],
    as_of_0_1_0: dict[str, Any] | None = None,
    stages: list[dict[str, Any]] | None = None,
    *,
    allow_change: bool = False,
    changes: Changes | None = None,
) -> set[str]:
    """Check that a checkpoint is of the same model, and that its position refers to the same data.

    Args:
        saved: folder of the checkpoint.
        model_config: the model of the run.
        description: facts of the run's data, see `TrainingData`.
        as_of_0_1_0: the same facts in the words of an older checkpoint, where these differ.
        stages: the facts of each stage, see `TrainingData`.
        allow_change: accept other data of the same tokenizer.
        changes: the keys of the configuration that changed, see `check_changes`; they say how a stream differs.

    Returns:
        The facts of the data that differ.

    Raises:
        UserError: the model differs, or the data do without being allowed to.
    """
    # The model of a checkpoint that is older than a field had the field's present default.
    before = OPTIONS | LrnnConfig().to_dict() | json.loads((saved / "config.json").read_text())
    now = OPTIONS | json.loads(model_config.to_json_string(use_diff=False))
    ignored = {"transformers_version", "dtype", "max_position_embeddings"}  # the data's seq_len is compared below
    for key in sorted((set(before) | set(now)) - ignored):
        same_layers = key == "mixer" and _layers(before) == _layers(now)  # whatever the spelling
        if before.get(key) != now.get(key) and not same_layers:
            raise UserError(
                f"{saved} was trained with {key} = {before.get(key)!r}, the model configuration says {now.get(key)!r}; "
                "a run resumes with the model it began with: restore the configuration, or choose another run_dir"
            )
    data_before = checkpoint.read_progress(saved)["data"]
    of_stages: set[str] = set()
    if "stages" in data_before or "stages" in description:
        of_stages = check_reached(saved, stages or [], allow_change)
        data_before, description = (
            {key: value for key, value in facts.items() if key not in OF_STAGE} for facts in (data_before, description)
        )
    changed = {
        key
        for key in data_before.keys() | description.keys()
        if not _same(data_before.get(key), description.get(key), (as_of_0_1_0 or {}).get(key))
    }
    same_tokens = "tokenizer" not in changed
    if changed and not (allow_change and same_tokens):
        remedy = "restore it, add --allow-change to continue all the same" if same_tokens else "restore it"
        raise UserError(
            f"{saved} was trained on {_difference(changed, data_before, description, changes or {})}; "
            f"the position in the data would mean something else: {remedy}, or choose another run_dir"
        )
    check_sequence_length(before, model_config.max_position_embeddings, saved, in_workers=True)
    return changed | of_stages


def _layers(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return mixer and options of each layer."""
    return [entry_at(model["mixer"], i) for i in range(model["num_hidden_layers"])]


def _same(before: Any, *now: Any) -> bool:
    """Return whether a fact of the data is the same in one of the ways to state it. A mapping holds several of them."""
    ways = [way for fact in now for way in _ways(fact)]
    return any(way in ways for way in _ways(before))


def _ways(fact: Any) -> list[Any]:
    return list(fact.values()) if isinstance(fact, dict) else [fact]


def _difference(changed: set[str], before: dict[str, Any], now: dict[str, Any], changes: Changes) -> str:
    """Return how data differ, for a message. A stream, whose fingerprint covers other facts, counts after these."""
    key = min(changed - {"stream"}, default="stream")
    if key != "stream":
        return f"data with {key} = {before.get(key)!r}, now it is {now.get(key)!r}"
    of_stream = {name: changes.get(f"data.stream.{name}") for name in OF_STREAM}
    named = [(f"data.stream.{name}", *values) for name, values in of_stream.items() if values is not None]
    listing = ", ".join(f"{key} = {old!r} (now {new!r})" for key, old, new in named)
    return f"another stream: {listing}" if listing else "another stream than that of the configuration"
