"""What is measured of every trained model: the section `measure` of a ladder."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lrnn.eval.retrieval.needles import FORMS
from lrnn.paths import IsPath
from lrnn.settings import Section, Unit, name_hint
from lrnn.traces.formats import FORMATS

Documents = Annotated[int, Unit("documents")]
Tokens = Annotated[int, Unit("tokens")]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a domain: part of the names of arrays
FREE = {"batch_tokens"}  # settings that change no result


def _distinct(items: list[Any]) -> list[Any]:
    """Raise ValueError if an item, or the name of one, is given twice."""
    names = [getattr(item, "name", item) for item in items]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is given twice; each may be given once")
    return items


def _known(names: list[str], valid: Sequence[str]) -> list[str]:
    """Raise ValueError for a name that is not valid, with the nearest one."""
    for name in names:
        if name not in valid:
            raise ValueError(f"unknown {name!r}; {name_hint(name, list(valid))}")
    return _distinct(names)


def _formats(names: list[str]) -> list[str]:
    return _known(names, list(FORMATS))


def _forms(names: list[str]) -> list[str]:
    return _known(names, list(FORMS))


class Domain(Section):
    """Held-out documents of one kind."""

    name: str = Field(pattern=NAME)
    """Name in the results."""
    documents: Annotated[str, IsPath()]
    """File of held-out documents, JSON lines `{"text": ...}`."""
    weight: float = Field(1.0, ge=0)
    """Share in the mean over domains, `mix`, relative to the others; 0 leaves it out."""
    traces: bool = False
    """Whether the documents are program traces, whose answers are also measured apart from the rest."""


class Traces(Section):
    """Program traces, answered by choosing among all possible answers."""

    formats: Annotated[list[str], AfterValidator(_formats)] = Field(list(FORMATS), min_length=1)
    """Formats of `lrnn.traces`."""
    documents: Documents = Field(60, ge=2, le=60)
    """Number of programs of each length."""
    longest: Annotated[int, Unit("state changes")] = Field(512, ge=4)
    """Longest program."""


class Recall(Section):
    """Multi-query recall: a list of keys and values, of which one is asked for."""

    documents: Documents = Field(120, ge=2, le=120)
    """Number of lists of each length."""
    longest: Annotated[int, Unit("pairs")] = Field(256, ge=4)
    """Longest list."""


class Needles(Section):
    """Needles in a haystack: what a long text says once."""

    forms: Annotated[list[str], AfterValidator(_forms)] = Field(
        ["multikey_1", "multikey_2", "multikey_3"], min_length=1
    )
    """Forms of the suite `needle`."""
    documents: Documents = Field(120, ge=2, le=120)
    """Number of texts of each length."""
    longest: Tokens = Field(4096, ge=1024)
    """Longest text, with its question."""


class Position(Section):
    """Loss by position in documents far longer than those of training."""

    domain: str
    """Name of the domain whose documents are read."""
    times: int = Field(16, ge=1)
    """Longest position, in training lengths."""
    documents: Documents = Field(64, ge=2)
    """Number of documents: the first ones that are long enough."""
    join: bool = False
    """Join documents until they are long enough. This shows how a model continues past a document's end, not whether it
    uses distant context."""


class MeasureConfig(Section):
    """What is measured of every trained model."""

    heldout: Annotated[list[Domain], AfterValidator(_distinct)] = Field(default_factory=list)
    """Held-out documents by domain."""
    tokens: Tokens = Field(4_000_000, ge=1000)
    """Held-out tokens of each domain: those of a sample of its documents."""
    gold: Annotated[list[Literal["humaneval", "mbpp", "gsm8k", "math500"]], AfterValidator(_distinct)] = Field(
        default_factory=list
    )
    """Benchmarks whose right answers are scored, in bits per byte. Their data is fetched with `lrnn eval --fetch`."""
    traces: Traces | None = None
    """Program traces; `null` leaves them out."""
    recall: Recall | None = None
    """Multi-query recall; `null` leaves it out."""
    needles: Needles | None = None
    """Needles in a haystack; `null` leaves them out."""
    position: Position | None = None
    """Loss by position; `null` leaves it out."""
    eigenvalue_steps: Annotated[int, Unit("steps")] = Field(8, ge=0)
    """Number of steps, spread over training, whose eigenvalues are reported."""
    batch_tokens: Tokens = Field(65_536, gt=0)
    """Largest number of tokens that are read at once. Logits take 10 bytes per token and word of the vocabulary."""

    @model_validator(mode="after")
    def position_has_documents(self) -> Self:
        names = [domain.name for domain in self.heldout]
        if self.position is not None and self.position.domain not in names:
            name = self.position.domain
            raise ValueError(f"position.domain {name!r} is no domain of heldout; {name_hint(name, names)}")
        return self

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide results. Files are left out, because their names do not."""
        said = self.model_dump(exclude=FREE)
        for domain in said["heldout"]:
            del domain["documents"]
        return said

    @property
    def asks(self) -> bool:
        """Whether questions of lm-eval are asked."""
        return bool(self.gold or self.traces or self.recall or self.needles)
