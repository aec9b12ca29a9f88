"""Compare the samples of a stream with the documents tokenised at once, and resume at every step."""

import json
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import sentencepiece
import torch

from lrnn.errors import UserError
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.corpus.source import SourceArguments
from lrnn.pretrain.corpus.streams import DatasetStream
from lrnn.pretrain.data.stream import StreamData, StreamLoader
from lrnn.tokenizer import load_tokenizer

SEQ_LEN = 32
G, MICRO = 8, 2


@pytest.fixture
def jsonl(tmp_path) -> tuple[Path, list[str]]:
    """Return two files of documents, one of them much longer than a sample, some empty."""
    texts = [f"document {i} " + "some words " * (i % 7) for i in range(120)]
    texts[5], texts[100] = "", ""
    texts[60] = "a long one " * 300
    for part in range(2):
        rows = [json.dumps({"text": text}) for text in texts[part * 60 : part * 60 + 60]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    return tmp_path / "*.jsonl", texts


@pytest.fixture
def stream(jsonl, sentencepiece_model):
    """`stream(**options)` returns a new `StreamData` over the same files."""

    def make(**options) -> StreamData:
        arguments = SourceArguments("json", data_files=[str(jsonl[0])])
        return StreamData(arguments, load_tokenizer(sentencepiece_model), SEQ_LEN, **options)

    return make


def take(data, steps, rank=0, ranks=1, state=None):
    """Return the steps of a rank, with the state after each as a checkpoint would store it."""
    with StreamLoader(data, Batching(G, MICRO, rank, ranks), state=state) as loader:
        taken = []
        for batches in islice(loader, steps):
            taken.append((batches, json.loads(json.dumps(loader.stream_state))))
        return taken


def same(a, b) -> bool:
    assert (a.cu_seqlens is None) == (b.cu_seqlens is None)
    names = ["input_ids", "labels", "sample_indices"] + (["cu_seqlens"] if a.cu_seqlens is not None else [])
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_samples_are_the_documents_in_a_row(stream, jsonl, sentencepiece_model):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    documents = [[1, *processor.encode(text), 2] for text in jsonl[1] if text]
    epoch = [(id_, place) for document in documents for place, id_ in enumerate(document)]
    steps = len(epoch) // (G * SEQ_LEN)
    assert steps > 10
    batches = list(chain.from_iterable(b for b, _ in take(stream(reset_at_document_boundaries=True), steps)))
    inputs = torch.cat([b.input_ids.flatten() for b in batches])
    labels = torch.cat([b.labels.flatten() for b in batches])
    n = steps * G * SEQ_LEN
    assert inputs.tolist() == [id_ for id_, _ in epoch[:n]]
    after = [*epoch, (1, 0)][1 : n + 1]  # the next epoch begins with a bos
    assert labels.tolist() == [-100 if place == 0 else id_ for id_, place in after]
    assert torch.cat([b.sample_indices for b in batches]).tolist() == list(range(steps * G))
    for number, batch in enumerate(batches):
        first = number * MICRO * SEQ_LEN
        starts = {i for i in range(MICRO * SEQ_LEN) if epoch[first + i][1] == 0} | {0, SEQ_LEN}
        assert batch.cu_seqlens.tolist() == [*sorted(starts), MICRO * SEQ_LEN]


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
def test_resume_at_every_step(stream, shuffle_buffer):
    options = {"shuffle_buffer": shuffle_buffer, "reset_at_document_boundaries": True, "seed": 3}
    whole = take(stream(**options), 90)
    assert {state["epoch"] for _, state in whole} >= {0, 1}  # past the end of the files
    for step in [*range(12), *range(12, 85, 7)]:
        resumed = take(stream(**options), 4, state=whole[step][1])
        for (a, state_a), (b, state_b) in zip(whole[step + 1 :], resumed, strict=False):
            assert all(map(same, a, b)) and state_a["offset"] == state_b["offset"]
        again = take(stream(**options), 2, state=resumed[2][1])  # a resume of a resume
        assert all(map(same, whole[step + 4][0], again[0][0]))


def test_ranks_share_the_same_micro_batches(stream):
    whole = take(stream(), 20)
    for ranks in (2, 4):
        parts = [take(stream(), 20, rank, ranks) for rank in range(ranks)]
        for step in range(20):
            batches = sorted(
                chain.from_iterable(part[step][0] for part in parts), key=lambda b: int(b.sample_indices[0])
            )
            assert len(batches) == G // MICRO and all(map(same, whole[step][0], batches))
            assert all(part[step][1] == whole[step][1] for part in parts)
    # The stream is also resumed on another number of processes.
    resumed = [take(stream(), 3, rank, 2, state=whole[9][1]) for rank in range(2)]
    assert same(whole[10][0][1], resumed[1][0][0][0]) and same(whole[12][0][2], resumed[0][2][0][1])


def test_state_is_that_of_the_step_taken(stream):
    with StreamLoader(stream(), Batching(G, MICRO)) as loader:
        assert loader.stream_state is None
        next(loader)
        assert loader.stream_state["samples"] == G  # though more steps are prepared
        next(loader)
        assert loader.stream_state["samples"] == 2 * G


def test_shuffling(stream, jsonl):
    def rows(**options):
        return [row for b, _ in take(stream(**options), 40) for batch in b for row in batch.input_ids.tolist()]

    plain, shuffled = rows(), rows(shuffle_buffer=60, seed=1)
    assert shuffled == rows(shuffle_buffer=60, seed=1)
    assert shuffled != plain and shuffled != rows(shuffle_buffer=60, seed=2)
    tokens = [np.bincount(list(chain.from_iterable(r)), minlength=400) for r in (plain, shuffled)]
    assert tokens[0].sum() == tokens[1].sum()


def test_fingerprint(stream):
    base = stream().fingerprint
    assert base == stream(reset_at_document_boundaries=True).fingerprint
    assert len({base, stream(seed=1).fingerprint, stream(shuffle_buffer=5).fingerprint}) == 3


def test_a_fingerprint_that_does_not_depend_on_the_current_folder(jsonl, sentencepiece_model, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(sentencepiece_model)

    def fingerprints(folder: str, path: str, files: list[str] | None, run: str) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path / folder)
        data = StreamData(SourceArguments(path, data_files=files), tokenizer, SEQ_LEN)
        return data.fingerprint, data.fingerprint_from(Path(run))

    (tmp_path / "run").mkdir()
    for path, files in (("json", ["0.jsonl", "1.jsonl"]), ("json", ["*.jsonl"]), ("0.jsonl", None), (".", ["0.jsonl"])):
        beside = fingerprints(".", path, files, "run")
        above = [f"../{name}" for name in files] if files and path != "." else files
        below = fingerprints("run", path if path == "json" else f"../{path}", above, ".")
        assert beside[1] == below[1] and beside[0] != below[0], path
    assert fingerprints(".", "json", ["0.jsonl"], "run")[1] != fingerprints(".", "json", ["1.jsonl"], "run")[1]


def test_streams_that_cannot_resume_are_refused(jsonl, monkeypatch):
    def no_state(self):
        raise NotImplementedError("no state here")

    for state_dict in (no_state, lambda self: {"rng": object()}, lambda self: {"shard": {1: 2}}):
        with monkeypatch.context() as patch:
            patch.setattr(datasets.IterableDataset, "state_dict", state_dict)
            with pytest.raises(UserError, match=r"position.*`lrnn corpus \.\.\. --streaming`"):
                DatasetStream(SourceArguments("json", data_files=[str(jsonl[0])])).state()


def test_a_position_that_datasets_stored_is_continued(stream, jsonl):
    """Checkpoints older than lrnn's own readers of files hold positions of `datasets`."""
    whole = take(stream(), 60)
    rows = datasets.load_dataset("json", data_files=[str(jsonl[0])], split="train", streaming=True)
    rows = rows.select_columns(["text"])
    iterator = iter(rows)
    for _ in range(100):
        next(iterator)
    source = json.loads(json.dumps(rows.state_dict()))
    # The block of documents 100 to 119, which is what is left of the first epoch.
    state = {"samples": 8 * G, "epoch": 0, "block": 1, "source": source, "offset": 5}
    resumed = take(stream(), 2, state=state)
    texts = [text for text in jsonl[1][100:] if text]
    processor = stream().tokenizer
    tokens = [id_ for ids in processor.encode_batch(texts) for id_ in (1, *ids, 2)]
    assert resumed[0][0][0].input_ids.flatten().tolist() == tokens[5 : 5 + MICRO * SEQ_LEN]
    assert resumed[0][0][0].sample_indices.tolist() == [8 * G, 8 * G + 1]
    # Its later positions are of the same kind.
    assert "reader" not in resumed[0][1] and "examples_iterable" in json.dumps(resumed[0][1])
    assert whole[0][1]["reader"] == "files"
    again = take(stream(), 1, state=resumed[0][1])
    assert all(map(same, resumed[1][0], again[0][0]))


def test_bad_streams(stream, tmp_path, sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(UserError, match="empty: zero-length"):
        StreamData(SourceArguments("json", data_files=[str(empty)]), tokenizer, SEQ_LEN)
    empty.write_text('{"text": ""}\n{"text": ""}')
    data = StreamData(SourceArguments("json", data_files=[str(empty)]), tokenizer, SEQ_LEN)
    with pytest.raises(UserError, match="gives no tokens"):
        next(StreamLoader(data, Batching(G, MICRO)))  # the error of the thread is raised here
