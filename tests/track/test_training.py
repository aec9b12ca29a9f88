"""Test the step of `lrnn track`: from any state it gives the numbers of a plain loop that draws each batch."""

import errno
import os

import pytest
import torch

from lrnn import LrnnForCausalLM, records
from lrnn.errors import UserError
from lrnn.model.cache import LrnnCache
from lrnn.pretrain.optim import parameter_groups
from lrnn.records import read_metrics
from lrnn.track import cell as cell_module
from lrnn.track import measure, training
from lrnn.track.cell import train_cell
from lrnn.track.interleave import interleave
from lrnn.track.tasks.counter_rng import split_seed
from lrnn.track.training import Training, learning_rate, new_model

CPU = torch.device("cpu")


def measured(cell):
    """Measure an untrained model, and return the result."""
    torch.manual_seed(0)
    model = LrnnForCausalLM(cell.model_config)
    cell.folder.mkdir(parents=True, exist_ok=True)
    ((_, result),) = interleave([cell], lambda c: measure.measure(c, model, CPU), 1, CPU)
    return result


def batch_of(cell, step, task=None, settings=None, used=0):
    task, settings = task or cell.task, settings or cell.train
    indices = used + torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    return task.batch(split_seed(cell.seed, "train"), indices, settings.min_length, settings.max_length)


def plain_losses(cell, model=None, task=None, settings=None, used=0) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of every step, by a plain loop."""
    settings = settings or cell.train
    if model is None:
        model = new_model(cell, CPU)
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas))
    found = []
    for step in range(settings.steps):
        batch = batch_of(cell, step, task, settings, used)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(input_ids=batch.input_ids, shift_labels=batch.labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def finish(cell, say=lambda line: None):
    list(interleave([cell], lambda c: train_cell(c, CPU, 1, say), 1, CPU))


def losses(trained: Training, count: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(count):
        trained.run(1)
        found.append((trained.loss.item(), trained.grad_norm.item()))
    return found


@pytest.fixture
def three_at_once(monkeypatch):
    """Samples are drawn for three steps at a time, so 20 steps end within a block."""
    monkeypatch.setattr(training, "SAMPLE_TOKENS", 3 * 8 * 10 + 7)


def test_steps_are_those_of_a_plain_loop(tiny_cells, three_at_once):
    cell, *_ = tiny_cells()
    trained = Training(cell, CPU)
    assert trained.steps_at_once == 3
    assert losses(trained, 20) == plain_losses(cell)
    assert trained.step == 20


@pytest.mark.parametrize("task", ["parity", "modular_arithmetic_brackets", "group_word"])
def test_a_step_gets_the_samples_of_its_number(tiny_cells, three_at_once, task):
    """This holds even if it resumes within a block, and for the look before it."""
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


def test_resuming_from_a_state_is_bitwise(tiny_cells, three_at_once, tmp_path):
    """This holds even for a GPU's state, with other options and a learning rate in a tensor."""
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


CURRICULUM = {
    "tasks": {"s3": {"task": "group_word", "group": "S3"}},
    "train": {
        "min_length": 4, "max_length": 10, "steps": 5, "batch_size": 8, "lr": 1e-2, "betas": [0.8, 0.9],
        "curriculum": [
            {"steps": 4, "task": {"variant": "only_swaps"}, "min_length": 3, "max_length": 5, "batch_size": 6},
            {"steps": 3, "lr": 3e-3},
        ],
    },
}  # fmt: skip


def test_a_curriculum_comes_first(tiny_cells):
    """Each stage has the steps of a plain loop with its own task, lengths, batch size and learning rate."""
    cell, *_ = tiny_cells(**CURRICULUM)
    swaps, shorter = cell.curriculum[0]
    assert len(swaps.inputs) == 4 and len(cell.task.inputs) == 6
    assert (shorter.steps, shorter.min_length, shorter.max_length, shorter.batch_size, shorter.lr) == (4, 3, 5, 6, 1e-2)
    assert [(s.steps, s.max_length, s.batch_size, s.lr) for _, s in cell.stages[1:]] == [
        (3, 10, 8, 3e-3),
        (5, 10, 8, 1e-2),
    ]
    trained, plain = new_model(cell, CPU), new_model(cell, CPU)
    for stage, used in enumerate((0, 4 * 6, 4 * 6 + 3 * 8)):
        task, settings = cell.stages[stage]
        found = losses(Training(cell, CPU, stage, trained), settings.steps)
        assert found == plain_losses(cell, plain, task, settings, used)


