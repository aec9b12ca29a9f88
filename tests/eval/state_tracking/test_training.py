"""The step of `lrnn track`: the same numbers as of a loop that draws every batch by itself, from any state."""

import pytest
import torch

from lrnn import LrnnForCausalLM
from lrnn.eval.state_tracking import measure, training
from lrnn.eval.state_tracking.counter_rng import split_seed
from lrnn.eval.state_tracking.interleave import interleave
from lrnn.eval.state_tracking.training import Training, learning_rate
from lrnn.pretrain.engine import parameter_groups

CPU = torch.device("cpu")


def measured(cell):
    """Measure an untrained model; the result."""
    torch.manual_seed(0)
    model = LrnnForCausalLM(cell.model_config)
    cell.folder.mkdir(parents=True, exist_ok=True)
    ((_, result),) = interleave([cell], lambda c: measure.measure(c, model, CPU), 1, CPU)
    return result


def batch_of(cell, step):
    settings = cell.train
    indices = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    return cell.task.batch(split_seed(cell.seed, "train"), indices, settings.min_length, settings.max_length)


def plain_losses(cell) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of every step, by a loop as one would write it."""
    settings = cell.train
    torch.manual_seed(cell.seed)
    model = LrnnForCausalLM(cell.model_config).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr)
    found = []
    for step in range(settings.steps):
        batch = batch_of(cell, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(input_ids=batch.input_ids, shift_labels=batch.labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def losses(trained: Training, count: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(count):
        trained.run(1)
        found.append((trained.loss.item(), trained.grad_norm.item()))
    return found


@pytest.fixture
def three_at_once(monkeypatch):
    """Samples of three steps at a time: 20 steps end within a block."""
    monkeypatch.setattr(training, "SAMPLE_TOKENS", 3 * 8 * 10 + 7)


def test_steps_are_those_of_a_plain_loop(tiny_cells, three_at_once):
    cell, *_ = tiny_cells()
    trained = Training(cell, CPU)
    assert trained.steps_at_once == 3
    assert losses(trained, 20) == plain_losses(cell)
    assert trained.step == 20


@pytest.mark.parametrize("task", ["parity", "modular_arithmetic_brackets", "group_word"])
def test_a_step_gets_the_samples_of_its_number(tiny_cells, three_at_once, task):
    """Also where it resumes within a block, and the look ahead of it gets the same."""
    cell, *_ = tiny_cells(tasks={"t": {"task": task}})
    trained = Training(cell, CPU)
    seen = []
    trained.model.register_forward_pre_hook(
        lambda module, args, options: seen.append((options["input_ids"].clone(), options.get("shift_labels"))),
        with_kwargs=True,
    )
    trained.load(trained.state() | {"step": 4})
    for step in range(4, 11):
        assert 1 <= trained.steps_until_drawing() <= 3
        trained.look()
        trained.run(1)
        looked, used = seen[-2:]
        batch = batch_of(cell, step)
        assert torch.equal(looked[0], batch.input_ids) and torch.equal(used[0], batch.input_ids)
        assert torch.equal(used[1], batch.labels)


def test_going_on_from_a_state_is_bitwise(tiny_cells, three_at_once, tmp_path):
    """Also from that of a GPU, whose optimizer has other options and its learning rate in a tensor."""
    cell, *_ = tiny_cells()
    straight = Training(cell, CPU)
    expected = losses(straight, 20)
    first = Training(cell, CPU)
    losses(first, 7)
    state = first.state()
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(0.3), "capturable": True, "fused": True}
    torch.save(state, tmp_path / "state.pt")
    second = Training(cell, CPU)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert losses(second, 13) == expected[7:]
    for name, value in straight.state()["model"].items():
        assert torch.equal(value, second.state()["model"][name]), name


def test_a_look_changes_nothing(tiny_cells):
    cell, *_ = tiny_cells()
    trained = Training(cell, CPU)
    losses(trained, 2)
    before = {name: x.clone() for name, x in trained.state()["model"].items()}
    trained.look()
    assert trained.step == 2 and all(torch.equal(x, before[name]) for name, x in trained.state()["model"].items())
    assert losses(trained, 18) == plain_losses(cell)[2:]


@pytest.mark.parametrize("tasks", [{"p": {"task": "parity"}}, {"s3": {"task": "group_word", "group": "S3"}}])
def test_long_sequences_are_tested_fewer_at_a_time(tiny_cells, monkeypatch, tasks):
    cell, *_ = tiny_cells(tasks=tasks)
    expected, table = measured(cell), (cell.folder / "accuracy.csv").read_text()
    sizes = []
    original = type(cell.task).batch
    monkeypatch.setattr(
        type(cell.task),
        "batch",
        lambda self, seed, indices, *rest: sizes.append(len(indices)) or original(self, seed, indices, *rest),
    )
    monkeypatch.setattr(measure, "TEST_TOKENS", 30 * 5 + 29)
    result = measured(cell)
    assert sizes == [5] * 12 + [4]
    assert result == expected and (cell.folder / "accuracy.csv").read_text() == table
