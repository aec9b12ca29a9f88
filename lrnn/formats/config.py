"""The configuration of a model folder, of any format that lrnn reads, as fields of lrnn's model."""

from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.formats.fla import ARCHITECTURES, from_fla_config
from lrnn.model_config import NOT_OF_THE_MODEL, described_fields
from lrnn.settings import read_json

LRNN, OLMO = "lrnn", "olmo_hybrid"
FORMATS = (LRNN, *ARCHITECTURES, OLMO)
OLD_NAMES = ("torch_dtype", "_name_or_path")  # which transformers wrote into a config.json, and no longer has


def read_config(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read the configuration of a model folder. No weights are looked at.

    Returns:
        The format, one of `FORMATS`; the fields of lrnn's model that computes the same; the content of `config.json`.

    Raises:
        UserError: the folder is of no format that lrnn reads, or lrnn has no such model.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"{folder} {what}; give a model folder, with its config.json and model.safetensors; a model of the hub is "
            "downloaded with `hf download NAME --local-dir FOLDER`"
        )
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    raw = read_json(path, "model configuration")
    kind = raw.get("model_type")
    if kind not in FORMATS:
        raise UserError(f"{path}: model_type {kind!r} cannot be read; lrnn reads {', '.join(FORMATS)}")
    if kind == LRNN:
        return kind, own_fields(raw), raw
    if kind == OLMO:
        from lrnn.formats.olmo_hybrid import from_olmo_config  # here, because it imports transformers

        return kind, from_olmo_config(folder, raw), raw
    return kind, from_fla_config(folder, raw), raw


def own_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that lrnn wrote, without those of transformers. Unknown ones stay."""
    from transformers import PretrainedConfig

    ours = {field.name for field in described_fields()}
    others = {*PretrainedConfig().to_dict(), *NOT_OF_THE_MODEL, *OLD_NAMES} - ours
    return {name: value for name, value in raw.items() if name not in others}
