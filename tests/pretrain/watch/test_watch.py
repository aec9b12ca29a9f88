"""Test what a run does around an evaluation, with evaluators that find what the test says."""

import errno
import json
import random
import sys
from contextlib import closing, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.generation.decoding import GraphDecoding
from lrnn.eval.in_run.evaluator import InRun
from lrnn.eval.in_run.prompts import write_on
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics import speed as speed_module
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.metrics.speed import Speed
from lrnn.pretrain.watch.protocol import Found, Sample, Score, Wants
from lrnn.pretrain.watch.settings import SamplesConfig
from lrnn.pretrain.watch.undisturbed import undisturbed
from lrnn.pretrain.watch.watch import Watch, make_evaluator
from lrnn.records import DurableLines, read_metrics

SCORES = [Score("a", "acc", "none", 0.5, 0.1), Score("b", "exact_match", "strict-match", 0.25, None)]
SAMPLES = [Sample("def f", "(x):\n    return 1"), Sample("# ä", "b")]


class Alone(Ranks):
    """A process without a group."""

    def gather(self, value):
        return [value]


RANKS = Alone(0, 1, torch.device("cpu"), None)


@pytest.fixture
def config(tmp_path):
    raw = {
        "run_dir": str(tmp_path), "model": "x", "steps": 11, "global_batch_size": 1, "micro_batch_size": 1,
        "data": {"seq_len": 50, "corpora": [{"path": "x"}]}, "optim": {"lr": 1.0},
        "eval": {"every": 4, "tasks": ["a"]}, "samples": {"every": 5, "prompts": ["x"]},
        "log": {"tensorboard": False},
    }  # fmt: skip
    return parse_config(raw, "test")


class Evaluator:
    """Notes what is wanted, draws random numbers, and finds what is set."""

    def __init__(self):
        self.wanted, self.found = [], {}

    def evaluate(self, engine, wants, turn, stopped):
        self.wanted.append(tuple(wants))
        random.random(), np.random.rand(), torch.rand(1), torch.manual_seed(3)
        turn()
        return self.found.get(wants.step, Found(SCORES * wants.scores or None, SAMPLES * wants.samples or None))


@pytest.fixture
def parts(config):
    """Return an evaluator, a request to stop, the phases so far, and `watch(first_step)`."""
    evaluator, stop, phases = Evaluator(), SimpleNamespace(signal=None), []

    @contextmanager
    def phase(name, step):
        phases.append((name, step))
        yield

    log = MetricsLog(config, 0, False, RANKS)
    speed = SimpleNamespace(paused=lambda: phase("paused", 0))

    def watch(first_step=0):
        return Watch(config, RANKS, evaluator, first_step, log, speed, phase, stop)

    yield SimpleNamespace(evaluator=evaluator, stop=stop, phases=phases, watch=watch, log=log)
    log.close()


def look(watch, steps):
    for step in steps:
        watch.look(None, step)


def test_what_is_due(parts, tmp_path):
    look(parts.watch(), range(12))
    wanted = [(4, True, False), (5, False, True), (8, True, False), (10, False, True), (11, True, True)]
    assert parts.evaluator.wanted == wanted
    events = [r for r in read_metrics(tmp_path) if r["event"] == "eval"]
    assert [e["step"] for e in events] == [4, 8, 11]
    assert events[0]["scores"] == {"a": {"acc": 0.5}, "b": {"exact_match,strict-match": 0.25}}
    assert events[0]["stderr"] == {"a": {"acc": 0.1}}
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(r["step"], r["prompt"], r["text"]) for r in rows] == [(s, *x) for s in (5, 10, 11) for x in SAMPLES]


def test_the_watchdog_hears_of_every_round(parts):
    look(parts.watch(), [4])
    assert [name for name, _ in parts.phases] == ["paused", *["evaluating the model"] * 2, "writing metrics"]


def test_a_run_that_resumes_does_what_is_missing(parts):
    look(parts.watch(), [4])
    look(parts.watch(4), [4, 5])  # the scores of step 4 are recorded
    look(parts.watch(5), [5])  # so are the samples of step 5
    assert [step for step, *_ in parts.evaluator.wanted] == [4, 5]
    look(parts.watch(8), [8])  # a checkpoint was written, and the process died
    assert parts.evaluator.wanted[-1] == (8, True, False)


def test_steps_that_are_repeated_are_evaluated_again(parts):
    watch = parts.watch()
    look(watch, [4, 5, 8])
    watch.went_back(4)
    look(watch, [4, 5, 8])
    assert [step for step, *_ in parts.evaluator.wanted] == [4, 5, 8, 5, 8]


def test_a_signal_leaves_the_rest_to_the_run_that_resumes(parts, tmp_path, capsys):
    parts.evaluator.found[4] = Found(interrupted=True)
    watch = parts.watch()
    look(watch, [4])
    parts.stop.signal = "SIGTERM"
    look(watch, [5])
    assert [step for step, *_ in parts.evaluator.wanted] == [4]
    assert not [r for r in read_metrics(tmp_path) if r["event"] in ("eval", "samples", "eval_failed")]
    assert "a signal came during the evaluation" in capsys.readouterr().out


