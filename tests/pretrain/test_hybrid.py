"""Take two hybrids the whole way: train, stop, resume, export, use without lrnn, evaluate.

One has a form that fla has, the other that of transformers' class `olmo_hybrid`. `test_training.py` resumes a hybrid
after every step in every ZeRO stage, and `test_torture.py` after kills. With LRNN_TORTURE=1 fla reads the export too.
"""

import json
import math
import os
import sys
import sysconfig
from pathlib import Path

import clean_process
import pytest
import torch
from training_group import losses, run_group

from lrnn.cli import main
from lrnn.eval.export import check
from lrnn.eval.export.read import read_checkpoint
from lrnn.pretrain.launch import STOPPED

ATTENTION = {"mixer": "attention", "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
OF_OLMO = {"norm_position": "post", "qk_norm": "projection", "rope_theta": None}
FORMS = {
    "fla": {"mixer": ["gated_deltanet", ATTENTION]},
    "olmo_hybrid": {"mixer": ["gated_deltanet", ATTENTION | OF_OLMO], "gated_norm_eps": 1e-5, "head_v_dim": 24},
}
STAGES = {"fla": 3, "olmo_hybrid": 2}

# Uses the folders with transformers alone, in float32. Prints one JSON object per folder.
USE = """
import json, sys
sys.modules.update(dict.fromkeys(("lrnn", "fla", "causal_conv1d")))
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts = ["def f(x):\\n    return", "import os", "class Parser:\\n    def __init__(self, prog=None):\\n"]
free = dict(eos_token_id=-1, max_new_tokens=6, do_sample=False)
for folder in sys.argv[1:]:
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    batch = tok(prompts, return_tensors="pt", padding=True)
    ids = [tok(prompt, return_tensors="pt").input_ids for prompt in prompts]
    alone = [model.generate(x, **free)[0, x.shape[1]:].tolist() for x in ids]
    padded = model.generate(**batch, pad_token_id=tok.pad_token_id, **free)[:, batch.input_ids.shape[1]:].tolist()
    with torch.no_grad():
        logits = model(ids[2]).logits[0].tolist()
    print("RESULT", json.dumps({
        "class": type(model).__module__.split(".")[0] + " " + type(model).__name__, "alone": alone, "padded": padded,
        "ids": ids[2].tolist(), "logits": logits,
    }))
"""


@pytest.fixture
def runs(base, tmp_path, model_json):
    """Return the folders of runs of two steps, by form, each stopped after the first and resumed."""
    configs, specs = {}, []
    for form, fields in FORMS.items():
        path = tmp_path / f"{form}.json"
        path.write_text(json.dumps(json.loads(model_json.read_text()) | {"num_hidden_layers": 3} | fields))
        straight, configs[form] = (base(f"{form}-{i}", STAGES[form], model=str(path), steps=3) for i in range(2))
        specs += [{"config": straight}, {"config": configs[form], "stop_at": 2}, {"config": configs[form]}]
    assert run_group(tmp_path, specs) == [0, STOPPED, 0] * len(FORMS)
    for form, config in configs.items():
        assert losses(config) == losses({"run_dir": str(tmp_path / f"{form}-0")}) and len(losses(config)) == 3
    return {form: Path(config["run_dir"]) for form, config in configs.items()}


def check_evaluation(folder, trained, texts, tmp_path):
    """Bits per byte of the folder are those of the trained model's own probabilities."""
    documents, out = tmp_path / "short.jsonl", tmp_path / "evaluation" / folder.name
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRNN_EVAL_HELDOUT", str(documents))
        options = ["--tasks", "lrnn_heldout_bpb", "--device", "cpu", "--max-length", "512"]  # longer than the texts
        assert main(["eval", str(folder), *options, "--out", str(out)]) == 0
    bits = 0.0
    for ids in trained.tokenizer.encode_batch(texts):
        whole = torch.tensor([*trained.tokenizer.document_prefix, *ids])
        with torch.no_grad():
            log_probabilities = trained.model.eval()(whole[None]).logits[0, :-1].double().log_softmax(-1)
        bits -= log_probabilities.gather(1, whole[1:, None]).sum().item() / math.log(2)
    truth = bits / sum(len(text.encode()) for text in texts)
    (found,) = json.loads((out / "results.json").read_text())["metrics"]
    assert found["metric"] == "bits_per_byte" and found["value"] == pytest.approx(truth, rel=1e-4)


def test_the_whole_way(runs, tmp_path):
    exports = {"hf": "fla", "olmo_hybrid": "olmo_hybrid"} | (
        {"fla": "fla"} if os.environ.get("LRNN_TORTURE") == "1" else {}
    )
    for export_format, form in exports.items():
        out = tmp_path / "exports" / export_format
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(check.subprocess, "run", clean_process.run)
            assert main(["export", str(runs[form]), str(out), "--format", export_format]) == 0
    folders = {name: tmp_path / "exports" / name for name in ("hf", "olmo_hybrid")}
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / name).read_text()[:3000] for name in ("textwrap.py", "bisect.py")]

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = clean_process.run([sys.executable, "-I", "-c", USE, *folders.values()], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert [r["class"] for r in found] == ["transformers_modules LrnnForCausalLM", "transformers OlmoHybridForCausalLM"]
    for name, result in zip(folders, found, strict=True):
        assert result["padded"] == result["alone"], name
        trained = read_checkpoint(runs[exports[name]])
        with torch.no_grad():
            truth = trained.model.eval()(torch.tensor(result["ids"])).logits[0]
        assert (torch.tensor(result["logits"]) - truth).abs().max() < 1e-4 * truth.abs().max(), name
        check_evaluation(folders[name], trained, [text[:200] for text in texts], tmp_path)

    documents = tmp_path / "heldout.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--documents", str(documents), "--max-length", "256", "--piece", "100", "--device", "cpu"]
    assert main(["position", *map(str, folders.values()), "--out", str(tmp_path / "position"), *options]) == 0
    results = json.loads((tmp_path / "position/results.json").read_text())
    assert len(results["models"]) == 2 and results["data"]["taken"] == 2
