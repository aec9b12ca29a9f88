"""Test trainings that pass states on: against longer samples, stopped anywhere, on other numbers of processes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from training_group import losses, run_group

from lrnn.errors import UserError
from lrnn.pretrain.checkpoint.format import list_checkpoints
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.config import DataConfig
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.chains import choose_chains
from lrnn.pretrain.data.samples import CorpusData
from lrnn.pretrain.launch import STOPPED
from lrnn.records import read_metrics

TORTURE = os.environ.get("LRNN_TORTURE") == "1"
LONG, SHORT, CHAIN = 64, 16, 4
STEPS = 6


def test_a_chain_is_a_longer_sample(corpora):
    opened, weights = [TokenCorpus(corpora / name) for name in "ab"], [1.0, 2.0]
    rows = 6
    chains = choose_chains(CHAIN, opened, SHORT, rows)
    short = CorpusData(opened, weights, SHORT, 3, True, chains)
    long = CorpusData(opened, weights, LONG, 3, True)
    numbers = np.arange(3 * rows)
    truth = long.batch(numbers).input_ids.view(3, rows, CHAIN, SHORT)
    found = short.batch(np.arange(3 * rows * CHAIN)).input_ids.view(3, CHAIN, rows, SHORT)
    assert (found.transpose(1, 2) == truth).all()
    for turns in (0, 1, 40):
        assert short.epochs(turns * rows * CHAIN) == pytest.approx(long.epochs(turns * rows), rel=1e-12)
    between = zip(long.epochs(rows), long.epochs(2 * rows), strict=True)
    assert short.epochs(5 * rows) == pytest.approx([0.75 * a + 0.25 * b for a, b in between])


def test_a_row_begins_where_its_chain_or_a_document_does(corpora):
    corpus = TokenCorpus(corpora / "a")
    starts = corpus.document_starts(0, corpus.num_tokens)
    seq_len = next(n for n in range(2, 2 + starts[1]) if starts[1] % n == 0)  # so that a sample begins with a document
    chains = choose_chains(True, [corpus], seq_len, 5)
    assert chains.length == (corpus.num_tokens - 1) // seq_len // 5
    samples = np.arange(0, 5 * chains.length)
    for resets in (False, True):
        data = CorpusData([corpus], [1.0], seq_len, 0, resets, chains)
        continues = data.batch(samples).continues.view(-1, 5).numpy()
        assert not continues[0].any()
        _, window = data.locate(samples)
        begins = np.isin(window * seq_len, starts).reshape(-1, 5)
        assert (continues[1:] == ~(begins[1:] & resets)).all() and begins[1:].any()


def test_trainings(base, hybrid_json, tmp_path):
    """One group of two processes trains: the truth by longer samples, a straight run, and one that is stopped.

    The third step is not applied, because a gradient is not finite. The model is a hybrid with a window above a sample.
    """
    data = base()["data"]
    still = {"model": str(hybrid_json), "optim": {"lr": 1e-12}, "log": {"every": 1, "tensorboard": False}}
    passing = {"data": data | {"seq_len": SHORT, "state_passing": CHAIN}, "model": str(hybrid_json)}
    long = base("long", **still, steps=1, data=data | {"seq_len": LONG}, schedule={"warmup_steps": 0})
    short = base("short", **(still | passing), steps=CHAIN, schedule={"warmup_steps": 0})
    straight, stopped, elastic = (base(name, **passing, steps=STEPS) for name in ("straight", "stopped", "elastic"))
    stops = [2, 3, 5] if TORTURE else [3]
    specs = [{"config": long}, {"config": short}, {"config": straight, "poison_at": 3}]
    specs += [{"config": stopped, "poison_at": 3, "stop_at": stop} for stop in stops] + [{"config": stopped}]
    assert run_group(tmp_path, specs) == [0, 0, 0, *[STOPPED] * len(stops), 0]

    records = [[r for r in read_metrics(Path(run["run_dir"])) if "event" not in r] for run in (long, short)]
    labels = np.diff([0, *(r["tokens"] for r in records[1])])
    assert labels.sum() == records[0][0]["tokens"]
    assert np.average([r["loss"] for r in records[1]], weights=labels) == pytest.approx(records[0][0]["loss"], rel=1e-6)
    truth = losses(straight)
    assert list(truth) == list(range(1, STEPS + 1)) and truth == losses(stopped)
    assert truth[STEPS][0] < truth[1][0] and truth[3][1] is None

    # The rest again, from the checkpoint of step 3, on one process with other micro-batches and another ZeRO stage.
    copied = Path(shutil.copytree(stopped["run_dir"], elastic["run_dir"])) / "checkpoints"
    for later in copied.glob("step-*[!3]"):
        shutil.rmtree(later)
    (copied.parent / "metrics.jsonl").unlink()
    names = SavedState(copied / "step-00000003").names("carried")
    assert names == ["0.conv", "0.state", "1.state.0", "1.state.1", "1.state.2"]
    assert run_group(tmp_path, [{"config": elastic | {"micro_batch_size": 4, "zero": 1}}], processes=1) == [0]
    again = losses(elastic)
    assert list(again) == list(range(4, STEPS + 1))
    for step in range(4, STEPS + 1):
        assert again[step][0] == pytest.approx(truth[step][0], rel=2e-5), step
        assert again[step][1] == pytest.approx(truth[step][1], rel=1e-3), step
    # The end of a chain leaves nothing to carry on.
    assert SavedState(list_checkpoints(Path(short["run_dir"]))[-1]).names("carried") == []


@pytest.mark.skipif(not TORTURE, reason="takes long; set LRNN_TORTURE=1")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rollback_begins_with_fresh_states(base, hybrid_json, tmp_path, stage):
    """After the rollback no state is left, and a run that is stopped then continues as one that is not."""
    data = base()["data"] | {"seq_len": SHORT, "state_passing": 8}
    spikes = {"window": 6, "threshold": 5.0, "action": "rollback"}
    changes = {"model": str(hybrid_json), "data": data, "spikes": spikes, "steps": 13, "checkpoint": {"every": 4}}
    changes |= {"optim": {"lr": 0.04}, "schedule": {"name": "wsd", "warmup_steps": 1}}
    straight, stopped = (base(name, stage, **changes) for name in ("straight", "stopped"))
    specs = [{"config": straight, "strange_at": 10}]
    specs += [{"config": stopped, "strange_at": 10, "stop_at": stop} for stop in (3, 12, 14)] + [{"config": stopped}]
    assert run_group(tmp_path, specs) == [0, *[STOPPED] * 3, 0]
    assert any(r.get("event") == "rollback" for r in read_metrics(Path(stopped["run_dir"])))
    assert losses(straight) == losses(stopped)


def test_chains_that_a_corpus_cannot_give_are_refused(corpora):
    corpus = TokenCorpus(corpora / "a")
    samples = (corpus.num_tokens - 1) // SHORT
    with pytest.raises(
        UserError, match=rf"state_passing=100000: corpus .*a has only {samples:,} samples of seq_len=16"
    ):
        choose_chains(100_000, [corpus], SHORT, 2)
    with pytest.raises(UserError, match=r"state_passing=true: .*2,000,000, 2 for each row"):
        choose_chains(True, [corpus], SHORT, 1_000_000)
    assert choose_chains(False, [corpus], SHORT, 2) is None


@pytest.mark.parametrize(("value", "message"), [(1, "greater than or equal to 2"), ("16", "valid"), (-3, "greater")])
def test_the_number_of_samples_is_checked(value, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(seq_len=8, corpora=[{"path": "x"}], state_passing=value)


def test_a_stream_is_refused():
    with pytest.raises(ValidationError, match="state_passing needs corpora"):
        DataConfig(seq_len=8, stream={"path": "x", "tokenizer": "y"}, state_passing=True)