def test_a_failure_is_a_warning(parts, tmp_path, capsys):
    parts.evaluator.found[11] = Found(samples=SAMPLES, errors={"scores": "ValueError: no"})
    look(parts.watch(), [11])
    failed = next(r for r in read_metrics(tmp_path) if r["event"] == "eval_failed")
    assert (failed["step"], failed["what"], failed["error"]) == (11, "scores", "ValueError: no")
    assert (tmp_path / "samples.jsonl").exists()
    assert "warning: step 11: scores failed, training continues: ValueError: no" in capsys.readouterr().out


def test_memory_that_zero_3_lacks_is_a_failure_before_weights_are_gathered(config):
    """A rank that raised an error while others gather a weight would leave them waiting."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    evaluator = object.__new__(InRun)
    evaluator._ranks, evaluator._dtype, evaluator._prompts = RANKS, torch.float32, ["x"]
    evaluator._model_config = LrnnConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=16, intermediate_size=16
    )
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.ds_status, module.weight.ds_numel = ZeroParamStatus.NOT_AVAILABLE, 2**50
    module.weight.ds_tensor = SimpleNamespace(ds_numel=2**49, dtype=torch.float32)
    found = evaluator.evaluate(SimpleNamespace(module=module), Wants(4, True, False), lambda: None, lambda: False)
    assert list(found.errors) == ["scores"] and "allocate memory" in found.errors["scores"]


def test_samples_that_cannot_be_written_are_not_recorded(config, tmp_path, capsys, monkeypatch):
    write = DurableLines.write
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(lines, text):
        return full if lines.path.name == "samples.jsonl" else write(lines, text)

    monkeypatch.setattr(DurableLines, "write", fail)
    with closing(MetricsLog(config, 0, False, RANKS)) as log:
        log.write_samples(11, SAMPLES)
    assert "the samples of step 11 could not be written: " in capsys.readouterr().out
    assert not any(record.get("event") == "samples" for record in read_metrics(tmp_path))


def test_tensorboard_has_scores_and_samples(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.log.tensorboard = True
    with closing(MetricsLog(config, 0, False, RANKS)) as log:
        log.write_scores(11, SCORES, 1.0)
        log.write_samples(11, SAMPLES)
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0})
    board.Reload()
    assert [(s.step, s.value) for s in board.Scalars("eval/b/exact_match/strict-match")] == [(11, 0.25)]
    text = board.Tensors("samples/1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    def f(x):\n        return 1\n"


def test_wandb_has_scores_and_samples(config, monkeypatch):
    logged = []
    table = SimpleNamespace(Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", table)
    with closing(MetricsLog(config, 0, False, RANKS)) as log:
        log._wandb = SimpleNamespace(log=logged.append, finish=lambda: None)
        log.write_scores(11, SCORES, 1.0)
        log.write_samples(11, SAMPLES)
    assert logged == [
        {"step": 11, "eval/a/acc": 0.5, "eval/b/exact_match/strict-match": 0.25},
        {"step": 11, "samples": (["prompt", "text"], [list(sample) for sample in SAMPLES])},
    ]


def test_drawn_samples_follow_from_seed_step_and_prompt():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 8}
    model = LrnnForCausalLM(LrnnConfig(**sizes, intermediate_size=16)).eval()
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: ids.tolist())
    settings = SamplesConfig(every=1, prompts=["x"], temperature=1.0, max_new_tokens=16)

    def write(*seed):
        torch.rand(3)
        return write_on(model, GraphDecoding(model), tokenizer, [1, 2, 3], settings, seed)

    assert write(0, 5, 0) == write(0, 5, 0)
    assert len({tuple(write(*seed)) for seed in ((0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1))}) == 4


def test_random_numbers_go_on_as_if_nothing_had_been():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(1))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = [draw()]
    with pytest.raises(ValueError), undisturbed(torch.device("cpu")):
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        raise ValueError
    assert [*found, draw()] == expected


def test_time_and_memory_are_left_out(config, monkeypatch):
    now, peak, resets = [0.0], [5], []
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed_module, "peak_memory", lambda device: peak[0])
    monkeypatch.setattr(speed_module.torch.cuda, "reset_peak_memory_stats", lambda d: resets.append(peak.pop()))
    monkeypatch.setattr(speed_module, "train_flops_per_token", lambda model: 1)
    speed = Speed(config, None, RANKS)
    speed._device = torch.device("cuda")
    with speed.step():
        now[0] += 1
    with speed.paused():
        now[0] += 100
        peak.insert(0, 9_000_000_000)
    peak[:] = [7]
    with speed.step():
        now[0] += 1
    record = speed.read(0.0)
    assert record["step_seconds"] == 1 and record["memory_gb"] == 0 and resets


def test_a_program_without_an_evaluator(config):
    with pytest.raises(UserError, match="start the run with `lrnn pretrain`"):
        make_evaluator(None, config, None, None, RANKS)
    config.eval.every = config.samples.every = 0
    assert make_evaluator(None, config, None, None, RANKS) is None
