"""Functions that the task files of this folder name with `!function`: data, prompts, scoring.

lm-eval finds this file beside the task files, so the tasks work with `lrnn eval` and with plain
`lm_eval --include_path`, from any current directory.
"""

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

from lrnn.errors import UserError
from lrnn.eval.documents import read_texts
from lrnn.eval.suites import sandbox
from lrnn.eval.suites.fetch_data import load_rows

Doc = dict[str, Any]


def fetched(file: str, **_: Any) -> dict[str, Dataset]:
    """Return the data set of a fetched file. lm-eval passes a task's `dataset_kwargs` and `metadata` as keywords."""
    return {"test": Dataset.from_list(load_rows(file))}


def heldout(**_: Any) -> dict[str, Dataset]:
    """Return the data set of the jsonl file `$LRNN_EVAL_HELDOUT`, rows {"text": str, ...}, without empty texts."""
    name = os.environ.get("LRNN_EVAL_HELDOUT")
    if not name:
        raise UserError("the task lrnn_heldout_bpb needs a file: `lrnn eval DIR --heldout FILE`, or $LRNN_EVAL_HELDOUT")
    return {"test": Dataset.from_list(read_heldout(Path(name)))}


def read_heldout(path: Path) -> list[Doc]:
    """Return documents {"text": str} of a jsonl file. Raise UserError for a missing file, a bad row or no text."""
    if not path.is_file():
        raise UserError(f"held-out file not found: {path}")
    docs = [{"text": text} for _, text in read_texts(path) if text]
    if not docs:
        raise UserError(f"{path} holds no text")
    return docs


# These are callables, not templates: lm-eval turns a rendered template such as "[1, 2]" into a list.
def few_shot_context(doc: Doc) -> str:
    return doc["context"]


def zero_shot_context(doc: Doc) -> str:
    return doc["question"]


def continuation(doc: Doc) -> str:
    return doc["continuation"]


def text(doc: Doc) -> str:
    return doc["text"]


def gold_bits_per_byte(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Return (log-likelihood in nats, bytes of UTF-8) of the gold answer; lm-eval sums both over documents.

    lm-eval scores the white space at the end of a prompt together with the answer, so its bytes count too.
    """
    ((loglikelihood, _),) = results
    blank = doc["context"][len(doc["context"].rstrip()) :]
    return {"bits_per_byte": (loglikelihood, len((blank + doc["continuation"]).encode("utf-8")))}


def humaneval_programs(resps: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    return [[doc["prompt"] + response for response in responses] for responses, doc in zip(resps, docs, strict=True)]


def humaneval_pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    return {f"pass@{one}": sandbox.pass_at_k(references, predictions, one) for one in k}


def pass_at_1(references: list[str], predictions: list[str]) -> float:
    return sandbox.pass_at_k(references, [[program] for program in predictions], 1)


def mbpp_fewshot_samples() -> list[Doc]:
    """Return lm-eval's own three examples, read from its source because importing that file accesses the hub."""
    tree = ast.parse(_lm_eval_file("mbpp/utils.py").read_text(encoding="utf-8"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "list_fewshot_samples")
    (statement,) = function.body
    assert isinstance(statement, ast.Return) and statement.value is not None
    return ast.literal_eval(statement.value)


def gsm8k_cot_fewshot_samples() -> list[Doc]:
    """Return lm-eval's own eight examples, read from its task file."""
    import yaml

    config = yaml.safe_load(_lm_eval_file("gsm8k/gsm8k-cot.yaml").read_text(encoding="utf-8"))
    return config["fewshot_config"]["samples"]


def _lm_eval_file(path: str) -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks" / path
