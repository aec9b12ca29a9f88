"""Test the record of a run: writing, reading, averaging and drawing."""

import json
import re
import shutil
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics import speed as speed_module
from lrnn.pretrain.metrics.curves import split_records
from lrnn.pretrain.metrics.eigenvalues import EIGENVALUE_BINS, EigenvalueProbe
from lrnn.pretrain.metrics.flops import train_flops_per_token
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.metrics.speed import Speed
from lrnn.pretrain.metrics.wandb_run import identity_of, start
from lrnn.records import read_metrics

RANKS = Ranks(0, 2, torch.device("cpu"), None)  # no group, because nothing here talks to others
MODEL = LrnnConfig(
    vocab_size=64, hidden_size=8, num_hidden_layers=2, num_heads=4, head_dim=4, intermediate_size=8
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    return parse_config(
        {
            "run_dir": str(tmp_path), "model": "x", "steps": 100, "global_batch_size": 12,
            "micro_batch_size": 1, "data": {"seq_len": 50, "corpora": [{"path": "x"}]}, "optim": {"lr": 1.0},
        },
        "test",
    )  # fmt: skip


def step_record(step: int, loss: float, **more) -> dict:
    """Return a record as the loop writes it."""
    record = {"step": step, "loss": loss, "lr": 0.001 * step, "grad_norm": 1.5, "tokens": 600 * step}
    record |= {"tokens_per_second_per_gpu": 1000.0 + step, "mfu": None}
    share = step / 1000
    record["eigenvalues"] = {"negative_fraction": {"0": share, "1": 1 - share}, "histogram": [[0.5] * 2] * 2}
    return record | more


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard would show of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_log_writes_lines_and_scalars(config, tmp_path, capsys):
    before = datetime.now(UTC).replace(microsecond=0)
    log = MetricsLog(config, 0, False, RANKS)
    records = [step_record(10, 3.0), step_record(20, 2.5, heldout_loss=2.75), {"step": 25, "heldout_loss": 2.5}]
    for record in records:
        log.write(record)
    log.write({"event": "checkpoint", "step": 25, "path": "x"})
    log.close()
    found = read_metrics(tmp_path)
    versions = found[0].pop("versions")
    assert versions["torch"] == torch.__version__ and versions["device"] == "cpu"
    assert {"python", "lrnn", "deepspeed", "transformers", "datasets", "source"} < set(versions)
    times = [datetime.fromisoformat(record.pop("time")) for record in found]
    assert before <= times[0] and times == sorted(times) and times[-1] <= datetime.now(UTC)
    assert found == [
        {"event": "start", "step": 0, "processes": 2, "resumed": False},
        *records,
        {"event": "checkpoint", "step": 25, "path": "x"},
    ]
    shown = scalars(tmp_path / "tensorboard")
    assert shown["loss"] == [(10, 3.0), (20, 2.5)] and shown["heldout_loss"] == [(20, 2.75), (25, 2.5)]
    assert [step for step, _ in shown["eigenvalues/negative_fraction/1"]] == [10, 20]
    assert shown["eigenvalues/negative_fraction/1"][0][1] == pytest.approx(0.99)
    assert not {"step", "mfu", "path"} & set(shown)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "held-out 2.7500" in lines[1]
    assert re.match(r"step 10/100  loss 3\.0000  lr 1\.00e-02  \|grad\| 1\.500  1,010 tokens/s/process", lines[0])


def test_a_number_that_is_not_finite_leaves_json_valid(config, tmp_path):
    log = MetricsLog(config, 0, False, RANKS)
    log.write(step_record(1, float("nan"), grad_norm=float("inf"), nested={"list": [1.0, float("-inf")]}))
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["nested"] == {"list": [1.0, None]}
    assert record["lr"] == 0.001


def test_a_resumed_run_appends(config, tmp_path):
    log = MetricsLog(config, 0, False, RANKS)
    for step in (10, 20, 30):
        log.write(step_record(step, 3.0))
    log.close()
    log = MetricsLog(config, 15, True, RANKS)
    log.write(step_record(20, 2.0))
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 10, 20, 30, 15, 20]
    # TensorBoard drops what the resumed run repeats.
    assert scalars(tmp_path / "tensorboard")["loss"] == [(10, 3.0), (20, 2.0)]


