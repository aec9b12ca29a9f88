"""Measure the kernels of the gated delta rule on a GPU, beside those of fla and FlashQLA, in one run."""

import argparse
import contextlib
import functools
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from lrnn.bench.peers import Contender, Inputs, find_peers, fla_guard_lifted
from lrnn.errors import UserError, first_line
from lrnn.kernels.delta_rule.heads import check_sizes
from lrnn.model.mixer_deltanet import HeadSizes


@dataclass
class Measurement:
    """Milliseconds (median, 20% and 80% quantile) and MiB beyond the inputs; `error` if it did not run."""

    contender: str
    batch_size: int
    seq_len: int
    forward: list[float] = field(default_factory=list)
    forward_backward: list[float] = field(default_factory=list)
    graph: list[list[float]] = field(default_factory=list)  # both passes as CUDA graphs, without the host's time
    peak_forward: float = 0.0
    peak_forward_backward: float = 0.0
    first_call_seconds: float = 0.0
    error: str = ""


def make_inputs(
    batch_size: int,
    seq_len: int,
    heads: int,
    size: int,
    device: str = "cuda",
    seed: int = 0,
    *,
    value_heads: int | None = None,
    value_size: int | None = None,
) -> Inputs:
    """Return a layer's raw projections in bf16.

    They are q, k [B, T, H, K], v [B, T, HV, V], the logits a, b [B, T, HV] of gates and step sizes, and A_log, dt_bias
    [HV]. Gates are those of the start of training: A is uniform in (0, 16), and steps are log-uniform in [0.001, 0.1].
    """
    value_heads, value_size = value_heads or heads, value_size or size
    r = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=r)

    steps = torch.empty(value_heads, device=device).uniform_(-6.9, -2.3, generator=r).exp()
    x = {name: normal(batch_size, seq_len, heads, size) for name in ("q", "k")}
    x["v"] = normal(batch_size, seq_len, value_heads, value_size)
    x |= {name: normal(batch_size, seq_len, value_heads) for name in ("a", "b")}
    x["A_log"] = torch.empty(value_heads, device=device).uniform_(1e-4, 16, generator=r).log()
    x["dt_bias"] = steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
    return x


def _inputs_of(batch_size: int, seq_len: int, heads: HeadSizes) -> Inputs:
    return make_inputs(batch_size, seq_len, heads.H, heads.K, value_heads=heads.HV, value_size=heads.V)


def ours(x: Inputs, **options: Any) -> Tensor:
    """Call lrnn, which computes norms, gates and step sizes inside the kernels."""
    from lrnn.kernels.delta_rule.api import fused_gated_delta_rule

    return fused_gated_delta_rule(x["q"], x["k"], x["v"], x["a"], x["b"], x["A_log"], x["dt_bias"], **options)[0]


ours_split = functools.partial(ours, precision="split")
ours_saved = functools.partial(ours, save_states=True)
OURS: dict[str, Callable[..., Tensor]] = {"lrnn": ours, "lrnn split": ours_split, "lrnn save_states": ours_saved}


def peak_memory(run: Callable[[], Any]) -> float:
    """Return the MiB that a call allocates at its peak, beyond what was allocated before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def passes(run: Callable[[Inputs], Tensor], x: Inputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return calls of the forward pass as training runs it, and of both passes.

    The latter computes the gradients of all inputs from a fixed gradient of o.
    """
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    do = torch.randn_like(leaves["v"])

    def forward() -> Tensor:
        return run(leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), list(leaves.values()), do)

    return forward, both


