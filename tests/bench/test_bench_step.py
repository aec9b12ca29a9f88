"""`lrnn bench step` without a GPU: the step itself, its batches, fla's model, and the table."""

import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import step_worker
import torch
from fork_server import CONTEXT

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.bench import fla_model, step
from lrnn.bench.step_table import Measured, Workload, kernel_lines, table
from lrnn.cli import main
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.config import load_config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.launch import free_port, local_environment

TINY = ["tiny", "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_heads=1", "model.head_dim=32"]
TINY += ["model.intermediate_size=32", "model.vocab_size=500", "data.seq_len=64", "micro_batch_size=2"]
CPU = Ranks(0, 1, torch.device("cpu"), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "lrnn bench step needs a CUDA GPU, and PyTorch finds none here"),
        (["optim.lrr=1"], "command line: unknown key optim.lrr; did you mean lr?"),
        (["model.mixer=gated"], "mixer"),
        (["--json", "no_such_folder/x.json"], "--json no_such_folder/x.json: the folder no_such_folder does not exist"),
        (["--json", "/"], "--json /: it is a folder; name a file"),
    ],
)
def test_refusals(options, message, capsys):
    assert main(["bench", "step", "tiny", *options]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("lrnn: error: ") and message in error and error.count("\n") == 1


def test_it_is_the_step_of_training(tmp_path):
    """It computes every micro-batch, updates with learning rate 0, and keeps nothing in memory."""
    arguments = [*TINY, "global_batch_size=12", "data.reset_at_document_boundaries=true"]
    worker = CONTEXT.Process(target=step_worker.main, args=(arguments, tmp_path, local_environment(0, 1, free_port())))
    worker.start()
    worker.join(200)
    output = (tmp_path / "output").read_text()
    assert worker.exitcode == 0, output
    facts, written = (json.loads((tmp_path / name).read_text()) for name in ("facts.json", "figures.json"))
    assert facts["same_weights"] and facts["freed"]
    assert len(facts["steps"]) == step.SETTLING + step.TIMED + step.PROFILED
    for micro_batches, loss, lr, norm in facts["steps"]:
        assert micro_batches == 4 and lr == 0 and norm > 0
        assert loss == pytest.approx(math.log(500), rel=0.1)  # weights are fresh, and tokens random
    (figures,) = written["models"]
    assert written["tokens_per_step"] == 4 * 2 * 64 and len(figures["steps"]) == step.TIMED
    assert figures["kernels"] == {"nvjet_a": 3.0 / step.PROFILED} and figures["peak_memory_gb"] > 0.01
    assert figures["tokens_per_second"] == pytest.approx(512e3 / np.median(figures["steps"]))
    for line in (
        "0.0M parameters, mixer gated_deltanet, on 1 x NVIDIA H200",
        "1 x 4 micro-batches of 2 x 64 random tokens in documents of 500 tokens on average per step; a step of the run "
        "has 6",
        "ZeRO-2, float32, activation_checkpointing: none; 5 steps timed, 2 others profiled",
        f"lrnn: {np.median(figures['steps']):.1f} ms per step",
        "fla: left out: --only-ours",
        "products                                  1.50",
        "products                           1.500  nvjet_a",
    ):
        assert line in output.splitlines()


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_of_the_configured_shape(packed):
    """Samples of each rank differ. Documents begin where a label is left out."""
    options = ["micro_batch_size=4", "global_batch_size=16", "data.seq_len=5000"]
    config = load_config("tiny", [*options, f"data.reset_at_document_boundaries={str(packed).lower()}"])
    batches = step.random_batches(config, 300, CPU)
    assert [batch.input_ids.shape for batch in batches] == [(4, 5000)] * 4
    ids = torch.cat([batch.input_ids for batch in batches])
    assert ids.min() == 0 and ids.max() == 299
    for batch in batches:
        ignored = (batch.labels == -100).flatten()
        assert torch.equal(
            batch.labels[:, :-1][batch.labels[:, :-1] != -100], batch.input_ids[:, 1:][batch.labels[:, :-1] != -100]
        )
        assert (batch.cu_seqlens is not None) == packed
        if packed:
            inner = [start for start in batch.cu_seqlens[:-1].tolist() if start % 5000]
            assert ignored[np.array(inner) - 1].all() and 300 < 20000 / (len(inner) + 4) < 700
    other = step.random_batches(config, 300, Ranks(1, 2, torch.device("cpu"), None))
    assert len(other) == 2 and not torch.equal(other[0].input_ids, batches[0].input_ids)


def test_micro_batches_are_cut():
    config = load_config("tiny", ["micro_batch_size=2", "global_batch_size=64"])
    assert config.batching(0, 2).accumulation_steps == 16
    cut = step.cut_to(config, 4, 2)
    assert cut.global_batch_size == 16 and cut.batching(1, 2).accumulation_steps == 4
    assert config.global_batch_size == 64


GATED = ("gated_deltanet", "gated_deltaproduct")
IN_FLA = (*GATED, "deltanet", "deltaproduct")


@pytest.mark.parametrize("fields", [{"mixer": mixer, "num_heads": 2 if mixer in GATED else 3} for mixer in IN_FLA])
def test_flas_model_has_the_same_parameters(fields):
    config = LrnnConfig(hidden_size=64, num_hidden_layers=2, head_dim=32, intermediate_size=96, vocab_size=50, **fields)
    assert fla_model.reason_without(config, 1) is None
    with torch.device("meta"):
        ours = LrnnForCausalLM(config)
    theirs = fla_model.build(config, torch.bfloat16, "meta")
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    kept = {n.rpartition(".")[2] for n, p in theirs.named_parameters() if p.dtype == torch.float32}
    assert kept == ({"A_log", "dt_bias"} if config.mixer in GATED else set()) and theirs.training
    assert theirs.config.fuse_linear_cross_entropy and not theirs.config.fuse_cross_entropy


def test_fla_is_left_out_with_a_reason(monkeypatch):
    for mixer in MIXERS:
        reason = fla_model.reason_without(LrnnConfig(mixer=mixer), 1)
        assert (reason is None) == (mixer in IN_FLA), mixer
        assert reason is None or reason.endswith(f"mixer {mixer}")
    assert "one GPU" in fla_model.reason_without(LrnnConfig(), 2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fla.models", None)  # importing it raises ImportError
        assert "importing it failed: ModuleNotFoundError" in fla_model.reason_without(LrnnConfig(), 1)
    monkeypatch.setattr(fla_model.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in fla_model.reason_without(LrnnConfig(), 1)


def test_what_fla_cannot_do_is_in_its_row(monkeypatch):
    """A peer that fails must not lose our own figures, even if no memory can be freed after it."""

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(step, "_free", fail)
    broken = LrnnConfig(mixer="mamba")
    row = step.measure_fla(load_config("tiny"), broken, [], CPU, torch.float32)
    assert row.name == "fla float32" and row.error.startswith("UserError: ") and "mamba" in row.error


class StandIn(torch.nn.Module):
    """Takes the place of fla's model, and notes how it is called."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.head, self.calls = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300), []

    def forward(self, input_ids, labels, use_cache, cu_seqlens=None):
        self.calls.append((input_ids, labels, cu_seqlens, torch.is_autocast_enabled("cpu"), use_cache))
        logits = self.head(self.embeddings(input_ids)).float()
        return SimpleNamespace(loss=100 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_of_fla(packed, monkeypatch):
    """It computes every micro-batch with its documents in one row, clips, and updates with learning rate 0."""
    options = ["micro_batch_size=2", "global_batch_size=6", "data.seq_len=700", "optim.clip=0.5"]
    config = load_config("tiny", [*options, f"data.reset_at_document_boundaries={str(packed).lower()}"])
    batches = step.random_batches(config, 300, CPU)
    model, norms = StandIn(), []
    weights = [p.detach().clone() for p in model.parameters()]
    update = torch.optim.AdamW.step

    def counted(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        update(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    fla_model.training_step(model, config, batches, CPU.device)()
    assert all(torch.equal(p, before) and p.grad is None for p, before in zip(model.parameters(), weights, strict=True))
    assert norms == [pytest.approx(0.5, rel=1e-3)] and len(model.calls) == 3
    for (ids, labels, cu_seqlens, autocast, use_cache), batch in zip(model.calls, batches, strict=True):
        assert ids is labels and autocast and not use_cache and torch.equal(ids.flatten(), batch.input_ids.flatten())
        assert ids.shape == ((1, 1400) if packed else (2, 700)) and cu_seqlens is batch.cu_seqlens


WORK = Workload(tokens=16384, flops_per_token=2e9, peak_flops=1e15)
OURS = Measured(
    "lrnn", [0.102, 0.099, 0.100, 0.101, 0.098], Counter({"nvjet_a": 60.0, "nvjet_b": 10.0, "strange": 5.0}), 32 * 10**9
)
FLA = Measured("fla bfloat16", [0.150] * 5, Counter({"nvjet_a": 62.0, "ncclDevKernel_x": 1.0}), 20 * 10**9)
SLOW = Measured("fla float32", [0.250] * 5, Counter({"nvjet_a": 62.0}), 20 * 10**9)


def test_the_table():
    rows = {line[:30].strip(): line[30:].split() for line in table([OURS, SLOW, FLA], WORK)}
    assert rows["products"] == ["70.00", "62.00", "62.00"] and rows["other"] == ["5.00", "0.00", "0.00"]
    assert rows["collectives"] == ["0.00", "0.00", "1.00"] and "AdamW" not in rows
    assert rows["GPU busy"] == ["75.00", "62.00", "63.00"] and rows["GPU idle"] == ["25.00", "188.00", "87.00"]
    assert rows["step, median"] == ["100.00", "250.00", "150.00"]
    assert rows["step, shortest to longest"][:3] == ["98.0", "to", "102.0"]
    assert rows["tokens/s per GPU"] == ["163,840", "65,536", "109,227"]
    assert rows["MFU"] == ["32.8%", "13.1%", "21.8%"] and rows["peak memory, GB"] == ["32.0", "20.0", "20.0"]
    assert table([OURS, SLOW, FLA], WORK)[-1] == "lrnn has 1.50 times the tokens/s of fla bfloat16"


def test_the_table_without_fla_and_without_a_peak():
    failed = Measured("fla float32", error="RuntimeError: no")
    lines = table([OURS, failed], Workload(16384, 2e9, None))
    assert lines[-1] == "fla float32: failed: RuntimeError: no"
    assert [line.split() for line in lines if line.startswith("MFU")] == [["MFU", "unknown"]]
    assert not any("times the tokens" in line for line in lines)


def test_each_kernel_is_listed_by_its_kind():
    lines = kernel_lines(OURS)[1:]
    assert [line.split()[-3:] for line in lines] == [
        ["products", "60.000", "nvjet_a"],
        ["products", "10.000", "nvjet_b"],
        ["other", "5.000", "strange"],
    ]


def test_figures_for_json():
    figures = json.loads(json.dumps(OURS.figures(WORK)))
    assert figures["kinds"] == {"products": 70.0, "other": 5.0} and figures["busy"] == 75.0
    assert figures["tokens_per_second"] == pytest.approx(163840) and figures["mfu"] == pytest.approx(0.32768)
    assert Measured("fla", error="no").figures(WORK) == {"name": "fla", "error": "no"}


def test_a_profile_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(step, "profile", lambda call, count: [])
    with pytest.raises(step.UserError, match="recorded no kernels"):
        step.measure("lrnn", lambda: None, torch.device("cpu"))