def test_a_line_cut_by_a_crash(config, tmp_path):
    log = MetricsLog(config, 0, False, RANKS)
    log.write(step_record(10, 3.0))
    log.write(step_record(20, 2.0))
    log.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 10]
    log = MetricsLog(config, 10, True, RANKS)  # the next line must not be lost with it
    log.close()
    assert [(r["step"], r.get("resumed")) for r in read_metrics(tmp_path)] == [(0, False), (10, None), (10, True)]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\0\n3\n[]\n\n{"step": 2}\n')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_no_metrics(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl; give the run_dir of a run"):
        read_metrics(tmp_path)


def test_wandb_that_is_not_installed(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = config.model_copy(update={"log": config.log.model_copy(update={"wandb_project": "p"})})
    with pytest.raises(UserError, match=r"log\.wandb_project is 'p'.*pip install 'lrnn\[wandb\]'"):
        MetricsLog(settings, 0, False, RANKS)


def test_wandb_gets_the_same_numbers(config, tmp_path, monkeypatch):
    started, logged, finished = [], [], []

    def init(**arguments):
        started.append(arguments)
        return SimpleNamespace(
            define_metric=lambda *names, **options: None, log=logged.append, finish=lambda: finished.append(1)
        )

    fake_wandb(monkeypatch, init)
    settings = config.model_copy(update={"log": config.log.model_copy(update={"wandb_project": "p"})})
    log = MetricsLog(settings, 0, False, RANKS, {"hidden_size": 8})
    log.write(step_record(10, 3.0))
    log.close()
    assert started[0]["project"] == "p" and started[0]["name"] == tmp_path.name and started[0]["resume"] == "allow"
    expected = settings.model_dump() | {"model": {"hidden_size": 8}, "processes": 2}
    assert started[0]["config"] == expected and expected["optim"]["lr"] == 1.0
    (numbers,) = logged
    assert (numbers["step"], numbers["loss"]) == (10, 3.0) and numbers["eigenvalues/negative_fraction/0"] == 0.01
    assert finished == [1]


def fake_wandb(monkeypatch, init) -> None:
    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, errors=errors))


def test_wandb_that_does_not_start_or_ends(config, monkeypatch, capsys):
    """A run does not start without it, but continues."""

    def fail(*arguments: object, **options: object) -> None:
        raise sys.modules["wandb"].errors.Error("api_key not configured\n(no-tty)")

    settings = config.model_copy(update={"log": config.log.model_copy(update={"wandb_project": "p"})})
    fake_wandb(monkeypatch, fail)
    with pytest.raises(
        UserError, match=r"'p' but wandb does not start: api_key not configured \(no-tty\); run `wandb l"
    ):
        MetricsLog(settings, 0, False, RANKS)
    fake_wandb(monkeypatch, lambda **options: SimpleNamespace(define_metric=lambda *a, **o: None, log=fail))
    log = MetricsLog(settings, 0, False, RANKS)
    for step in (10, 20):
        log.write(step_record(step, 3.0))
    log.close()
    assert capsys.readouterr().out.count("wandb does not take records any more") == 1
    assert [r["step"] for r in read_metrics(Path(config.run_dir)) if "loss" in r] == [10, 20]


