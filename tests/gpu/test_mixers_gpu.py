"""Compare mixers on a GPU: recurrences with float64, and whole models with the same model on the CPU.

`tests/model/test_mixer_equations.py` compares the mixers on the CPU with the equations of their papers.
"""

import copy

import pytest
import torch
from mixer_models import VARIANTS, WITHOUT_RANGE
from mixer_recurrences import by_logit, compare, diagonal_inputs, rwkv7_inputs, scan_inputs, true_diagonal

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.kernels import recurrences
from lrnn.kernels.reference import steps as step_recurrences

DEVICE = "cuda"
FP32, BF16 = torch.float32, torch.bfloat16
T = 200
BOUNDS = [0, 30, 31, 31, T, T + 77, 2 * T]  # of documents in two rows
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
both_ranges = pytest.mark.parametrize("negative", [True, False], ids=["[-1,1]", "[0,1]"])


def bounds(device: str = "cpu") -> torch.Tensor:
    return torch.tensor(BOUNDS, dtype=torch.int32, device=device)


def document_of(device: str) -> torch.Tensor:
    return (torch.bucketize(torch.arange(2 * T), bounds(), right=True) - 1).view(2, T).to(device)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


# ---- recurrences


@both_ranges
@both_dtypes
@pytest.mark.parametrize(
    ("K", "V", "numbers"), [(16, 16, 16), (32, 32, 32), (128, 128, 128), (32, 33, 1), (64, 64, 1), (128, 129, 1)]
)
def test_diagonal_recurrence(K, V, numbers, dtype, negative):
    x = diagonal_inputs(2, T, 2, K, V, numbers, DEVICE)
    functions = by_logit(recurrences.diagonal_recurrence, negative), by_logit(true_diagonal, negative)
    # In 16 bits the gradient of 2a - 1 is damped near 0, and computed by tf32 products.
    bars = {"": 1e-4, "dlogit": 5e-4} if dtype == FP32 else {"": 2e-2, "dlogit": 0.2 if negative else 3e-2}
    compare(*functions, x, "qkv", dtype, bars, output_final_state=True)
    del x["initial_state"]
    compare(*functions, x, "qkv", dtype, bars, document=document_of(DEVICE))


@both_dtypes
@pytest.mark.parametrize("numbers", [1, 64])
@pytest.mark.parametrize("strong", [-20.0, -500.0])
def test_strong_decays(strong, numbers, dtype):
    x = diagonal_inputs(2, T, 2, 64, 64, numbers, DEVICE)
    g = -0.1 * x.pop("logit").abs()
    g[:, ::3] = g[:, 60:80] = strong
    x["g"] = g
    start = x.pop("initial_state")  # it gets no gradient

    def run(rule):
        return lambda **y: rule(**y, sign=None, scale=1.0, initial_state=start, output_final_state=True)

    functions = run(recurrences.diagonal_recurrence), run(true_diagonal)
    compare(*functions, x, "qkv", dtype, {"": 1e-4} if dtype == FP32 else {"": 2e-2, "dg": 5e-2})


@both_ranges
@both_dtypes
@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 32), (64, 48), (128, 128)])
def test_rwkv7_recurrence(K, V, dtype, negative):
    x = rwkv7_inputs(2, T, 2, K, V, negative, DEVICE)
    functions = recurrences.rwkv7_recurrence, step_recurrences.rwkv7_recurrence
    bars = {"": 1e-4} if dtype == FP32 else {"": 2e-2, "dw": 5e-2, "da": 5e-2, "dkappa": 5e-2}
    compare(*functions, x, "rkv", dtype, bars)
    del x["initial_state"]
    compare(*functions, x, "rkv", dtype, bars, cu_seqlens=bounds(DEVICE))


@both_ranges
@pytest.mark.parametrize(("D", "N"), [(64, 16), (40, 5), (1024, 16)])
def test_selective_scan(D, N, negative):
    x = scan_inputs(2, T, D, N, DEVICE)
    functions = recurrences.selective_scan, step_recurrences.selective_scan
    compare(*functions, x, "", FP32, {"": 1e-4}, allow_neg_eigval=negative)
    del x["initial_state"]
    compare(*functions, x, "", FP32, {"": 1e-4}, allow_neg_eigval=negative, document=document_of(DEVICE))


# ---- models

SIZE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "intermediate_size": 48,
    "state_size": 5,
}
every_case = pytest.mark.parametrize(
    ("variant", "negative"),
    [(v, r) for v in VARIANTS for r in (True, False) if r or v not in WITHOUT_RANGE],
)


def make_model(variant: str, negative: bool = True, conv_size: int = 4, head_dim: int = 32) -> LrnnForCausalLM:
    """Return a model on the CPU in which every parameter matters, and decays and steps cover their range."""
    torch.manual_seed(0)
    sizes = {**SIZE, **VARIANTS[variant], "head_dim": head_dim, "conv_size": conv_size}
    model = LrnnForCausalLM(LrnnConfig(**sizes, allow_neg_eigval=negative))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.ndim == 2 and not name.endswith(("A_log", "gate_bias")):
                p.normal_(std=0.15)
            elif name.endswith(("A_log", "dt_bias", "gate_bias")):
                p.copy_(0.5 * torch.randn_like(p))
    return model


def inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(1))
    x = {"input_ids": ids, "labels": ids.clone()}
    if kind == "documents":
        x["cu_seqlens"] = bounds()
    if kind == "padded":
        x["attention_mask"] = torch.ones_like(ids)
        x["attention_mask"][1, :50] = 0
        x["labels"][1, :51] = -100
    return x


def results(model: LrnnForCausalLM, x: dict[str, torch.Tensor], device: str, autocast: bool) -> dict[str, torch.Tensor]:
    """Return logits, gradients of all parameters and, without documents, the states, on the CPU."""
    model = copy.deepcopy(model).to(device)
    x = {n: y.to(device) for n, y in x.items()}
    with torch.autocast(device, BF16, enabled=autocast):
        out = model(**x, use_cache="cu_seqlens" not in x, num_items_in_batch=T)
    out.loss.backward()
    found = {"logits": out.logits.detach()} | {n: p.grad for n, p in model.named_parameters()}
    if out.past_key_values is not None and model.config.mixer != "attention":
        state = out.past_key_values.layers[0].state
        found |= {f"state {i}": s.detach() for i, s in enumerate(state if isinstance(state, tuple) else (state,))}
    if "attention_mask" in x:
        found["logits"] = found["logits"] * x["attention_mask"][..., None]
    return {n: y.float().cpu() for n, y in found.items()}


@every_case
@pytest.mark.parametrize("kind", ["plain", "documents", "padded"])
def test_models_in_float32(kind, variant, negative):
    model = make_model(variant, negative, conv_size=1 if kind == "plain" else 4)
    truth = results(model, inputs(kind), "cpu", autocast=False)
    found = results(model, inputs(kind), DEVICE, autocast=False)
    errors = {n: error(found[n], true) for n, true in truth.items()}
    print({n: f"{e:.1e}" for n, e in errors.items()})
    assert not {n: e for n, e in errors.items() if not e <= (1e-4 if n == "logits" else 1e-3)}


@every_case
@pytest.mark.parametrize("kind", ["plain", "documents", "padded"])
def test_models_under_autocast(kind, variant, negative):
    """Compare the error with that of bfloat16 on the CPU, where the recurrences are computed in float32."""
    model = make_model(variant, negative, conv_size=1 if kind == "plain" else 4)
    truth = results(model, inputs(kind), "cpu", autocast=False)
    usual = results(model, inputs(kind), "cpu", autocast=True)
    found = results(model, inputs(kind), DEVICE, autocast=True)
    errors = {n: (error(found[n], true), error(usual[n], true)) for n, true in truth.items()}
    print({n: f"{e:.1e} beside {u:.1e}" for n, (e, u) in errors.items()})
    assert not {n: (e, u) for n, (e, u) in errors.items() if not e <= 4 * u + 0.03}


@every_case
@both_dtypes
def test_continuing_from_a_cache(variant, negative, dtype):
    model = make_model(variant, negative).to(DEVICE).eval()
    ids = inputs("plain")["input_ids"].to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, BF16, enabled=dtype == BF16):
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split([100, 1, 1, 70, 28], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert error(torch.cat(parts, 1), whole) < (1e-4 if dtype == FP32 else 5e-2)


def step(model, x, autocast):
    for p in model.parameters():
        p.grad = None
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        labels = x["labels"]
        model(x["input_ids"], shift_labels=labels, cu_seqlens=x.get("cu_seqlens"), num_items_in_batch=T).loss.backward()


@every_case
@both_dtypes
@pytest.mark.parametrize("kind", ["plain", "documents"])
def test_training_reads_nothing_back_from_the_gpu(kind, variant, negative, dtype):
    if (variant, kind, dtype) == ("rwkv7", "documents", BF16):
        pytest.skip("fla reads the boundaries of documents")
    model = make_model(variant, negative).to(DEVICE).train()
    x = {n: y.to(DEVICE) for n, y in inputs(kind).items()}
    step(model, x, dtype == BF16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, dtype == BF16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
@both_dtypes
def test_training_steps_can_be_captured(variant, negative, dtype):
    """Capture forward and backward pass as a CUDA graph, as small models need it."""
    model = make_model(variant, negative, conv_size=1).to(DEVICE).train()
    x = {n: y.to(DEVICE) for n, y in inputs("plain").items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, x, dtype == BF16)
    torch.cuda.current_stream().wait_stream(side)
    truth = {n: p.grad.clone() for n, p in model.named_parameters()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, x, dtype == BF16)
    graph.replay()
    torch.cuda.synchronize()
    for name, p in model.named_parameters():
        assert error(p.grad, truth[name]) < 1e-3, name
