"""Test what is measured of a trained model: held-out loss, answers of traces, loss by position, against float64."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder_models import true_log_likelihoods, true_model, write_export, write_jsonl
from transformers import AutoTokenizer

from lrnn.errors import UserError
from lrnn.eval.position.evaluate import load_tokenizer
from lrnn.eval.statistics import aggregate, bootstrap_stderr
from lrnn.ladder.measure import measure as measuring
from lrnn.ladder.measure.heldout import mark_answers, read_documents, sum_losses
from lrnn.ladder.measure.measure import mixed
from lrnn.ladder.measure.settings import MeasureConfig
from lrnn.ladder.measures import MEASURES
from lrnn.settings import validate
from lrnn.traces.formats import FORMATS
from lrnn.traces.program import TRAINING, Rng
from lrnn.traces.training import answer_spans, training_document

WINDOW = 32  # the training length of the model
START = {"event": "start", "step": 0, "processes": 1, "resumed": False, "time": "2026-11-29T10:00:00+00:00"}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Held-out documents of two domains: shorter than a window, of several, and beyond 16."""
    folder = tmp_path_factory.mktemp("heldout")
    prose = ["naïve café\n", "", "a" * 7, "日本 and so on, " * 9, " x", "on and on " * 150, "so and so " * 180]
    write_jsonl(folder / "prose.jsonl", prose)
    write_jsonl(folder / "traces.jsonl", [training_document(number, 8) for number in range(6)])
    return folder


def new_run(folder: Path) -> Path:
    """Make a folder the folder of a run without steps."""
    (folder / "metrics.jsonl").write_text(json.dumps(START) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path)


@pytest.fixture(scope="module")
def measured(export, files, tmp_path_factory):
    """Figures, and values of documents, of everything that needs no question."""
    run = new_run(tmp_path_factory.mktemp("run"))
    position = {"domain": "prose", "documents": 2}
    return measuring.measure(run, export, settings(files, position=position), "cpu", print)


def settings(files: Path, **more) -> MeasureConfig:
    heldout = [
        {"name": "prose", "documents": str(files / "prose.jsonl"), "weight": 3.0},
        {"name": "traces", "documents": str(files / "traces.jsonl"), "weight": 1.0, "traces": True},
    ]
    return validate({"heldout": heldout, "batch_tokens": 200, **more}, "test", MeasureConfig)


def by_name(figures):
    return {(figure.measure, figure.of, figure.at): figure for figure in figures}


def true_losses(export: Path, file: Path) -> list[tuple[str, list[int], torch.Tensor]]:
    """Return text, ids and log-likelihoods of every document, window by window, without code of the ladder."""
    tokenizer, model, found = AutoTokenizer.from_pretrained(export), true_model(export), []
    for text in (json.loads(line)["text"] for line in file.read_text().splitlines()):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if text:
            windows = [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)]
            found.append((text, ids[1:], torch.cat([true_log_likelihoods(model, window) for window in windows])))
    return sorted(found, key=lambda of_text: hashlib.sha256(of_text[0].encode()).digest())


def test_heldout_loss_against_float64(export, files, measured):
    figures, documents = measured
    found, tokenizer = by_name(figures), AutoTokenizer.from_pretrained(export)
    sums = {}
    for name in ("prose", "traces"):
        truth = true_losses(export, files / f"{name}.jsonl")
        nats = np.array([loss.sum().item() for _, _, loss in truth])
        n_bytes = np.array([len(tokenizer.decode(ids).encode()) for _, ids, _ in truth])
        tokens = np.array([len(loss) for _, _, loss in truth])
        assert tokens.min() < WINDOW < 16 * WINDOW < tokens.max() or name == "traces"
        of_bytes, of_tokens = (documents[f"heldout_{unit}/{name}"] for unit in ("bits_per_byte", "nats_per_token"))
        np.testing.assert_allclose(of_bytes, np.stack([nats, n_bytes], 1), rtol=1e-5)
        np.testing.assert_allclose(of_tokens, np.stack([nats, tokens], 1), rtol=1e-5)
        bits = found["heldout_bits_per_byte", name, None]
        assert bits.value == pytest.approx(-nats.sum() / math.log(2) / n_bytes.sum(), rel=1e-5)
        assert bits.stderr == pytest.approx(bootstrap_stderr("bits_per_byte", of_bytes))
        sums[name] = -nats.sum() / tokens.sum()
    mix = found["heldout_nats_per_token", "mix", None]
    assert mix.value == pytest.approx(0.75 * sums["prose"] + 0.25 * sums["traces"], rel=1e-5) and mix.stderr > 0


