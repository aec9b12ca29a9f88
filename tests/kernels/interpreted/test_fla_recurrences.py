"""Test fla's kernels as this project calls them, against the recurrences in float64, with all gradients and states.

fla is not written for the interpreter. Its uses of a GPU are replaced here, but no arithmetic. The interpreter
multiplies float32 exactly, so float32 tests the equations, and float16 tests the effect of rounding.
"""

import builtins
import copy
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixer_recurrences import by_logit, compare, diagonal_inputs, random, rwkv7_inputs, true_diagonal
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.kernels import fla_recurrences, recurrences
from lrnn.kernels.reference import steps as step_recurrences
from lrnn.kernels.reference.documents import document_ids
from lrnn.model.cache import LrnnCacheLayer

FP16, FP32 = torch.float16, torch.float32
TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # also run the cases that only combine again what others contain
BARS = {FP16: {"": 2e-3}, FP32: {"": 1e-4}}


class Count(int):
    """A loop variable. The interpreter makes it a plain integer, but fla expects a tensor."""

    def to(self, dtype):
        return self


@pytest.fixture(autouse=True)
def fla_without_a_gpu(monkeypatch):
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: [1.0] * 3)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            monkeypatch.setattr(
                module, "range", lambda *bounds: map(Count, builtins.range(*map(int, bounds))), raising=False
            )
            if hasattr(module, "IS_GATHER_SUPPORTED"):
                monkeypatch.setattr(module, "IS_GATHER_SUPPORTED", False)


