"""The pattern of a model's layers: the mixer of each, and its own options. Copied into exported folders."""

from typing import Any

from .registry import MIXERS, canonical_name

Entry = dict[str, Any]  # "mixer", the name, and the options: fields of the configuration by name

BLOCK_OPTIONS = ("norm_position",)  # fields that blocks read and that an entry may have beside those of its mixer


def read_pattern(mixer: Any, num_layers: int) -> list[Entry]:
    """Return the entries of `LrnnConfig.mixer`, of which layer i has entry i modulo their number.

    Args:
        mixer: a name, or a list of names and objects {"mixer": name, option: value}.
        num_layers: number of layers of the model.

    Raises:
        ValueError: another type, no entry, more entries than layers, an unknown name, or an option that neither the
            mixer nor the block reads.
    """
    if isinstance(mixer, str):
        return [_read_entry(mixer, "mixer")]
    if not isinstance(mixer, list | tuple):
        raise ValueError(f"mixer must be a name, or a list with one entry per layer that is repeated; got {mixer!r}")
    if not mixer:
        raise ValueError("mixer is an empty list; it must name at least one mixer")
    if len(mixer) > num_layers:
        raise ValueError(f"mixer is a pattern of {len(mixer)} layers, but num_hidden_layers is only {num_layers}")
    return [_read_entry(entry, f"mixer[{i}]") for i, entry in enumerate(mixer)]


def entry_at(mixer: str | list[str | Entry], i: int) -> Entry:
    """Return the entry of layer i in a pattern that has been read."""
    entry = mixer if isinstance(mixer, str) else mixer[i % len(mixer)]
    options = {"mixer": entry} if isinstance(entry, str) else entry
    return {**options, "mixer": canonical_name(options["mixer"])}


def short_pattern(entries: list[Entry]) -> list[str | Entry]:
    """Return entries as configurations write them: a mixer without options as its name."""
    return [dict(entry) if len(entry) > 1 else entry["mixer"] for entry in entries]


def options_of(name: str) -> tuple[str, ...]:
    """Return the fields that an entry of a mixer may replace: those that the mixer or the block reads."""
    return *MIXERS[name].options, *BLOCK_OPTIONS


def _read_entry(entry: Any, where: str) -> Entry:
    """Return an entry with the mixer's own name. Raise ValueError, which begins with `where`."""
    options = {"mixer": entry} if isinstance(entry, str) else entry
    if not isinstance(options, dict) or not isinstance(options.get("mixer"), str):
        raise ValueError(
            f'{where} must be a name, or an object with one, such as {{"mixer": "gla", "num_heads": 4}}; got {entry!r}'
        )
    name = canonical_name(options["mixer"])
    if name not in MIXERS:
        raise ValueError(f"{where} {options['mixer']!r} is not one of {', '.join(MIXERS)}")
    for option in options.keys() - {"mixer"}:
        if option not in options_of(name):
            raise ValueError(f"{where}: {option} is not an option of {name}, which has {', '.join(options_of(name))}")
    return {**options, "mixer": name}