def test_identity_at_wandb(tmp_path, monkeypatch):
    """It is kept by a run that resumes or moves, and no two folders share one, whatever their names."""
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (a, b):
        folder.mkdir(parents=True)
    first = identity_of(a, False)
    assert identity_of(a, True) == identity_of(a, False) == first != identity_of(b, False)
    shutil.copytree(a, tmp_path / "copy")
    assert (copied := identity_of(tmp_path / "copy", True)) not in (first, "copy")
    assert identity_of(tmp_path / "copy", True) == copied and identity_of(a, True) == first
    a.rename(tmp_path / "moved")
    assert identity_of(tmp_path / "moved", True) == first
    (old := tmp_path / "c" / "run").joinpath("wandb").mkdir(parents=True)
    assert identity_of(old, True) == "run"  # of lrnn 0.1.0
    assert identity_of(old, True) == "run"

    started = []
    fake_wandb(
        monkeypatch, lambda **options: started.append(options) or SimpleNamespace(define_metric=lambda *a, **o: 0)
    )
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start("p", b, False, {})
    assert started[0]["id"] == "mine"


def test_later_records_of_a_step_count():
    records = [
        {"event": "start", "step": 0, "resumed": False},
        {"event": "stage", "step": 0, "stage": 1, "name": "stage 1"},
        *({"step": s, "loss": 1.0} for s in (10, 20, 30)),
        {"event": "checkpoint", "step": 30, "path": "x"},
        {"event": "start", "step": 15, "resumed": True},
        {"step": 20, "loss": 2.0},
        {"event": "stage", "step": 20, "stage": 2, "name": "long"},
        {"event": "loss_spike", "step": 22, "loss": "9.0"},
        {"event": "rollback", "step": 22, "to": "x"},
        {"event": "skipped_step", "step": 24, "loss": "nan"},
        {"step": 25, "loss": 2.5},
    ]
    by_step, marked = split_records(records)
    assert marked == {"resumed": [15], "loss_spike": [22], "skipped_step": [24], "rollback": [22], "stage": [20]}
    assert {s: r["loss"] for s, r in by_step.items()} == {10: 1.0, 20: 2.0, 25: 2.5, 30: 1.0}
    assert list(by_step) == [10, 20, 25, 30]


# --- speed ------------------------------------------------------------------------------------------------------------


def test_speed(config, monkeypatch):
    """There are two steps of 2 s and 4 s, pauses of 1 s and 2 s between them, and a pause that does not count."""
    clock = [100.0]
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[0])
    speed = Speed(config, MODEL, RANKS)

    def step(before: float, inside: float) -> None:
        clock[0] += before
        with speed.step():
            clock[0] += inside

    clock[0] += 50  # warm-up pass
    speed.skip()
    step(1, 2)
    clock[0] += 70  # a checkpoint
    speed.skip()
    step(2, 4)
    record = speed.read(wait_s=1.0)
    assert (record["step_seconds"], record["loop_seconds"], record["data_wait_seconds"]) == (4.5, 1.5, 0.5)
    assert record["tokens_per_second_per_gpu"] == pytest.approx(12 * 50 / 2 / 4.5, abs=0.1)  # of two processes
    assert record["mfu"] is None  # no peak is known for a CPU
    step(0, 1)  # A new average begins.
    assert speed.read(0.0)["step_seconds"] == 1.0


def test_mfu(config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[0])
    speed = Speed(config, MODEL, RANKS)
    monkeypatch.setattr(speed, "_peak", 1e9)
    with speed.step():
        clock[0] += 0.1
    flops = train_flops_per_token(MODEL) * 12 * 50 / 2 / 0.1
    assert flops / 1e9 > 0.01  # not lost in the rounding
    assert speed.read(0.0)["mfu"] == pytest.approx(flops / 1e9, abs=1e-4)


def test_speed_over_a_boundary_of_stages(config, monkeypatch):
    """Each step counts with the tokens and FLOPs of its own stage."""
    clock = [0.0]
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[0])
    speed = Speed(config, MODEL, RANKS)
    monkeypatch.setattr(speed, "_peak", 1e7)
    longer = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 150})})
    wider = LrnnConfig(**{**MODEL.to_dict(), "intermediate_size": 64})
    for stage, model, seconds in ((config, MODEL, 1), (longer, wider, 2)):
        speed.enter(stage, model)
        with speed.step():
            clock[0] += seconds
    record = speed.read(0.0)
    assert record["tokens_per_second_per_gpu"] == pytest.approx(12 * (50 + 150) / 2 / 3, abs=0.1)
    flops = 12 * (50 * train_flops_per_token(MODEL) + 150 * train_flops_per_token(wider)) / 2 / 3
    assert record["mfu"] == pytest.approx(flops / 1e7, abs=1e-4) and flops / 1e7 > 0.1


