"""The data of a run in stages, each with its own corpora, weights and lengths.

A stage continues where the last stage with samples of its length ended: at its next sample, if the stage has the same
corpora and weights, else at samples of each corpus that earlier stages of this length did not take. Every window still
comes at most once before a corpus is through. With other weights or corpora, up to `order.BLOCK` windows of those that
the stage before had mixed are left out. Windows of different lengths overlap, and are not compared.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrnn import LrnnConfig
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.config import Config
from lrnn.pretrain.corpus.reader import TokenCorpus, check_model_matches_corpora
from lrnn.pretrain.data.loader import Loader, prepared, steps_from
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.data.prefetch import Prefetcher
from lrnn.pretrain.data.samples import CorpusData, check_enough_samples
from lrnn.pretrain.data.stream import StreamLoader
from lrnn.pretrain.data.training_data import (
    TrainingData,
    distinct,
    facts_of_stage,
    open_data,
    throwaway_batch,
    tokenizer_writer,
)
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.stages import Stage, naming, stages_left, stages_of


@dataclass
class Part:
    """The data of a stage.

    Attributes:
        stage: the stage.
        data: its samples.
        batching: its batch sizes, and the place of this process among all; None if the stage is over.
        start: number among the samples of `data` of the first sample of the stage.
    """

    stage: Stage
    data: CorpusData
    batching: Batching | None
    start: int

    @property
    def origin(self) -> int:
        """Return the number in the run of sample 0 of `data`."""
        return self.stage.first_sample - self.start

    def epochs(self, samples: int) -> list[float]:
        """Return how often `samples` samples of the stage go through each corpus."""
        before, after = self.data.epochs(self.start), self.data.epochs(self.start + samples)
        return [b - a for a, b in zip(before, after, strict=True)]


@dataclass
class _Taken:
    """What stages of one length have taken so far.

    Attributes:
        mix: corpora and weights of the last of them; None before the first.
        samples: samples of this mix.
        offsets: of each corpus the first of its samples in this mix.
        used: of each corpus the samples that are taken, or left out.
    """

    mix: tuple[Sequence[Hashable], Sequence[float]] | None = None
    samples: int = 0
    offsets: dict[Hashable, int] = field(default_factory=dict)
    used: dict[Hashable, int] = field(default_factory=dict)


class StagedLoader(Loader):
    """Iterate over the steps of one process through all stages, and without end in the last one.

    Args:
        parts: the stages.
        start_sample: number of samples that the run has already consumed.
        pin_memory: return tensors in page-locked memory.
        prefetch: number of steps that are prepared ahead.
    """

    def __init__(self, parts: Sequence[Part], start_sample: int = 0, pin_memory: bool = False, prefetch: int = 2):
        def steps() -> Iterator[list[MicroBatch]]:
            start = start_sample
            ends: list[int | None] = [part.stage.first_sample for part in parts[1:]]
            for part, stop in zip(parts, [*ends, None], strict=True):
                if part.batching is None:
                    continue
                size = part.batching.global_batch_size
                yield from steps_from(part.data, part.batching, start, stop, part.origin)
                if stop is not None and start < stop:
                    start += -(-(stop - start) // size) * size

        Prefetcher.__init__(self, prepared(steps(), pin_memory), prefetch)


@dataclass
class StagedData(TrainingData):
    """The data of a run in stages.

    Attributes:
        parts: the stages. `source` is that of the first, `batching` that of the first which is not over.
    """

    parts: Sequence[Part] = ()

    def loader(self, samples: int, stream: dict | None, pin_memory: bool) -> Loader | StreamLoader:
        return StagedLoader(self.parts, samples, pin_memory)

    def epochs(self, samples: int, stream: dict | None) -> dict[str, float]:
        """Return how often each corpus was gone through in all stages so far, by its path."""
        total: dict[str, float] = {}
        for part, taken in zip(self.parts, self._taken(samples), strict=True):
            names = distinct([str(corpus.path) for corpus in part.data.corpora])
            for name, epochs in zip(names, part.epochs(taken), strict=True):
                total[name] = total.get(name, 0.0) + epochs
        return {name: round(epochs, 6) for name, epochs in total.items()}

    def throwaway_batches(self, samples: int) -> Iterator[MicroBatch]:
        ends = [part.stage.first_sample for part in self.parts[1:]]
        for part, end in zip(self.parts, [*ends, None], strict=True):
            if part.batching is not None and (end is None or samples < end):
                yield throwaway_batch(part.batching.micro_batch_size, part.data)

    def _taken(self, samples: int) -> Iterator[int]:
        """Yield how many of the first `samples` samples of the run each stage gives."""
        for part, following in zip(self.parts, [*self.parts[1:], None], strict=True):
            end = samples if following is None else min(samples, following.stage.first_sample)
            yield max(0, end - part.stage.first_sample)


def open_run_data(config: Config, model_config: LrnnConfig, ranks: Ranks, samples: int) -> TrainingData:
    """Open and check the data of a run, of all of its stages if it has some.

    Args:
        config: the run's configuration.
        model_config: its model.
        ranks: this process among all.
        samples: those that the run has consumed. Batch sizes of stages that are over are not looked at.

    Raises:
        UserError: see `open_data`. The message names the stage.
    """
    if not config.stages:
        return open_data(config, model_config, ranks)
    parts = list(_open_parts(config, ranks, samples))
    corpora = [corpus for part in parts for corpus in part.data.corpora]
    for part in parts:
        with naming(part.stage, config):
            first = corpora[:1] if part.data.corpora[0] is not corpora[0] else []
            sizes = model_config.vocab_size, model_config.tokenizer_fingerprint
            check_model_matches_corpora(*sizes, [*first, *part.data.corpora])
    first_part = parts[0]
    facts = [facts_of_stage(part.stage.config, part.data) for part in parts]
    description: dict[str, Any] = {
        "seed": config.seed,
        "reset_at_document_boundaries": config.data.reset_at_document_boundaries,
        "tokenizer": corpora[0].tokenizer_fingerprint,
        "stages": facts,
    }
    return StagedData(
        source=first_part.data,
        description=description,
        save_tokenizer=tokenizer_writer(corpora[0]),
        batching=next(part.batching for part in parts if part.batching is not None),
        as_of_0_1_0={"tokenizer": corpora[0].tokenizer_file_sha256},
        stages=facts,
        parts=parts,
    )


def _open_parts(config: Config, ranks: Ranks, samples: int) -> Iterator[Part]:
    """Yield the data of each stage. Raises UserError that names the stage."""
    left = {stage.number for stage in stages_left(config, samples)}
    opened: dict[str, TokenCorpus] = {}
    keys: dict[Hashable, int] = {}  # of a corpus that may occur several times in a stage
    by_length: dict[int, _Taken] = {}
    for stage in stages_of(config):
        with naming(stage, config):
            data = stage.config.data
            batching = stage.config.batching(ranks.rank, ranks.world_size) if stage.number in left else None
            for corpus in data.corpora:
                if corpus.path not in opened:
                    opened[corpus.path] = TokenCorpus(corpus.path)
            corpora = [opened[corpus.path] for corpus in data.corpora]
            names = [(c.fingerprint, i) for c, i in zip(corpora, _occurrences(corpora), strict=True)]
            for name in names:
                keys.setdefault(name, len(keys))
            weights = [corpus.weight for corpus in data.corpora]
            taken = by_length.setdefault(data.seq_len, _Taken())
            if taken.mix != (names, weights):
                taken.mix, taken.samples, taken.offsets = (names, weights), 0, dict(taken.used)
            source = CorpusData(
                corpora,
                weights,
                data.seq_len,
                config.seed,
                data.reset_at_document_boundaries,
                keys=[keys[name] for name in names],
                offsets=[taken.offsets.get(name, 0) for name in names],
            )
            if batching is not None:
                check_enough_samples(source, ranks.world_size)
        yield Part(stage, source, batching, taken.samples)
        taken.samples += stage.samples
        for name, count in zip(names, source.reserved(taken.samples), strict=True):
            taken.used[name] = taken.offsets.get(name, 0) + count


def _occurrences(corpora: Sequence[TokenCorpus]) -> list[int]:
    """Return of each corpus how often the same came before it."""
    prints = [corpus.fingerprint for corpus in corpora]
    return [prints[:i].count(prints[i]) for i in range(len(prints))]