@pytest.mark.parametrize("stop_at", [2, 4, 6, 8])
def test_a_stopped_curriculum_resumes_where_it_was(tiny_cells, monkeypatch, stop_at):
    """It may stop in any stage or between two stages."""
    train = CURRICULUM["train"] | {"log_every": 1, "checkpoint_seconds": 1e-9}
    settings = CURRICULUM | {"train": train, "seeds": [0]}
    whole, stopped = tiny_cells("whole", **settings)[0], tiny_cells("stopped", **settings)[0]
    finish(whole)
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == stop_at + 1:  # the state was saved after the previous line
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(stopped, say)
    assert f"step {stop_at}/12" in lines[-2]
    begun = []
    original = Training.load
    monkeypatch.setattr(Training, "load", lambda self, state: begun.append(state["stage"]) or original(self, state))
    finish(stopped)
    assert len(begun) == 1
    states = [torch.load(cell.folder / "state.pt", weights_only=True)["model"] for cell in (whole, stopped)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    records = [{r["step"]: r["loss"] for r in read_metrics(cell.folder)} for cell in (whole, stopped)]
    assert list(records[0]) == list(range(1, 13)) and records[0] == records[1]


def test_a_record_has_the_mean_loss_since_the_one_before(tiny_cells, monkeypatch):
    """The mean is that of a plain loop, also over a stop between records and with a file of an earlier version."""
    train = {"min_length": 3, "max_length": 10, "steps": 11, "batch_size": 8, "lr": 1e-2}
    settings = {"train": train | {"log_every": 4, "checkpoint_seconds": 1e-9}, "seeds": [0]}
    whole, stopped = tiny_cells("whole", **settings)[0], tiny_cells("stopped", **settings)[0]
    finish(whole)
    monkeypatch.setattr("lrnn.track.cell.BLOCK", 2)  # a state is saved every two steps
    save = cell_module._save
    for cell in (stopped, tiny_cells("old", **settings)[0]):

        def stop(cell, training):
            save(cell, training)
            if training.step == 6:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cell_module, "_save", stop)
            finish(cell)
        state = torch.load(cell.folder / "state.pt", weights_only=True)
        assert state["step"] == 6 and state["unrecorded"][1] == 2
        if cell is not stopped:
            torch.save({name: x for name, x in state.items() if name != "unrecorded"}, cell.folder / "state.pt")
        finish(cell)
    values = [loss for loss, _ in plain_losses(whole)]
    means = [(4, sum(values[:4]) / 4), (8, sum(values[4:8]) / 4), (11, sum(values[8:]) / 3)]
    records = read_metrics(whole.folder)
    assert [(r["step"], r["loss"]) for r in records] == [(step, pytest.approx(mean, rel=1e-12)) for step, mean in means]
    assert [r["loss_last"] for r in records] == [values[i] for i in (3, 7, 10)]
    assert [r["loss"] for r in read_metrics(stopped.folder)] == [r["loss"] for r in records]
    assert read_metrics(cell.folder)[1]["loss"] == pytest.approx(sum(values[6:8]) / 2, rel=1e-12)


def test_losses_that_are_not_finite_are_left_out_of_the_mean(tiny_cells):
    trained = Training(tiny_cells()[0], CPU)
    ((first, _),) = losses(trained, 1)
    for p in trained.model.parameters():
        p.data.fill_(float("nan"))
    trained.run(2)
    assert trained.take_losses().item() == first and trained.loss.isnan()
    trained.run(1)
    assert trained.take_losses().isnan()


def test_a_curriculum_keeps_to_the_ids_of_its_task(tiny_cells):
    train = CURRICULUM["train"] | {"curriculum": [{"steps": 1, "task": {"group": "S4"}}]}
    with pytest.raises(UserError, match=r"train.curriculum\[0\].task makes a task with 25 ids .* has 7"):
        tiny_cells(**CURRICULUM | {"train": train})


def test_looking_at_the_model_changes_nothing(tiny_cells):
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
    monkeypatch.setitem(measure.TEST_TOKENS, "cpu", 30 * 5 + 29)
    result = measured(cell)
    assert sizes == [5] * 12 + [4]
    assert result == expected and (cell.folder / "accuracy.csv").read_text() == table


PASSING = {
    "tasks": {"s3": {"task": "group_word", "group": "S3"}},
    "models": {
        "deltaproduct": {
            "mixer": "gated_deltaproduct", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16,
            "conv_size": 1, "intermediate_size": 64,
        }
    },
    "seeds": [0],
    # The model is sometimes right, then steps change nothing, so that states stay those of the present parameters.
    "train": {
        "min_length": 2, "max_length": 4, "steps": 16, "batch_size": 24, "lr": 1e-30, "weight_decay": 0.0,
        "min_lr": 0.0, "state_passing": 0.7, "curriculum": [{"steps": 80, "lr": 1e-2}],
    },
}  # fmt: skip


