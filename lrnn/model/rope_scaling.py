"""Rotary positions for longer texts than a model was trained on. Copied into exported folders.

`rope_scaling` of a configuration is a mapping with the keys of transformers: `rope_type` and what that type reads.

    linear: every angle divided by `factor` (Position Interpolation, arXiv 2306.15595)
    yarn:   slow channels interpolated, fast ones as they were, the softmax sharpened (arXiv 2309.00071)
    llama3: the same by wavelength, without sharpening (Llama 3.1)

The type `dynamic` is refused: its angles depend on the length of the text so far, so that keys in a cache, rotated
before, would have other angles than those of a text that is read at once.
"""

import math
from typing import Any

import torch
from torch import Tensor

COUNT, FACTOR, SHARE, FLAG = "a positive integer", "a number of at least 1", "a positive number", "true or false"
# Keys of each type with what each must be: those that must be given, and those that may.
REQUIRED: dict[str, dict[str, str]] = {
    "linear": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "original_max_position_embeddings": COUNT},
    "llama3": {
        "factor": FACTOR,
        "original_max_position_embeddings": COUNT,
        "low_freq_factor": SHARE,
        "high_freq_factor": SHARE,
    },
}
OPTIONAL: dict[str, dict[str, str]] = {
    "yarn": {
        "attention_factor": SHARE,
        "beta_fast": SHARE,
        "beta_slow": SHARE,
        "mscale": SHARE,
        "mscale_all_dim": SHARE,
        "truncate": FLAG,
    },
}


def check_scaling(scaling: Any) -> None:
    """Raise ValueError if a configuration's `rope_scaling` is not None and not one of those above."""
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(kind, str) or kind not in REQUIRED:
        why = " (the angles of 'dynamic' change with the length of the text)" if kind == "dynamic" else ""
        known = " or ".join(map(repr, REQUIRED))
        raise ValueError(f"rope_scaling must be null or a mapping whose rope_type is {known}{why}; got {scaling!r}")
    required, known_keys = REQUIRED[kind], REQUIRED[kind] | OPTIONAL.get(kind, {})
    for key in required:
        if key not in scaling:
            needed = ", ".join(required)
            raise ValueError(f"rope_scaling of type {kind!r} needs {needed}, but has no {key}; got {scaling!r}")
    for key, value in scaling.items():
        if key != "rope_type" and key not in known_keys:
            raise ValueError(f"rope_scaling of type {kind!r} has no key {key!r}; it has {', '.join(known_keys)}")
        if key != "rope_type" and not _fits(value, known_keys[key]):
            raise ValueError(f"rope_scaling.{key} must be {known_keys[key]}; got {value!r}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in scaling and high in scaling and scaling[low] >= scaling[high]:
            raise ValueError(f"rope_scaling.{low} must be below {high}; got {scaling[low]!r} and {scaling[high]!r}")


def scaled_frequencies(size: int, base: float, scaling: dict[str, Any], device: torch.device) -> tuple[Tensor, float]:
    """Return the angle per token of each pair of channels, float32 [size/2], and the factor on cosines and sines.

    Args:
        size: of a head.
        base: theta.
        scaling: `rope_scaling`, which `check_scaling` has accepted.
        device: of the result.
    """
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    frequencies = 1.0 / (base**exponent)
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        return _by_wavelength(frequencies, scaling), 1.0
    fast = 1 - _ramp(size, base, scaling, device)  # 1 where a channel keeps its frequency
    return frequencies / factor * (1 - fast) + frequencies * fast, _sharpening(scaling)


def _by_wavelength(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Return the frequencies of Llama 3.1: low ones divided by the factor, high ones unchanged, others in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def _ramp(size: int, base: float, scaling: dict[str, Any], device: torch.device) -> Tensor:
    """Return how far each pair of channels is interpolated under YaRN, from 0 to 1: [size/2]."""
    length = scaling["original_max_position_embeddings"]
    # The channels that turn `beta_fast` and `beta_slow` times in the original length.
    ends = (size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1))  # fmt: skip
    first, last = ends
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last = last + 0.001 if first == last else last
    channel = torch.arange(size // 2, dtype=torch.float32, device=device)
    return ((channel - first) / (last - first)).clamp(0, 1)


def _sharpening(scaling: dict[str, Any]) -> float:
    """Return YaRN's factor on cosines and sines, which sharpens the softmax."""

    def of_length(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of_length(scaling["mscale"]) / of_length(scaling["mscale_all_dim"])
    return of_length(1.0)


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value is of one of the kinds above."""
    if kind == FLAG:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 if kind == SHARE else value >= 1 and (kind == FACTOR or isinstance(value, int))
