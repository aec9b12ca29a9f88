"""Figures with the values of documents behind them, and files that keep those of a measurement under way."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.eval.statistics import aggregate, bootstrap_stderr
from lrnn.files import write_atomically
from lrnn.ladder.measures import MEASURES
from lrnn.ladder.results import Figure

ABOUT, FIGURES = ".about", ".figures"  # keys in a file, beside those of documents


@dataclass
class Part:
    """Figures, and values of documents by key: float64 [n], or [n, 2] pairs as `lrnn.eval.statistics` takes them."""

    figures: list[Figure] = field(default_factory=list)
    documents: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, measure: str, of: str, at: int | None, values: np.ndarray) -> Figure:
        """Add a figure, computed from the values of its documents, and return it.

        Raises:
            UserError: a value is not finite.
        """
        key = "/".join([measure, of, *([] if at is None else [str(at)])])
        if not np.isfinite(values).all():
            bad = len(values) - int(np.isfinite(values.reshape(len(values), -1)).all(1).sum())
            raise UserError(f"{key}: the log-likelihoods of {bad} of {len(values)} documents are not finite")
        name = MEASURES[measure].aggregate
        value, stderr = float(aggregate(name, values)), bootstrap_stderr(name, values)
        figure = Figure(measure, of, at, value, stderr, key)
        self.figures.append(figure)
        self.documents[key] = values
        return figure

    def __iadd__(self, other: "Part") -> "Part":
        self.figures += other.figures
        self.documents |= other.documents
        return self


class Kept:
    """Parts on disk, so that a measurement that was stopped does not repeat those that it had.

    Args:
        folder: of the files; made when the first part is written.
        about: what all parts depend on, as JSON.
    """

    def __init__(self, folder: Path, about: Any):
        self._folder, self._about = folder, about

    def get(self, name: str, about: Any, compute: Callable[[], Part]) -> Part:
        """Return the part of a name, from its file if what it depends on is the same, computed otherwise.

        Args:
            about: what the part depends on beside what all do, as JSON.
        """
        path = self._folder / f"{name}.npz"
        digest = hashlib.sha256(json.dumps([self._about, about], sort_keys=True).encode()).hexdigest()
        part = _read(path, digest)
        if part is None:
            part = compute()
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _as_bytes(part, digest))
        return part


def _read(path: Path, digest: str) -> Part | None:
    """Return the part in a file, or None if there is none, or one that depends on something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if arrays.pop(ABOUT) != digest:
            return None
        figures = [Figure(**figure) for figure in json.loads(str(arrays.pop(FIGURES)))]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return Part(figures, arrays)


def _as_bytes(part: Part, digest: str) -> bytes:
    content = io.BytesIO()
    figures = json.dumps([asdict(figure) for figure in part.figures])
    arrays: dict[str, Any] = {ABOUT: np.array(digest), FIGURES: np.array(figures), **part.documents}
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()