def product_of(word: list[int]) -> int:
    """Return the product of elements of S3, given by number, the first applied first."""
    elements = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    images = (0, 1, 2)
    for element in word:
        images = tuple(elements[element][i] for i in images)
    return elements.index(images)


def test_a_stage_may_do_without_state_passing(tiny_cells):
    train = PASSING["train"] | {"lr": 1e-2, "curriculum": [{"steps": 5, "state_passing": 0.0}]}
    cell, *_ = tiny_cells(**PASSING | {"train": train})
    assert losses(Training(cell, CPU, 0), 5) == plain_losses(cell, None, *cell.stages[0])
    assert [settings.state_passing for _, settings in cell.stages] == [0.0, 0.7]


def value_of(expressions: list[list[int]], symbols: str) -> int:
    """Return the sum modulo 5 of expressions that each end in `=`."""
    return sum(eval("".join(symbols[i] for i in ids[:-1])) for ids in expressions) % 5


@pytest.mark.parametrize(
    ("task", "mixer"),
    [("group_word", "gated_deltaproduct"), *(("parity", m) for m in ("gated_deltaproduct", "mamba", "mamba2", "gla"))],
)
def test_sequences_continue_where_the_previous_ones_ended(tiny_cells, monkeypatch, task, mixer):
    """The loss equals that of the row's last sequence in all that it has read since its last fresh start."""
    monkeypatch.setattr(training, "SAMPLE_TOKENS", 3 * 24 * 4)
    parameters = {"group": "S3"} if task == "group_word" else {}
    models = {"m": PASSING["models"]["deltaproduct"] | {"mixer": mixer}}
    cell, *_ = tiny_cells(**PASSING | {"tasks": {"t": {"task": task, **parameters}}, "models": models})
    model = new_model(cell, CPU)
    Training(cell, CPU, 0, model).run(80)
    trained = Training(cell, CPU, 1, model)
    read: list[list[int]] = [[] for _ in range(24)]  # since the row last began from a fresh state
    right, reached, by_chance = [False] * 24, 0, []
    for step in range(10):
        trained.run(1)
        chances = trained._continues[step % 3].tolist()
        by_chance += chances
        summed, labelled = 0.0, 0
        for row, ids in enumerate(batch_of(cell, step, used=80 * 24).input_ids.tolist()):
            word = [i for i in ids if i != cell.task.pad_id]
            read[row] = read[row] + word if chances[row] and right[row] else word
            if task == "parity":
                wanted = [1 + read[row].count(2) % 2]
            else:
                wanted = [product_of(read[row][: len(read[row]) - ahead]) for ahead in reversed(range(len(word)))]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([read[row]]), use_cache=False).logits[0, -len(wanted) :]
            summed += torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum").item()
            labelled += len(wanted)
            right[row] = logits.argmax(-1).tolist() == wanted
            reached = max(reached, len(read[row]) - len(word))
        assert trained.loss.item() == pytest.approx(summed / labelled, rel=1e-4), step
    assert reached >= 6 and 0.6 < sum(by_chance) / len(by_chance) < 0.8


@pytest.mark.parametrize(
    ("task", "symbols", "lengths"),
    [("modular_arithmetic", " +-* 01234", (3, 7)), ("modular_arithmetic_brackets", "01234+-*()", (5, 9))],
)
def test_expressions_continue_as_sums(tiny_cells, task, symbols, lengths):
    """An expression that continues is added to the previous ones; convolutions do not look back past its beginning."""
    fields = PASSING["models"]["deltaproduct"] | {"conv_size": 2}
    train = PASSING["train"] | {"min_length": lengths[0], "max_length": lengths[1], "state_passing": 0.9}
    changes = {"tasks": {"t": {"task": task}}, "models": {"m": fields}, "train": train}
    cell, *_ = tiny_cells(**PASSING | changes)
    model = new_model(cell, CPU)
    Training(cell, CPU, 0, model).run(80)
    trained = Training(cell, CPU, 1, model)
    read: list[list[list[int]]] = [[] for _ in range(24)]
    right, longest = [False] * 24, 0
    for step in range(10):
        trained.run(1)
        summed = 0.0
        for row, ids in enumerate(batch_of(cell, step, used=80 * 24).input_ids.tolist()):
            expression = [i for i in ids if i != cell.task.pad_id]
            continues = bool(trained._continues[step, row]) and right[row]
            read[row] = [*read[row], expression] if continues else [expression]
            cache = LrnnCache(len(model.model.layers))
            with torch.no_grad():
                for each in read[row]:
                    for layer in cache.layers:
                        layer.conv = None
                    logits = model(input_ids=torch.tensor([each]), past_key_values=cache, use_cache=True).logits[0, -1]
            wanted = value_of(read[row], symbols) + cell.task.first_answer_id
            summed += torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item()
            right[row], longest = int(logits.argmax()) == wanted, max(longest, len(read[row]))
        assert trained.loss.item() == pytest.approx(summed / 24, rel=1e-4), step
    assert longest >= 3


