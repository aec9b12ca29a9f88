"""The lrnn model: blocks of a token mixer and an MLP, and the language model on them. Copied into exported folders.

The files of this folder depend on torch and transformers, and through `ops.py` on the kernels of `lrnn.kernels` or, in
an exported folder without lrnn, on the plain PyTorch files beside them. On CUDA, if lrnn is installed, the mixers run
on its Triton kernels, or in 16 bits on those of `fla` (`lrnn.kernels.recurrences`). On CPU and without lrnn they run
in PyTorch.

Parameter names and shapes of the DeltaNet mixers are those of `fla`'s `gated_deltanet` and `delta_net` models.
"""

from collections.abc import Callable
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
from transformers.utils import ModelOutput, logging

from .cache import LrnnCache, LrnnCacheLayer, layers_of
from .configuration_lrnn import LrnnConfig
from .inputs import Layout, check_cache_position, read_layout, refuse_keywords, selected_states
from .layers import Mixer, RMSNorm, ShortConvolution
from .mixers import MIXERS
from .ops import swiglu
from .renamed import accepts_cache

logger = logging.get_logger(__name__)

LOSS_CHUNK = 4096  # tokens whose logits exist at a time in training: [4096, 32000] in float32 is 0.5 GB
SMALL_LOGITS = 2**24  # logits up to which all of them are kept for the backward pass: 64 MB in float32


