"""The loss on the held-out splits of the corpora, measured between steps."""

from collections.abc import Iterator, Sequence

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


class HeldOut:
    """The mean loss over the first windows of the corpora's held-out splits.

    Raises:
        UserError: `log.heldout_every` is set, and the data is a stream or a held-out split is smaller than one sample.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self._every, self._steps, self._device = config.log.heldout_every, config.steps, ranks.device
        self._batches: list[MicroBatch] = []
        if self._every:
            data = config.data
            if data.stream is not None:
                raise UserError("log.heldout_every needs corpora with a held-out split; a stream has none, set it to 0")
            self._batches = list(
                heldout_batches(
                    [TokenCorpus(c.path, "heldout") for c in data.corpora],
                    data.seq_len,
                    config.batching(ranks.rank, ranks.world_size),
                    config.log.heldout_batches,
                    data.reset_at_document_boundaries,
                )
            )

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` steps: every `log.heldout_every` steps and after the last one."""
        return bool(self._batches) and (step % self._every == 0 or step == self._steps)

    @torch.no_grad()
    def loss(self, engine: Engine) -> float:
        """Return the mean cross-entropy in nats per token, over the batches of all ranks."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        engine.eval()
        refresh(engine.module)
        for batch in self._batches:
            totals[0] += engine(**model_inputs(batch, self._device), num_items_in_batch=1, use_cache=False).loss
            totals[1] += batch.num_labels
        engine.train()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])


def heldout_batches(
    corpora: Sequence[TokenCorpus],
    seq_len: int,
    batching: Batching,
    max_batches: int,
    reset_at_document_boundaries: bool = False,
) -> Iterator[MicroBatch]:
    """Return this process's batches for a held-out loss: always the same windows, on any number of processes.

    The windows are the first ones of the corpora in turn, `max_batches * micro_batch_size` over all processes, or as
    many as there are. Every process gets the same number of batches, filled up with rows whose labels are all -100.
    `sample_indices` number the windows.

    Args:
        corpora: held-out splits.
        seq_len: tokens per window.
        batching: `micro_batch_size`, and the place of this process among all.
        max_batches: largest number of micro-batches over all processes.
        reset_at_document_boundaries: whether to set `cu_seqlens`.

    Raises:
        UserError: a corpus is smaller than one sample.
    """
    size, world_size = batching.micro_batch_size, batching.world_size
    wanted = max_batches * size
    counts = [num_windows(corpus, seq_len) for corpus in corpora]
    chosen = sorted((w, c) for c, count in enumerate(counts) for w in range(min(count, wanted)))[:wanted]
    per_rank = -(-len(chosen) // (size * world_size))

    def batches() -> Iterator[MicroBatch]:
        for turn in range(per_rank):
            first = (turn * world_size + batching.rank) * size
            numbers = [i if i < len(chosen) else -1 for i in range(first, first + size)]
            rows = [read_window(corpora[c], w, seq_len) for w, c in (chosen[max(i, 0)] for i in numbers)]
            batch = build_micro_batch(rows, seq_len, np.array(numbers), reset_at_document_boundaries)
            batch.labels[batch.sample_indices < 0] = IGNORED
            yield batch

    return batches()
