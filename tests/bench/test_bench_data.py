"""The data loader is fast enough that training never waits for it, even on a slow and shared machine."""

import pytest

from lrnn.bench.loader import measure_loader, write_synthetic_corpus
from lrnn.cli import main
from lrnn.pretrain.corpus.reader import TokenCorpus

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "corpus"
    write_synthetic_corpus(path, 20_000_000)
    return path


def test_synthetic_corpus_is_a_corpus(corpus_path):
    corpus = TokenCorpus(corpus_path)
    assert 20_000_000 <= corpus.num_tokens < 21_000_000
    assert 500 < corpus.num_tokens / corpus.num_documents < 2000
    starts = corpus.document_starts(0, 100_000)
    tokens = corpus.tokens(0, 100_000)
    assert (tokens[starts] == 1).all() and (tokens[starts[1:] - 1] == 2).all()


@pytest.mark.parametrize("reset", [False, True])
def test_loader_speed(corpus_path, reset):
    rates = measure_loader(corpus_path, 2048, 8, 64, seconds=2.0, reset_at_document_boundaries=reset, repeats=4)
    assert max(rates) > 5e6  # about 80e6 on an idle core; the best counts, because other tests may run beside it


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("data", ["--seq-len", "0"], "--seq-len 0 should be at least 1"),
        ("data", ["--micro-batch-size", "0"], "--micro-batch-size 0 should be at least 1"),
        ("data", ["--global-batch-size", "12"], "global_batch_size=12 is not a multiple of micro_batch_size=8"),
        ("data", ["--seconds", "0"], "--seconds 0 should be a positive number"),
        ("data", ["--seconds", "nan"], "--seconds nan should be a positive number"),
        ("loop", ["tiny", "--steps", "5"], "--steps 5 should be at least 6: the first 5 are not counted"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(part, options, message, capsys):
    assert main(["bench", part, *options]) == 2
    out, error = capsys.readouterr()
    assert not out and message in error and error.count("\n") == 1


def test_command(corpus_path, capsys):
    assert main(["bench", "data", "--corpus", str(corpus_path), "--seconds", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("documents run on", "reset at documents"):
        (line,) = [line for line in lines if line.startswith(name)]
        low, median, high = map(float, line.removeprefix(name).split())
        assert 0 < low <= median <= high
