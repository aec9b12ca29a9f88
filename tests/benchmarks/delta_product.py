"""Time the kernels of gated DeltaProduct on a GPU beside those of fla, in one run.

    python tests/benchmarks/delta_product.py [--shape 8x2048] [--factors 1 2 3 4] [--only-ours]

Prints a line for each number of factors as soon as it is measured: the medians in ms of the forward pass and of both
passes, their ratios to those of the first line, and MiB beyond the inputs. Heads have 128 keys and values, in bf16.
Gates, step sizes and norms are computed from raw projections, inside or outside of the kernels, and timed with them.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from lrnn.bench.kernels import environment, make_inputs, parse_shape, peak_memory
from lrnn.bench.peers import Inputs, fla_guard, fla_guard_lifted
from lrnn.kernels.delta_rule.api import fused_gated_delta_product, fused_gated_delta_rule

HEAD = 128


def product_inputs(batch_size: int, seq_len: int, factors: int, heads: int, device: str = "cuda") -> Inputs:
    """Return raw projections as `make_inputs` does, with k, v [B, T, n_h, H, D] and b [B, T, n_h, H]."""
    x = make_inputs(batch_size, seq_len * factors, heads, HEAD, device)
    x |= {name: x[name].unflatten(1, (seq_len, factors)) for name in ("k", "v", "b")}
    return x | {name: x[name][:, :seq_len].contiguous() for name in ("q", "a")}


def gates_and_steps(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return log-gates and step sizes in float32, as layers compute them outside of kernels."""
    return -x["A_log"].exp() * F.softplus(x["a"].float() + x["dt_bias"]), 2 * x["b"].float().sigmoid()


def ours(x: Inputs) -> Tensor:
    q, k, v = x["q"], x["k"], x["v"]
    if k.shape[2] == 1:
        k, v, b = (y[:, :, 0] for y in (k, v, x["b"]))
        return fused_gated_delta_rule(q, k, v, x["a"], b, x["A_log"], x["dt_bias"])[0]
    return fused_gated_delta_product(q, k, v, x["a"], x["b"], x["A_log"], x["dt_bias"])[0]


def fla(x: Inputs) -> Tensor:
    from fla.ops.gated_delta_product import chunk_gated_delta_product
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    g, beta = gates_and_steps(x)
    factors = x["k"].shape[2]
    k, v, beta = (y.flatten(1, 2) for y in (x["k"], x["v"], beta))
    if factors == 1:
        return chunk_gated_delta_rule(x["q"], k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return chunk_gated_delta_product(
        x["q"], k, v, g=g, beta=beta, num_householder=factors, use_qk_l2norm_in_kernel=True
    )[0]


def measure(run: Callable[[Inputs], Tensor], x: Inputs) -> tuple[float, float, float]:
    """Return the ms of the forward pass and of both passes, and MiB."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    do = torch.randn_like(leaves["q"])  # with H heads of one size, outputs are shaped like queries

    def forward() -> Tensor:
        return run(leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), list(leaves.values()), do)

    times = [do_bench(call, warmup=20, rep=120, quantiles=[0.5]) for call in (forward, both)]
    return *times, peak_memory(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8x2048", metavar="BxT", help="batch size and tokens (default 8x2048)")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 3, 4], help="factors per token")
    parser.add_argument("--heads", type=int, default=16, help="heads (default 16)")
    parser.add_argument("--only-ours", action="store_true", help="leave out fla, whose first calls take minutes")
    args = parser.parse_args()
    print("\n".join(f"{name:22}{value}" for name, value in environment().items()), flush=True)
    if not args.only_ours and (note := fla_guard()):
        print(note)
    print(
        "| | factors | forward | forward + backward | to the first line | MiB |\n|---|---|---|---|---|---|", flush=True
    )
    for name, run in (("lrnn", ours), *(() if args.only_ours else (("fla", fla),))):
        first: tuple[float, float] | None = None
        for factors in args.factors:
            x = product_inputs(*parse_shape(args.shape), factors, args.heads)
            with fla_guard_lifted() if name == "fla" else nullcontext():
                forward, both, memory = measure(run, x)
            first = first or (forward, both)
            ratios = f"{forward / first[0]:.2f} / {both / first[1]:.2f}"
            print(f"| {name} | {factors} | {forward:.3f} | {both:.3f} | {ratios} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
