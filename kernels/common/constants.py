"""Numbers that several kernels, their launchers and their tests agree on."""

import triton.language as tl

CHUNK = 64  # tokens per chunk: the rows of one Hopper warpgroup; a system of 64 x 64 is solved for each chunk
HEAD_SIZES = (64, 128, 256)  # sizes of keys that the delta-rule kernels support; others are padded

# Below this step size x is not recovered from beta x (`step_and_back`).
SMALL_BETA = tl.constexpr(1e-4)
# Below these step sizes dW is kept for the backward pass inside chunks, from there on beta dW (`is_kept_small`).
LEAST_KEPT, LEAST_KEPT_FP16 = tl.constexpr(1e-20), tl.constexpr(0.0625)
