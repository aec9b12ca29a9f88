"""x + mixer(norm(x)) for (gated) DeltaNet and DeltaProduct, with its own backward pass.

The plain form is in `mixer_deltanet.py`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn.kernels import gated_rms_norm
from lrnn.kernels.common.constants import HEAD_SIZES
from lrnn.kernels.delta_rule.api import is_saving
from lrnn.kernels.delta_rule.heads import pad_heads, padded_sizes
from lrnn.kernels.delta_rule.operator import gated_delta_rule_backward, gated_delta_rule_forward
from lrnn.kernels.reference.documents import states_of_documents, states_of_rows
from lrnn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from lrnn.kernels.short_conv import operator as short_conv
from lrnn.kernels.short_conv.api import TAPS
from lrnn.model.cache import LrnnCacheLayer
from lrnn.model.layers import Mixer, RMSNorm, pass_inputs
from lrnn.model.mixer_deltanet import DeltaNet
from lrnn.pretrain.fused.float8 import Float8Product
from lrnn.pretrain.fused.product import Product


class FusedDeltaNet:
    """Compute x + mixer(norm(x)).

    All projections of norm(x) are one product [q | k | v | gate | b | a], whose columns the other kernels read and
    whose gradient they write in place. The norms are computed again in the backward pass. With `float8`, the products
    are those of `Float8Product`, but [b | a], which eigenvalues and decays come from, is a product of its own in
    `dtype`. Heads of other sizes than those of the kernels are padded between convolution and delta rule.
    """

    def __init__(self, norm: RMSNorm, mixer: DeltaNet, dtype: torch.dtype, float8: bool):
        self.norm, self.mixer = norm, mixer
        wide = [mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight]
        narrow = [mixer.b_proj.weight]
        if mixer.gated:
            wide, narrow = [*wide, mixer.g_proj.weight], [*narrow, mixer.a_proj.weight]
        if float8:
            self.inner = [Float8Product(wide, dtype), Product(narrow, dtype)]
        else:
            self.inner = [Product([*wide, *narrow], dtype)]
        self.out = (Float8Product if float8 else Product)([mixer.o_proj.weight], dtype)
        self.products = [*self.inner, self.out]
        self.convolutions = [mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d]
        self.scale = mixer.heads[1] ** -0.5
        self.padded = padded_sizes(mixer.heads[1], mixer.value_heads[1])

    @staticmethod
    def fits(mixer: Mixer) -> bool:
        """Return whether the mixer is one of those that can be computed so."""
        return (
            isinstance(mixer, DeltaNet)
            and max(mixer.heads[1], mixer.value_heads[1]) <= HEAD_SIZES[-1]
            and mixer.q_conv1d.weight.shape[-1] in TAPS
        )

    def __call__(
        self, x: Tensor, cache: LrnnCacheLayer | None, cu_seqlens: Tensor | None, document: Tensor | None
    ) -> Tensor:
        """Return x + mixer(norm(x)).

        Args:
            x: [B, T, hidden] in the dtype of the products.
            cache: holds the state ahead of x, which gets no gradient, and is given the state after it; or None.
            cu_seqlens: int32 [N + 1], the boundaries of documents in the flattened B * T tokens, or None.
            document: int64 [B, T], the document of each token, or None.
        """
        return _FusedDeltaNet.apply(x.contiguous(), cache, cu_seqlens, document, self, *self.parameters())

    def parameters(self) -> list[Tensor]:
        """Return the parameters in the order in which the backward pass returns their gradients."""
        mixer = self.mixer
        gates = [mixer.A_log, mixer.dt_bias] if mixer.gated else []
        convolutions = [c.weight for c in self.convolutions]
        matrices = [weight for product in self.products for weight in product.weights]
        return [self.norm.weight, mixer.o_norm.weight, *gates, *convolutions, *matrices]

    def by_step(self, x: Tensor) -> Tensor:
        """Return x [B, T, n_h * D], with the columns of n_h factors, as a view [B, T * n_h, D]."""
        return x.unflatten(-1, (self.mixer.num_householder, -1)).flatten(1, 2)

    def step_bounds(self, cu_seqlens: Tensor | None) -> Tensor | None:
        """Return the boundaries of documents in steps."""
        factors = self.mixer.num_householder
        return cu_seqlens if cu_seqlens is None or factors == 1 else cu_seqlens * factors

    def gates(self) -> tuple[Tensor | None, Tensor | None]:
        """Return A_log and dt_bias."""
        return (self.mixer.A_log, self.mixer.dt_bias) if self.mixer.gated else (None, None)

    def columns(self, zs: list[Tensor]) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor]:
        """Return the parts of the inner products [B, T, columns]: [q, k, v], the gate [B, T, HV, V], a, and b."""
        q, k, v, *rest = (part for p, z in zip(self.inner, zs, strict=True) for part in z.split(p.rows, -1))
        if not self.mixer.gated:
            return [q, k, v], None, None, rest[0]
        gate, b, a = rest
        return [q, k, v], gate.unflatten(-1, self.mixer.value_heads), a, b

    def as_heads(self, qkv: list[Tensor]) -> list[Tensor]:
        """Return q [B, T, H, K], and k and v [B, T * n_h, ...] by step, padded to the sizes of the kernels."""
        (K, V), mixer, (q, k, v) = self.padded, self.mixer, qkv
        by_step = (q, self.by_step(k), self.by_step(v))
        kinds = zip(by_step, (mixer.heads, mixer.heads, mixer.value_heads), (K, K, V), strict=True)
        return [pad_heads(x.unflatten(-1, heads), size) for x, heads, size in kinds]

    def as_columns(self, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
        """Return [B, T, columns] of gradients of what `as_heads` returns."""
        K, V = self.mixer.heads[1], self.mixer.value_heads[1]
        return [d[..., :size].reshape(*dq.shape[:2], -1) for d, size in ((dq, K), (dk, K), (dv, V))]

    def initial_states(
        self, cache: LrnnCacheLayer | None, cu_seqlens: Tensor | None, document: Tensor | None
    ) -> Tensor | None:
        """Return the states ahead of sequences or documents, padded to the sizes of the kernels, or None for zeros."""
        state = states_of_documents(self.mixer.read_state(cache), cu_seqlens, document)
        if state is None:
            return None
        (K, V), sizes = self.padded, state.shape[2:]
        return F.pad(state, (0, V - sizes[1], 0, K - sizes[0])).contiguous()

    def without_padding(self, state: Tensor) -> Tensor:
        """Return states [B, HV, K, V] in the sizes of the mixer."""
        return state[..., : self.mixer.heads[1], : self.mixer.value_heads[1]]

    def gated_norm(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """Return the normed output of the delta rule as rows [B * T, HV * V]."""
        norm = self.mixer.o_norm
        y = gated_rms_norm.compute(o, gate, norm.weight, norm.eps)
        return y.flatten(-2).flatten(0, 1)


class _FusedDeltaNet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cache: LrnnCacheLayer | None,
        cu_seqlens: Tensor | None,
        document: Tensor | None,
        layer: FusedDeltaNet,
        *parameters: Tensor,
    ) -> Tensor:
        mixer, norm = layer.mixer, layer.norm
        rows = x.flatten(0, 1)
        y = rms_norm_forward(rows, norm.weight, norm.eps)
        zs = [product.forward(y).unflatten(0, x.shape[:2]) for product in layer.inner]
        qkv, gate, a, b = layer.columns(zs)
        a, b = None if a is None else a.contiguous(), b.contiguous()
        mixer.note_eigenvalues(partial(mixer._eigenvalues, b))
        weights: list[Tensor] = [c.weight for c in layer.convolutions]
        before = list(pass_inputs(qkv, cache, weights[0].shape[-1], None, cu_seqlens) or [])
        q, k, v = layer.as_heads(short_conv.compute(qkv, weights, before, cu_seqlens))
        b, options = layer.by_step(b), (mixer.beta_range, layer.scale, True)
        initial, bounds = layer.initial_states(cache, cu_seqlens, document), layer.step_bounds(cu_seqlens)
        o, final, *kept = gated_delta_rule_forward(
            q, k, v, a, b, *layer.gates(), *options, initial, cache is not None, bounds, mixer.precision, is_saving()
        )
        if cache is not None:
            cache.state = layer.without_padding(states_of_rows(final, document))
        o = o[..., : mixer.value_heads[1]].contiguous()
        ctx.layer, ctx.options, ctx.taps_ahead = layer, options, len(before)
        ctx.save_for_backward(x, cu_seqlens, initial, *before, q, k, v, a, b, o, *zs, *kept)
        return layer.out.forward(layer.gated_norm(o, gate)).add_(rows).view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        x, cu_seqlens, initial, *rest = ctx.saved_tensors
        before, rest = rest[: ctx.taps_ahead], rest[ctx.taps_ahead :]
        q, k, v, a, b, o, *rest = rest
        layer: FusedDeltaNet = ctx.layer
        zs, kept = rest[: len(layer.inner)], rest[len(layer.inner) :]
        mixer, norm, o_norm = layer.mixer, layer.norm, layer.mixer.o_norm
        A_log, dt_bias = layer.gates()
        qkv, gate, _, _ = layer.columns(zs)
        dzs = [torch.empty_like(z) for z in zs]
        dqkv, dgate, da_column, db_column = layer.columns(dzs)
        rows, dx_rows = x.flatten(0, 1), dx.contiguous().flatten(0, 1)

        dn, n = layer.out.input_gradient(dx_rows).view_as(o), torch.empty_like(o)
        do, d_o_norm = gated_rms_norm.write_gradients(dgate, n, dn, o, gate, o_norm.weight, o_norm.eps)
        d_out = layer.out.weight_gradients(dx_rows, n.flatten(-2).flatten(0, 1))
        dq, dk, dv, da, db, d_gates, _ = gated_delta_rule_backward(
            pad_heads(do, layer.padded[1]),
            None,
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            *ctx.options,
            initial,
            layer.step_bounds(cu_seqlens),
            mixer.precision,
            *kept,
        )
        db_column.copy_(db.view_as(db_column))
        gates = []
        if da_column is not None and A_log is not None and dt_bias is not None:
            da_column.copy_(da)
            gates = [d_gates[0].to(A_log.dtype), d_gates[1].to(dt_bias.dtype)]
        weights: list[Tensor] = [c.weight for c in layer.convolutions]
        d_taps = short_conv.write_gradients(dqkv, layer.as_columns(dq, dk, dv), qkv, weights, before, cu_seqlens)
        taps = d_taps.split([w.shape[0] for w in weights])
        convolutions = [d[:, None].to(w.dtype) for d, w in zip(taps, weights, strict=True)]

        dz_rows = [dz.flatten(0, 1) for dz in dzs]
        dy = layer.inner[0].input_gradient(dz_rows[0])
        for product, dz in zip(layer.inner[1:], dz_rows[1:], strict=True):
            product.add_input_gradient(dy, dz)
        dx, d_norm, y = rms_norm_backward(dy, rows, norm.weight, norm.eps, dx_rows)
        d_inner = [d for product, dz in zip(layer.inner, dz_rows, strict=True) for d in product.weight_gradients(dz, y)]
        small = [d_norm.to(norm.weight.dtype), d_o_norm.to(o_norm.weight.dtype), *gates, *convolutions]
        return dx.view_as(x), None, None, None, None, *small, *d_inner, *d_out
