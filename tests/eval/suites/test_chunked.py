"""Requests in chunks: answers are at their requests, equal on any number of devices, and kept when a run stops."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.suites import harness
from lrnn.eval.suites.kept_answers import KeptAnswers


class Lengths:
    """A model whose answer to a text is its length, and which notes the chunks that it was given."""

    def __init__(self, batch_size=2, fails_at=None):
        self.batch_size_per_gpu, self.chunks, self._fails_at = batch_size, [], fails_at

    def loglikelihood(self, requests, disable_tqdm):
        if len(self.chunks) == self._fails_at:
            raise KeyboardInterrupt
        self.chunks.append([request.args[0] for request in requests])
        return [[-float(len(text)), True] for text in self.chunks[-1]]

    loglikelihood_rolling = generate_until = loglikelihood


def requests(count: int, *rest):
    return [SimpleNamespace(args=("x" * (7 * i % count), *rest)) for i in range(count)]


def answer(model, tmp_path, wanted, kind="loglikelihood", helpers=(), about="a"):
    from lrnn.eval.suites.chunked import ChunkedModel

    kept = KeptAnswers(tmp_path / "out", {"about": about})
    try:
        return getattr(ChunkedModel(model, list(helpers), kept), kind)(wanted, disable_tqdm=True)
    finally:
        kept.close()


@pytest.mark.parametrize(
    ("kind", "rest", "sizes"),
    [("loglikelihood", (" y",), [64, 64, 22]), ("loglikelihood_rolling", (), [2] * 75)],
)
def test_answers_are_at_their_requests(tmp_path, kind, rest, sizes):
    model, wanted = Lengths(), requests(150, *rest)
    assert answer(model, tmp_path, wanted, kind) == [[-float(len(r.args[0])), True] for r in wanted]
    assert [len(chunk) for chunk in model.chunks] == sizes
    lengths = [len(text) for chunk in model.chunks for text in chunk]
    assert lengths == sorted(lengths, reverse=True)


def test_generations_of_other_settings_are_in_other_chunks(tmp_path):
    model = Lengths()
    wanted = [r for until in ("\n", "```") for r in requests(70, {"until": [until]})]
    assert answer(model, tmp_path, wanted, "generate_until") == [[-float(len(r.args[0])), True] for r in wanted]
    assert [len(chunk) for chunk in model.chunks] == [64, 6, 64, 6]


def test_a_stopped_evaluation_continues_with_the_chunk_it_was_at(tmp_path):
    wanted = requests(200, " y")
    with pytest.raises(KeyboardInterrupt):
        answer(Lengths(fails_at=2), tmp_path, wanted)
    path = tmp_path / ".out.answers.jsonl"
    with path.open("a") as file:
        file.write('{"key": "cut o')  # the line that was being written
    rest = Lengths()
    assert answer(rest, tmp_path, wanted) == [[-float(len(r.args[0])), True] for r in wanted]
    whole = Lengths()
    answer(whole, tmp_path / "other", wanted)
    assert rest.chunks == whole.chunks[2:]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    again = Lengths()
    assert answer(again, tmp_path, wanted) == [[-float(len(r.args[0])), True] for r in wanted] and not again.chunks


def test_answers_behind_a_damaged_line_are_computed_again(tmp_path):
    """A disk that lost power may leave zeros."""
    wanted = requests(200, " y")
    answer(Lengths(), tmp_path, wanted)
    path = tmp_path / ".out.answers.jsonl"
    about, first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(about + first + b"\0" * len(second) + b"".join(rest))
    again = Lengths()
    assert answer(again, tmp_path, wanted) == [[-float(len(r.args[0])), True] for r in wanted]
    assert [len(chunk) for chunk in again.chunks] == [64, 64, 8]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 1 + 4


def test_answers_of_another_model_are_dropped(tmp_path, capsys):
    answer(Lengths(), tmp_path, requests(100, " y"))
    model = Lengths()
    answer(model, tmp_path, requests(100, " y"), about="b")
    assert (
        len(model.chunks) == 2
        and "are dropped: the model, the settings or a version has changed" in capsys.readouterr().out
    )


def test_an_evaluation_without_answers_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        answer(Lengths(fails_at=0), tmp_path, requests(5, " y"))
    assert not list(tmp_path.iterdir())


class Thread:
    """A helper in a thread."""

    def __init__(self):
        self.model, self._pool = Lengths(), ThreadPoolExecutor(1)

    def submit(self, kind, texts):
        from lrnn.eval.suites.chunked import answer

        return self._pool.submit(answer, self.model, kind, texts)

    def result(self, future):
        return future.result()


def test_helpers_share_the_chunks(tmp_path):
    helpers, own, wanted = [Thread(), Thread()], Lengths(), requests(600, " y")
    assert answer(own, tmp_path, wanted, helpers=helpers) == [[-float(len(r.args[0])), True] for r in wanted]
    models = [own, *(helper.model for helper in helpers)]
    assert all(model.chunks for model in models) and sum(len(model.chunks) for model in models) == 10


def test_a_single_chunk_does_not_wait_for_a_helper_to_start(tmp_path):
    helper, own, wanted = Thread(), Lengths(), requests(5, " y")
    answer(own, tmp_path, wanted, helpers=[helper])
    assert len(own.chunks) == 1 and not helper.model.chunks


def test_a_helper_says_why_it_cannot_answer(tmp_path, tiny_model, monkeypatch):
    from lrnn.eval.suites import chunked

    monkeypatch.setattr(chunked, "_model", None)
    chunked._prepare(tmp_path / "nowhere", {"device": "cpu"}, processes=64)
    with pytest.raises(UserError, match=r"model folder not found: .*nowhere"):
        chunked._answer_here("loglikelihood", [("a", "b")])
    chunked._prepare(tiny_model, {"device": "cpu"}, processes=64)
    (first,), (again,) = (chunked._answer_here("loglikelihood", [("def f", "(x)")]) for _ in range(2))
    assert first == again and first[0] < 0


def test_two_processes_give_the_results_of_one(tiny_model, heldout, few_documents, tmp_path):
    """The numbers are equal bit by bit."""
    found = {}
    for processes in (1, 2):
        model = shutil.copytree(tiny_model, tmp_path / f"{processes}/model")
        options = ["--suite", "quick", "--heldout", str(heldout), "--limit", "6", "--batch-size", "2"]
        options += ["--num-processes", str(processes)]
        assert cli.main(["eval", str(model), *options, "--device", "cpu"]) == 0
        results = json.loads((model / "eval/quick-first-6/results.json").read_text())
        found[processes] = results["metrics"]
        assert sorted(path.name for path in (model / "eval").iterdir()) == ["quick-first-6"]
    assert found[1] == found[2]


def test_devices_that_are_not_there():
    assert harness.choose_devices("cpu", None) == ["cpu"] and harness.choose_devices("cpu", 2) == ["cpu", "cpu"]
    with pytest.raises(UserError, match="--device cuda:1 is one device; leave it out to use --num-processes 2"):
        harness.choose_devices("cuda:1", 2)
    with pytest.raises(UserError, match="--num-processes 2 needs as many GPUs, and 0 are visible"):
        harness.choose_devices("cuda", 2)
