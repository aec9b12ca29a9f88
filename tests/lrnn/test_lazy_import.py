"""Test that transformers knows the model, although `import lrnn` imports neither."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from own_process import run

from lrnn import LrnnConfig, LrnnForCausalLM

REPOSITORY = Path(__file__).parents[2]
TORTURE = os.environ.get("LRNN_TORTURE") == "1"
SELECT = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM"
ORDERS = {
    "lrnn": f"import lrnn; {SELECT}",
    "Auto classes": f"{SELECT}; import lrnn",
    "a class of lrnn": f"from lrnn import LrnnForCausalLM; {SELECT}",
    "a module of the model": f"import lrnn.model.layers; {SELECT}",
    "a configuration": f"import lrnn; lrnn.LrnnConfig(); {SELECT}",
}
if TORTURE:  # modules are complete in the same order as with "lrnn" and "a class of lrnn"
    ORDERS |= {
        "transformers": f"import transformers, lrnn; {SELECT}",
        "the module of the classes": f"import lrnn.model.modeling_lrnn; {SELECT}",
    }
LOAD = "loaded = [x.from_pretrained(FOLDER) for x in (AutoConfig, AutoModel, AutoModelForCausalLM)]"
# What each process executes first, and what each of its forks then executes, by the name of the case.
CASES = {imports: {f"{name} first": LOAD} for name, imports in ORDERS.items()}
TRUSTED = "loaded = [AutoModel.from_pretrained(FOLDER, trust_remote_code=True)]"
CASES[ORDERS["lrnn"]]["trusted, lrnn first"] = TRUSTED
CASES[ORDERS["Auto classes"]]["trusted, lrnn last"] = TRUSTED
# `AutoConfig` is in its own module, which other code imports without that of the models.
CASES["import lrnn; from transformers import AutoConfig"] = {
    "AutoConfig alone": "loaded = [AutoConfig.from_pretrained(FOLDER)]"
}
# Modules that import the Auto classes themselves, at a moment when the model cannot be imported yet.
NEEDED = ("transformers.modeling_layers", "transformers.generation.utils", "transformers.modeling_utils")
CASES |= {
    f"import lrnn, {module}": {
        f"{module} after lrnn": "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING\n"
        "found = MODEL_FOR_CAUSAL_LM_MAPPING[lrnn.LrnnConfig] is lrnn.LrnnForCausalLM"
    }
    for module in NEEDED
}
IN_REPOSITORY = f"""
import os, sys
os.chdir({str(REPOSITORY)!r})
sys.path.insert(0, "")
from transformers import LlamaConfig, LlamaForCausalLM
import lrnn, lrnn.kernels.reference.delta_rule
"""
CASES[IN_REPOSITORY] = {
    "at the root of the repository": """
size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
found = LlamaForCausalLM(LlamaConfig(**size)).num_parameters()
"""
}
# Runs each case in a fork of a process that has already imported what takes long and does not matter here, and has
# read which packages are installed, which transformers does when it is imported.
FORKED = """
import gc, importlib.metadata, json, os, sys, traceback
import accelerate.utils, huggingface_hub, jinja2, PIL.Image, scipy.optimize, tokenizers, torch, triton
import torch._dynamo.aot_compile, torch.distributed.fsdp, torch.distributed.tensor
import huggingface_hub.hf_api, jinja2.sandbox, psutil, regex, torch.distributed.checkpoint, triton.experimental.gluon
assert not {"transformers", "lrnn", "kernels"} & set(sys.modules)
packages = importlib.metadata.packages_distributions()
importlib.metadata.packages_distributions = lambda: packages
gc.freeze()

def forked():
    sys.stdout.flush()
    process = os.fork()
    if process:
        os.waitpid(process, 0)
    return process == 0

for imports, cases in json.loads(sys.argv[1]).items():
    if not forked():
        continue
    scope, failure = {"FOLDER": sys.argv[2]}, None
    try:
        exec(imports, scope)
    except BaseException:
        failure = traceback.format_exc()
    for name, code in cases.items():
        if not forked():
            continue
        try:
            if failure is None:
                exec(code, scope)
            classes = [f"{type(x).__module__}.{type(x).__name__}" for x in scope.get("loaded", [])]
            print(json.dumps([name, failure or scope.get("found", classes)]), flush=True)
        except BaseException:
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        os._exit(0)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """Return what each case finds, or the classes that it loads of a folder with the model files of an exported one."""
    root = tmp_path_factory.mktemp("loaded")
    folder = root / "model"
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    LrnnForCausalLM(LrnnConfig(**size, intermediate_size=48)).save_pretrained(folder)
    lines = run(FORKED, root, json.dumps(CASES), str(folder)).splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("case", [f"{name} first" for name in ORDERS])
def test_transformers_loads_a_folder_with_the_classes_of_lrnn(case, found):
    assert found[case] == [
        "lrnn.model.configuration_lrnn.LrnnConfig",
        "lrnn.model.modeling_lrnn.LrnnModel",
        "lrnn.model.modeling_lrnn.LrnnForCausalLM",
    ]


def test_a_configuration_alone(found):
    assert found["AutoConfig alone"] == ["lrnn.model.configuration_lrnn.LrnnConfig"]


@pytest.mark.parametrize("case", ["trusted, lrnn first", "trusted, lrnn last"])
def test_trusted_code_loads_beside_lrnn(case, found):
    assert len(found[case]) == 1 and found[case][0].endswith(".modeling_lrnn.LrnnModel"), found[case]


def test_unknown_attributes_are_errors():
    import lrnn

    with pytest.raises(AttributeError, match="module 'lrnn' has no attribute 'LrnnModle'"):
        _ = lrnn.LrnnModle


@pytest.mark.parametrize("module", NEEDED)
def test_modules_that_the_model_needs_may_come_first(module, found):
    assert found[f"{module} after lrnn"] is True


def test_transformers_works_at_the_root_of_the_repository(found):
    """transformers imports Hugging Face's package `kernels`, and a folder of that name is there."""
    assert isinstance(found["at the root of the repository"], int), found["at the root of the repository"]