def test_memory_is_that_of_this_process(config):
    speed = Speed(config, MODEL, RANKS)
    with speed.step():
        pass
    peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])  # noqa: SIM115
    assert speed.read(0.0)["memory_gb"] == pytest.approx(peak_kib * 1024 / 1e9, rel=0.05)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


def probed(allow_neg_eigval: bool, logits: dict[int, list[float]], tokens: int = 6):
    """Return the probe of a model with these logits of beta in each layer, head by head, at every token."""
    config = LrnnConfig(**{**MODEL.to_dict(), "allow_neg_eigval": allow_neg_eigval})
    model = LrnnForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            # The norm of a constant vector is a vector of ones, so a column of logit / width gives the logit.
            layer.attn_norm.register_forward_hook(lambda module, args, out: torch.ones_like(out))
            layer.attn.b_proj.weight.copy_(torch.tensor(logits[i])[:, None].expand(-1, config.hidden_size) / 8)
    probe = EigenvalueProbe(model)
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    assert probe.read() == {}
    model(ids)
    assert probe.read() == {}  # not armed, so nothing is noted
    probe.arm()
    model(ids)
    return probe, model, ids


def expected_histogram(eigenvalues: list[float]) -> list[float]:
    """Return the fractions of `EIGENVALUE_BINS` bins over [-1, 1], by arithmetic on each value."""
    counts = Counter(int((x + 1) / 2 * EIGENVALUE_BINS) for x in eigenvalues)
    return [counts[b] / len(eigenvalues) for b in range(EIGENVALUE_BINS)]


def test_eigenvalues_in_both_halves():
    # 1 - 2 sigmoid(x): -0.523, 0.117, 0.976, -0.995; and 0.245, 0.717, -0.04, -0.716.
    logits = {0: [1.16, -0.235, -4.4, 6.0], 1: [-0.5, -1.8, 0.08, 1.8]}
    eigenvalues = [[-float(np.tanh(x / 2)) for x in row] for row in logits.values()]
    found = probed(True, logits)[0].read()
    assert found["negative_fraction"] == {"0": 0.5, "1": 0.5}
    assert found["histogram"] == [expected_histogram(row) for row in eigenvalues]


def test_eigenvalues_above_zero_only():
    logits = {0: [1.16, -0.235, -4.4, 6.0], 1: [50.0, 50.0, 50.0, 50.0]}
    eigenvalues = [[float(1 / (1 + np.exp(x))) for x in row] for row in logits.values()]
    found = probed(False, logits)[0].read()
    assert found["negative_fraction"] == {"0": 0.0, "1": 0.0}
    assert found["histogram"] == [expected_histogram(row) for row in eigenvalues]


def test_the_ends_of_the_range_are_counted():
    found = probed(True, {0: [200.0, 200.0, 200.0, -200.0], 1: [-200.0] * 4})[0].read()
    assert found["negative_fraction"] == {"0": 0.75, "1": 0.0}
    assert found["histogram"][0][0] == 0.75 and found["histogram"][0][-1] == 0.25


def test_the_first_pass_after_arming_counts():
    probe, model, ids = probed(True, {0: [1.0] * 4, 1: [1.0] * 4})
    assert probe.read()["negative_fraction"] == {"0": 1.0, "1": 1.0}
    with torch.no_grad():
        model.model.layers[1].attn.b_proj.weight.neg_()
    model(ids)
    assert probe.read()["negative_fraction"] == {"0": 1.0, "1": 1.0}  # not armed again
    probe.arm()
    model(ids)
    assert probe.read()["negative_fraction"] == {"0": 1.0, "1": 0.0}