def as_graph(run: Callable[[], Any]) -> Callable[[], None]:
    """Capture a call once and return a function that replays it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # what the first calls allocate and look up must not be captured
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def measure(contender: Contender, batch_size: int, seq_len: int, heads: HeadSizes) -> Measurement:
    """Time one contender at one shape. If a peer fails, its error is in the result."""
    from triton.testing import do_bench

    result = Measurement(contender.name, batch_size, seq_len)
    x = _inputs_of(batch_size, seq_len, heads)
    if contender.prepare is not None:
        x = contender.prepare(x)
    quantiles = [0.5, 0.2, 0.8]
    with fla_guard_lifted() if contender.lifts_guard else contextlib.nullcontext():
        try:
            forward, both = passes(contender.run, x)
            start = time.perf_counter()
            both()
            torch.cuda.synchronize()
            result.first_call_seconds = time.perf_counter() - start
            result.forward = do_bench(forward, warmup=50, rep=200, quantiles=quantiles)
            result.forward_backward = do_bench(both, warmup=50, rep=400, quantiles=quantiles)
            result.peak_forward, result.peak_forward_backward = peak_memory(forward), peak_memory(both)
            for run in (forward, both):
                result.graph.append(do_bench(as_graph(run), warmup=50, rep=200, quantiles=quantiles))
        except Exception as error:
            if contender.name in OURS:
                raise
            result.error = f"{type(error).__name__}: {first_line(error)}"
    return result


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a copy of 1 GB on the device."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), quantiles=[0.5]) / 1e3)


def floor_milliseconds(tokens: int, heads: HeadSizes, bandwidth: float) -> tuple[float, float]:
    """Return the time to read every input and write every result once, in bf16: forward, and both passes.

    Forward reads q, k, v, a, b and writes o. Backward reads q, k, v, a, b, do and writes dq, dk, dv, da, db.
    """
    forward = tokens * 2 * (2 * heads.keys + 2 * heads.values + 2 * heads.HV)
    backward = tokens * 2 * (4 * heads.keys + 3 * heads.values + 4 * heads.HV)
    return 1e3 * forward / bandwidth, 1e3 * (forward + backward) / bandwidth


def breakdown(batch_size: int, seq_len: int, heads: HeadSizes, repeats: int = 10) -> list[tuple[str, float, float]]:
    """Return name, milliseconds and launches of each GPU kernel of one forward and backward pass of lrnn."""
    from torch.profiler import ProfilerActivity, profile

    _, both = passes(ours, _inputs_of(batch_size, seq_len, heads))
    both()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            both()
        torch.cuda.synchronize()
    rows = [
        (event.key, event.self_device_time_total / 1e3 / repeats, event.count / repeats)
        for event in record.key_averages()
        if event.self_device_time_total > 0 and event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(rows, key=lambda row: -row[1])


def installed(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Return the name of the GPU and the versions that the figures depend on."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability()
    ptxas = get_ptxas(10 * major + minor).path
    text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", text)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown (nvidia-smi did not run)"
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver, clock, power": driver,
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "triton": triton.__version__,
        "ptxas": f"{release[1] if release else text.strip()} ({ptxas})",
        "fla": installed("flash-linear-attention"),
        "FlashQLA": installed("flash-qla"),
        "tilelang": installed("tilelang"),
    }


def parse_shape(text: str) -> tuple[int, int]:
    """Return (batch size, sequence length) of a text BxT."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or 0 in (sizes := (int(match[1]), int(match[2]))):
        raise UserError(f"--shapes takes batch size and length as in 8x4096; got {text!r}")
    return sizes


def parse_heads(args: argparse.Namespace) -> HeadSizes:
    """Return the heads that the options ask for. Raises UserError for sizes that the kernels do not take."""
    value_heads, value_size = args.value_heads, args.value_size
    heads = HeadSizes(
        H=args.heads,
        HV=args.heads if value_heads is None else value_heads,
        K=args.head_size,
        V=args.head_size if value_size is None else value_size,
    )
    if min(heads) < 1:
        raise UserError("--heads, --value-heads, --head-size and --value-size should be at least 1")
    if heads.HV % heads.H:
        raise UserError(f"--value-heads {heads.HV} should be a multiple of --heads {heads.H}")
    try:
        check_sizes(heads.K, heads.V)
    except ValueError as error:
        raise UserError(str(error)) from None
    return heads


def parse_contenders(args: argparse.Namespace) -> tuple[list[str], bool]:
    """Return which of our variants are measured, and whether peers are. Raises UserError for an unknown variant."""
    if args.only is None:
        return list(OURS), not args.only_ours
    unknown = [name for name in args.only if name not in OURS]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is none of ours; give some of {', '.join(map(repr, OURS))}")
    return args.only, False


