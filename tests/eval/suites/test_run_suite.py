"""Test `lrnn eval` end to end on a tiny random model, and bad input."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hub_stand_ins import write_hub_copies

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval import result_folder
from lrnn.eval.suites import fetch_data, harness, hub_data, report
from lrnn.eval.suites.evaluate import choose_tasks
from lrnn.eval.suites.prompts import load_tokenizer
from lrnn.eval.suites.suites import SUITES

LIMIT = 3


@pytest.fixture(scope="module")
def quick(eval_data, tiny_model, heldout, tmp_path_factory):
    """Return the result folder of the suite `quick`, written by the command line."""
    out = tmp_path_factory.mktemp("results") / "quick"
    options = ["--suite", "quick", "--heldout", heldout, "--limit", LIMIT, "--device", "cpu", "--out", out]
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 0
    return out


@pytest.fixture(scope="module")
def log_likelihood(tiny_model):
    """Return log P(continuation | context) in nats, by transformers alone. No context means the BOS token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def compute(context: str | None, continuation: str) -> float:
        text = continuation if context is None else context + continuation
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = 0 if context is None else len(tokenizer(context, add_special_tokens=False)["input_ids"])
        if context is None:
            ids, start = [tokenizer.bos_token_id, *ids], 1
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        return sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))

    return compute


def metrics(folder):
    results = json.loads((folder / "results.json").read_text())
    return {row["task"]: row for row in results["metrics"]}


def test_bits_per_byte_agree_with_the_probabilities_of_the_model(quick, heldout, log_likelihood):
    # The newline that ends a prompt belongs to the answer: a tokenizer may merge it with what follows.
    rows = [(r["question"], r["continuation"]) for r in fetch_data.load_rows("humaneval_gold")[:LIMIT]]
    gold = [(question.rstrip(), question[len(question.rstrip()) :] + answer) for question, answer in rows]
    texts = [(None, json.loads(line)["text"]) for line in heldout.read_text().splitlines()]
    for task, pairs in (("lrnn_humaneval_bpb_0shot", gold), ("lrnn_heldout_bpb", texts)):
        nats = [log_likelihood(*pair) for pair in pairs]
        n_bytes = sum(len(answer.encode()) for _, answer in pairs)
        row = metrics(quick)[task]
        assert row["value"] == pytest.approx(-sum(nats) / n_bytes / math.log(2), rel=1e-5)
        assert row["n"] == len(pairs) and row["shots"] == 0 and row["stderr"] > 0


def test_result_folder(quick, tiny_model):
    results = json.loads((quick / "results.json").read_text())
    tasks = ["lrnn_heldout_bpb", "lrnn_humaneval_bpb_0shot", "lrnn_gsm8k_bpb_0shot"]
    assert [row["task"] for row in results["metrics"]] == tasks
    assert results["suite"] == "quick" and results["limit"] == LIMIT and results["schema_version"] == 1
    weights = subprocess.check_output(["sha256sum", tiny_model / "model.safetensors"], text=True).split()[0]
    assert results["model"]["weights_sha256"] == {"model.safetensors": weights}
    assert results["settings"]["dtype"] == "float32" and results["settings"]["max_length"] == 2048
    assert results["environment"]["lm-eval"] == "0.4.13"
    table = (quick / "table.md").read_text()
    for row in results["metrics"]:
        assert (
            f"| {row['task']} | bits_per_byte | lower is better | {row['value']:.4f} | {row['stderr']:.4f} |" in table
        )
    for task in tasks:
        samples = [json.loads(line) for line in (quick / f"samples_{task}.jsonl").read_text().splitlines()]
        assert len(samples) == LIMIT and all("resps" in sample and "arguments" in sample for sample in samples)
    raw = json.loads((quick / "lm_eval_results.json").read_text())
    assert set(raw["results"]) == set(raw["configs"]) == set(tasks)
    assert sorted(p.name for p in quick.parent.iterdir()) == ["quick"], "no temporary folder is left"


