"""Check that weights that were trained before fit the model and the tokenizer of a run, and fill its model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.formats.tokenizers import difference
from lrnn.model.configuration_lrnn import OPTIONS
from lrnn.model.pattern import options_of
from lrnn.model_config import SAME_AS
from lrnn.pretrain.init_from.source import open_source, tokenizer_of
from lrnn.tokenizer import Tokenizer

# Fields of the model as a whole that decide what it computes. Those of layers are the options of their mixers.
OF_THE_MODEL = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "norm_eps",
    "tie_word_embeddings",
)
NOT_COMPARED = ("delta_rule_precision",)  # decides how exactly a layer is computed, not what
Differences = dict[str, tuple[Any, Any]]  # by field, the values of the folder and of the run


class InitialWeights:
    """The weights that a run begins with, checked against the model of the run.

    Args:
        init_from: the path of the weights, see `open_source`.
        model: the model of the run.
        changed: names of the fields that the run's configuration gives beside a model, which may differ.

    Attributes:
        source: where the weights are.
        differences: the fields that the run changes.

    Raises:
        UserError: the weights cannot be read, or do not fit the model. The message names the field or the tensor.
    """

    def __init__(self, init_from: str, model: LrnnConfig, changed: set[str]):
        self._given, self._model = init_from, model
        self.source = open_source(Path(init_from))
        self.differences = dict(compare_models(self.source.config, model))
        for field, (before, now) in self.differences.items():
            name = field.rpartition(" ")[2]
            if not changed & ({name} if field in OF_THE_MODEL else {name, "mixer"}):
                raise UserError(
                    f"the model of the run has {field} = {now!r}, that of init_from {init_from} has {before!r}; leave "
                    f"out model (or add model=) to train that of the folder, or give the change alone, as model.{name}"
                )
        self._check_shapes()

    def check_tokenizer(self, tokenizer: Tokenizer, path: str) -> str | None:
        """Check that the tokenizer of the run's data gives the ids that the weights were trained with.

        Args:
            tokenizer: that of the data.
            path: where it is, for messages.

        Returns:
            What could not be checked, or None.

        Raises:
            UserError: it gives other ids.
        """
        known = self.source.config.tokenizer_fingerprint, (self.source.training or {}).get("tokenizer_sha256")
        if {tokenizer.fingerprint, tokenizer.file_sha256} & set(known):
            return None
        theirs = tokenizer_of(self.source)
        if theirs is None:
            return f"{self._given} has no tokenizer, so whether the ids of {path} mean the same to it is not checked"
        if (how := difference(tokenizer, theirs)) is not None:
            raise UserError(
                f"the tokenizer of {path} is not that of init_from {self._given}: {how}; make the corpus with "
                f"--tokenizer {self._given}"
            )
        return None

    def load_into(self, model: nn.Module) -> None:
        """Fill the model of the run. Raise UserError if a value of a model folder is infinite or NaN."""
        self.source.load_into(model)

    def facts(self) -> dict[str, Any]:
        """Return what tells the weights from others: format, checksums, and what is known about their training.

        Raises:
            UserError: the weights are a checkpoint, and it is damaged.
        """
        source = self.source
        facts: dict[str, Any] = {"format": source.format, "name": source.path.name, "sha256": source.checksums()}
        if self.differences:
            facts["changed"] = {field: list(values) for field, values in self.differences.items()}
        return facts | ({"training": source.training} if source.training else {})

    def _check_shapes(self) -> None:
        """Raise UserError unless the run's model has the parameters of the folder's, and at most more embeddings."""
        theirs, ours = (_shapes(config) for config in (self.source.config, self._model))
        listing = ", ".join(f"{field} = {now!r}" for field, (_, now) in self.differences.items())
        for name in sorted(theirs.keys() | ours.keys()):
            before, now = theirs.get(name), ours.get(name)
            if before != now and not self._grows(before, now):
                what = [f"shape {list(x)}" if x is not None else "none" for x in (before, now)]
                raise UserError(
                    f"the model of the run, with changed {listing}, does not fit the weights of init_from "
                    f"{self._given}: they have {name} of {what[0]}, the model has {what[1]}"
                )

    def _grows(self, before: tuple[int, ...] | None, now: tuple[int, ...] | None) -> bool:
        """Return whether a parameter is one that gets rows for a larger vocabulary."""
        sizes = (self.source.config.vocab_size, self._model.vocab_size)
        if before is None or now is None:
            return False
        return sizes[0] < sizes[1] and (before[0], now[0]) == sizes and before[1:] == now[1:]


def compare_models(before: LrnnConfig, now: LrnnConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the fields in which two models differ, with both values. Those of layers name the first layer that differs.

    A field of layers is yielded once for each pair of values.
    """
    for name in OF_THE_MODEL:
        if getattr(before, name) != getattr(now, name):
            yield name, (getattr(before, name), getattr(now, name))
    seen = set()
    for i in range(min(before.num_hidden_layers, now.num_hidden_layers)):
        old, new = before.layer(i), now.layer(i)
        names = ("mixer",) if old.mixer != new.mixer else options_of(old.mixer)
        for name in names:
            values = _value(old, name), _value(new, name)
            if name not in NOT_COMPARED and values[0] != values[1] and (name, *values) not in seen:
                seen.add((name, *values))
                yield f"layer {i} {name}" if before.is_hybrid or now.is_hybrid else name, values


def _value(layer: LrnnConfig, name: str) -> Any:
    value = getattr(layer, name, OPTIONS.get(name))
    return getattr(layer, SAME_AS[name]) if value is None and name in SAME_AS else value


def _shapes(config: LrnnConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LrnnForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
