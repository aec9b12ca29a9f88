"""The lrnn model: blocks of a token mixer and an MLP, and the language model on them. Copied into exported folders.

The files of this folder depend on torch and transformers, and through `ops.py` on the kernels of `lrnn.kernels` or, in
an exported folder without lrnn, on the plain PyTorch files beside them. On CUDA, if lrnn is installed, the mixers run
on its Triton kernels, or in 16 bits on those of `fla` (`lrnn.kernels.recurrences`). On CPU and without lrnn they run
in PyTorch.

Parameter names and shapes of the DeltaNet mixers are those of `fla`'s `gated_deltanet` and `delta_net` models.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache import LrnnCache
from .configuration_lrnn import LrnnConfig
from .layers import Mixer, RMSNorm, ShortConvolution
from .mixers import MIXERS
from .ops import document_ids
from .renamed import accepts_cache

LOSS_CHUNK = 4096  # tokens whose logits exist at a time in training: [4096, 32000] in float32 is 0.5 GB
SMALL_LOGITS = 2**24  # logits up to which all of them are kept for the backward pass: 64 MB in float32


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
        self.attn = MIXERS[config.mixer](config, layer_idx)
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
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "gate_bias"]

    def post_init(self):
        # transformers 4 refuses the name of a parameter that the model does not have.
        names = {part for name, _ in self.named_parameters() for part in name.split(".")}
        kept = type(self)._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = [name for name in kept if name in names]
        super().post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Mixer | ShortConvolution):
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

    @accepts_cache
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
        """Return the hidden states of a batch of token sequences.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, >= T], 0 at padding (its last T columns count). Padding leaves the state as it is; pad
                on the left, since the convolutions read the inputs next to them.
            past_key_values: the `LrnnCache` of the tokens before, or None.
            cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens; the state and the
                convolutions are reset at each. Every row must start a document. Training only: it excludes the cache.
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

    @accepts_cache
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
        """Return logits [B, T, vocab] and, with labels, the loss.

        Args:
            labels: int64 [B, T], -100 at tokens without one; shifted by one inside.
            shift_labels: int64 [B, T], labels that are already shifted. Then no logits are returned, so that the logits
                of the whole batch never exist at once.
            num_items_in_batch: divisor of the summed loss; default the number of labels.

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
        """Return the cross-entropy summed over the labels, divided by `num_items`.

        Unless the logits are few, they are computed in pieces, and again in the backward pass.
        """

        def piece(h: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(h).float(), labels, reduction="sum")

        flat_h, flat_labels = h.flatten(0, 1), labels.flatten()
        if flat_labels.numel() * self.config.vocab_size <= SMALL_LOGITS:
            total = piece(flat_h, flat_labels)
        else:
            # Nothing random is inside, and a generator's state cannot be read while a CUDA graph is captured.
            run = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
            pieces = zip(flat_h.split(LOSS_CHUNK), flat_labels.split(LOSS_CHUNK), strict=True)
            total = torch.stack([run(*p) for p in pieces]).sum()
        return total / ((labels != -100).sum() if num_items is None else num_items)
