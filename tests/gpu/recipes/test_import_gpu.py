"""A model of fla with 340M parameters is imported: logits on a GPU, the way back, and training on from its weights.

fla makes the model, with random weights, and computes the truth. Its logits and ours differ by what kernels round:
in float32 both multiply with less than float32 inside of chunks, and in bfloat16 they round at other places.
"""

import json
import shutil
import statistics

import pytest
import torch
from gpu_runs import MODEL, ON_GPU, VOCABULARY, run_group
from training_group import losses

from lrnn import LrnnForCausalLM, cli
from lrnn.formats.folder import ModelFolder

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 20,
    "num_heads": 8,
    "head_dim": 128,
    "intermediate_size": 2816,
}
if not ON_GPU:
    SHAPE = {name: MODEL[name] for name in SHAPE}
STEPS = 100 if ON_GPU else 20
# Relative errors of the logits, in the norm of all: in float32 fla multiplies as tf32, with 3e-4 per product.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def theirs():
    """Return fla's model with its own random weights, in bfloat16 as it would be saved, on the GPU."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(
        **SHAPE, expand_v=1, allow_neg_eigval=True, bos_token_id=1, eos_token_id=2,
        fuse_cross_entropy=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = GatedDeltaNetForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture(scope="module")
def imported(theirs, corpus, tmp_path_factory):
    """Return the folder that fla saves, and what `lrnn import` makes of it."""
    folder = tmp_path_factory.mktemp("models")
    theirs.save_pretrained(folder / "fla")
    out = folder / "ours"
    assert cli.main(["import", str(folder / "fla"), str(out), "--tokenizer", str(corpus / "tokenizer")]) == 0
    return folder / "fla", out


@pytest.mark.skipif(not ON_GPU, reason="fla computes on GPUs alone")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_logits_are_those_of_fla(theirs, imported, dtype):
    ours = LrnnForCausalLM.from_pretrained(imported[1], dtype=dtype).cuda().eval()
    copy = type(theirs)(theirs.config).cuda().eval()
    copy.load_state_dict(theirs.state_dict())
    for name, parameter in copy.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    for length in (40, 300, 2048):  # fla takes other kernels for short texts
        ids = torch.randint(3, VOCABULARY, (2, length), device="cuda")
        found, truth = ours(ids).logits.double(), copy(ids).logits.double()
        error = float((found - truth).norm() / truth.norm())
        print(f"{dtype}, {length} tokens: relative error {error:.1e}, largest difference "
              f"{float((found - truth).abs().max()):.1e} of {float(truth.abs().max()):.2f}")  # fmt: skip
        assert error < TOLERANCES[dtype]


def test_export_gives_the_same_tensors_back(imported, tmp_path):
    theirs, ours = imported
    assert cli.main(["export", str(ours), str(tmp_path / "again"), "--format", "fla", "--dtype", "bfloat16"]) == 0
    before, after = ModelFolder(theirs), ModelFolder(tmp_path / "again")
    assert set(before.tensors.entries) == set(after.tensors.entries)
    for name in before.tensors.entries:
        assert torch.equal(before.read(name), after.read(name)), name
    kept, given = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "again"))
    assert {name: (kept[name], value) for name, value in given.items() if kept.get(name, value) != value} == {}


def test_the_loss_falls_from_its_weights(base, imported, tmp_path):
    """Random weights know nothing: the loss begins at that of a uniform guess or above."""
    data = {**base("x")["data"], "seq_len": 2048 if ON_GPU else 64}
    moved = shutil.copytree(imported[1], tmp_path / "moved")
    config = base("run", init_from=str(moved), steps=STEPS, data=data, optim={"lr": 1e-3 if ON_GPU else 0.01})
    del config["model"]
    assert run_group(tmp_path, [{"config": config}], processes=1) == [0]
    found = [loss for loss, *_ in losses(config).values()]
    first, last = statistics.mean(found[:5]), statistics.mean(found[-5:])
    print(f"{STEPS} steps: loss {first:.3f} to {last:.3f}, {[round(x, 2) for x in found[:: max(1, STEPS // 10)]]}")
    assert len(found) == STEPS and last < (0.7 if ON_GPU else 0.95) * first
