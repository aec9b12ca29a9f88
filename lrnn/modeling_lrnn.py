"""The lrnn model. Depends on torch and transformers, and on the kernels of `lrnn.kernels` or, in an exported folder
without lrnn, on the plain delta rule in the file beside this one.

On CUDA the token mixer runs on the kernels wherever lrnn is installed; on CPU, and without lrnn, in plain PyTorch.

Parameter names and shapes are those of `fla`'s `gated_deltanet` and `delta_net` models.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_lrnn import LrnnConfig

try:
    from lrnn.kernels.delta_rule_reference import document_ids
    from lrnn.kernels.gated_delta_rule import fused_gated_delta_rule
    from lrnn.kernels.gated_rms_norm import gated_rms_norm
    from lrnn.kernels.short_conv import short_conv
    from lrnn.kernels.tiles import use_kernels
except ImportError:  # an exported folder, loaded where lrnn is not installed
    from .delta_rule_reference import (  # type: ignore[import-not-found, no-redef]
        document_ids,
        fused_gated_delta_rule,
    )

    def use_kernels(x: Tensor) -> bool:
        return False


LOSS_CHUNK = 4096  # tokens whose logits exist at a time in training: [4096, 32000] in float32 is 0.5 GB


class LrnnCache(Cache):
    """What generation carries on: for each layer the last inputs of the convolutions and the recurrent state.

    Its size does not depend on the number of tokens read. It cannot be cropped: a recurrent state has no way back.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        self.layers: list = []  # read by transformers' Cache
        self.layer_class_to_replicate = None
        self.offloading = False
        self.reset_states(num_layers)

    def reset_states(self, num_layers: int):
        self.conv: list[Tensor | None] = [None] * num_layers  # [B, conv_size - 1, channels]
        self.state: list[Tensor | None] = [None] * num_layers  # [B, H, K, V], float32
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.state)

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return self.seen_tokens

    def get_max_cache_shape(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return -1

    def get_max_length(self, *args, **kwargs) -> None:
        return None

    def reset(self):
        self.reset_states(len(self.state))

    def _apply(self, function):
        self.conv = [None if x is None else function(x) for x in self.conv]
        self.state = [None if x is None else function(x) for x in self.state]

    def reorder_cache(self, beam_idx: Tensor):
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        self._apply(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor):
        self._apply(lambda x: x[indices])

    def crop(self, *args, **kwargs):
        raise NotImplementedError("a recurrent state cannot be rolled back, so its cache cannot be cropped")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """norm(x) * silu(gate), or without a gate norm(x) alone, in float32; the result has the given dtype."""

    def forward(self, x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        if use_kernels(x):
            return gated_rms_norm(x, gate, self.weight, self.eps).to(dtype)
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        if gate is not None:
            y = y * F.silu(gate.float())
        return y.to(dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU, summed in float32. Weight [D, 1, taps], as in `fla`."""

    def __init__(self, size: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))

    def reset_parameters(self):
        # PyTorch's default for a convolution with `taps` inputs a channel.
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, document: Tensor | None) -> Tensor:
        """x [B, T, D]; before [B, taps - 1, D], the inputs ahead of x, None for zeros.

        `document` int64 [B, T] or None is `document_ids(cu_seqlens, B, T)`: no tap reaches into another document.
        Returns [B, T, D] in float32, on the kernels in the dtype of x.
        """
        if use_kernels(x):
            states = None if before is None else [before.to(x.dtype)]
            return short_conv([x], [self.weight], before=states, cu_seqlens=cu_seqlens)[0]
        taps = self.weight.shape[-1]
        weight = self.weight[:, 0].float()
        y = weight[:, -1] * x
        T = x.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
        for back in range(1, taps):
            shifted = padded[:, taps - 1 - back : taps - 1 - back + T]
            if document is not None:
                same = document == F.pad(document, (back, 0), value=-1)[:, :T]
                shifted = shifted * same[..., None]
            y = y + weight[:, taps - 1 - back] * shifted
        return F.silu(y)


class DeltaNet(nn.Module):
    """Token mixer: DeltaNet, or gated DeltaNet where `config.mixer` says so.

    beta_t = range * sigmoid(W_b x_t), with range 2 for eigenvalues in [-1, 1] and 1 for [0, 1];
    log-gate g_t = -exp(A_log) softplus(W_a x_t + dt_bias).
    """

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.gated = config.mixer == "gated_deltanet"
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.q_conv1d = ShortConvolution(inner, config.conv_size)
        self.k_conv1d = ShortConvolution(inner, config.conv_size)
        self.v_conv1d = ShortConvolution(inner, config.conv_size)
        if self.gated:
            self.a_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
            self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_norm = GatedRMSNorm(config.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def reset_parameters(self):
        """Gates as in Mamba-2 and `fla`: A uniform in (0, 16), step softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        if not self.gated:
            return
        with torch.no_grad():
            if not getattr(self.A_log, "_is_hf_initialized", False):
                # The lower bound keeps log A finite; a head at it decays by less than 1e-5 a step.
                self.A_log.copy_(torch.empty_like(self.A_log).uniform_(0, 16).clamp_(min=1e-4).log_())
            if not getattr(self.dt_bias, "_is_hf_initialized", False):
                dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp_()
                self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(
        self,
        x: Tensor,
        cache: LrnnCache | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        """x [B, T, hidden]; mask bool [B, T], False at padding; document is `document_ids(cu_seqlens, B, T)`.

        Returns [B, T, hidden] in the dtype of x, and puts the new state into `cache`.
        """
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        inputs = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        before: list[Tensor | None] = [None] * 3
        state = None
        if cache is not None:
            window = cache.conv[self.layer_idx]
            if window is not None:
                before = list(window.chunk(3, -1))
                state = cache.state[self.layer_idx]
            cache.conv[self.layer_idx] = self._last_inputs(torch.cat(inputs, -1), window)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        q, k, v = (
            conv(y, b, cu_seqlens, document).unflatten(-1, (self.num_heads, self.head_dim))
            for conv, y, b in zip(convolutions, inputs, before, strict=True)
        )
        b = self.b_proj(x)
        a = self.a_proj(x) if self.gated else None
        if mask is not None:  # a padded step is the identity on the state: beta = 0 and a log-gate of 0
            b = b.masked_fill(~mask[..., None], float("-inf"))
            a = None if a is None else a.masked_fill(~mask[..., None], float("-inf"))
        o, state = fused_gated_delta_rule(
            q,
            k,
            v,
            a,
            b,
            self.A_log if self.gated else None,
            self.dt_bias if self.gated else None,
            allow_neg_eigval=self.beta_range == 2.0,
            initial_state=state,
            output_final_state=cache is not None,
            cu_seqlens=cu_seqlens,
        )
        if cache is not None:
            cache.state[self.layer_idx] = state
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_dim)) if self.gated else None
        return self.o_proj(self.o_norm(o, gate, x.dtype).flatten(-2))

    def _last_inputs(self, inputs: Tensor, before: Tensor | None) -> Tensor:
        keep = self.q_conv1d.weight.shape[-1] - 1
        if before is None:
            before = inputs.new_zeros(inputs.shape[0], keep, inputs.shape[-1])
        joined = torch.cat([before, inputs], 1)
        return joined[:, joined.shape[1] - keep :].clone()


class SwiGLU(nn.Module):
    def __init__(self, config: LrnnConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LrnnBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DeltaNet(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cache, mask, cu_seqlens, document)
        return x + self.mlp(self.mlp_norm(x))


class LrnnPreTrainedModel(PreTrainedModel):
    config_class = LrnnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LrnnBlock"]
    _is_stateful = True  # generation modes that must rewind the cache refuse to start
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DeltaNet | ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class LrnnModel(LrnnPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: LrnnConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LrnnBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value):
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of token sequences.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, >= T], 0 at padding (its last T columns count). Padding leaves the state as it is; pad
                on the left, since the convolutions read the inputs next to them.
            past_key_values: the `LrnnCache` of the tokens before, or None.
            cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens; the state and the
                convolutions start anew at each. Every row must start a document. Training only: it excludes the cache.
        """
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # otherwise the residual stream would stay float32
        B, T = x.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = None
        if use_cache and cu_seqlens is None:
            # Some callers pass an empty cache of transformers' own kind.
            cache = past_key_values if isinstance(past_key_values, LrnnCache) else LrnnCache(len(self.layers))
        mask = None
        if attention_mask is not None and T > 1:
            mask = attention_mask[:, -T:].bool()
        document = None if cu_seqlens is None else document_ids(cu_seqlens, B, T)
        for layer in self.layers:
            x = layer(x, cache, mask, cu_seqlens, document)
        if cache is not None:
            cache.seen_tokens += T
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class LrnnForCausalLM(LrnnPreTrainedModel, GenerationMixin):
    """The language model: `LrnnModel` and a linear head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: LrnnConfig):
        super().__init__(config)
        self.model = LrnnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab] and, with labels, the loss.

        Args:
            labels: int64 [B, T], -100 where there is none; shifted by one inside.
            shift_labels: int64 [B, T], labels that are already shifted. Then no logits are returned, so that the logits
                of the whole batch never exist at once.
            num_items_in_batch: what the summed loss is divided by; default the number of labels.

        The other arguments are those of `LrnnModel.forward`.
        """
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cu_seqlens)
        h = out.last_hidden_state
        loss: Tensor | None = None
        if shift_labels is not None:
            loss = self._loss(h, shift_labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, past_key_values=out.past_key_values)
        if isinstance(logits_to_keep, int):
            h = h[:, -logits_to_keep:] if logits_to_keep else h
        else:
            h = h[:, logits_to_keep]
        logits = self.lm_head(h)
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = self._loss(out.last_hidden_state, shifted, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def _loss(self, h: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Cross-entropy summed over the labels, by pieces whose logits are computed anew in the backward pass."""

        def piece(h: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(h).float(), labels, reduction="sum")

        pieces = zip(h.flatten(0, 1).split(LOSS_CHUNK), labels.flatten().split(LOSS_CHUNK), strict=True)
        total = torch.stack([checkpoint(piece, *p, use_reentrant=False) for p in pieces]).sum()
        return total / ((labels != -100).sum() if num_items is None else num_items)
