"""The other implementations that lrnn is compared with: flash-linear-attention (fla) and FlashQLA."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass
class Contender:
    """A function from the inputs of a layer's kernel to its output, and how to run it and read its figures."""

    name: str
    run: Callable[[Inputs], Tensor]
    note: str = ""
    prepare: Callable[[Inputs], Inputs] | None = None  # converts the inputs beforehand, which is not timed
    lifts_guard: bool = False  # whether it runs inside `fla_guard_lifted`


def fla(x: Inputs) -> Tensor:
    """Call fla as its own layer does."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q=x["q"],
        k=x["k"],
        v=x["v"],
        g=x["a"],
        beta=x["b"],
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )[0]


def flash_qla(x: Inputs) -> Tensor:
    """Call FlashQLA. It takes log-gates and step sizes in float32, which `make_log_inputs` computes beforehand."""
    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], use_qk_l2norm_in_kernel=True)[0]


def make_log_inputs(x: Inputs) -> Inputs:
    """Return the inputs with log-gates g and step sizes beta in float32 instead of the raw projections."""
    g = -x["A_log"].exp() * torch.nn.functional.softplus(x["a"].float() + x["dt_bias"])
    return {"q": x["q"], "k": x["k"], "v": x["v"], "g": g, "beta": 2 * x["b"].float().sigmoid()}


def fla_guard() -> str | None:
    """Return a note if fla refuses its gated backward pass here, else None.

    It does on Hopper with Triton 3.4 to 3.7.0. If tilelang is installed, fla uses another kernel there and refuses
    nothing, unless FLA_TILELANG=0 forbids it.
    """
    from fla.ops.common import chunk_o

    refuses = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    tilelang = importlib.util.find_spec("tilelang") is not None and os.environ.get("FLA_TILELANG") != "0"
    if not refuses or tilelang:
        return None
    import triton

    return (
        f"fla's own check calls the result of its gated backward pass incorrect under Triton {triton.__version__} on "
        "Hopper and refuses it; the check was lifted: timed for speed only"
    )


@contextlib.contextmanager
def fla_guard_lifted() -> Iterator[None]:
    """Run fla's gated backward pass even if fla refuses it, to measure its time and memory. Gradients may be wrong."""
    from fla.ops.common import chunk_o

    before = chunk_o.TRITON_ABOVE_3_7_1
    chunk_o.TRITON_ABOVE_3_7_1 = True
    try:
        yield
    finally:
        chunk_o.TRITON_ABOVE_3_7_1 = before


def find_peers() -> tuple[list[Contender], list[str]]:
    """Return the peers that can be timed here, and for each peer a line on why it is left out or what to know."""
    found, lines = [], []
    for name, package, run in (("fla", "fla", fla), ("FlashQLA", "flash_qla", flash_qla)):
        if importlib.util.find_spec(package) is None:
            lines.append(f"{name}: skipped, {package} is not installed")
            continue
        try:
            importlib.import_module(package)
            note = (fla_guard() or "") if name == "fla" else "gates and step sizes computed ahead of the clock"
        except Exception as error:  # a peer that does not import here must not keep lrnn from being measured
            lines.append(f"{name}: skipped, importing {package} failed: {error!r}")
            continue
        prepare = make_log_inputs if name == "FlashQLA" else None
        found.append(Contender(name, run, note, prepare, lifts_guard=name == "fla"))
        lines.append(f"{name}: found" + (f"; {note}" if note else ""))
    return found, lines
