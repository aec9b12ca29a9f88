"""The beginning of a run, with weights of a folder or with fresh ones; and what it keeps of that."""

from pathlib import Path
from typing import Any

from torch import nn

from lrnn import LrnnConfig
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.init_from.record import check_begin, make_record, read_record, texts_of
from lrnn.pretrain.init_from.weights import InitialWeights
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.settings import BASE
from lrnn.tokenizer import Tokenizer, load_copy, load_tokenizer


class Beginning:
    """Load the weights that a run starts with, and keep the record of them.

    Args:
        config: the run's configuration.
        model: its model.
        saved: the checkpoint that it resumes from, or None.
        ranks: this process among all. All of them make the same calls.

    Attributes:
        texts: small files that every checkpoint of the run keeps, text by name.

    Raises:
        UserError: on all ranks, if the weights of `init_from` do not fit the run, or its checkpoints began otherwise.
    """

    def __init__(self, config: Config, model: LrnnConfig, saved: Path | None, ranks: Ranks):
        self._ranks = ranks
        self._weights: InitialWeights | None = None
        self._notices: list[str] = []
        self._record = self._resumed(config, saved) if saved is not None else self._opened(config, model)
        self.texts = texts_of(self._record)

    @property
    def has_weights(self) -> bool:
        """Return whether the run starts now, with weights of a folder."""
        return self._weights is not None

    def load_into(self, model: nn.Module) -> None:
        """Fill a model with the weights of the folder, if the run starts with any."""
        weights = self._weights
        if weights is not None:
            self._ranks.together(lambda: weights.load_into(model))

    def report(self, log: MetricsLog | None) -> None:
        """Show and record where the run begins, if it starts with weights of a folder."""
        if log is None or self._record is None or self._weights is None:
            return
        log.write({"event": "init_from", "step": 0, **self._record})
        log.say(f"begins with the weights of {self._record['folder']} ({self._record['format']})")
        for field, (before, now) in self._weights.differences.items():
            log.say(f"changed from the folder's model: {field} {before!r} -> {now!r}")
        for notice in self._notices:
            log.say(notice)

    def _resumed(self, config: Config, saved: Path) -> dict[str, Any] | None:
        def check() -> None:
            if config.init_from is not None:
                check_begin(saved, config.init_from, config.run_dir)

        self._ranks.together(check)
        return self._ranks.together(lambda: read_record(saved))

    def _opened(self, config: Config, model: LrnnConfig) -> dict[str, Any] | None:
        path = config.init_from
        if path is None:
            return None
        changed = set(config.model) - {BASE} if isinstance(config.model, dict) else set()

        def opened() -> InitialWeights:
            weights = InitialWeights(path, model, changed)
            notice = weights.check_tokenizer(*_tokenizer_of(config))
            self._notices += [notice] if notice else []
            return weights

        weights = self._weights = self._ranks.together(opened)
        # The checksums take long, and only the main process writes and shows them.
        facts = self._ranks.together(lambda: weights.facts() if self._ranks.is_main else {})
        return make_record(path, config.run_dir, facts)


def _tokenizer_of(config: Config) -> tuple[Tokenizer, str]:
    """Return the tokenizer of the run's data, and where it is. All corpora of a run have the same one."""
    stream = config.data.stream
    if stream is not None:
        return load_tokenizer(stream.tokenizer), stream.tokenizer
    corpora = [*config.data.corpora, *(corpus for stage in config.stages for corpus in stage.corpora)]
    return load_copy(Path(corpora[0].path) / "tokenizer"), corpora[0].path
