"""Test exported folders in other versions of transformers, each in an environment of its own, without lrnn.

LRNN_TORTURE=1 takes every mixer through all versions (`make torture`); otherwise one model is used in the oldest, since
the installed version is one of the newest. The versions are fetched from the package registry once. Without it these
tests fail: nothing else covers other versions.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import torch
from export_checkpoints import OTHER_MIXERS, VARIANTS, random_model, write_checkpoint
from other_transformers import PEFT, VERSIONS, environment, fetched
from safetensors.torch import load_file

from lrnn import cli
from lrnn.eval.export import check as export_check
from lrnn.eval.export import write
from lrnn.eval.export.tokenizer import export_tokenizer
from lrnn.tokenizer import load_tokenizer
from lrnn.tokenizer_export import ODD_TEXTS

TORTURE = os.environ.get("LRNN_TORTURE") == "1"
DTYPES = dict.fromkeys([*VARIANTS, *OTHER_MIXERS] if TORTURE else ["gated-tied"], "float32")
DTYPES["gated-tied"] = "bfloat16"
PROMPTS = ["def f(x):\n    return", "import os"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, sentencepiece_model):
    """Return a folder of exports. They are read back by the tests, so that the exporter need not do it."""
    root = tmp_path_factory.mktemp("exports")
    torch.set_num_threads(1)
    for variant, dtype in DTYPES.items():
        write_checkpoint(root / "runs" / variant, random_model(variant), sentencepiece_model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lrnn.eval.export.write.check_hf_folder", lambda *arguments: 0.0)
            assert cli.main(["export", str(root / "runs" / variant), str(root / variant), "--dtype", dtype]) == 0
    return root


@pytest.fixture(scope="module")
def unigram(tmp_path_factory, exports):
    """Return a tokenizer that transformers reads with SentencePiece itself, and its folder, beside a config.json."""
    root = tmp_path_factory.mktemp("unigram")
    text = "".join((Path(sysconfig.get_paths()["stdlib"]) / name).read_text() for name in ("textwrap.py", "bisect.py"))
    with (root / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()), model_writer=file, vocab_size=300, minloglevel=2
        )
    tokenizer = load_tokenizer(root / "tokenizer.model")
    export_tokenizer(tokenizer, root / "folder")
    shutil.copyfile(exports / "gated-tied/config.json", root / "folder/config.json")
    return tokenizer, root / "folder"


@pytest.fixture(scope="module", params=VERSIONS if TORTURE else ["4.57.6"])
def used(request, exports, unigram, sentencepiece_model, tmp_path_factory):
    """Return what a process with one version found, by variant, its logits, what it was given, and the unigram ids."""
    work = tmp_path_factory.mktemp("work")
    tokenizer = load_tokenizer(sentencepiece_model)
    given = {
        "folders": {variant: str(exports / variant) for variant in DTYPES},
        "texts": ODD_TEXTS,
        "decoded": tokenizer.encode_batch(ODD_TEXTS),
        "batch": export_check.sample_batch(tokenizer)[:, :70].tolist(),
        "prompts": PROMPTS,
        "tokenizers": [str(unigram[1])],
    }
    (work / "input.json").write_text(json.dumps(given))
    env = environment(request.param) | {"HF_MODULES_CACHE": str(work / "modules")}
    script = Path(__file__).parents[2] / "support/use_exports.py"
    arguments = [work / "input.json", work / "output.safetensors", work]
    done = subprocess.run(
        [sys.executable, "-P", script, *arguments], cwd=work, env=env, capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = dict(zip(DTYPES, map(json.loads, lines), strict=True))
    assert {found["transformers"] for found in results.values()} == {request.param}
    (ids,) = [json.loads(line.removeprefix("TOKENIZER ")) for line in done.stdout.splitlines() if "TOKENIZER" in line]
    return results, load_file(work / "output.safetensors"), given, ids


@pytest.mark.parametrize("variant", DTYPES)
def test_logits_are_those_of_the_checkpoint(used, variant):
    results, logits, given, _ = used
    model = random_model(variant)
    write.round_weights(model, getattr(torch, DTYPES[variant]))
    with torch.no_grad():
        truth = model.float()(torch.tensor(given["batch"])).logits
    assert (logits[f"{variant} exported"] - truth).abs().max() < 1e-4
    assert torch.equal(logits[f"{variant} saved"], logits[f"{variant} exported"])
    found = results[variant]
    assert found["class"] == "transformers_modules" and found["base"] == "LrnnModel"
    assert found["tied"] == variant.endswith("-tied")
    for name, dtype in found["dtypes"].items():
        gate = name.endswith(("A_log", "dt_bias", "gate_bias"))
        assert dtype == f"torch.{'float32' if gate else DTYPES[variant]}", name


@pytest.mark.parametrize("variant", DTYPES)
def test_a_saved_model_has_the_code(used, exports, variant):
    code = {file.name: file.read_text() for file in (exports / variant).glob("*.py")}
    assert used[0][variant]["saved files"] == code


@pytest.mark.parametrize("variant", DTYPES)
def test_generation(used, variant):
    found = used[0][variant]
    assert len({token for row in found["generated"] for token in row}) > 4  # otherwise equality says little
    assert found["generated in a batch"] == found["generated"]
    assert found["pipeline"] == found["generated"]
    assert found["beams"][0] == 4


@pytest.mark.parametrize("variant", DTYPES)
def test_tokenizer(used, sentencepiece_model, variant):
    results, _, given, _ = used
    tokenizer = load_tokenizer(sentencepiece_model)
    assert results[variant]["ids"] == given["decoded"]
    assert results[variant]["decoded"] == [tokenizer.decode(ids) for ids in given["decoded"]]


def test_tokenizer_of_sentencepiece(used, unigram):
    assert used[3] == unigram[0].encode_batch(ODD_TEXTS)


@pytest.mark.skipif(not TORTURE, reason="long: LRNN_TORTURE=1 (make torture)")
@pytest.mark.parametrize("version", VERSIONS)
def test_fine_tuned_models_load(exports, version, tmp_path):
    env = environment(version, fetched(*PEFT)) | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [Path(__file__).parents[2] / "support/tune_exports.py", exports / "gated-tied", tmp_path]
    done = subprocess.run([sys.executable, "-P", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.rpartition("RESULT ")[2]) == dict.fromkeys(
        ("trained", "Trainer", "adapted", "PEFT"), True
    )
