"""The HTML page of results: what it shows, that texts in it are only texts, and that a browser reads it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from lrnn.cli import main
from lrnn.eval.report_page import curves
from lrnn.eval.report_page.samples import LONGEST, PER_TASK, shorten
from lrnn.eval.suites.collect import read_collection

HOSTILE = "</pre><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> {{ 7 * 7 }}"
BROWSER = os.environ.get("LRNN_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")


def write_results(folder: Path, run: str, step: int, right: list[int]) -> None:
    """Write what `lrnn eval` writes: a task in which `right` are the scores, and a curve by length."""
    folder.mkdir(parents=True)
    value = sum(right) / len(right)
    metric = {"task": "lrnn_piqa", "metric": "acc", "filter": "none", "value": value, "stderr": 0.1, "n": len(right)}
    curve = [
        {"task": "s5", "kind": "mc", "unit": "swaps", "length": n, "accuracy": 1 / n, "floor": 0.2} for n in (4, 8)
    ]
    results = {
        "suite": "commonsense",
        "limit": None,
        "metrics": [metric | {"shots": 0, "higher_is_better": True}],
        "by_length": curve,
        "model": {
            "path": f"/runs/{run}/step-{step}",
            "training": {"step": step, "run_config_sha256": run},
            "weights_sha256": {"model.safetensors": f"{run}{step}"},
        },
        "settings": {"max_length": 2048, "dtype": "bfloat16", "bos": "never", "bos_ids": []},
        "environment": {"lm-eval": "0.4.13"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    samples = [
        {
            "doc_id": i,
            "doc_hash": str(i),
            "doc": {},
            "target": "1",
            "arguments": {"gen_args_0": {"arg_0": f"question {i} {HOSTILE}", "arg_1": " yes"}},
            "filtered_resps": [[-1.5, False]],
            "filter": "none",
            "acc": score,
        }
        for i, score in enumerate(right)
    ]
    (folder / "samples_lrnn_piqa.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("results")
    write_results(tmp_path / "a/10", "negative", 10, [0, 1] * 15)
    write_results(tmp_path / "a/20", "negative", 20, [1] * 30)
    write_results(tmp_path / "b/20", "positive", 20, [0, 0, 1] * 10)
    position = tmp_path / "position"
    position.mkdir()
    rows = [{"name": "negative", "from": 1 + 64 * i, "to": 64 * (i + 1), "ppl": 9.0 - i} for i in range(3)]
    (position / "results.json").write_text(json.dumps({"curves": [rows]}))
    return tmp_path


class Elements(HTMLParser):
    """Collect the tags, ids and texts of a page, and check that every element is closed."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write_page(results: Path, name: str) -> str:
    page = results / name
    assert main(["eval", "--collect", str(results), "--html", str(page), "--published", "2412.06464"]) == 0
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(results):
    return write_page(results, "page.html")


def test_what_the_page_shows(text):
    page = Elements(text)
    for words in (
        "0.5000 ± 0.1000",
        "1.0000 ± 0.1000",
        ">window 2048, dtype bfloat16, bos never, ids [], shots 0, harness lm-eval 0.4.13<",
        "Transformer++",
        "arXiv 2412.06464, table 3",
        "0.7225",
    ):
        assert words in text
    assert page.tags.count("li") == 2  # the protocol of our runs, and that of the published table
    assert page.tags.count("svg") == 3 and len(page.ids) == len(set(page.ids))
    assert page.tags.count("details") == 3 * (1 + PER_TASK)
    # 20 of positive's 30 documents are wrong that negative's has right at step 20, and 10 more than at step 10.
    assert "+0.5000 [" in text and "-0.1667 [" in text
    assert not re.search(r"(src|href)=\"(?!#)", text)  # nothing is loaded


def test_texts_of_models_stay_texts(text):
    assert "script" not in Elements(text).tags and "img" not in Elements(text).tags
    assert "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text


def test_the_same_results_give_the_same_page(text, results):
    assert write_page(results, "again.html") == text


def change(path: Path, **values) -> None:
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results | values))


def test_a_curve_is_of_one_model_under_one_protocol(tmp_path, monkeypatch):
    """Models in folders of one name, two filters of one metric, and a trial on a part of the documents."""
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}/hf/eval/commonsense"
        write_results(folder, "run", step, [0, 1])
        results = json.loads((folder / "results.json").read_text())
        (metric,) = results["metrics"]
        filters = [metric | {"metric": "match", "filter": name, "value": 0.01 * step} for name in ("strict", "loose")]
        change(folder / "results.json", metrics=filters, model=results["model"] | {"path": f"/runs/{step}/hf"})
        shutil.copytree(folder, folder.parent / "trial")
        change(folder.parent / "trial/results.json", limit=2)
    drawn, draw = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, *args, **style: drawn.append(x) or draw(self, x, *args, **style)
    )
    collection = read_collection([tmp_path])
    by_checkpoint, by_length = curves.by_checkpoint(collection), curves.by_length(collection)
    assert drawn == [(10, 20)] * 4 + [[4, 8]] * 4
    for name in ("strict", "loose"):
        assert f">match ({name}), bos never</text>" in by_checkpoint
        assert f">match ({name}), bos never, first 2</text>" in by_checkpoint
    assert ">bos never</text>" in by_length and ">bos never, first 2</text>" in by_length
    assert ">hf, step 10</text>" in by_length and ">hf, step 20</text>" in by_length


def test_long_texts_keep_both_ends():
    text = "a" * LONGEST + "b" * LONGEST
    short = shorten(text)
    assert short.startswith("aaa") and short.endswith("bbb") and f"[... {LONGEST:,} characters ...]" in short
    assert shorten("a" * LONGEST) == "a" * LONGEST


def test_results_without_samples_are_shown_unpaired(tmp_path):
    for name in ("a", "b"):
        write_results(tmp_path / name, name, 5, [0, 1])
    (tmp_path / "b/samples_lrnn_piqa.jsonl").unlink()
    page = write_page(tmp_path, "page.html")
    assert "b/samples_lrnn_piqa.jsonl is missing, so the documents of lrnn_piqa cannot be paired" in page


def test_wrong_requests(results, capsys):
    assert main(["eval", "--html", "x.html"]) == 2
    assert "--html shows results that are there: it needs --collect" in capsys.readouterr().err
    assert main(["eval", "--collect", str(results), "--html", str(results)]) == 2
    assert "must be a file in a folder that exists" in capsys.readouterr().err
    assert main(["eval", "--collect", str(results), "--published", "nobody"]) == 2
    assert "--published nobody: no published model or paper has this in its name" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: install chromium, or name one in LRNN_BROWSER")
def test_a_browser_reads_the_page(text, results):
    assert (results / "page.html").read_text(encoding="utf-8") == text
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (results / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>Results of step-10, negative/step-20, positive/step-20</title>" in done.stdout  # no script has run
    assert done.stdout.count("<details>") == 3 * (1 + PER_TASK) and done.stdout.count("<svg ") == 3
