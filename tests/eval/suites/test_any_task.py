"""Test `lrnn eval --tasks`: the numbers are lm-eval's own, results compare, and bad requests are one clear error."""

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from task_files import KINDS, write_task, write_tasks
from torch.utils import collect_env

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.suites import fetch_data, harness, task_objects
from lrnn.eval.suites.collect import collect
from lrnn.eval.suites.compare import compare
from lrnn.eval.suites.protocol import check_comparable
from lrnn.eval.suites.request import Request

OPTIONS = {"dtype": "float32", "softmax_dtype": "float32"}
SHOTS = 2


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Let tests run with and without the network, as the user has it."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave out what takes lm-eval seconds: it starts pip to describe the machine, and processes for a bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(lambda: ""))
        patch.setenv("DISABLE_MULTIPROC", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """Return a copy of the model, with a chat template, whose folder no other test writes results into."""
    copy = shutil.copytree(tiny_model, tmp_path_factory.mktemp("any") / "model", ignore=shutil.ignore_patterns("eval"))
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (copy / "chat_template.jinja").write_text(template)
    return copy


@pytest.fixture(scope="module")
def ours(folder, model):
    """Return results.json of `lrnn eval --tasks` with some options, and its folder."""

    def run(*options: str):
        arguments = [*map(str, options), "--include-path", str(folder), "--device", "cpu", "--bos", "never"]
        before = set((model / "eval").glob("*"))
        assert cli.main(["eval", str(model), "--tasks", *arguments]) == 0
        (out,) = set((model / "eval").glob("*")) - before
        return json.loads((out / "results.json").read_text()), out

    return run


def theirs(folder, model, names, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = {"pretrained": str(model), **OPTIONS}
    options = {"bootstrap_iters": 1000, "task_manager": manager, **options}
    return simple_evaluate(model="hf", model_args=arguments, tasks=names, batch_size=8, device="cpu", **options)


def assert_equal(results, raw, out):
    values = {(row["task"], f"{row['metric']},{row['filter']}"): row for row in results["metrics"]}
    expected = {
        (task, key): value
        for task, metrics in {**raw["results"], **raw.get("groups", {})}.items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }
    assert values.keys() == expected.keys()
    for (task, key), value in expected.items():
        row = values[task, key]
        assert row["value"] == pytest.approx(value, rel=1e-5), (task, key)
        stderr = {**raw["results"], **raw.get("groups", {})}[task][key.replace(",", "_stderr,")]
        if not row["metric"].endswith(("perplexity", "byte")):  # lrnn has bootstraps of its own for these
            assert row["stderr"] == pytest.approx(stderr)
        assert row["stderr"] is not None
        if task in raw["n-shot"]:
            assert row["shots"] == raw["n-shot"][task]
    for task, samples in raw["samples"].items():
        found = [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
        assert [s["prompt_hash"] for s in found] == [s["prompt_hash"] for s in samples], task
        assert [s["doc_hash"] for s in found] == [s["doc_hash"] for s in samples]


def test_every_output_type_and_a_group_give_lm_evals_numbers(ours, folder, model):
    results, out = ours("tiny_group,tiny_last", "tiny_rolling", "tiny_generation", "--num-fewshot", SHOTS)
    assert out.name == "tiny_group+tiny_last+tiny_rolling+tiny_generation-2-shot-bos-never"
    names = ["tiny_group", "tiny_last", "tiny_rolling", "tiny_generation"]
    assert_equal(results, theirs(folder, model, names, num_fewshot=SHOTS), out)
    (group,) = (row for row in results["metrics"] if row["task"] == "tiny_group")
    assert f"| tiny_group | acc | {group['value']:.4f} | {group['value']:.4f} | +0.0000 |" in compare(out, out)
    assert group["n"] == 20 and group["tasks"] == ["tiny_choice", "tiny_other"]
    assert results["protocol"] == {"num_fewshot": SHOTS} and results["settings"]["bos"] == "never"
    assert "| tiny_group | acc | higher is better |" in (out / "table.md").read_text()


def test_a_conversation_a_fraction_and_settings_of_generation(ours, folder, model):
    options = ["--apply-chat-template", "--system-instruction", "Be brief.", "--limit", "0.3", "--num-fewshot", "1"]
    results, out = ours("tiny_choice,tiny_generation", *options, "--gen-kwargs", "max_gen_toks=3", "--seed", "5")
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief."}
    options |= {"limit": 0.3, "num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 3}, "fewshot_random_seed": 5}
    raw = theirs(folder, model, ["tiny_choice", "tiny_generation"], **options)
    assert_equal(results, raw, out)
    assert {row["n"] for row in results["metrics"]} == {4} and results["limit"] == 0.3
    prompt = raw["samples"]["tiny_choice"][0]["arguments"][0][0]
    assert prompt.startswith("[system] Be brief.") and prompt.count("[assistant]") == 2
    assert "Only the first 0.3 of the documents of every task" in (out / "table.md").read_text()


def test_patterns_tags_and_files(folder, model, monkeypatch):
    monkeypatch.setattr(
        task_objects, "_index", lambda *_: TaskManager(include_path=str(folder), include_defaults=False)
    )

    def found(*names):
        return set(task_objects.load_tasks(names).tasks)

    assert found("tiny_tag") == {"tiny_choice", "tiny_last"}
    assert found("tiny_[rl]*", "tiny_last") == {"tiny_last", "tiny_rolling"}
    assert found(str(folder / "tiny_group.yaml")) == {"tiny_choice", "tiny_other"}
    assert found(str(folder / "tiny_[lr]*.yaml")) == {"tiny_last", "tiny_rolling"}
    loaded = task_objects.load_tasks([str(folder / "tiny_group.yaml")])
    assert list(loaded.groups) == ["tiny_group"]


def test_the_index_of_lm_eval_is_read_only_if_a_name_needs_it(folder):
    from lrnn.eval.suites.task_objects import _is_complete

    own = TaskManager(include_path=str(folder), include_defaults=False).task_index
    assert all(_is_complete(own, name) for name in (*KINDS, "tiny_group", "tiny_tag", str(folder / "tiny_group.yaml")))
    assert not any(_is_complete(own, name) for name in ("hellaswag", "tiny_*", {"task": "arc_easy"}))


@pytest.fixture
def error_of(capsys, model, monkeypatch, folder, tmp_path):
    """Return the line of an error for task files in a folder of their own, and fail if the model is loaded."""
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    own = shutil.copytree(folder, tmp_path / "own")
    for split in ("test", "train"):
        shutil.copy(folder / f"{split}.jsonl", own)

    def run(*arguments, like=None, **changes):
        if like is not None:
            write_task(own, arguments[0], like, **changes)
        task, *options = map(str, arguments)
        capsys.readouterr()
        assert cli.main(["eval", str(model), "--tasks", task, "--include-path", str(own), *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrnn: error")]
        return line

    run.folder = own
    return run


def test_tasks_that_cannot_be_loaded(error_of, monkeypatch):
    line = error_of("own_code", like="tiny_choice", unsafe_code=True)
    assert "own_code: runs code written by the model; add --allow-code-execution" in line
    assert "nothing is left to run" in error_of("own_code", "--skip-code-execution")
    (error_of.folder / "empty.yaml").write_text("group: own_empty\ntask: []\n")
    assert "the group 'own_empty' has no tasks" in error_of("own_empty")
    (error_of.folder / "own_functions.py").write_text("import a_package_that_is_not_there\ndef docs(d): return d\n")
    (error_of.folder / "own_import.yaml").write_text(
        "include: tiny_other.yaml\ntask: own_import\nprocess_docs: !function own_functions.docs\n"
    )
    line = error_of("own_import")
    assert "needs a package that is missing" in line and line.endswith("pip install a-package-that-is-not-there")
    sys.modules.pop("own_functions", None)
    assert "its data or its file has no 'nosuch'" in error_of("own_split", like="tiny_choice", test_split="nosuch")
    (error_of.folder / "own_slash.yaml").write_text("include: tiny_choice.yaml\ntask: own/slash\ntag: null\n")
    assert "'own/slash': a name with a slash" in error_of("own/slash")
    assert "an answer of document 0 is empty" in error_of("own_answer", like="tiny_last", doc_to_target="")
    (error_of.folder / "none.jsonl").touch()
    files = {"data_files": {"test": str(error_of.folder / "none.jsonl")}}
    changes = {"dataset_kwargs": files, "test_split": "test", "fewshot_split": None, "training_split": None}
    assert "the task 'own_none' has no documents" in error_of("own_none", like="tiny_choice", **changes)
    line = error_of("own_picture", like="tiny_choice", doc_to_image="q")
    assert "'own_picture' shows images" in line
    assert "Duplicate task 'tiny_choice'" in error_of("tiny_group,tiny_choice")
    assert "nowhere.yaml'; there is no such file" in error_of("nowhere.yaml")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    line = error_of("tiny_choice")
    assert "the data of the task 'tiny_choice' is not on this machine" in line
    assert "`lrnn eval --fetch tiny_choice`" in line


def test_unknown_tasks_name_the_nearest(error_of, monkeypatch):
    own = [str(task_objects.TASK_FOLDER), str(error_of.folder)]
    monkeypatch.setattr(task_objects, "_index", lambda *_: TaskManager(include_path=own, include_defaults=False))
    assert error_of("tiny_chioce").endswith("unknown task 'tiny_chioce'; did you mean tiny_choice?")
    assert error_of("zz*").endswith("unknown task 'zz*'; no task matches the pattern")
    assert "`lm_eval ls tasks` lists lm-eval's" in error_of("qqqqq")


def test_prompts_that_cannot_be_built_or_do_not_fit(error_of, model):
    assert "--num-fewshot 9: the task 'tiny_choice' has 7 examples" in error_of("tiny_choice", "--num-fewshot", 9)
    assert "--num-fewshot must be at least 0" in error_of("tiny_choice", "--num-fewshot", -1)
    line = error_of("own_long", like="tiny_choice", doc_to_text="{{q * 200}}")
    assert "own_long has prompts with answers of up to" in line and "--truncate to cut 39 requests" in line
    line = error_of("own_generation", like="tiny_generation", generation_kwargs={"max_gen_toks": 4000, "until": ["."]})
    assert "own_generation has prompts" in line and "--max-length 40" in line and "--truncate" not in line
    assert "own_generation generates up to 4001 tokens" in error_of("own_generation", "--truncate")
    assert "needs --apply-chat-template" in error_of("tiny_choice", "--fewshot-as-multiturn")
    assert "one template without a name" in error_of("tiny_choice", "--apply-chat-template", "tools")
    (model / "chat_template.jinja").rename(model / "elsewhere")
    try:
        assert "has no chat template" in error_of("tiny_choice", "--apply-chat-template")
    finally:
        (model / "elsewhere").rename(model / "chat_template.jinja")
    for option, value, text in (
        *(
            ("--limit", value, f"--limit must be at least 1, got {value}: a whole number of documents, or a fraction")
            for value in ("1.5", "nan", "inf")
        ),
        ("--include-path", "/nowhere", "--include-path /nowhere is not a folder"),
        ("--suite", "quick", "give --suite or --tasks, not both"),
    ):
        assert text in error_of("tiny_choice", option, value)


def test_data_of_tasks_is_fetched_by_loading_them(folder, capsys, monkeypatch):
    assert cli.main(["eval", "--include-path", str(folder), "--fetch", "tiny_group", "tiny_last"]) == 0
    assert "tiny_other: 7 documents" in capsys.readouterr().out
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert cli.main(["eval", "--fetch", "tiny_group"]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_results_of_different_protocols_do_not_compare(ours, capsys, model):
    _, plain = ours("tiny_choice", "--limit", "5")
    assert "| tiny_choice | acc |" in compare(plain, plain)
    results = json.loads((plain / "results.json").read_text())
    with_bos = shutil.copytree(plain, plain.parent / "with-bos")
    results["settings"] |= {"bos": "auto", "bos_ids": [0]}
    (with_bos / "results.json").write_text(json.dumps(results))
    assert cli.main(["eval", "--compare", str(plain), str(with_bos)]) == 2
    line = capsys.readouterr().err
    assert "do not compare" in line and "bos never (no ids)" in line and "bos auto (ids 0)" in line
    results["settings"] |= {"bos": "never", "bos_ids": []}
    results["protocol"] = {"num_fewshot": 3}
    (with_bos / "results.json").write_text(json.dumps(results))
    assert cli.main(["eval", "--compare", str(plain), str(with_bos)]) == 2
    assert "num_fewshot" in capsys.readouterr().err
    table = collect([plain, with_bos]).splitlines()[0]
    assert (
        "tiny_choice acc, bos never, first 5 |" in table
        and "tiny_choice acc, bos never, num_fewshot 3, first 5 |" in table
    )


def test_the_folder_may_follow_the_tasks(folder, monkeypatch, model):
    from lrnn.eval.suites import evaluate as module

    asked = []
    monkeypatch.setattr(module, "evaluate", lambda request: asked.append(request) or 1 / 0)
    for words in (["--tasks", "a,b", "c", str(model)], ["--tasks", "a", "b,c", "--fetch", str(model)]):
        monkeypatch.setattr(fetch_data, "fetch", lambda: None)
        with pytest.raises(ZeroDivisionError):
            cli.main(["eval", *words])
    assert [(request.tasks, request.model) for request in asked] == [(("a", "b", "c"), Path(model))] * 2


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"tasks": ("arc_*", "own/tasks/mine.yaml")}, "arc__+mine"),
        ({"tasks": ("latxa-7b-v1",)}, "latxa-7b-v1"),
        ({"tasks": ("latxa-7b-v1.1",)}, "latxa-7b-v1.1"),
        ({"tasks": ("mmlu",), "num_fewshot": 0, "apply_chat_template": True}, "mmlu-0-shot-chat"),
        ({"suite": "fast", "bos": "never", "limit": 0.1}, "fast-bos-never-first-0.1"),
    ],
)
def test_what_differs_has_a_folder_of_its_own(asked, name):
    assert Request(model=Path("m"), **asked).folder == Path("m/eval") / name


def test_other_settings_are_told_apart_by_a_checksum():
    def name(**asked):
        return Request(model=Path("m"), tasks=("gsm8k",), **asked).name

    kinds = [{}, {"gen_kwargs": {"temperature": 0.7}}, {"gen_kwargs": {"temperature": 0.8}}, {"seeds": (1, 1, 1, 1)}]
    kinds += [{"system_instruction": "Be brief."}, {"metadata": {"n": 1}}, {"apply_chat_template": True}]
    kinds += [{"apply_chat_template": "tools"}, {"apply_chat_template": True, "fewshot_as_multiturn": False}]
    names = [name(**kind) for kind in kinds]
    assert len(set(names)) == len(names) and names[0] == "gsm8k" and names[6:8] == ["gsm8k-chat", "gsm8k-chat-tools"]
    assert names[8] == "gsm8k-chat-one-turn"
    assert all(re.fullmatch(r"gsm8k-settings-[0-9a-f]{8}", n) for n in names[1:6])
    assert name(apply_chat_template=True, fewshot_as_multiturn=True) == "gsm8k-chat", "the default, spelled out"
    assert name(gen_kwargs={"a": 1, "b": 2}) == name(gen_kwargs={"b": 2, "a": 1})


def test_no_examples_are_another_protocol_than_those_of_the_task():
    asked, default = (Request(model=Path("m"), tasks=("gsm8k",), num_fewshot=n).protocol() for n in (0, None))
    assert asked == {"num_fewshot": 0} and default == {}
    results = [{"settings": {"bos": "never", "bos_ids": []}, "protocol": protocol} for protocol in (asked, default)]
    with pytest.raises(UserError, match="num_fewshot is 0 in the first, and the default in the second"):
        check_comparable(*results)


def test_a_long_name_is_cut_and_stays_different():
    long, other = (Request(model=Path("m"), tasks=(f"{'x' * 150}{end}",)).name for end in "ab")
    assert long[:100] == other[:100] == "x" * 100 and long != other and len(long) < 120