def test_answers_of_traces_against_float64(export, files, measured):
    _, documents = measured
    tokenizer, answers, rest = AutoTokenizer.from_pretrained(export), [], []
    for text, ids, losses in true_losses(export, files / "traces.jsonl"):
        # Characters of the answers, by what `str.split` says of each program; those of a token, by decoding.
        in_answer, place = [], 0
        for program in text.removesuffix("\n").split("\n\n"):
            word = program.split()[-1]
            in_answer += [False] * (len(program) - len(word)) + [True] * len(word) + [False] * 2
        pieces = [tokenizer.decode([i]) for i in ids]
        marked = []
        for piece in pieces:
            marked.append(any(in_answer[place : place + len(piece)]))
            place += len(piece)
        mask = torch.tensor(marked)
        answers.append([losses[mask].sum().item(), mask.sum().item()])
        rest.append([losses[~mask].sum().item(), (~mask).sum().item()])
    np.testing.assert_allclose(documents["answer_nats_per_token/traces"], answers, rtol=1e-5)
    np.testing.assert_allclose(documents["rest_nats_per_token/traces"], rest, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_found_in_every_format(name):
    task, rng = FORMATS[name], Rng(f"test/{name}")
    text, spans = "", []
    for length in (4, 5, 9):
        program = task.draw_of_half(rng, length, length % len(task.choices), TRAINING)
        start = len(text) + len(program.text + task.delimiter)
        spans.append((start, start + len(task.choices[program.answer])))
        text += task.solved(program) + "\n\n"
    assert answer_spans(text[:-1]) == spans and answer_spans(text[:-2]) == spans
    # Tokens of one character, of two, and one that holds an answer with what is around it.
    for width in (1, 2):
        offsets = [(i, min(i + width, len(text) - 1)) for i in range(0, len(text) - 1, width)]
        marked = {i for i, group in enumerate(mark_answers(text[:-1], offsets)) if group}
        assert marked == {i // width for start, end in spans for i in range(start, end)}


def test_batches_change_nothing(export, files):
    subject = measuring.Subject(export, "cpu", asked=False)
    documents = read_documents(files / "prose.jsonl", subject.tokenizer, 10**6)
    read = []
    results = [sum_losses(subject.model, documents, WINDOW, n, read.append)[0] for n in (1, 130, 10**6)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-5)
    assert sum(read) == 3 * sum(len(document.groups) for document in documents)


def test_documents_are_sampled_until_they_have_enough_tokens(export, tmp_path):
    tokenizer, texts = load_tokenizer(export, {}), [f"text {number} " * (1 + number % 3) for number in range(30)]
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    file = write_jsonl(tmp_path / "texts.jsonl", [*texts, ""])

    def taken(limit):
        return [tokenizer.decode(document.ids[1:]) for document in read_documents(file, tokenizer, limit)]

    assert taken(10**6) == by_hash != texts
    for number in (2, 7):
        tokens = sum(map(len, tokenizer.encode_batch(by_hash[:number])))
        assert taken(tokens) == by_hash[:number] and taken(tokens + 1) == by_hash[: number + 1]
    with pytest.raises(UserError, match=r"texts\.jsonl holds 1 documents up to 2 tokens"):
        read_documents(file, tokenizer, 2)


def test_the_mix_is_the_weighted_mean_of_its_domains():
    rng = np.random.default_rng(0)
    pairs = {name: np.stack([-rng.random(n) * 9, rng.integers(1, 99, n)], 1) for name, n in (("a", 5), ("b", 40))}
    expected = 0.25 * aggregate("bits_per_byte", pairs["a"]) + 0.75 * aggregate("bits_per_byte", pairs["b"])
    assert aggregate("bits_per_byte", mixed(pairs, {"a": 1.0, "b": 3.0})) == pytest.approx(expected)


def test_loss_by_position_against_float64(export, files, measured):
    figures, documents = measured
    tokenizer, model = AutoTokenizer.from_pretrained(export), true_model(export)
    texts = [json.loads(line)["text"] for line in (files / "prose.jsonl").read_text().splitlines()][-2:]
    losses = [
        true_log_likelihoods(
            model, [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][: 16 * WINDOW + 1]
        )
        for text in texts
    ]
    places = [figure.at for figure in figures if figure.measure == "position_nats"]
    assert places[-1] == 16 * WINDOW and WINDOW in places
    assert all(len(loss) == 16 * WINDOW for loss in losses)
    for before, last in zip([0, *places], places, strict=False):
        expected = [[loss[before:last].sum().item(), last - before] for loss in losses]
        np.testing.assert_allclose(documents[f"position_nats/prose/{last}"], expected, rtol=1e-4)


def test_what_is_finished_is_not_repeated(export, files, run, monkeypatch):
    first, values = measuring.measure(run, export, settings(files), "cpu", print)
    computed = []
    monkeypatch.setattr(measuring, "_heldout", lambda *_: computed.append(1))
    again, same = measuring.measure(run, export, settings(files, batch_tokens=100), "cpu", print)
    assert again == first and values.keys() == same.keys() and not computed
    assert all((values[key] == same[key]).all() for key in values)
    other = settings(files, tokens=1000)
    with pytest.raises(AttributeError):  # the stand-in returns None, which is no part
        measuring.measure(run, export, other, "cpu", print)
    assert len(computed) == 1
    kept = next((run / "measures").glob("held-out-prose.npz"))
    kept.write_bytes(kept.read_bytes()[:100])  # a damaged file is as good as none
    with pytest.raises(AttributeError):
        measuring.measure(run, export, settings(files), "cpu", print)
    assert len(computed) == 2


def test_every_figure_is_the_aggregate_of_its_documents(measured):
    figures, documents = measured
    assert figures and {figure.documents for figure in figures} == documents.keys()
    for figure in figures:
        values = documents[figure.documents]
        assert values.dtype == np.float64 and figure.stderr is not None
        assert figure.value == aggregate(MEASURES[figure.measure].aggregate, values)


def test_losses_that_are_not_finite_are_refused(export, files, run, monkeypatch):
    monkeypatch.setattr(measuring, "sum_losses", lambda model, documents, *_: (
        np.full((len(documents), 2), np.nan), np.ones((len(documents), 2), np.int64)
    ))  # fmt: skip
    with pytest.raises(UserError, match=r"heldout_bits_per_byte/prose: the log-likelihoods of 6 of 6 documents"):
        measuring.measure(run, export, settings(files), "cpu", print)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"traces": {"formats": ["trace_s6"]}}, "unknown 'trace_s6'; did you mean trace_s5"),
        ({"heldout": [{"name": "a", "documents": "x"}, {"name": "a", "documents": "y"}]}, "a is given twice"),
        ({"position": {"domain": "cod"}, "heldout": [{"name": "code", "documents": "x"}]}, "did you mean code"),
        ({"heldout": [{"name": "a/b", "documents": "x"}]}, "should match pattern"),
    ],
)
def test_bad_settings(section, message):
    with pytest.raises(UserError, match=message):
        validate(section, "ladder.yaml", MeasureConfig)


def test_missing_data_is_refused_at_once(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"measure\.heldout: prose: there is no file .*gone/prose\.jsonl"):
        measuring.check_data(settings(files / "gone"))
    monkeypatch.setenv("LRNN_EVAL_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"evaluation data not found: .*gsm8k_gold\.jsonl; run `lrnn eval --fetch`"):
        measuring.check_data(settings(files, gold=["gsm8k"]))


def test_settings_that_change_no_result_are_not_decisive(files):
    first, second = settings(files), settings(files, batch_tokens=999)
    second.heldout[0].documents = "elsewhere.jsonl"
    assert first.decisive() == second.decisive() != settings(files, tokens=1000).decisive()
