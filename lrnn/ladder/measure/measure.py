"""Measure one trained and exported model: everything that a ladder says of it, in one process."""

import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lrnn import LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval import offline, result_folder
from lrnn.eval.loading import choose_device, load_model
from lrnn.eval.model_folder import check_export, describe_model
from lrnn.eval.position.evaluate import load_tokenizer
from lrnn.eval.suites import fetch_data
from lrnn.files import sha256
from lrnn.ladder.measure.heldout import ANSWER, REST, Text, read_documents, sum_losses
from lrnn.ladder.measure.parts import Kept, Part
from lrnn.ladder.measure.position import loss_by_position
from lrnn.ladder.measure.settings import Domain, MeasureConfig
from lrnn.ladder.measure.training import eigenvalues
from lrnn.ladder.measures import MEASURES, MIX
from lrnn.ladder.results import Figure
from lrnn.records import read_metrics

VERSION = 1  # of the files that keep parts; parts of another version are not used
FOLDER = "measures"  # of a run, with these files
MOST_SHOWN = 10  # figures of a line


def measure(
    run_dir: Path, export: Path, settings: MeasureConfig, device: str | None, say: Callable[[str], None]
) -> tuple[list[Figure], dict[str, np.ndarray]]:
    """Measure an exported model, and return the figures with the values of documents that they name.

    What is finished is kept in `run_dir/measures`, and not repeated when the same is measured again.

    Args:
        run_dir: of the run that trained the model; its records are read.
        export: the folder of the model.
        settings: what to measure.
        device: such as "cuda:1"; None for a GPU if there is one.
        say: takes lines for people.

    Raises:
        UserError: data is missing, or the model's numbers are not finite.
    """
    check_data(settings)
    offline.go_offline()
    subject = Subject(export, device, settings.asks)
    model = {name: value for name, value in describe_model(export).items() if name != "path"}
    environment = result_folder.describe_environment(str(subject.device))
    about = {"version": VERSION, "model": model, "dtype": str(subject.dtype), "environment": environment}
    kept = Kept(run_dir / FOLDER, about)
    part = _all_heldout(subject, settings, kept, say)
    if settings.asks:
        part += _all_questions(subject, settings, kept, say)
    if settings.position is not None:
        part += _position(subject, settings, kept, say)
    part.figures += eigenvalues(read_metrics(run_dir), settings.eigenvalue_steps)
    return part.figures, part.documents


def check_data(settings: MeasureConfig) -> None:
    """Raise UserError if a file of documents or the data of a benchmark is missing: before a run, rather than after."""
    for domain in settings.heldout:
        if not Path(domain.documents).is_file():
            raise UserError(f"measure.heldout: {domain.name}: there is no file {domain.documents}")
    for name in settings.gold:
        fetch_data.load_rows(f"{name}_gold")


class Subject:
    """The model that is measured. It is loaded once, when it is first needed.

    Args:
        export: its folder.
        device: None for a GPU if there is one.
        asked: whether lm-eval asks it questions too; its own object then holds the model.
    """

    def __init__(self, export: Path, device: str | None, asked: bool):
        config = check_export(export)
        self.export, self._asked = export, asked
        self.device, self.dtype = choose_device(device, None)
        self.trained: int = config["max_position_embeddings"]  # training length, in tokens
        self.tokenizer = load_tokenizer(export, config)

    @cached_property
    def lm(self) -> Any:
        """Return lm-eval's model."""
        from lrnn.ladder.measure.questions import CONTEXT, Model  # takes seconds to import

        return Model(self.export, device=str(self.device), max_length=CONTEXT)

    @cached_property
    def model(self) -> LrnnForCausalLM:
        model = self.lm.model if self._asked else load_model(self.export, self.device, self.dtype)
        if not isinstance(model, LrnnForCausalLM):
            raise UserError(f"{self.export} holds a {type(model).__name__}; a ladder measures models of lrnn")
        return model

    def offsets(self) -> Any:
        """Return the `tokenizers.Tokenizer` of the folder, which says where tokens are in a text."""
        from lrnn.eval.suites.prompts import load_tokenizer

        backend = getattr(load_tokenizer(self.export), "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{self.export}: its tokenizer does not say where tokens are in a text, so answers of traces cannot be "
                "told from the rest; set traces: false for these documents, or train a BPE tokenizer"
            )
        return backend