def bench_kernels(args: argparse.Namespace) -> None:
    """Print the tables of `lrnn bench kernels`."""
    shapes, heads = [parse_shape(shape) for shape in args.shapes], parse_heads(args)
    ours, peers_wanted = parse_contenders(args)
    if not torch.cuda.is_available():
        raise UserError("lrnn bench kernels needs a GPU, and PyTorch finds none here")
    env = environment()
    print("\n".join(f"{name:22}{value}" for name, value in env.items()))
    peers, lines = find_peers() if peers_wanted else ([], ["fla, FlashQLA: left out (--only, --only-ours)"])
    print("\n".join(lines))
    contenders = [*(Contender(name, OURS[name]) for name in ours), *peers]
    results = _bench_shapes(shapes, heads, contenders, args)
    if args.json:
        args.json.write_text(json.dumps({"environment": env, "notes": lines, "kernels": results}, indent=1) + "\n")


def _bench_shapes(
    shapes: list[tuple[int, int]], heads: HeadSizes, contenders: list[Contender], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print a table of every contender at every shape, and return its rows for JSON."""
    bandwidth = copy_bandwidth()
    print(
        f"device copy: {bandwidth / 1e12:.2f} TB/s, read and written; the floor is every input and result once at that"
    )
    print(f"\nbf16, {_named(heads)}; milliseconds, median (20% to 80%); MiB beyond the inputs")
    print(
        f"{'shape':12} {'':16} {'forward':>21} {'forward + backward':>24} {'to lrnn':>13} {'MiB':>15} "
        f"{'first call':>11}"
    )
    results: list[dict[str, Any]] = []
    for batch_size, seq_len in shapes:
        rows: list[Measurement] = []
        for contender in contenders:
            rows.append(measure(contender, batch_size, seq_len, heads))
            torch.cuda.empty_cache()
            row = rows[-1]
            print(f"{f'B{batch_size} T{seq_len}':12} {row.contender:16} {_figures(row, rows[0])}", flush=True)
            if not row.error:
                print(f"{'':12} {'- graph':16} {_graph_figures(row, rows[0])}", flush=True)
        floor = floor_milliseconds(batch_size * seq_len, heads, bandwidth)
        print(f"{'':12} {'floor':16} {floor[0]:21.3f} {floor[1]:24.3f}")
        results += [asdict(row) for row in rows]
        results.append({"contender": "floor", "batch_size": batch_size, "seq_len": seq_len, "forward": [floor[0]]})
        results[-1]["forward_backward"] = [floor[1]]
        if args.breakdown:
            for name, milliseconds, launches in breakdown(batch_size, seq_len, heads):
                print(f"{'':12} {milliseconds:8.3f} ms {launches:5.1f} x  {name[:80]}")
    return results


def _named(heads: HeadSizes) -> str:
    return ", ".join(f"{name} {number}" for name, number in heads._asdict().items())


def _spread(times: list[float]) -> str:
    median, low, high = times
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _graph_figures(row: Measurement, first: Measurement) -> str:
    spread = [_spread(times) for times in row.graph]
    ratios = " / ".join(f"{mine[0] / ours[0]:.2f}" for mine, ours in zip(row.graph, first.graph, strict=True))
    return f"{spread[0]:>21} {spread[1]:>24} {ratios:>13}"


def _figures(row: Measurement, first: Measurement) -> str:
    if row.error:
        return f"failed: {row.error}"
    spread = [_spread(times) for times in (row.forward, row.forward_backward)]
    ratios = f"{row.forward[0] / first.forward[0]:.2f} / {row.forward_backward[0] / first.forward_backward[0]:.2f}"
    memory = f"{row.peak_forward:.0f} / {row.peak_forward_backward:.0f}"
    return f"{spread[0]:>21} {spread[1]:>24} {ratios:>13} {memory:>15} {row.first_call_seconds:9.1f} s"
