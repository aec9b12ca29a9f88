"""Test that a task's requests are those of lm-eval, with each of its templates compiled once."""

from pathlib import Path
from types import MethodType

from jinja2 import Environment
from lm_eval import utils

from lrnn.eval.suites import build
from lrnn.eval.suites.harness import SEEDS
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.task_objects import load_tasks

DOCUMENTS, EXAMPLES = 20, 8
TEMPLATES = 2  # of a question and its answer


def requests(task):
    return [(instance.request_type, instance.args) for instance in task.instances]


def test_templates_are_compiled_once(few_documents, monkeypatch):
    monkeypatch.setattr(utils.env, "from_string", MethodType(Environment.from_string, utils.env))
    compiled, compile_template = [], utils.env.compile

    def counting(source, **options):
        compiled.append(source)
        return compile_template(source, **options)

    monkeypatch.setattr(utils.env, "compile", counting)

    def gsm8k():
        return load_tasks(["lrnn_gsm8k_cot"])

    plain = gsm8k().tasks["lrnn_gsm8k_cot"]
    plain.set_fewshot_seed(seed=SEEDS[3])
    plain.build_all_requests(limit=DOCUMENTS, rank=0, world_size=1)
    assert len(compiled) > DOCUMENTS * EXAMPLES

    loaded = gsm8k()
    compiled.clear()
    build.build(loaded, Request(model=Path("model"), tasks=("lrnn_gsm8k_cot",), limit=DOCUMENTS), None)
    (ours,) = loaded.tasks.values()
    assert requests(ours) == requests(plain) and len(requests(ours)) == DOCUMENTS
    assert len(compiled) == len(set(compiled)) == TEMPLATES
