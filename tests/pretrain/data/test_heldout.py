"""Test the held-out losses of single corpora: their names, and that they are over the windows of the whole."""

from pathlib import Path

import torch

from lrnn.pretrain.config import parse_config
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.heldout import HeldOut, batches_in, names_of
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics.log import _by_corpus
from lrnn.pretrain.stages import stages_of


def test_names():
    assert names_of(["data/web"]) == ["web"]
    assert names_of(["data/web", "other/web", "code", "/x/books/"]) == ["data/web", "other/web", "code", "books"]
    assert names_of(["a/en/web", "b/en/web", "web"])[:2] == ["a/en/web", "b/en/web"]


def test_the_windows_of_each_corpus_are_those_of_all(base):
    """On two processes; a stage without one of the corpora measures it too, with the stage's length."""
    corpora = base()["data"]["corpora"]
    stages = [{"steps": 1}, {"steps": 1, "seq_len": 32, "micro_batch_size": 4, "corpora": corpora[:1]}]
    config = parse_config({**base(), "steps": 2, "stages": stages}, "test")
    splits = {c["path"]: TokenCorpus(c["path"], "heldout") for c in corpora}
    for stage in stages_of(config):
        rows = {"heldout_loss": [], "heldout_loss/a": [], "heldout_loss/b": []}
        for rank in range(2):
            found = batches_in(stage, splits, Ranks(rank, 2, torch.device("cpu"), None))
            assert list(found) == list(rows)
            for name, batches in found.items():
                for batch in batches:
                    assert batch.input_ids.shape == (stage.config.micro_batch_size, stage.config.data.seq_len)
                    kept = (batch.sample_indices >= 0).tolist()
                    rows[name] += [tuple(row) for row, keep in zip(batch.input_ids.tolist(), kept, strict=True) if keep]
        assert len(rows["heldout_loss"]) == config.log.heldout_batches * stage.config.micro_batch_size
        assert sorted(rows["heldout_loss/a"] + rows["heldout_loss/b"]) == sorted(rows["heldout_loss"])
        for name, corpus in zip("ab", splits.values(), strict=True):
            length = stage.config.data.seq_len
            windows = {
                tuple(corpus.tokens(n * length, (n + 1) * length).tolist()) for n in range(len(rows["heldout_loss"]))
            }
            assert set(rows[f"heldout_loss/{name}"]) <= windows


def test_one_corpus_has_one_loss(base):
    config = parse_config(base(), "test")
    config.data.corpora = config.data.corpora[:1]
    (found,) = HeldOut(config, Ranks(0, 1, torch.device("cpu"), None), 0)._batches
    assert list(found) == ["heldout_loss"] and Path(config.data.corpora[0].path).name == "a"


def test_the_line_of_a_step():
    record = {"step": 1, "loss": 2.0, "heldout_loss": 1.5, "heldout_loss/web": 1.25, "heldout_loss/code": 1.75}
    assert _by_corpus(record) == " (web 1.2500, code 1.7500)" and _by_corpus({"heldout_loss": 1.5}) == ""
