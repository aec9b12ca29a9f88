"""The data of a run, from its configuration: corpora or a stream, with the loader of each rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.files import copy_files
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.config import Config, StreamSource
from lrnn.pretrain.corpus.reader import TokenCorpus, check_model_matches_corpora
from lrnn.pretrain.corpus.source import SourceArguments
from lrnn.pretrain.data.chains import Chains, choose_chains
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.data.samples import CorpusData, check_enough_samples
from lrnn.pretrain.data.stream import StreamData, StreamLoader
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.state_passing import check_states
from lrnn.tokenizer import fingerprint_of_0_1_0, load_copy, load_tokenizer
from lrnn.tokenizer_export import check_exportable


@dataclass
class TrainingData:
    """The data that a run trains on.

    Attributes:
        source: the samples.
        description: the facts that must not change when the run resumes. A mapping states one in several ways, of which
            one must be the same.
        save_tokenizer: writes the tokenizer's files into a folder, which it makes.
        batching: batch sizes, and the place of this process among all.
        as_of_0_1_0: the facts that a checkpoint of lrnn 0.1.0 states in another way for the same data.
        stages: the facts of each stage, see `lrnn.pretrain.stage_changes`. Corpora without stages are one; a stream has
            none.
    """

    source: CorpusData | StreamData
    description: dict[str, Any]
    save_tokenizer: Callable[[Path], object]
    batching: Batching
    as_of_0_1_0: dict[str, Any]
    stages: list[dict[str, Any]] = field(default_factory=list)

    def loader(self, samples: int, stream: dict | None, pin_memory: bool) -> Loader | StreamLoader:
        """Return the loader of this rank, from the position of the run on.

        Args:
            samples: number of samples consumed so far.
            stream: position in a stream; None at its start, and for corpora.
            pin_memory: return tensors in page-locked memory.
        """
        if isinstance(self.source, StreamData):
            return StreamLoader(self.source, self.batching, state=stream, pin_memory=pin_memory)
        return Loader(self.source, self.batching, start_sample=samples, pin_memory=pin_memory)

    def epochs(self, samples: int, stream: dict | None) -> dict[str, float]:
        """Return how often the data was gone through, by its path: fractions for corpora, whole epochs for a stream.

        Args:
            samples, stream: the position of the run, see `loader`.
        """
        if isinstance(self.source, StreamData):
            return {self.source.arguments.path: stream["epoch"] if stream else 0}
        names = distinct([str(corpus.path) for corpus in self.source.corpora])
        return {name: round(n, 6) for name, n in zip(names, self.source.epochs(samples), strict=True)}

    @property
    def chains(self) -> Chains | None:
        """Return the chains of samples that rows read, or None if no state is passed on."""
        return None if isinstance(self.source, StreamData) else self.source.chains

    def throwaway_batches(self, samples: int) -> Iterator[MicroBatch]:
        """Yield a micro-batch of each full shape from the position of the run on, for the passes before step 1."""
        yield throwaway_batch(self.batching.micro_batch_size, self.source)


def distinct(names: Sequence[str]) -> list[str]:
    """Return names, those that occur more than once with their number among all."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def throwaway_batch(rows: int, source: CorpusData | StreamData) -> MicroBatch:
    """Return a micro-batch of full shape with one document per row."""
    ids = torch.zeros(rows, source.seq_len, dtype=torch.int64)
    cu_seqlens = None
    if source.reset_at_document_boundaries:
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * source.seq_len
    passes_states = isinstance(source, CorpusData) and source.chains is not None
    continues = torch.ones(rows, dtype=torch.bool) if passes_states else None
    return MicroBatch(ids, ids.clone(), cu_seqlens, torch.full((rows,), -1), continues)


