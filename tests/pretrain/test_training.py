"""Test whole trainings on CPU over gloo: a run that is stopped anywhere and resumed gives bitwise the same result."""

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from training_group import losses, run_group

from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.deepspeed_config import COPY
from lrnn.pretrain.launch import STOPPED
from lrnn.pretrain.zero import zero_settings
from lrnn.records import read_metrics

STEPS = 6
FEW = 16  # tokens per sample in bfloat16, with which many CPUs compute many times as slowly


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [(1, "float32", "adamw"), (1, "float32", "muon"), (2, "float32", "adamw"), (3, "bfloat16", "adamw")],
)
def test_stop_and_resume_is_bitwise_the_same(base, hybrid_json, tmp_path, stage, precision, optimizer):
    """Compare a run that is stopped after every single step with one that never stopped. The model is a hybrid."""
    optim = base()["optim"] | {"name": optimizer}
    changes = {"model": str(hybrid_json), "precision": precision, "optim": optim}
    if precision == "bfloat16":
        changes["data"] = base()["data"] | {"seq_len": FEW}
    straight, stopped = base("straight", stage, **changes), base("stopped", stage, **changes)
    stops = {1: [3], 2: range(1, STEPS), 3: [1, 2, 4]}[stage]  # stage 1 keeps its state as stage 2 does
    specs = [{"config": straight}] + [{"config": stopped, "stop_at": k} for k in stops] + [{"config": stopped}]
    statuses = run_group(tmp_path, specs)
    assert statuses == [0] + [STOPPED] * len(stops) + [0]
    truth = losses(straight)
    assert list(truth) == list(range(1, STEPS + 1)) and truth == losses(stopped)
    assert truth[STEPS][0] < truth[1][0], "the loss should fall"
    assert read_metrics(Path(stopped["run_dir"]))[-2]["tokens"] == read_metrics(Path(straight["run_dir"]))[-2]["tokens"]
    events = [r for r in read_metrics(Path(stopped["run_dir"])) if r.get("event") == "start"]
    assert [e["resumed"] for e in events] == [False] + [True] * len(stops)