class SwiGLU(nn.Module):
    def __init__(self, config: LrnnConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LrnnBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with `norm_position` "post", x + norm(mixer(x)), x + norm(mlp(x))."""

    # If set, it is called in place of the lines below, for the same result. `lrnn.pretrain.fused` sets it.
    fused: Callable[[Tensor, LrnnCacheLayer | None, Tensor | None, Tensor | None], Tensor] | None = None

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = MIXERS[config.mixer](config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.norms_outputs = config.norm_position == "post"

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        if self.fused is not None and (cache is None or cache.keeps_both_states) and mask is None:
            return self.fused(x, cache, cu_seqlens, document)
        if self.norms_outputs:
            x = x + self.attn_norm(self.attn(x, cache, mask, cu_seqlens, document))
            return x + self.mlp_norm(self.mlp(x))
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
        self.layers = nn.ModuleList(LrnnBlock(config.layer(i), i) for i in range(config.num_hidden_layers))
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
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Return the hidden states of a batch of token sequences.

        Documents that are packed into a row are named by `position_ids`, `seq_idx`, `cu_seqlens` or transformers'
        `cu_seq_lens_q` and `cu_seq_lens_k`. The state and the convolutions are reset at each document. There is no
        cache then.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] or [B, tokens of the cache + T], 1 at tokens and 0 at padding, which may be anywhere.
                A row gives what its tokens alone would give.
            position_ids: int64 [B or 1, T]. A document starts where a number is not the one before plus 1; the numbers
                have no other effect.
            past_key_values: the `LrnnCache` of the tokens before, an empty `DynamicCache`, which is filled, or None.
            inputs_embeds: [B, T, hidden], in place of `input_ids`.
            use_cache: whether to return a cache; default `config.use_cache`, and no cache in training or with packed
                documents. A cache that is passed is always used.
            seq_idx: int [B or 1, T], the document of each token.
            cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens. Every row must start one.
            output_hidden_states: whether to return the embeddings, the output of each block but the last, and the
                final norm's output, or the numbers of those to return.
            return_dict: whether to return an object instead of a tuple; default `config.return_dict`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value that the model cannot obey.
        """
        x = self._embed(input_ids, inputs_embeds)
        B, T = x.shape[:2]
        given = {"cu_seqlens": cu_seqlens}
        given |= {name: kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        cache_position = kwargs.pop("cache_position", None)
        refuse_keywords(kwargs, type(self).__name__)
        layers = None if past_key_values is None else layers_of(past_key_values, len(self.layers), B)
        seen = layers[0].seen_tokens if layers else 0
        check_cache_position(cache_position, seen, T)
        boundaries = {name: y for name, y in given.items() if y is not None}
        layout = read_layout((B, T), seen, attention_mask, position_ids, seq_idx, boundaries)
        cache = self._choose_cache(past_key_values, use_cache, layout)
        if cache is not None:
            layers = cache.layers
        select = selected_states(output_hidden_states, self.config.output_hidden_states, len(self.layers) + 1)
        x = layout.move(x)
        hidden_states: list[Tensor | None] = []
        for i, layer in enumerate(self.layers):
            hidden_states.append(layout.move_back(x) if i in select else None)
            x = layer(x, layers[i] if layers else None, layout.mask, layout.cu_seqlens, layout.document)
        for layer_cache in layers or ():
            layer_cache.seen_tokens += T
        x = layout.move_back(self.norm(x))
        hidden_states.append(x if len(self.layers) in select else None)
        states = tuple(hidden_states) if select else None
        out = BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=states)
        return _as_asked(out, return_dict, self.config)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the embeddings of the tokens [B, T, hidden]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3 or x.shape[1] == 0:
            what = "input_ids must be" if inputs_embeds is None else "inputs_embeds must be embeddings of"
            raise ValueError(f"{what} [batch, tokens] with at least one token; got shape {list(x.shape[:-1])}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # otherwise the residual stream would stay float32
        return x

    def _choose_cache(self, past_key_values: Cache | None, use_cache: bool | None, layout: Layout) -> Cache | None:
        """Return the cache to use: the caller's, a new one, or none.

        Raises:
            ValueError: a cache together with packed documents, or the caller's with gradient checkpointing.
        """
        packed = layout.cu_seqlens is not None
        recomputed = self.training and any(layer.gradient_checkpointing for layer in self.layers)
        if past_key_values is not None and all(layer.keeps_both_states for layer in past_key_values.layers):
            return past_key_values
        if packed and (use_cache or past_key_values is not None):
            raise ValueError("a cache holds one document per row, but documents are packed; pass use_cache=False")
        if recomputed and past_key_values is not None:
            raise ValueError("gradient checkpointing computes layers twice, so that it cannot continue from a cache")
        if past_key_values is not None:
            return past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if use_cache and recomputed:
            logger.warning_once("use_cache=True is incompatible with gradient checkpointing; no cache is returned")
            use_cache = False
        return LrnnCache(len(self.layers)) if use_cache else None


def _as_asked(out: ModelOutput, return_dict: bool | None, config: LrnnConfig) -> ModelOutput | tuple:
    """Return the outputs as an object, or as a tuple of those that are not None."""
    return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class LrnnForCausalLM(LrnnPreTrainedModel, GenerationMixin):
    """The language model: `LrnnModel` and a linear head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    # If set, it is called in place of the head and the summed cross-entropy. `lrnn.pretrain.fused` sets it.
    fused_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: LrnnConfig):
        super().__init__(config)
        self.model = LrnnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @property
    def init_continuous_batching(self):
        """Raise AttributeError, which makes `transformers serve --continuous-batching` generate without it.

        It keeps keys and values in pages, which a state is not.
        """
        raise AttributeError(f"{type(self).__name__} has no continuous batching; call generate with a padded batch")

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @accepts_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits [B, T, vocab] and, with labels, the loss.

        Args:
            labels: int64 [B, T], -100 at tokens without one; shifted by one inside.
            logits_to_keep: number of last tokens with logits, 0 for all; or their columns, int64 [n] or [B, n]; or a
                bool mask [B, T], with which the logits are [n, vocab]. The loss is of all labels.
            num_items_in_batch: divisor of the summed loss; default the number of labels.
            shift_labels: int64 [B, T], labels that are already shifted. Then no logits are returned, so that the logits
                of the whole batch never exist at once. (A keyword, since transformers' Trainer expects all arguments
                with such a name in every batch.)

        The other arguments are those of `LrnnModel.forward`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        h = out.last_hidden_state
        logits = self.lm_head(slice_tokens(h, logits_to_keep)) if shift_labels is None else None
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = None if shift_labels is None else self._loss(h, shift_labels, num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return _as_asked(result, return_dict, self.config)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, attention_mask=None, **kwargs):
        """Return the arguments of `forward` for the next token, as transformers does.

        Raises:
            ValueError: a prompt ends in padding. Its next token would be predicted from the padding.
        """
        padded = attention_mask is not None and attention_mask.ndim == 2
        # A piece of a prompt that is read in pieces may be nothing but padding.
        if padded and bool((attention_mask.any(1) & (attention_mask[:, -1] == 0)).any()):
            raise ValueError("a prompt ends in padding, so nothing can follow it; set padding_side='left'")
        # `generate` reads these itself (for stop strings, for example), and yet passes them on.
        kwargs = {name: x for name, x in kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def _loss(self, h: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Return the cross-entropy summed over the labels, divided by `num_items`.

        Unless the logits are few, they are computed in pieces, and again in the backward pass.
        """

        def piece(h: Tensor, labels: Tensor) -> Tensor:
            logits = self.lm_head(h).float()
            return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")

        if labels.shape != h.shape[:2]:
            raise ValueError(f"labels must have shape {list(h.shape[:2])}, as the tokens; got {list(labels.shape)}")
        flat_h, flat_labels = h.flatten(0, 1), labels.flatten()
        if self.fused_loss is not None:
            total = self.fused_loss(flat_h, flat_labels)
        elif flat_labels.numel() * self.config.vocab_size <= SMALL_LOGITS:
            total = piece(flat_h, flat_labels)
        else:
            # Nothing random is inside, and a generator's state cannot be read while a CUDA graph is captured.
            run = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
            pieces = zip(flat_h.split(LOSS_CHUNK), flat_labels.split(LOSS_CHUNK), strict=True)
            total = torch.stack([run(*p) for p in pieces]).sum()
        if num_items is None:
            num_items = (labels != -100).sum()
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def slice_tokens(h: Tensor, keep: int | Tensor) -> Tensor:
    """Return the hidden states [B, T, hidden] of the tokens that `logits_to_keep` names."""
    if isinstance(keep, int):
        return h[:, -keep:] if keep else h
    if keep.ndim < 2:
        return h[:, keep]
    return h[keep] if keep.dtype == torch.bool else h.take_along_dim(keep[..., None], 1)
