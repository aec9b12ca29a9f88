"""The loss on the held-out splits of the corpora, measured between steps."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lrnn.errors import UserError
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.config import Config
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.micro_batch import IGNORED, MicroBatch, build_micro_batch, model_inputs
from lrnn.pretrain.data.samples import num_windows, read_window
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine
from lrnn.pretrain.fused.layers import refresh
from lrnn.pretrain.stages import Stage, naming, stages_left, stages_of

LOSS = "heldout_loss"


class HeldOut:
    """The mean loss over the first windows of the corpora's held-out splits, of all corpora and of each.

    In a run with stages the corpora are those of all stages, so that the losses can be compared throughout, and a
    window has the length of the stage's samples.

    Args:
        config: the run's configuration.
        ranks: this process among all.
        samples: those that the run has consumed. Nothing is measured in stages that are over.

    Raises:
        UserError: `log.heldout_every` is set, and the data is a stream or a held-out split is smaller than one sample.
    """

    def __init__(self, config: Config, ranks: Ranks, samples: int):
        self._every, self._steps, self._device = config.log.heldout_every, config.steps, ranks.device
        self._batches: list[dict[str, list[MicroBatch]]] = []  # by stage and by the name of the loss
        if self._every:
            if config.data.stream is not None:
                raise UserError("log.heldout_every needs corpora with a held-out split; a stream has none, set it to 0")
            stages = stages_of(config)
            paths = dict.fromkeys(corpus.path for stage in stages for corpus in stage.config.data.corpora)
            corpora = {path: TokenCorpus(path, "heldout") for path in paths}
            left = {stage.number for stage in stages_left(config, samples)}
            for stage in stages:
                with naming(stage, config):
                    self._batches.append(batches_in(stage, corpora, ranks) if stage.number in left else {})

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` steps: every `log.heldout_every` steps and after the last one."""
        return bool(self._batches) and (step % self._every == 0 or step == self._steps)

    def losses(self, engine: Engine, stage: Stage) -> dict[str, float]:
        """Return mean cross-entropies in nats per token over the batches of all ranks, in a stage of the run.

        Returns:
            `heldout_loss`, and `heldout_loss/NAME` of each corpus if there are several.
        """
        return {name: self._loss(engine, batches) for name, batches in self._batches[stage.number - 1].items()}

    @torch.no_grad()
    def _loss(self, engine: Engine, batches: Sequence[MicroBatch]) -> float:
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        engine.eval()
        refresh(engine.module)
        for batch in batches:
            totals[0] += engine(**model_inputs(batch, self._device), num_items_in_batch=1, use_cache=False).loss
            totals[1] += batch.num_labels
        engine.train()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])


def batches_in(stage: Stage, corpora: dict[str, TokenCorpus], ranks: Ranks) -> dict[str, list[MicroBatch]]:
    """Return this process's batches of a stage by the name of the loss: of all corpora, and the same windows by corpus.

    Windows that one batch of several corpora would hold are in batches of their own too, because a pass has one loss.
    """
    config = stage.config
    batching = config.batching(ranks.rank, ranks.world_size)
    length, resets = config.data.seq_len, config.data.reset_at_document_boundaries
    splits, count = list(corpora.values()), config.log.heldout_batches
    batches = {LOSS: list(heldout_batches(splits, length, batching, count, resets))}
    if len(splits) > 1:
        chosen = choose_windows(splits, length, count * batching.micro_batch_size)
        for c, name in enumerate(names_of(list(corpora))):
            own = [(w, corpus) for w, corpus in chosen if corpus == c] or [(0, c)]
            batches[f"{LOSS}/{name}"] = list(batches_of(splits, own, length, batching, resets))
    return batches


def names_of(paths: Sequence[str]) -> list[str]:
    """Return a short name of each folder: its own, with as many of those above as tell it from the others."""
    parts = [Path(path).absolute().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own))
        short = next((n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own))
        return "/".join(own[-short:])

    return [name(own) for own in parts]


def choose_windows(corpora: Sequence[TokenCorpus], seq_len: int, wanted: int) -> list[tuple[int, int]]:
    """Return the first windows of the corpora in turn, as (window, corpus): at most `wanted`."""
    counts = [num_windows(corpus, seq_len) for corpus in corpora]
    return sorted((w, c) for c, count in enumerate(counts) for w in range(min(count, wanted)))[:wanted]


def heldout_batches(
    corpora: Sequence[TokenCorpus],
    seq_len: int,
    batching: Batching,
    max_batches: int,
    reset_at_document_boundaries: bool = False,
) -> Iterator[MicroBatch]:
    """Return this process's batches for a held-out loss: always the same windows, on any number of processes.

    The windows are the first ones of the corpora in turn, `max_batches * micro_batch_size` over all processes, or as
    many as there are.

    Args:
        corpora: held-out splits.
        seq_len: tokens per window.
        batching: `micro_batch_size`, and the place of this process among all.
        max_batches: largest number of micro-batches over all processes.
        reset_at_document_boundaries: whether to set `cu_seqlens`.

    Raises:
        UserError: a corpus is smaller than one sample.
    """
    chosen = choose_windows(corpora, seq_len, max_batches * batching.micro_batch_size)
    return batches_of(corpora, chosen, seq_len, batching, reset_at_document_boundaries)


def batches_of(
    corpora: Sequence[TokenCorpus],
    chosen: Sequence[tuple[int, int]],
    seq_len: int,
    batching: Batching,
    reset_at_document_boundaries: bool,
) -> Iterator[MicroBatch]:
    """Yield this process's batches of chosen windows, which are (window, corpus).

    Every process gets the same number of batches, filled up with rows whose labels are all -100. `sample_indices`
    number the windows.
    """
    size, world_size = batching.micro_batch_size, batching.world_size
    for turn in range(-(-len(chosen) // (size * world_size))):
        first = (turn * world_size + batching.rank) * size
        numbers = [i if i < len(chosen) else -1 for i in range(first, first + size)]
        rows = [read_window(corpora[c], w, seq_len) for w, c in (chosen[max(i, 0)] for i in numbers)]
        batch = build_micro_batch(rows, seq_len, np.array(numbers), reset_at_document_boundaries)
        batch.labels[batch.sample_indices < 0] = IGNORED
        yield batch
