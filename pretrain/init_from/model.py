"""The model of a run that begins with weights of a folder."""

from pathlib import Path
from typing import Any

from lrnn.pretrain.init_from.record import check_begin, newest_with_model
from lrnn.settings import read_json

# Not taken from the folder: the run sets the length itself, and `InitialWeights` compares tokenizers by their ids.
NOT_TAKEN = ("max_position_embeddings", "tokenizer_fingerprint")


def fields_of_begun(init_from: str, run_dir: str, changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of the model of a run whose configuration describes no whole model, and what to call them.

    They are those of the folder with the changes of the run. A run that resumes has them in its checkpoint, and does
    not read the folder.

    Args:
        init_from: the folder.
        run_dir: folder of the run.
        changes: fields that the run's configuration gives.

    Raises:
        UserError: the folder cannot be read, or the run's checkpoints are of another beginning.
    """
    from lrnn.formats.config import own_fields  # here, because it imports torch
    from lrnn.pretrain.init_from.source import fields_of_source

    saved = newest_with_model(run_dir)
    if saved is None:
        fields, origin = fields_of_source(Path(init_from)), f"model of init_from {init_from}"
    else:
        check_begin(saved, init_from, run_dir)
        path = saved / "config.json"
        fields, origin = own_fields(read_json(path, "model configuration")), f"model configuration {path}"
    kept = {name: value for name, value in fields.items() if name not in NOT_TAKEN}
    return _changed(kept, changes), f"{origin} with changed {', '.join(changes)}" if changes else origin


def _changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model with changes, which hold for layers that have a value of their own too."""
    entries = fields.get("mixer")
    if "mixer" not in changes and isinstance(entries, list):
        own = [entry if isinstance(entry, dict) else {} for entry in entries]
        replaced = [{name: value for name, value in changes.items() if name in entry} for entry in own]
        pairs = zip(entries, replaced, strict=True)
        fields = {**fields, "mixer": [{**entry, **new} if new else entry for entry, new in pairs]}
    return fields | changes