# Each range has both types. The range changes only the numbers that the kernels are given.
@pytest.mark.parametrize(
    ("K", "V", "T", "numbers", "one_number_kernels", "dtype", "negative"),
    [
        (32, 33, 66, 1, True, FP16, True),
        (32, 33, 66, 1, True, FP32, False),
        (16, 17, 66, 1, False, FP32, True),
        (32, 32, 66, 32, True, FP32, False),
        (20, 7, 35, 20, True, FP16, True),
        *([(32, 32, 66, 32, True, FP16, True)] if TORTURE else []),
    ],
)
def test_diagonal(K, V, T, numbers, one_number_kernels, dtype, negative, monkeypatch):
    monkeypatch.setattr(fla_recurrences, "ONE_NUMBER_KERNELS", one_number_kernels)
    monkeypatch.setattr(fla_recurrences, "TF32", 1e-9)  # no damping, since the interpreter multiplies exactly
    x = diagonal_inputs(2, T, 1, K, V, numbers)
    functions = by_logit(fla_recurrences.diagonal_recurrence, negative), by_logit(true_diagonal, negative)
    bars = BARS[dtype] | ({"dlogit": 5e-3} if negative else {})
    compare(*functions, x, "qkv", dtype, bars, output_final_state=True)
    del x["initial_state"]
    document = (torch.arange(2 * T) // 11).view(2, T)
    document[0, 20:30] = torch.arange(10) + 1000  # documents of one token
    # Their starts add 1e3 to the sums of g, of which float32 loses 1e-4.
    compare(*functions, x, "qkv", dtype, bars | {"dlogit": 5e-3}, document=document)


@pytest.mark.parametrize("numbers", [1, 32])
@pytest.mark.parametrize("strong", [-20.0, -500.0])
def test_strong_decays(strong, numbers):
    """The logarithm of 2a - 1 near 0 is -16 to -20. The mLSTM's decays may be stronger."""
    x = diagonal_inputs(1, 90, 1, 32, 32, numbers)
    g = -0.1 * x.pop("logit").abs()
    g[:, ::3] = g[:, 60:80] = strong
    x["g"] = g
    start = x.pop("initial_state")  # it gets no gradient

    def run(rule):
        return lambda **y: rule(**y, sign=None, scale=1.0, initial_state=start, output_final_state=True)

    for dtype in (FP16, FP32):
        functions = run(fla_recurrences.diagonal_recurrence), run(true_diagonal)
        # In sums of g around 1e4, float32 loses 3e-4.
        compare(*functions, x, "qkv", dtype, {"": 2e-3 if dtype == FP16 else 5e-4})


@pytest.mark.parametrize("numbers", [1, 64])
def test_few_tokens_near_zero_do_not_drown_the_gradient(numbers, monkeypatch):
    """Multiply float32 operands by their first 10 bits, as a GPU does.

    The few tokens have 2a - 1 = 5e-7. Without damping their gradient is 250 to 500 times its true size, and that of all
    tokens 50 to 100 times. Damping takes it to 0, an error of 1, and leaves the others' gradient alone.
    """
    multiply = InterpreterBuilder.create_dot

    def tf32(x):
        if x.data.dtype == np.float32:
            x = copy.copy(x)
            x.data = (np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return x

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: multiply(self, tf32(a), tf32(b), *rest)
    )
    monkeypatch.setattr(fla_recurrences, "ONE_NUMBER_KERNELS", False)
    x = diagonal_inputs(1, 192, 2, 64, 16, numbers)
    x["near_zero"] = torch.full_like(x["logit"][:, 5::40], 1e-6)

    def with_few(rule):
        def run(logit, near_zero, **y):
            logit = logit.clone()
            logit[:, 5::40] = near_zero
            return by_logit(rule, True)(logit=logit, **y)

        return run

    functions = with_few(fla_recurrences.diagonal_recurrence), with_few(true_diagonal)
    bars = {"": 2e-3, "dlogit": 0.08, "dnear_zero": 1.01}
    compare(*functions, x, "qkv", FP16, bars, output_final_state=True)


@pytest.mark.parametrize(
    ("K", "V", "T", "negative", "dtype"),
    [
        (32, 32, 18, True, FP16),
        (20, 7, 17, False, FP32),
        (16, 16, 16, True, FP32),
        *([(16, 16, 16, False, FP16)] if TORTURE else []),
    ],
)
def test_rwkv7(K, V, T, negative, dtype):
    x = rwkv7_inputs(2, T, 1, K, V, negative)
    functions = fla_recurrences.rwkv7_recurrence, step_recurrences.rwkv7_recurrence
    compare(*functions, x, "rkv", dtype, BARS[dtype])
    del x["initial_state"]
    bounds = torch.tensor([0, 3, 3, 4, T, T + 9, 2 * T])
    compare(*functions, x, "rkv", dtype, BARS[dtype], cu_seqlens=bounds)


def test_reflections_do_not_grow():
    """With one key, a rate of 2 and no decay, every step changes the sign of the state along the key."""
    T, K = 256, 32
    kappa = F.normalize(random(0, 1, 1, 1, K), dim=-1).expand(1, T, 1, K)
    zeros, ones = torch.zeros(1, T, 1, K, dtype=FP16), torch.ones(1, T, 1, K)
    start = random(1, 1, 1, K, K)
    _, state = fla_recurrences.rwkv7_recurrence(zeros, ones, zeros, zeros, kappa, 2 * ones, initial_state=start)
    assert ((state - start).norm() / start.norm()).item() < 0.05


# Three of the four call the same function, each with numbers of its own; RWKV-7 has its own.
KINDS = {"gla": ["documents"], "mamba2": ["padded", "states"], "mlstm": ["states"]}
KINDS["rwkv7"] = ["documents", "padded", "states"]
if TORTURE:
    KINDS = dict.fromkeys(KINDS, KINDS["rwkv7"])


@pytest.mark.parametrize(("mixer", "kind"), [(mixer, kind) for mixer, kinds in KINDS.items() for kind in kinds])
def test_mixers(mixer, kind, monkeypatch):
    """Each mixer in float16 on fla's kernels agrees with the recurrences in float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 16}
    attn = LrnnForCausalLM(LrnnConfig(**sizes, intermediate_size=48, mixer=mixer)).model.layers[0].attn
    for p in attn.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    x = random(1, 2, 20, 32)
    mask = cu_seqlens = document = None
    if kind == "padded":
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[1, 12:] = False
    if kind == "documents":
        cu_seqlens = torch.tensor([0, 7, 20, 21, 40])
        document = document_ids(cu_seqlens, 2, 20)
    found = []
    for on_fla in (True, False):
        monkeypatch.setattr(recurrences, "_runs_on_fla", lambda r, on_fla=on_fla: on_fla and r.dtype == FP16)
        cache = None if kind == "documents" else LrnnCacheLayer()
        attn.zero_grad()
        leaf = x.half().requires_grad_()
        with torch.autocast("cpu", FP16):
            out = attn(leaf, cache, mask, cu_seqlens, document)
            if kind == "states":
                cache.conv = None if cache.conv is None else cache.conv.detach()  # the kernels' rule
                out = torch.cat([out, attn(leaf[:, :9], cache, None, None, None)], 1)
        out = out if mask is None else out * mask[..., None]
        (out.float() * random(2, *out.shape)).sum().backward()
        state = () if cache is None else cache.state
        states = state if isinstance(state, tuple) else (state,)
        found.append([out, *states, leaf.grad, *(p.grad for p in attn.parameters())])
    for ours, plain in zip(*found, strict=True):
        assert (ours.double() - plain.double()).norm() <= 2e-2 * plain.double().norm()
    assert not torch.equal(found[0][0], found[1][0])
