"""`lrnn bench step` on a GPU: its kinds sum to the time in which the GPU works, and it knows the kernels that run."""

import json
import subprocess
import sys

import pytest
import torch

from lrnn import LrnnConfig
from lrnn.bench import fla_model, step
from lrnn.bench.kinds import OTHER, by_kind, kernel_times
from lrnn.pretrain.config import load_config
from lrnn.pretrain.distributed import Ranks

MODEL = {"hidden_size": 256, "num_heads": 2, "head_dim": 128, "num_hidden_layers": 2, "intermediate_size": 512}
KINDS = {"products", "recurrence", "RMS norm", "gated norm", "SwiGLU", "short convolution", "loss", "AdamW"}
UNKNOWN = 0.02  # share of the time that may go to kernels of no known kind


@pytest.mark.parametrize("packed", [False, True])
def test_kinds_of_our_step(packed, tmp_path):
    """It runs as a command, because DeepSpeed cannot begin twice in a process."""
    figures = tmp_path / "figures.json"
    settings = ["precision=bfloat16", f"data.reset_at_document_boundaries={str(packed).lower()}"]
    settings += [f"model.{name}={value}" for name, value in MODEL.items()]
    command = [sys.executable, "-m", "lrnn.cli", "bench", "step", "tiny", *settings, "--only-ours", "--verbose"]
    done = subprocess.run([*command, "--json", figures], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    (found,) = json.loads(figures.read_text())["models"]
    kinds = found["kinds"]
    assert sum(kinds.values()) == pytest.approx(found["busy"]) and min(kinds.values()) > 0
    assert found["busy"] + found["idle"] == pytest.approx(sorted(found["steps"])[2])
    assert set(kinds) >= KINDS and kinds.get(OTHER, 0) < UNKNOWN * found["busy"]


@pytest.mark.parametrize("packed", [False, True])
def test_kinds_of_flas_step(packed):
    options = ["micro_batch_size=2", "global_batch_size=4", f"data.reset_at_document_boundaries={str(packed).lower()}"]
    config, device = load_config("tiny", options), torch.device("cuda")
    model_config = LrnnConfig(**MODEL, vocab_size=500)
    assert fla_model.reason_without(model_config, 1) is None
    model = fla_model.build(model_config, torch.bfloat16, device)
    batches = step.random_batches(config, 500, Ranks(0, 1, device, None))
    found = step.measure("fla", fla_model.training_step(model, config, batches, device), device)
    kinds = by_kind(found.kernels)
    print("\n".join(step.kernel_lines(found)))
    assert set(kinds) >= KINDS and kinds[OTHER] < UNKNOWN * found.busy


def test_the_time_of_products():
    """The profile agrees with CUDA's events on kernels that follow each other without gaps."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def products():
        for _ in range(20):
            a @ a

    products()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    products()
    end.record()
    torch.cuda.synchronize()
    kinds = by_kind(kernel_times(step.profile(products, 1)))
    assert kinds["products"] > 0.99 * kinds.total()  # cuBLAS may clear its workspace
    assert kinds.total() == pytest.approx(start.elapsed_time(end), rel=0.1)
