"""Test runs in stages: the samples and learning rate of each step, and that a run resumes bitwise at a boundary."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from training_group import losses, run_group

from lrnn.errors import UserError
from lrnn.pretrain.changes import check_changes
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.heldout import HeldOut
from lrnn.pretrain.data.staged import open_run_data
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.launch import STOPPED
from lrnn.pretrain.schedule import learning_rate
from lrnn.pretrain.stage_changes import check_reached
from lrnn.pretrain.stages import stage_at, stages_of, steps_left
from lrnn.records import read_metrics
from lrnn.settings import dump

TORTURE = os.environ.get("LRNN_TORTURE") == "1"
LONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture
def staged(base, corpora):
    """`staged(run, **changes)`: 3 steps of both corpora, then 3 of longer samples of one, with its own schedule."""

    def make(run="run", stage=2, **changes):
        long = {"name": "long", "steps": 3, "seq_len": 128, "micro_batch_size": 4, "lr": 0.005}
        long |= {"corpora": [{"path": str(corpora / "b")}], "schedule": {"name": "wsd", "decay_steps": 2}}
        config = base(run, stage, stages=[{"steps": 3}, long], **changes)
        del config["steps"]
        return config

    return make


LONG = {"zero": 3, "optimizer": "muon", "stops": [1, 2, 3, 4, 5]}, {"zero": 1, "optimizer": "adamw", "stops": [3, 5]}
CASES = [{"zero": 2, "optimizer": "adamw", "stops": [2, 3, 4]}, *(LONG if TORTURE else ())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['optimizer']}, ZeRO-{case['zero']}")
def test_stop_and_resume_around_a_boundary(staged, tmp_path, case):
    """The run is stopped before, at and after the boundary. Another one continues with one process instead of two."""
    changes = {"log": {"every": 1, "heldout_every": 2, "heldout_batches": 4, "tensorboard": False}}
    changes["optim"] = {"lr": 0.01, "name": case["optimizer"]}
    straight, stopped, moved = (staged(run, case["zero"], **changes) for run in ("straight", "stopped", "moved"))
    specs = [{"config": straight}, *({"config": stopped, "stop_at": k} for k in case["stops"]), {"config": stopped}]
    assert run_group(tmp_path, [*specs, {"config": moved, "stop_at": 2}]) == [
        0,
        *[STOPPED] * len(case["stops"]),
        0,
        STOPPED,
    ]
    assert run_group(tmp_path, [{"config": moved}], processes=1) == [0]
    truth = losses(straight)
    assert list(truth) == [1, 2, 3, 4, 5, 6] and truth == losses(stopped)
    for step, (loss, *_) in losses(moved).items():
        assert loss == pytest.approx(truth[step][0], rel=1e-5)
    folder = checkpoint.find_newest(Path(moved["run_dir"]))
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 128
    progress = checkpoint.read_progress(folder)["progress"]
    assert progress["samples"] == 48 and progress["optimizer_step"] == 6
    assert len(progress["losses"]) == 3, "losses of the first stage still decide what is a spike in the second"
    records = {r["step"]: r for r in read_metrics(Path(stopped["run_dir"])) if "event" not in r}
    assert [records[step]["stage"] for step in range(1, 7)] == [1, 1, 1, 2, 2, 2]
    entered = [r for r in read_metrics(Path(straight["run_dir"])) if r.get("event") == "stage"]
    assert [(r["step"], r["stage"], r["name"]) for r in entered] == [(0, 1, "stage 1"), (3, 2, "long")]
    for step in (2, 4, 6):  # the same windows, together and by corpus
        found = [records[step][key] for key in ("heldout_loss/a", "heldout_loss/b")]
        assert min(found) < records[step]["heldout_loss"] < max(found)


@pytest.mark.skipif(not TORTURE, reason="takes long; set LRNN_TORTURE=1")
def test_a_rollback_over_a_boundary(staged, tmp_path):
    """The position in the data stays: the steps that are repeated have samples of the second stage, and all resumes."""
    changes = {
        "spikes": {"action": "rollback", "window": 6, "threshold": 5.0},
        "checkpoint": {"every": 5, "keep_last": 10},
        "log": {"every": 1, "tensorboard": False},
        "optim": {"lr": 0.04},  # The loss soon hardly falls.
        "schedule": {"name": "wsd", "warmup_steps": 1},
    }
    raw = staged("rolled", **changes)
    long = {"seq_len": 128, "micro_batch_size": 4, "corpora": raw["stages"][1]["corpora"], "steps": 8}
    raw["stages"] = [{"steps": 6}, long]  # a checkpoint in step 5, and a spike in step 10
    again = {**raw, "run_dir": str(tmp_path / "again")}
    specs = [{"config": raw, "strange_at": 10}, {"config": again, "strange_at": 10, "stop_at": 12}, {"config": again}]
    statuses = run_group(tmp_path, specs)
    assert statuses == [0, STOPPED, 0]
    records = read_metrics(tmp_path / "rolled")
    (event,) = (r for r in records if r.get("event") == "rollback")
    assert event["step"] == 10 and event["to"].endswith("step-00000005")
    stages = [r["stage"] for r in records if "loss" in r and "event" not in r]
    assert stages == [1] * 6 + [2] * 3 + [2] * 9, "steps 6 to 14 have samples of the second stage"
    assert losses(raw) == losses(again)


def test_the_samples_of_each_stage(staged, tmp_path):
    """The first stage has the samples of a run without stages. A stage that keeps its data continues where it is."""
    raw = staged()
    whole = open_data(config := parse_config({**raw, "stages": [], "steps": 6}, "test"), load_model_of(config), LONE)
    raw["stages"] = [{"steps": 2}, {"steps": 1, "micro_batch_size": 4}, raw["stages"][1], {"steps": 9}]
    config = parse_config(raw, "test")
    data = open_run_data(config, load_model_of(config), LONE, 0)
    assert load_model_of(config).max_position_embeddings == 128
    b = TokenCorpus(raw["data"]["corpora"][1]["path"])
    windows = {corpus: (TokenCorpus(c["path"]).num_tokens - 1) // 64 for corpus, c in enumerate(raw["data"]["corpora"])}

    def steps(source, start, n):
        with source.loader(start, None, False) as loader:
            return [next(loader) for _ in range(n)]

    taken, expected = steps(data, 0, 7), steps(whole, 0, 4)
    for found, same in zip([*taken[:3], taken[6]], expected, strict=True):
        assert torch.cat([m.input_ids for m in found]).equal(torch.cat([m.input_ids for m in same]))
    assert [len(step) for step in taken] == [4, 4, 2, 2, 2, 2, 4]
    for number, step in enumerate(taken):
        assert torch.cat([m.sample_indices for m in step]).tolist() == list(range(8 * number, 8 * number + 8))
        again = steps(data, 8 * number, 1)[0]  # from there on
        assert all(x.input_ids.equal(y.input_ids) for x, y in zip(step, again, strict=True))
    rows = torch.cat([m.input_ids for step in taken[3:6] for m in step])
    starts = {tuple(b.tokens(n * 128, n * 128 + 128).tolist()) for n in range((b.num_tokens - 1) // 128)}
    found = [tuple(row) for row in rows.tolist()]
    assert len(set(found)) == 24 and set(found) <= starts
    epochs = data.epochs(56, None)
    of_b = epochs[str(b.path)] - 24 / len(starts)
    assert epochs[raw["data"]["corpora"][0]["path"]] * windows[0] + of_b * windows[1] == pytest.approx(32, abs=0.01)


def test_no_window_comes_again_before_a_corpus_is_through(staged):
    """This holds over stages with other mixes and another order of the corpora, if the samples have the same length."""
    raw = staged()
    a, b = raw["data"]["corpora"]
    mixes = [{}, {"corpora": [b]}, {"steps": 512}, {"corpora": [b | {"weight": 0.3}, a]}, {"corpora": [a]}]
    raw["stages"] = [{"steps": 700, **mix} for mix in mixes]
    config = parse_config(raw, "test")
    parts = open_run_data(config, load_model_of(config), LONE, 0).parts
    seen = {a["path"]: [], b["path"]: []}
    for part in parts:
        corpus, epoch, window = part.data._order(np.arange(part.start, part.start + part.stage.samples))
        for c, *place in zip(corpus.tolist(), epoch.tolist(), window.tolist(), strict=True):
            seen[str(part.data.corpora[c].path)].append(tuple(place))
    for path, places in seen.items():
        n = (TokenCorpus(path).num_tokens - 1) // 64
        assert len(places) == len(set(places)) > n
        assert len(places) > 0.6 * n * (1 + max(epoch for epoch, _ in places)), "few are left out"


def test_learning_rates(staged):
    """The schedule of the run goes over all of its steps; a stage's own over the stage; see `learning_rate`."""
    raw = staged(schedule={"name": "wsd", "warmup_steps": 2, "decay_steps": 3, "min_lr_ratio": 0.0})
    one = parse_config({**raw, "stages": [], "steps": 6}, "test")
    cut = parse_config({**raw, "stages": [{"steps": 3}, {"tokens": 3 * 8 * 64 - 5}]}, "test")
    rates = [learning_rate(step, one) for step in range(6)]
    assert rates == [learning_rate(step, cut) for step in range(6)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    own = parse_config(raw, "test")
    assert [learning_rate(step, own) for step in range(6)] == pytest.approx(
        [0.005, 0.01, 0.01, 0.005, 0.005 * (0.1 + 0.9 * 2 / 3), 0.005 * (0.1 + 0.9 / 3)]
    )
    raw["stages"][1]["schedule"] = {"name": "cosine", "warmup_steps": 1, "min_lr_ratio": 0.0}
    again = parse_config(raw, "test")
    assert [learning_rate(step, again) for step in (3, 4, 5)] == pytest.approx([0.005, 0.005, 0.0])


def test_which_stage_a_sample_belongs_to(staged):
    """After a rollback the samples are ahead of the steps: a stage begins as many steps earlier, the last is longer."""
    raw = staged()
    raw["stages"][1]["global_batch_size"] = 4
    stages = stages_of(parse_config(raw, "test"))
    assert [(s.number, s.first_step, s.first_sample, s.samples) for s in stages] == [(1, 0, 0, 24), (2, 3, 24, 12)]
    assert [s.title for s in stages] == ["stage 1", "stage 2 (long)"]
    assert [stage_at(stages, n).number for n in (-1, 0, 16, 23, 24, 36, 99)] == [1, 1, 1, 1, 2, 2, 2]
    left = [[(s.number, n) for s, n in steps_left(stages, *place)] for place in ((0, 0), (8, 1), (24, 3), (16, 1))]
    assert left == [[(1, 3), (2, 3)], [(1, 2), (2, 3)], [(2, 3)], [(1, 1), (2, 4)]]


WRONG = {
    "overlap": ({"steps": 5}, r"steps is 5, and the stages have 6 steps \(stage 1 3, long 3\): they are 1 too many"),
    "gap": ({"steps": 9}, r"the stages have 6 steps .*: steps 7 to 9 belong to no stage; set steps to 6, or remove it"),
    "no length": ({"stages": [{}]}, "key stages.0 .*: give exactly one of steps and tokens"),
    "two lengths": ({"stages": [{"steps": 1, "tokens": 9}]}, "key stages.0 .*: give exactly one of steps and tokens"),
    "same name": ({"stages": [{"steps": 1, "name": "x"}] * 2}, "2 of them have the name 'x'; give each its own"),
    "a model": (
        {"stages": [{"steps": 1, "model": {"rope_theta": 1.0}}]},
        "model is no key of a stage, because all stages share it; make the stage a run of its own that begins with",
    ),
    "states": ({"stages": [{"steps": 1, "state_passing": 2}]}, "state_passing is no key of a stage"),
    "unknown key": ({"stages": [{"steps": 1, "seqlen": 9}]}, "unknown key stages.0.seqlen; did you mean seq_len?"),
    "schedule": (
        {"stages": [{"steps": 4, "schedule": {"warmup_steps": 5}}]},
        r"stages.0.schedule.warmup_steps 5 \+ stages.0.schedule.decay_steps 0 is more than the 4 steps of stage 1",
    ),
    "no stages": ({"stages": []}, "key steps is missing"),
    "no corpora": ({"data": {"seq_len": 64}}, "key data = .*: give exactly one of corpora .* and stream"),
    "state passing": (
        {"data": {"seq_len": 64, "corpora": [{"path": "a"}], "state_passing": 4}},
        "data.state_passing does not go with stages; set it to false",
    ),
    "stream": (
        {"data": {"seq_len": 64, "stream": {"path": "x", "tokenizer": "y"}}},
        "stages take corpora, and data.stream is a stream",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_stages(staged, name):
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        parse_config({**staged(), **changes}, "test")


def test_a_stage_that_does_not_fit(staged, build_corpus, text_folder, tmp_path):
    """Every stage is checked before the first begins, and the message names it."""
    other = build_corpus(text_folder)
    small = tmp_path / "small"
    small.mkdir()
    (small / "x.txt").write_text("one two")
    tiny = build_corpus(small, "--tokenizer", f"{other}/tokenizer", out="tiny")
    wrong = {
        r"corpora .*/a and .*/corpus were made with different tokenizers": {"corpora": [{"path": str(other)}]},
        "split 'train' has .* tokens, too few for one sample of seq_len=128": {"corpora": [{"path": str(tiny)}]},
        "global_batch_size=8 is not a multiple of micro_batch_size=3": {"micro_batch_size": 3},
        "no manifest.json": {"corpora": [{"path": str(tmp_path / "nothing")}]},
    }
    for message, changes in wrong.items():
        raw = staged()
        raw["stages"][1] |= changes
        config = parse_config(raw, "test")
        with pytest.raises(UserError, match=rf"^stage 2 \(long\): .*{message}"):
            open_run_data(config, load_model_of(config), LONE, 0)


def test_batches_of_stages_that_are_over_need_not_fit_the_processes(staged):
    """A run that began with 8 samples per step resumes in its second stage, of 32, on 16 processes."""
    raw = staged()
    raw["log"] = {"heldout_every": 2, "heldout_batches": 1, "tensorboard": False}
    raw["stages"] = [{"steps": 3, "micro_batch_size": 4}, {"steps": 3, "global_batch_size": 32, "micro_batch_size": 2}]
    config, many = parse_config(raw, "test"), [Ranks(rank, 16, torch.device("cpu"), None) for rank in range(16)]
    model = load_model_of(config)
    for samples in (0, 23):
        with pytest.raises(UserError, match=r"^stage 1: global_batch_size=8 has too few samples for 16 processes"):
            open_run_data(config, model, many[0], samples)
        with pytest.raises(UserError, match=r"^stage 1: global_batch_size=8 has too few samples for 16 processes"):
            HeldOut(config, many[0], samples)
    alone = open_run_data(config, model, LONE, 0).loader(24, None, False)
    found = [open_run_data(config, model, ranks, 24).loader(24, None, False) for ranks in many]
    with alone as expected:
        step = torch.cat([batch.input_ids for batch in next(expected)])
    taken = []
    for loader in found:
        with loader as own:
            taken += [batch.input_ids for batch in next(own)]
    assert torch.cat(taken).equal(step)
    assert [list(batches)[:1] for batches in HeldOut(config, many[3], 24)._batches] == [[], ["heldout_loss"]]
    sizes = [batch.input_ids.shape for batch in open_run_data(config, model, many[0], 24).throwaway_batches(24)]
    assert sizes == [(2, 64)]


def test_a_run_grows_onto_processes_that_its_first_stage_does_not_fit(staged, tmp_path):
    raw = {**staged(), "global_batch_size": 4, "micro_batch_size": 4}
    raw["stages"] = [{"steps": 2}, {"steps": 1, "global_batch_size": 8}]
    assert run_group(tmp_path, [{"config": raw, "stop_at": 2}], 1) == [STOPPED]
    assert run_group(tmp_path, [{"config": raw}], 2) == [0]
    assert [r["step"] for r in read_metrics(Path(raw["run_dir"])) if "loss" in r] == [1, 2, 3]


@pytest.fixture
def resume(staged, tmp_path):
    """`resume(before, samples, now)` checks the resume of a checkpoint of `before` with the configuration `now`."""

    def run(before, samples, now, allow_change=False):
        data = {}
        for name, raw in (("before", before), ("now", now)):
            config = parse_config(raw, "test")
            data[name] = config, open_run_data(config, load_model_of(config), LONE, 0)
        (config, old), (changed, new) = data["before"], data["now"]
        (tmp_path / "run.yaml").write_text(dump(config))
        progress = {"progress": {"samples": samples}, "data": old.description}
        (tmp_path / "progress.json").write_text(json.dumps(progress))
        check_changes(tmp_path, changed, allow_change)
        return check_reached(tmp_path, new.stages, allow_change)

    return run


def of_stage(raw, number, **changes):
    """Return a configuration with other values of a stage, counted from 1."""
    stages = [stage | changes if i == number else stage for i, stage in enumerate(raw["stages"], start=1)]
    return {**raw, "stages": stages}


def test_stages_that_are_not_reached_may_change(staged, resume):
    raw, a = staged(), staged()["data"]["corpora"][:1]
    wsd, cosine = ({**raw, "schedule": {"name": name, "warmup_steps": 1}} for name in ("wsd", "cosine"))
    for now in (
        wsd,
        of_stage(wsd, 1, micro_batch_size=4),
        of_stage(wsd, 2, steps=5, seq_len=32, corpora=a, lr=0.1, schedule=None),
        {**wsd, "stages": [*wsd["stages"], {"steps": 4}]},
    ):
        assert resume(wsd, 24, now) == set()
    longer = of_stage(cosine, 2, steps=5)
    with pytest.raises(UserError, match=r"was trained with steps = 6 \(now 8\), which changes the results"):
        resume(cosine, 24, longer)  # the cosine of the whole run is another one
    assert resume(cosine, 24, longer, allow_change=True) == set()
    once = {**raw, "stages": [], "steps": 3, "schedule": {"name": "wsd"}}  # a run without stages gets a second one
    assert resume(once, 24, {**raw, "schedule": {"name": "wsd"}}) == set()
    ended = {"name": "wsd", "decay_steps": 2}  # and its decay on other data, which takes the place of the old one
    longer = {**raw, "stages": [{"steps": 3}, {"steps": 2, "name": "decay"}], "schedule": ended}
    assert resume(once, 24, longer) == set()


def test_stages_that_are_reached_may_not_change(staged, resume):
    raw, a = {**staged(), "schedule": {"name": "wsd"}}, staged()["data"]["corpora"][:1]
    for changes, message in (
        ({"seq_len": 32}, r"has reached stage 1, which had seq_len = 64, now it is 32; only later stages may change"),
        ({"steps": 2}, r"has reached stage 1, which had steps = 3, now it is 2"),
        ({"corpora": a}, r"has reached stage 1, which had corpora = "),
        ({"global_batch_size": 16}, r"has reached stage 1, which had global_batch_size = 8, now it is 16"),
        ({"lr": 0.5}, r"was trained with the learning rate of step 1 = 0.01 \(now 0.5\), which changes the results"),
    ):
        now = of_stage(raw, 1, **changes)
        with pytest.raises(UserError, match=message):
            resume(raw, 8, now)
        resume(raw, 8, now, allow_change=True)  # the stage that the run is in
        resume(raw, 24, of_stage(raw, 2, **changes))
        if "lr" not in changes:
            with pytest.raises(UserError, match=message):
                resume(raw, 32, now, allow_change=True)  # it is over
    with pytest.raises(UserError, match="has reached stage 2, and the run has only 1 now"):
        resume(raw, 32, {**raw, "stages": raw["stages"][:1]}, allow_change=True)