def test_resuming_from_a_state_with_its_sequences_is_bitwise(tiny_cells, tmp_path):
    cell, *_ = tiny_cells(**PASSING | {"train": PASSING["train"] | {"lr": 1e-2, "steps": 60}})
    straight = Training(cell, CPU)
    expected = losses(straight, 60)
    first = Training(cell, CPU)
    losses(first, 50)
    assert first._carried is not None and first._carried[0].any()  # there are some to continue from
    torch.save(first.state(), tmp_path / "state.pt")
    second = Training(cell, CPU)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert losses(second, 10) == expected[50:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"pairs": {"task": "even_pairs"}}},
            "is for parity, group_word, modular_arithmetic and modular_arithmetic_brackets",
        ),
        ({"models": {"m": PASSING["models"]["deltaproduct"] | {"mixer": "mlstm"}}}, "mamba, mamba2, not for mlstm"),
        (
            {
                "models": {
                    "m": PASSING["models"]["deltaproduct"] | {"mixer": ["gla", "attention"], "num_hidden_layers": 2}
                }
            },
            "mamba, mamba2, not for attention",
        ),
        ({"train": PASSING["train"] | {"state_passing": 1.0}}, "state_passing = 1.0"),
    ],
)
def test_sequences_that_cannot_continue(tiny_cells, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_cells(**PASSING | changes)


def test_a_damaged_state_is_named(tiny_cells):
    cell, *_ = tiny_cells()
    cell.folder.mkdir(parents=True)
    for content in (b"", b"PK\x03\x04 cut", b"\x80\x02cposix\nsystem\n."):
        (cell.folder / "state.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt is damaged \(.*\); remove it to train .*parity, .* again"):
            finish(cell)


def test_records_that_the_disk_refuses_are_said_and_come_later(tiny_cells, monkeypatch):
    (cell, *_), said, tries = tiny_cells(), [], iter([True, True, False])

    def full_at_first(*arguments, open=os.open):
        if arguments[0] == cell.folder / "metrics.jsonl" and next(tries, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(*arguments)

    monkeypatch.setattr(records.os, "open", full_at_first)
    finish(cell, said.append)
    assert sum("metrics.jsonl is not written: No space left on device" in line for line in said) == 2
    assert [record["step"] for record in read_metrics(cell.folder)] == [4, 8, 12, 16, 20]


def test_a_state_of_an_earlier_version_keeps_its_weight_decay(tiny_cells):
    """Its numbers of parameters count those with weight decay first, and these were told by shape."""
    model = {"mixer": "slstm", "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 16}
    cell, *_ = tiny_cells(models={"m": {**model, "intermediate_size": 16}})
    straight, first, second = (Training(cell, CPU) for _ in range(3))
    for earlier in (straight, first):
        earlier._optimizer = earlier._new_optimizer(decay_by_shape=True)
    expected = losses(straight, 6)
    losses(first, 3)
    second.load({name: value for name, value in first.state().items() if name != "decay_by_shape"})
    assert losses(second, 3) == expected[3:]
    assert second.state()["decay_by_shape"] is True and Training(cell, CPU).state()["decay_by_shape"] is False


def test_results_older_than_state_passing_stay_valid(tiny_cells):
    cell, *_ = tiny_cells()  # the fingerprints below are of a commit without state passing
    assert cell.fingerprint == "c87d446e2d6af29c3f600231801a797e95f32745fc167637734577b02520d811"
    before = tiny_cells(**CURRICULUM)[0].fingerprint
    assert before == "304df148dd1d9487a31c581dcc25b1e9217f13615725f528c152afc46bf17c1f"
    variants = [
        PASSING["train"] | {"state_passing": share, "curriculum": [{"steps": 60, "state_passing": ahead}]}
        for share, ahead in ((0.0, None), (0.7, None), (0.7, 0.0))
    ]
    assert len({tiny_cells(**PASSING | {"train": train})[0].fingerprint for train in variants}) == 3
