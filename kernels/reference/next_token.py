"""The next token of a (gated) DeltaNet mixer, between its projections, in plain PyTorch.

The kernel of `lrnn/kernels/delta_rule/next_token.py` is tested against it. The file is copied into exported model
folders.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta_rule import fused_gated_delta_rule
from .gated_rms_norm import gated_rms_norm
from .short_conv import short_conv


def next_token(
    qkv: Sequence[Tensor],
    a: Tensor | None,
    b: Tensor,
    gate: Tensor | None,
    taps: Sequence[Tensor],
    window: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm: Tensor,
    eps: float,
    beta_range: float,
) -> tuple[Tensor, Tensor]:
    """Apply the short convolutions, the delta rule and the gated norm to one token, and write its state into `state`.

    Args:
        qkv: projections q, k [B, 1, H * K] and v [B, 1, HV * V].
        a, b: projections [B, 1, HV] for the gate on the state, or None, and for the step size.
        gate: projection [B, 1, HV * V] for the gate on the output, or None.
        taps: weights of the three convolutions, [channels, 1, taps].
        window: inputs of the convolutions ahead of the token, [B, taps - 1, channels of q, k and v].
        state: [B, HV, K, V] float32, the state ahead of the token, which is replaced by the one after it.
        A_log, dt_bias: [HV] of the gate on the state, or None.
        norm: weight [V] of the norm of a head's output.
        eps: epsilon of that norm.
        beta_range: factor on the sigmoid of b.

    Returns:
        The output [B, 1, HV * V] in the dtype of v, and the window [B, taps - 1, channels] ahead of the next token.
    """
    _, HV, K, V = state.shape
    joined = torch.cat([window, torch.cat(list(qkv), -1)], 1)
    before = window.split([x.shape[-1] for x in qkv], -1)
    q, k, v = short_conv(qkv, taps, before=before)
    heads = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (HV, V))
    o, final = fused_gated_delta_rule(
        *heads, a, b, A_log, dt_bias, beta_range=beta_range, initial_state=state, output_final_state=True
    )
    assert final is not None
    state.copy_(final)
    y = gated_rms_norm(o, None if gate is None else gate.unflatten(-1, (HV, V)), norm, eps)
    return y.flatten(-2).to(qkv[2].dtype), joined[:, 1:].clone()