def _all_heldout(subject: Subject, settings: MeasureConfig, kept: Kept, say: Callable[[str], None]) -> Part:
    """Return the held-out loss of every domain, and of their mix."""
    part = Part()
    for domain in settings.heldout:
        about = {"sha256": sha256(Path(domain.documents)), "tokens": settings.tokens, "traces": domain.traces}
        part += _timed(f"held-out {domain.name}", kept, about, say, partial(_heldout, subject, domain, settings))
    weights = {domain.name: domain.weight for domain in settings.heldout if domain.weight}
    if len(weights) > 1:
        for measure in ("heldout_bits_per_byte", "heldout_nats_per_token"):
            pairs = {name: part.documents[f"{measure}/{name}"] for name in weights}
            part.add(measure, MIX, None, mixed(pairs, weights))
    return part


def mixed(pairs: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Return all documents [n, 2] of several domains, scaled so that the ratio of their sums is the weighted mean.

    Args:
        pairs: by domain, (log-likelihood, bytes or tokens) of its documents, [n, 2].
        weights: by domain.
    """
    return np.concatenate([pairs[name] * (weight / pairs[name][:, 1].sum()) for name, weight in weights.items()])


def _heldout(subject: Subject, domain: Domain, settings: MeasureConfig) -> Part:
    documents = read_documents(
        Path(domain.documents),
        subject.tokenizer,
        settings.tokens,
        subject.offsets() if domain.traces else None,
    )
    total = sum(len(document.groups) for document in documents)
    with tqdm(total=total, unit="token", unit_scale=True, desc=f"held-out {domain.name}") as bar:
        sums, counts = sum_losses(subject.model, documents, subject.trained, settings.batch_tokens, bar.update)
    return heldout_part(domain, documents, sums, counts)


def heldout_part(domain: Domain, documents: list[Text], sums: np.ndarray, counts: np.ndarray) -> Part:
    """Return the figures of a domain from `sum_losses` of its documents."""
    part = Part()
    n_bytes = np.array([document.n_bytes for document in documents])
    nats, tokens = -sums.sum(1), counts.sum(1)
    part.add("heldout_bits_per_byte", domain.name, None, np.stack([nats, n_bytes], axis=-1))
    part.add("heldout_nats_per_token", domain.name, None, np.stack([nats, tokens], axis=-1))
    if domain.traces:
        for measure, group in (("answer_nats_per_token", ANSWER), ("rest_nats_per_token", REST)):
            pairs = np.stack([-sums[:, group], counts[:, group]], axis=-1)
            part.add(measure, domain.name, None, pairs[pairs[:, 1] > 0])
    return part


def _all_questions(subject: Subject, settings: MeasureConfig, kept: Kept, say: Callable[[str], None]) -> Part:
    from lrnn.ladder.measure.questions import groups_of

    part = Part()
    for group in groups_of(settings):
        about: dict[str, Any] = {"tasks": group.tasks, "documents": group.documents, "longest": group.longest}
        about |= {"data": fetch_data.manifest_sha256()} if group.name == "gold" else {}
        part += _timed(group.name, kept, about, say, partial(_ask, subject, group, settings, say))
    return part


def _ask(subject: Subject, group: Any, settings: MeasureConfig, say: Callable[[str], None]) -> Part:
    from lrnn.ladder.measure.questions import ask

    return ask(group, subject.export, subject.lm, settings.batch_tokens, say)


def _position(subject: Subject, settings: MeasureConfig, kept: Kept, say: Callable[[str], None]) -> Part:
    position = settings.position
    assert position is not None
    path = Path(next(domain.documents for domain in settings.heldout if domain.name == position.domain))
    about = {"sha256": sha256(path), **position.model_dump()}
    return _timed(
        "loss by position",
        kept,
        about,
        say,
        lambda: loss_by_position(
            position, subject.model, path, subject.tokenizer, subject.trained, settings.batch_tokens
        ),
    )


def _timed(name: str, kept: Kept, about: Any, say: Callable[[str], None], compute: Callable[[], Part]) -> Part:
    """Return a part that is kept or computed, and say how long it took and what it holds, in a line per measure."""
    start = time.monotonic()
    part = kept.get(name.replace(" ", "-"), about, compute)
    say(f"{name}: {time.monotonic() - start:.1f} s")
    for measure in dict.fromkeys(figure.measure for figure in part.figures):
        shown = [
            f"{figure.of}{'' if figure.at is None else f' at {figure.at:,}'} {figure.value:.4f}"
            for figure in part.figures
            if figure.measure == measure
        ]
        more = f" and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
        say(f"  {MEASURES[measure].title}, {MEASURES[measure].unit}: {', '.join(shown[:MOST_SHOWN])}{more}")
    return part
