"""What is kept of a run of a ladder: `OUT/results/NAME` with `cell.json`, `metrics.jsonl` and `documents.npz`.

These files are small, and the report is made from them alone. A folder appears whole or not at all.
"""

import json
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.files import replace_folder
from lrnn.records import read_metrics

SCHEMA_VERSION = 1
METRICS_BYTES = 200_000  # of the records that are kept


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        measure: name in `lrnn.ladder.measures.MEASURES`, which says what it is, its unit and what `at` means.
        of: what was measured, such as the domain "code" or the task "s5".
        at: where, such as a length; None if the measure has no such axis.
        value: the number.
        stderr: its standard error over documents, if there is one.
        documents: key of the values by document in `CellResult.documents`, if they are kept.
    """

    measure: str
    of: str
    at: float | None
    value: float
    stderr: float | None = None
    documents: str | None = None


@dataclass(frozen=True)
class CellResult:
    """The result of a run.

    Attributes:
        name, size, arm, range, seed, lr: the cell; see `lrnn.ladder.cells.Cell`.
        tokens: tokens trained on.
        parameters, non_embedding_parameters: of the model; embeddings and head are left out of the latter.
        steps, tokens_per_step: of the training.
        settings: all that decides the result, by dotted key.
        corpora: SHA-256 of the checksums of each corpus's shards, by its folder's name.
        figures: what was measured.
        training: facts of the training, such as seconds, tokens per second, loss and spikes.
        environment: what it was computed with.
        documents: float64 arrays of values by document, in the same order for all cells: [n] means, or [n, 2] nats
            and bytes or tokens, of which the ratio of sums is the value.
        metrics: records of the run, thinned.
    """

    name: str
    size: str
    arm: str
    range: str
    seed: int
    tokens: int
    lr: float
    parameters: int
    non_embedding_parameters: int
    steps: int
    tokens_per_step: int
    settings: dict[str, Any]
    corpora: dict[str, str]
    figures: tuple[Figure, ...]
    training: dict[str, Any]
    environment: dict[str, str]
    documents: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)


def has_result(folder: Path) -> bool:
    """Return whether a result is in a folder `OUT/results/NAME`."""
    return (folder / "cell.json").is_file()


def write_result(folder: Path, result: CellResult) -> None:
    """Write a result. An earlier one in the folder is replaced.

    Raises:
        ValueError: a figure names documents that are not there, or the values of documents are not finite.
    """
    for figure in result.figures:
        if figure.documents is not None and figure.documents not in result.documents:
            raise ValueError(f"{figure} names values by document that are not given")
    for name, values in result.documents.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{result.name}: values by document of {name} are not finite")
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("documents", "metrics")}
    facts["figures"] = [asdict(figure) for figure in result.figures]
    with replace_folder(folder) as new:
        lines = [json.dumps(record) for record in thinned(result.metrics)]
        (new / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        with (new / "documents.npz").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **result.documents)
        (new / "cell.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, **facts}, indent=1) + "\n")


def read_result(folder: Path) -> CellResult:
    """Read a result. Raises UserError if the folder holds none, or a file of it is damaged or of another version."""
    path = folder / "cell.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema_version {version}, and this program reads {SCHEMA_VERSION}; update lrnn"
            )
        facts["figures"] = tuple(Figure(**figure) for figure in facts["figures"])
        with np.load(folder / "documents.npz", allow_pickle=False) as arrays:
            documents = dict(arrays)
        return CellResult(**facts, documents=documents, metrics=read_metrics(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no whole result: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder} cannot be read as a result ({error}); remove it, and run the cell again") from None


def thinned(records: list[dict[str, Any]], limit: int = METRICS_BYTES) -> list[dict[str, Any]]:
    """Return records that take at most `limit` bytes as JSON lines, or few more.

    All records but the plain ones of steps are kept, and of those every second, third and so on, the last among them.
    """
    sizes = [len(json.dumps(record)) + 1 for record in records]
    plain = [i for i, record in enumerate(records) if "event" not in record]
    of_plain = sum(sizes[i] for i in plain)
    left = max(limit - (sum(sizes) - of_plain), 1)
    stride = max(1, -(-of_plain // left))
    dropped = {i for place, i in enumerate(reversed(plain)) if place % stride}
    return [record for i, record in enumerate(records) if i not in dropped]