def test_the_recorded_loss_is_the_mean_since_the_last_record(base, tmp_path):
    """It is the same when the run is stopped between two records."""
    every, straight, stopped = (
        base(name, log={"every": n, "tensorboard": False}, checkpoint={"every": 1})
        for name, n in (("every", 1), ("straight", 4), ("stopped", 4))
    )
    specs = [{"config": every}, {"config": straight}, {"config": stopped, "stop_at": 3}, {"config": stopped}]
    assert run_group(tmp_path, specs) == [0, 0, STOPPED, 0]
    steps, found, resumed = (
        {r["step"]: r for r in read_metrics(Path(run["run_dir"])) if "event" not in r}
        for run in (every, straight, stopped)
    )
    assert list(found) == list(resumed) == [4, STEPS]
    for first, last in ((1, 4), (5, STEPS)):
        losses_ = [steps[s]["loss"] for s in range(first, last + 1)]
        assert found[last]["loss"] == resumed[last]["loss"] == math.fsum(losses_) / len(losses_)
        assert found[last]["loss_last"] == resumed[last]["loss_last"] == losses_[-1] == steps[last]["loss_last"]
    assert all(record["loss"] == record["loss_last"] for record in steps.values())
    # Corpus b has twice the weight of a, so in 48 samples about twice as many come from it.
    a, b = (TokenCorpus(corpus["path"]) for corpus in every["data"]["corpora"])
    epochs = steps[STEPS]["epochs"]
    taken = [epochs[str(corpus.path)] * ((corpus.num_tokens - 1) // 64) for corpus in (a, b)]
    assert sum(taken) == pytest.approx(STEPS * 8, abs=0.01) and 1.2 < taken[1] / taken[0] < 3.3
    (start,) = (r for r in read_metrics(Path(every["run_dir"])) if r.get("event") == "start")
    assert start["versions"]["torch"] == torch.__version__
    ready = [r["seconds"] for r in read_metrics(Path(stopped["run_dir"])) if r.get("event") == "ready"]
    phases = ["data and checkpoints", "model", "engine", "logs", "first pass"]
    assert list(ready[0]) == phases and list(ready[1]) == [*phases[:2], "checkpoint", *phases[2:]]
    assert all(s > 0 for seconds in ready for s in seconds.values())


@pytest.mark.parametrize(("stages", "autocast", "tolerance"), [((1, 2, 3), False, 1e-5), ((2, 3, 1), True, 5e-4)])
def test_other_numbers_of_processes_and_stages_agree(base, tmp_path, stages, autocast, tolerance):
    """A run of 2 processes continues with 1 and with 2 again, each time in another ZeRO stage: same samples and losses.

    In float32, losses differ by the order of sums. Under bf16 autocast a difference in the last bit of a weight can
    flip a rounding of 2^-9, so only differences of that size can be required.
    """

    def config(run, stage):
        path = tmp_path / f"zero{stage}.json"
        engine = zero_settings(stage)
        engine["torch_autocast"]["enabled"] = autocast
        engine["gradient_clipping"] = 1.0
        path.write_text(json.dumps(engine))
        data = base()["data"] | ({"seq_len": FEW} if autocast else {})
        return base(run, zero=None, precision=None, deepspeed=str(path), data=data)

    straight, moved = config("straight", stages[0]), config("moved", stages[0])
    assert run_group(tmp_path, [{"config": straight}, {"config": moved, "stop_at": 2}]) == [0, STOPPED]
    assert run_group(tmp_path, [{"config": config("moved", stages[1]), "stop_at": 4}], processes=1) == [STOPPED]
    assert run_group(tmp_path, [{"config": config("moved", stages[2])}]) == [0]
    if not autocast:  # otherwise it says what `zero` and `precision` do, which replace it
        copy = checkpoint.find_newest(Path(moved["run_dir"])) / COPY
        assert json.loads(copy.read_text()) == json.loads((tmp_path / f"zero{stages[2]}.json").read_text())
    truth, found = losses(straight), losses(moved)
    assert list(truth) == list(found) and found[2] == truth[2]
    for step in truth:
        assert found[step][0] == pytest.approx(truth[step][0], rel=tolerance), step
        assert found[step][1] == pytest.approx(truth[step][1], rel=10 * tolerance), step
    final = [r for r in read_metrics(Path(moved["run_dir"])) if r.get("step") == STEPS and "event" not in r]
    assert final[-1]["samples"] == STEPS * 8


def test_a_gradient_that_is_not_finite_changes_nothing(base, tmp_path):
    """With NaN in one rank's gradient, the step is skipped on all ranks and counted, and its samples are named."""
    clean, poisoned = base("clean", steps=3), base("poisoned", steps=3)
    assert run_group(tmp_path, [{"config": clean}, {"config": poisoned, "poison_at": 2}]) == [0, 0]
    skipped = [r for r in read_metrics(Path(poisoned["run_dir"])) if r.get("event") == "skipped_step"]
    assert len(skipped) == 1 and skipped[0]["step"] == 2 and skipped[0]["samples"] == list(range(8, 16))
    state = SavedState(checkpoint.find_newest(Path(poisoned["run_dir"])))
    assert all(state.read("param", n, 0, 2).isfinite().all() for n in state.parameters())
    progress = checkpoint.read_progress(state.folder)["progress"]
    assert progress["step"] == 3 and progress["optimizer_step"] == 2 and progress["skipped_steps"] == 1


def test_too_many_bad_steps_stop_the_run(base, tmp_path):
    config = base(steps=3, max_skipped_steps=1)
    (status,) = run_group(tmp_path, [{"config": config, "poison_at": 1}], processes=1)
    assert status.startswith("UserError: 1 steps in a row were skipped, the last one step 1"), status
    assert "its samples are 0, 1, 2, 3, 4, 5, 6, 7;" in status and "metrics.jsonl" in status


def test_a_stream_resumes_bitwise(base, corpora, tmp_path):
    """The stream is tokenised while training. It is stopped while the engine starts, before any step, and later."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "json"
    texts = [path.read_text() for path in sorted(folder.glob("*.py"))]
    for part in range(2):
        rows = [json.dumps({"text": text[:800]}) for text in texts[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))

    def config(run):
        files = [str(tmp_path / f"{part}.jsonl") for part in range(2)]
        stream = {
            "path": "json",
            "data_files": files,
            "tokenizer": str(corpora / "a" / "tokenizer"),
            "shuffle_buffer": 3,
        }
        changed = base(run, steps=10)
        data = {"seq_len": 64, "reset_at_document_boundaries": True, "stream": stream}
        return {**changed, "data": data, "log": changed["log"] | {"heldout_every": 0}}

    straight, stopped = config("straight"), config("stopped")
    stops = [{"config": stopped, "stop_at": k} for k in (0, 3, 8)]
    assert run_group(tmp_path, [{"config": straight}, *stops, {"config": stopped}]) == [0] + [STOPPED] * 3 + [0]
    starts = [r["step"] for r in read_metrics(Path(stopped["run_dir"])) if r.get("event") == "start"]
    assert starts == [0, 0, 3, 8]
    truth = losses(straight)
    assert list(truth) == list(range(1, 11)) and truth == losses(stopped)
    newest = checkpoint.find_newest(Path(stopped["run_dir"]))
    assert checkpoint.read_progress(newest)["progress"]["stream"]["epoch"] > 0, "the second epoch was not reached"


def test_the_pass_before_the_first_step_changes_nothing(base, tmp_path):
    """This also holds after a resume, when a stray gradient would change the moments."""
    pairs = [(base(f"with-{stage}", stage, steps=3), base(f"without-{stage}", stage, steps=3)) for stage in (2, 3)]
    specs = [
        {"config": config, "no_warm_up": left_out, "stop_at": stop_at}
        for pair in pairs
        for config, left_out in zip(pair, (False, True), strict=True)
        for stop_at in (2, None)
    ]
    assert run_group(tmp_path, specs, processes=1) == [STOPPED, 0] * 4
    for with_pass, without in pairs:
        assert losses(with_pass) == losses(without) and len(losses(without)) == 3