# --- pictures ---------------------------------------------------------------------------------------------------------


def write_run(folder, records) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


START = {"event": "start", "step": 0, "processes": 1, "resumed": False}


def test_plot_of_two_runs(tmp_path, capsys):
    resumed = {"event": "start", "step": 300, "processes": 1, "resumed": True}
    for run, base in (("a", 4.0), ("b", 3.0)):
        records = [step_record(s, base - s / 1000, heldout_loss=base) for s in range(100, 1000, 100)]
        write_run(tmp_path / run, [START, *records[:4], resumed, *records[3:]])
    out = tmp_path / "new" / "ranges.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    image = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert image.shape[0] > 500 and image.shape[1] > 1000
    panels = [image[: len(image) // 2], image[len(image) // 2 :]]
    for half in (
        p[:, side] for p in panels for side in (slice(0, len(image[0]) // 2), slice(len(image[0]) // 2, None))
    ):
        assert (half.sum(-1) < 740).mean() > 0.01  # every panel has something drawn
    blue, orange = ([31, 119, 180], [255, 127, 14])  # the first two colours of matplotlib's cycle
    for color in (blue, orange):
        assert (abs(image - np.array(color)).sum(-1) < 30).sum() > 200, "a run is missing"


def test_the_curves_and_marks(tmp_path, monkeypatch):
    """Check the values of the curves, and the marks where the run was resumed and where a step was skipped."""
    import matplotlib.figure

    figures = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    resumed = {"event": "start", "step": 25, "processes": 1, "resumed": True}
    records = [START, step_record(10, 4.0), step_record(20, 3.0, heldout_loss=3.5), resumed]
    records.append({"event": "skipped_step", "step": 28, "loss": "nan"})
    write_run(tmp_path, [*records, {"step": 30, "heldout_loss": 2.5}, step_record(40, 2.0, mfu=0.5)])
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "metrics.png").stat().st_size > 10_000
    loss, lr, speed = figures[0].axes[:3]
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines[f"{tmp_path} training"] == [[10, 4.0], [20, 3.0], [40, 2.0]]
    assert lines[f"{tmp_path} held-out"] == [[20, 3.5], [30, 2.5]]
    assert [point[0] for point in lines[f"{tmp_path} resumed"]] == [25, 25]
    assert [point[0] for point in lines[f"{tmp_path} skipped step"]] == [28, 28]
    assert lr.lines[0].get_xydata().tolist() == [[10, 0.01], [20, 0.02], [40, 0.04]]
    assert speed.lines[0].get_xydata().tolist() == [[10, 1010], [20, 1020], [40, 1040]]
    eigenvalues = figures[0].axes[3]
    assert np.allclose(eigenvalues.collections[0].get_array(), [[0.01, 0.02, 0.04], [0.99, 0.98, 0.96]])
    assert all(tick == int(tick) for tick in eigenvalues.get_yticks()), "there is no half layer"


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_run_of_one_step(tmp_path, ending):
    write_run(tmp_path, [START, step_record(1, 4.0)])
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / f"x.{ending}")]) == 0
    assert (tmp_path / f"x.{ending}").stat().st_size > 1000


def test_bad_input(tmp_path, capsys):
    def error(*arguments) -> str:
        assert main(["plot", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lrnn: error: ")
        return line

    write_run(tmp_path / "run", [START, step_record(1, 4.0)])
    write_run(tmp_path / "new", [START])
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no metrics.jsonl" in error(tmp_path / "run", tmp_path / "empty")
    assert f"{tmp_path / 'new'}/metrics.jsonl holds no step yet" in error(tmp_path / "new")
    message = error(tmp_path / "run", "--out", tmp_path / "x.xyz")
    assert "--out" in message and "x.xyz" in message and "png" in message