def open_data(config: Config, model_config: LrnnConfig, ranks: Ranks) -> TrainingData:
    """Open and check what `config.data` names.

    Raises:
        UserError: see `Batching`, `TokenCorpus`, `StreamData`, `check_model_matches_corpora` and
            `check_enough_samples`.
    """
    batching = config.batching(ranks.rank, ranks.world_size)
    d = config.data
    description: dict[str, Any] = {
        "seq_len": d.seq_len,
        "seed": config.seed,
        "reset_at_document_boundaries": d.reset_at_document_boundaries,
    }
    if d.stream is not None:
        return _open_stream(config, d.stream, model_config, description, batching)
    corpora = [TokenCorpus(c.path) for c in d.corpora]
    chains = choose_chains(d.state_passing, corpora, d.seq_len, config.global_batch_size)
    if chains is not None:
        check_states(model_config)
        description |= {"state_passing": chains.length, "global_batch_size": chains.rows}
    check_model_matches_corpora(model_config.vocab_size, model_config.tokenizer_fingerprint, corpora)
    weights = [c.weight for c in d.corpora]
    source = CorpusData(corpora, weights, d.seq_len, config.seed, d.reset_at_document_boundaries, chains)
    check_enough_samples(source, ranks.world_size)
    description |= {
        "tokenizer": corpora[0].tokenizer_fingerprint,
        "corpora": [c.fingerprint for c in corpora],
        "weights": weights,
    }
    old = {"tokenizer": corpora[0].tokenizer_file_sha256}
    stages = [facts_of_stage(config, source)]
    return TrainingData(source, description, tokenizer_writer(corpora[0]), batching, old, stages)


def facts_of_stage(config: Config, source: CorpusData) -> dict[str, Any]:
    """Return what decides the samples of a stage, from the configuration that holds in it."""
    return {
        "steps": config.steps,
        "global_batch_size": config.global_batch_size,
        "seq_len": source.seq_len,
        "corpora": [corpus.fingerprint for corpus in source.corpora],
        "weights": source.weights,
    }


def tokenizer_writer(corpus: TokenCorpus) -> Callable[[Path], object]:
    """Return a function that writes the tokenizer of a corpus into a folder.

    Raises:
        UserError: the corpus lacks its tokenizer, or has another one; see also `check_exportable`.
    """
    folder = corpus.path / "tokenizer"
    if not folder.is_dir():
        raise UserError(
            f"corpus {corpus.path}: its folder tokenizer is missing, which every checkpoint copies; copy the whole "
            "corpus, or build it again"
        )
    tokenizer = load_copy(folder)
    if tokenizer.fingerprint != corpus.tokenizer_fingerprint:
        raise UserError(
            f"corpus {corpus.path}: its folder tokenizer holds another tokenizer (fingerprint "
            f"{tokenizer.fingerprint[:12]}...) than the corpus was made with ({corpus.tokenizer_fingerprint[:12]}...)"
        )
    check_exportable(tokenizer)
    return partial(copy_files, folder)


def _open_stream(
    config: Config, stream: StreamSource, model_config: LrnnConfig, description: dict[str, Any], batching: Batching
) -> TrainingData:
    tokenizer = load_tokenizer(stream.tokenizer)
    check_exportable(tokenizer)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"tokenizer {stream.tokenizer} has a vocabulary of {tokenizer.vocab_size}, the model's embedding has only "
            f"vocab_size={model_config.vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
        )
    expected = model_config.tokenizer_fingerprint
    if expected not in (None, tokenizer.fingerprint, tokenizer.file_sha256):
        raise UserError(
            f"tokenizer {stream.tokenizer} (fingerprint {tokenizer.fingerprint[:12]}...) is not the model's "
            f"({expected[:12]}...); give the model's tokenizer"
        )
    arguments = SourceArguments(**stream.model_dump(exclude={"tokenizer", "shuffle_buffer"}), of_run=True)
    d = config.data
    source = StreamData(
        arguments, tokenizer, d.seq_len, config.seed, stream.shuffle_buffer, d.reset_at_document_boundaries
    )
    stated = {"as given": source.fingerprint, "from run_dir": source.fingerprint_from(Path(config.run_dir))}
    description |= {"tokenizer": tokenizer.fingerprint, "stream": stated}
    old = fingerprint_of_0_1_0(stream.tokenizer, tokenizer)
    facts = {} if old is None else {"tokenizer": old, "stream": source.fingerprint_with(old)}
    return TrainingData(source, description, tokenizer.save, batching, facts)
