"""Measure a training step of whole models on a GPU, ours and fla's of the same shape."""

import gc
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrnn import LrnnConfig, LrnnForCausalLM, shipped
from lrnn.bench.peers import fla_guard, fla_guard_lifted

TOKENS, SEQ_LEN = 16384, 2048  # per step and per sequence
WARM_UP, STEPS = 3, 10
PARAMETERS = ("float32", "bfloat16")


@dataclass
class Step:
    """The figures of one model; `error` if it did not run."""

    model: str
    shape: str
    parameters: str
    billions: float = 0.0
    milliseconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    error: str = ""


def shapes() -> dict[str, LrnnConfig]:
    """Return the configurations: 340M of `configs/`, and the defaults, 1.47B, at which the peers were measured."""
    path = shipped.MODELS / "340m.json"
    small = LrnnConfig.from_json_file(str(path)) if path.is_file() else LrnnConfig(
        hidden_size=1024, num_hidden_layers=20, num_heads=8, intermediate_size=2816
    )  # fmt: skip
    return {"340M": small, "1.47B": LrnnConfig()}


def fla_model(config: LrnnConfig) -> nn.Module:
    """Return fla's gated DeltaNet of the same shape, with its fused cross-entropy, which never holds all logits."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    return GatedDeltaNetForCausalLM(
        GatedDeltaNetConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            expand_v=1.0,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            conv_size=config.conv_size,
            norm_eps=config.norm_eps,
            allow_neg_eigval=config.allow_neg_eigval,
            max_position_embeddings=config.max_position_embeddings,
            fuse_cross_entropy=False,
            fuse_linear_cross_entropy=True,
            use_cache=False,
        )
    )


def build(which: str, config: LrnnConfig, parameters: str) -> nn.Module:
    """Return a model on the GPU.

    With bfloat16 parameters, A_log and dt_bias stay float32, as they do when either model is loaded.
    """
    with torch.device("cuda"):
        model: nn.Module = LrnnForCausalLM(config) if which == "lrnn" else fla_model(config)
    model.train()
    if parameters == "bfloat16":
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter.data = parameter.data.bfloat16()
    return model


def step_loss(which: str, model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of the next token."""
    if which == "lrnn":
        labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        return model(input_ids=ids, shift_labels=labels, use_cache=False).loss
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def measure_step(which: str, shape: str, config: LrnnConfig, parameters: str) -> Step:
    """Time forward, backward and AdamW on one batch under bf16 autocast, as the median of several steps."""
    result = Step(which, shape, parameters)
    model = build(which, config, parameters)
    result.billions = sum(p.numel() for p in model.parameters()) / 1e9
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    r = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (TOKENS // SEQ_LEN, SEQ_LEN), device="cuda", generator=r)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step_loss(which, model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    result.loss = loss.item()
    result.milliseconds = statistics.median(times[WARM_UP:])
    result.tokens_per_second = TOKENS / result.milliseconds * 1e3
    result.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return result


def bench_models(only_ours: bool) -> list[dict[str, Any]]:
    """Print the table of `lrnn bench kernels --model`."""
    print(
        f"\na step of {TOKENS} tokens ({TOKENS // SEQ_LEN} x {SEQ_LEN}): forward, backward, fused AdamW; bf16 autocast"
    )
    if not only_ours and (note := fla_guard()):
        print(f"fla: {note}")
    print(
        f"{'shape':8} {'model':6} {'parameters':11} {'billions':>9} {'ms':>9} {'tokens/s':>9} "
        f"{'peak GiB':>9} {'loss':>7}"
    )
    rows = []
    for shape, config in shapes().items():
        for which in ("lrnn",) if only_ours else ("lrnn", "fla"):
            for parameters in PARAMETERS:
                row = _try(which, shape, config, parameters)
                rows.append(asdict(row))
                figures = f"{row.billions:9.3f} {row.milliseconds:9.1f} {row.tokens_per_second:9.0f} "
                figures += f"{row.peak_gib:9.1f} {row.loss:7.3f}"
                print(
                    f"{shape:8} {which:6} {parameters:11} {f'failed: {row.error}' if row.error else figures}",
                    flush=True,
                )
    return rows


def _try(which: str, shape: str, config: LrnnConfig, parameters: str) -> Step:
    """Return a row of the table, even if a model does not fit or a peer does not run in this setting."""
    try:
        with fla_guard_lifted():
            return measure_step(which, shape, config, parameters)
    except Exception as error:
        if which == "lrnn" and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return Step(which, shape, parameters, error=f"{type(error).__name__}: {str(error).strip()[:150]}")
    finally:
        gc.collect()
        torch.cuda.empty_cache()