def test_code_and_maths_end_to_end(few_documents, tiny_model, tmp_path, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv(hub_data.FOLDER, str(write_hub_copies(tmp_path / "hub")))
    monkeypatch.setattr(HFLM, "_model_generate", generate_little(HFLM._model_generate))
    options = ["--suite", "code_math", "--limit", 1, "--device", "cpu", "--out", tmp_path / "out"]
    assert cli.main(["eval", str(tiny_model), *map(str, options), "--allow-code-execution"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    named = {(row["task"], row["metric"], row["filter"]): row["value"] for row in results["metrics"]}
    assert {task for task, _, _ in named} == set(SUITES["code_math"].tasks)
    for key in (("lrnn_humaneval", "pass@1", "create_test"), ("lrnn_mbpp", "pass_at_1", "none")):
        assert named[key] == 0.0
    assert ("lrnn_gsm8k_cot", "exact_match", "flexible-extract") in named
    assert ("lrnn_minerva_math", "math_verify", "none") in named
    # Prompts with examples exceed the context of 2,048 tokens, which are bytes or few of them here.
    long = {task for task in SUITES["code_math"].tasks if exceeds(tmp_path / f"out/samples_{task}.jsonl", tiny_model)}
    assert results["cut"] == dict.fromkeys(sorted(long, key=SUITES["code_math"].tasks.index), 1)
    assert {"lrnn_gsm8k_cot", "lrnn_gsm8k_bpb"} <= long and "lrnn_mathqa" not in long
    note = "Prompts are cut from the left, because they exceed the context of 2,048 tokens: 1 of "
    assert note in (tmp_path / "out/table.md").read_text() and note in capsys.readouterr().out.splitlines()[0]


def exceeds(samples, model):
    """Return whether the prompt of the only document, with its answer, has more than 2,048 tokens, without bos."""
    tokenizer = load_tokenizer(model)
    (sample, *_) = map(json.loads, samples.read_text().splitlines())
    (context, rest), *_ = sample["arguments"]
    if isinstance(rest, str):
        return len(tokenizer(context + rest).input_ids) - 1 > 2048
    return len(tokenizer(context).input_ids) + rest.get("max_gen_toks", 256) > 2048


def test_code_tasks_can_be_left_out():
    tasks, left_out = choose_tasks("code_math", heldout=False, allow_code=False, skip_code=True)
    assert left_out == ["lrnn_humaneval", "lrnn_mbpp"]
    assert tasks == [task for task in SUITES["code_math"].tasks if task not in left_out]
    results = {
        "suite": "s",
        "model": {"path": "p"},
        "limit": None,
        "left_out": left_out,
        "metrics": [],
        "by_length": [],
    }
    assert "Left out: lrnn_humaneval, lrnn_mbpp." in report.markdown_table(results)


def generate_little(original):
    """Cut generation to 8 tokens: a random model would continue for 1,024."""

    def generate(self, context, max_length, **kwargs):
        return original(self, context, max_length=context.shape[1] + 8, **kwargs)

    return generate


def error_of(capsys, *arguments):
    assert cli.main(["eval", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_requests_are_one_clear_error(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    unknown = error_of(capsys, tiny_model, "--suite", "qick")
    assert f"unknown suite 'qick'; did you mean quick? valid: {', '.join(SUITES)}" in unknown
    assert "--allow-code-execution" in error_of(capsys, tiny_model, "--suite", "code_math")
    assert f"{{{','.join(SUITES)}}}" in error_of(capsys, tiny_model)
    assert "or tasks" in error_of(capsys, tiny_model, "--tasks", ",")
    for size in ("auto:", "auto:0", "auto4", "x"):
        with pytest.raises(SystemExit):
            error_of(capsys, tiny_model, "--suite", "quick", "--batch-size", size)
        assert "argument --batch-size: " in capsys.readouterr().err
    assert "not found: /nowhere" in error_of(capsys, "/nowhere", "--suite", "quick")
    for missing in ("config.json", "tokenizer_config.json", "model.safetensors"):
        broken = tmp_path / f"without-{missing}"
        shutil.copytree(tiny_model, broken, ignore=lambda _, names, missing=missing: {missing, "eval"} & set(names))
        message = error_of(capsys, broken, "--suite", "quick")
        assert "is not an exported model" in message and "lrnn export" in message
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").touch()
    assert "not valid JSON" in error_of(capsys, broken, "--suite", "quick")
    assert "--limit must be at least 1, got 0" in error_of(capsys, tiny_model, "--suite", "quick", "--limit", 0)
    assert "held-out file not found" in error_of(capsys, tiny_model, "--suite", "quick", "--heldout", "/nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "holds other files" in error_of(capsys, tiny_model, "--suite", "quick", "--out", tmp_path / "full")
    monkeypatch.setenv("LRNN_EVAL_DATA", str(tmp_path / "nothing"))
    assert "lrnn eval --fetch" in error_of(capsys, tiny_model, "--suite", "quick")


def test_tasks_that_exceed_the_context_are_refused_before_the_model_loads(
    few_documents, tiny_model, capsys, monkeypatch
):
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    short = error_of(capsys, tiny_model, "--suite", "quick", "--max-length", 64)
    assert "lrnn_gsm8k_bpb_0shot has gold answers of up to" in short and "give --max-length 2048" in short
    options = ["--suite", "code_math", "--allow-code-execution", "--limit", 1, "--max-length", 1024]
    assert "lrnn_humaneval generates up to 1025 tokens" in error_of(capsys, tiny_model, *options)


def test_a_failed_write_leaves_the_earlier_results(quick, tmp_path, monkeypatch):
    out = tmp_path / "quick"
    shutil.copytree(quick, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    results = json.loads(before["results.json"])
    monkeypatch.setattr(report, "markdown_table", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(out, results, {"samples": {"a": [{}]}})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    report.write(out, results, {"samples": {"a": [{}]}})
    assert sorted(path.name for path in out.iterdir()) == [
        "lm_eval_results.json",
        "results.json",
        "samples_a.jsonl",
        "table.md",
    ]


def test_an_unexpected_folder_is_never_replaced(tmp_path):
    with pytest.raises(UserError, match="is a file"):
        result_folder.check_output(Path(__file__))
    result_folder.check_output(tmp_path / "new")
    result_folder.check_output(tmp_path)
