"""Time the products of a 1.36B model's layers in bfloat16 and in float8, and the casts, on a GPU.

    python tests/benchmarks/float8_products.py

Each product is repeated for 0.3 s, so that the GPU runs at the clock that its power limit leaves it.
"""

from collections.abc import Callable

import torch

from lrnn.kernels.float8 import cast_rows
from lrnn.kernels.swiglu import swiglu_backward, swiglu_backward_float8, swiglu_forward, swiglu_forward_float8

TOKENS, LAYERS = 16384, 22
SHAPES = [(8192, 2048), (2048, 2048), (11264, 2048), (2048, 5632)]  # features out and in: qkvg, o, gate and up, down


def milliseconds(function: Callable[[], object], seconds: float = 0.3) -> float:
    def repeat(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times

    repeat(5)
    return repeat(max(5, int(1000 * seconds / repeat(5))))


def products(N: int, K: int) -> dict[str, float]:
    """Return milliseconds of y = x W^T, dx = dy W and dW += dy^T x, and the relative error of y."""
    x, w, dy = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((TOKENS, K), (N, K), (TOKENS, N))
    )
    dw = torch.zeros(N, K, device="cuda")
    found = {
        "y bf16": milliseconds(lambda: x @ w.T),
        "dx bf16": milliseconds(lambda: dy @ w),
        "dW bf16": milliseconds(lambda: torch.addmm(dw, dy.T, x, out_dtype=torch.float32, out=dw)),
        "cast of x": milliseconds(lambda: cast_rows(x)),
        "cast of dy": milliseconds(lambda: cast_rows(dy)),
    }
    operands = {"y": (x, w), "dx": (dy, w.T.contiguous()), "dW": (dy.T.contiguous(), x.T.contiguous())}
    truth = x.float() @ w.float().T
    for name, (a, b) in operands.items():
        a8, b8 = cast_rows(a), cast_rows(b)
        for fast in (True, False):

            def multiply(a8=a8, b8=b8, fast=fast):
                scales = a8.scales, b8.scales.T
                return torch._scaled_mm(a8.values, b8.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

            found[f"{name} fp8{'' if fast else ', float32 sums'}"] = milliseconds(multiply)
            if name == "y":
                print(f"{N} x {K}: error of y, fast={fast}: {(multiply() - truth).norm() / truth.norm():.4%}")
    return found


def main() -> None:
    torch.manual_seed(0)
    rows = [products(N, K) for N, K in SHAPES]
    print(f"\n{'us':24}" + "".join(f"{f'{N} x {K}':>14}" for N, K in SHAPES) + f"{'22 layers, ms':>16}")
    for name in rows[0]:
        times = [row[name] for row in rows]
        print(f"{name:24}" + "".join(f"{1000 * t:14.1f}" for t in times) + f"{LAYERS * sum(times):16.1f}")
    ab, dh = (torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16) for n in (11264, 5632))
    pairs = [(swiglu_forward, swiglu_backward), (swiglu_forward_float8, swiglu_backward_float8)]
    for name, (forward, backward) in zip(("bf16", "fp8"), pairs, strict=True):
        times = milliseconds(lambda f=forward: f(ab)), milliseconds(lambda b=backward: b(dh, ab))
        print(f"SwiGLU, {name}: forward {1000 * times[0]:.1f} us, backward {1000 * times[1]:.1f} us")


if __name__ == "__main__":
    main()
