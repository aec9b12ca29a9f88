"""The configuration of an lrnn model. Copied into exported folders."""

import copy
import os
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .code_files import AUTO_MAP, write_code
from .pattern import entry_at, options_of, read_pattern, short_pattern

DELTA_RULE_PRECISIONS = ("standard", "split")
NORM_POSITIONS = ("pre", "post")
# Options of some mixers and of blocks, with their defaults. One is written to config.json only if it is not at its
# default.
OPTIONS: dict[str, Any] = {
    "num_value_heads": None,
    "head_v_dim": None,
    "gated_norm_eps": None,
    "num_kv_heads": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "qk_norm": None,
    "sliding_window": None,
    "attention_gate": False,
    "norm_position": "pre",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "head_dim",
    "num_householder",
    "state_size",
    "conv_size",
    "intermediate_size",
)
OPTIONAL_SIZES = ("num_value_heads", "head_v_dim")


class LrnnConfig(PretrainedConfig):
    """A stack of linear-RNN blocks, each a token mixer and a SwiGLU MLP.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        mixer: name under which a file `mixer_*.py` registers its token mixer; or a list of entries, of which layer i
            has entry i modulo their number. An entry is a name, or an object with the name as `mixer` and fields of
            this configuration that its layers have instead: `["gla", "gla", {"mixer": "attention", "num_heads": 4}]`.
        num_heads, head_dim: heads of the mixer, and their key and value size.
        num_value_heads: value heads of the DeltaNet and DeltaProduct mixers, a multiple of num_heads, which is the
            default. Key head i serves value heads i r to (i + 1) r - 1, with r = num_value_heads / num_heads.
        head_v_dim: value size of a head of the DeltaNet and DeltaProduct mixers; default head_dim, which is always
            their key size.
        num_kv_heads: key and value heads of "attention", each of which serves num_heads / num_kv_heads query heads;
            default num_heads. This field and the next five are of "attention" alone.
        rope_theta: base of the rotary positions; null for no positions.
        rope_scaling: other angles of the rotary positions, for texts longer than those of an earlier training; null for
            none. A mapping with a `rope_type`, "linear", "yarn" or "llama3", and the keys that transformers has for it.
        qk_norm: RMSNorm on queries and keys: "head" over each head, "projection" over all heads together, or null.
        sliding_window: number of tokens that a token sees, itself included; null for all before it.
        attention_gate: multiply the output by sigmoid(g_proj(x)), ahead of the last projection.
        num_householder: factors per token of the DeltaProduct mixers, 1 to 4; the others do not read it.
        state_size: numbers that each channel of "mamba" keeps; the others do not read it.
        allow_neg_eigval: eigenvalues of the state transition in [-1, 1] rather than [0, 1] (arXiv 2411.12537). For the
            DeltaNet mixers it means beta = 2 sigmoid rather than sigmoid; for the others see their files. A mixer that
            has no such range does not read it.
        delta_rule_precision: precision of the DeltaNet and DeltaProduct mixers on a GPU in 16 bits: "standard", or
            "split", which carries states several times as exactly (see `lrnn.kernels.delta_rule.api`); the others do
            not read it.
        conv_size: taps of the causal short convolutions, in the mixers that have any.
        intermediate_size: width of the SwiGLU MLP.
        norm_eps: epsilon of every RMSNorm, but for `gated_norm_eps`.
        gated_norm_eps: epsilon of the norm of a mixer's output per head, ahead of its gate, in mixers that have one;
            null for `norm_eps`. Olmo Hybrid has 1e-5.
        norm_position: where the two norms of a block are: "pre", on what its mixer and its MLP read, or "post", on what
            they add to the residual stream.
        max_position_embeddings: sequence length in training, in tokens. The model does not depend on it; evaluation
            tools read their window from it.
        initializer_range: standard deviation of linear and embedding weights at the start.
        tokenizer_fingerprint: fingerprint of the tokenizer or SHA-256 of its file, as the manifest of a
            corpus has it. If it is given, corpora made with another tokenizer are refused.
        use_cache: return the state with every forward pass outside of training, as generation needs it.
        pad_token_id, bos_token_id, eos_token_id: ids of the tokenizer's special tokens; transformers reads them.
        tie_word_embeddings: use the embedding as the output layer too.

    Raises:
        ValueError: an unknown mixer, precision or position of norms, a size that is not positive, more than 4
            Householder factors, a value that the mixer cannot have, an option that it does not read, or a pattern of
            mixers that is empty or longer than the stack.
    """

    model_type = "lrnn"
    keys_to_ignore_at_inference = ["past_key_values"]
    rope_scaling = None  # a field, where transformers 5 has a property that moves the value into `rope_parameters`

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        mixer: str | list[str | dict[str, Any]] = "gated_deltanet",
        num_heads: int = 16,
        head_dim: int = 128,
        num_householder: int = 2,
        state_size: int = 16,
        allow_neg_eigval: bool = True,
        delta_rule_precision: str = "standard",
        conv_size: int = 4,
        intermediate_size: int = 5632,
        norm_eps: float = 1e-6,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        tokenizer_fingerprint: str | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        num_value_heads: int | None = None,
        head_v_dim: int | None = None,
        gated_norm_eps: float | None = None,
        norm_position: str = "pre",
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: str | None = None,
        sliding_window: int | None = None,
        attention_gate: bool = False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_value_heads = num_value_heads
        self.head_v_dim = head_v_dim
        self.num_householder = num_householder
        self.state_size = state_size
        self.conv_size = conv_size
        self.intermediate_size = intermediate_size
        self.allow_neg_eigval = allow_neg_eigval
        self.delta_rule_precision = delta_rule_precision
        self.num_kv_heads = num_kv_heads
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.qk_norm = qk_norm
        self.sliding_window = sliding_window
        self.attention_gate = attention_gate
        self.norm_eps = norm_eps
        self.gated_norm_eps = gated_norm_eps
        self.norm_position = norm_position
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self._check_fields()
        self._set_pattern(mixer)

    @property
    def is_hybrid(self) -> bool:
        """Return whether layers differ in their mixers or in the options of these."""
        return isinstance(self.mixer, list)

    @property
    def mixers(self) -> tuple[str, ...]:
        """Return the name of each layer's mixer."""
        return tuple(self.layer(i).mixer for i in range(self.num_hidden_layers))

    def layer(self, i: int) -> "LrnnConfig":
        """Return the configuration of layer i, whose `mixer` is a name, with the options of the layer's entry."""
        entry = entry_at(self.mixer, i)
        if entry == {"mixer": self.mixer}:
            return self
        layer = copy.copy(self)
        layer.__dict__.update(entry)
        return layer

    def kinds_of_layers(self) -> list[tuple["LrnnConfig", list[int]]]:
        """Return the layers that differ, each with the numbers of the layers that are as it is, in their order."""
        kinds: list[tuple[LrnnConfig, list[int]]] = []
        entries = [entry_at(self.mixer, i) for i in range(self.num_hidden_layers)]
        for i, entry in enumerate(entries):
            if entries.index(entry) == i:
                kinds.append((self.layer(i), [j for j, other in enumerate(entries) if other == entry]))
        return kinds

    def _set_pattern(self, mixer: Any) -> None:
        """Set `mixer`, after all other fields. A pattern whose entries are all the same becomes a plain mixer."""
        from .mixers import MIXERS  # here, because the mixers import this file

        entries = read_pattern(mixer, self.num_hidden_layers)
        self.mixer: Any = mixer if isinstance(mixer, str) else short_pattern(entries)
        for i, entry in enumerate(entries):
            layer = self.layer(i)
            try:
                layer._check_fields()
                MIXERS[layer.mixer].check(layer)
            except ValueError as error:
                raise ValueError(f"mixer[{i}], {entry['mixer']}: {error}" if self.is_hybrid else str(error)) from None
        if self.is_hybrid and all(entry == entries[0] for entry in entries):
            self.__dict__.update(entries[0])
        self._check_options()
        self._check_scaling()

    def _check_fields(self) -> None:
        """Raise ValueError for a value that no mixer could have."""
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        for name in OPTIONAL_SIZES:
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a positive integer or null; got {size!r}")
        for name, nullable in (("norm_eps", False), ("initializer_range", False), ("gated_norm_eps", True)):
            value = getattr(self, name)
            if not (nullable and value is None) and (type(value) not in (int, float) or not value >= 0):
                more = ", or null" * nullable
                raise ValueError(f"{name} must be a number that is not negative{more}; got {value!r}")
        if self.norm_position not in NORM_POSITIONS:
            raise ValueError(f"norm_position {self.norm_position!r} is not one of {', '.join(NORM_POSITIONS)}")
        if self.num_householder > 4:
            raise ValueError(f"num_householder must be 1, 2, 3 or 4; got {self.num_householder}")
        if self.delta_rule_precision not in DELTA_RULE_PRECISIONS:
            raise ValueError(
                f"delta_rule_precision {self.delta_rule_precision!r} is not one of {', '.join(DELTA_RULE_PRECISIONS)}"
            )

    def _check_options(self) -> None:
        """Raise ValueError if an option is set that no layer reads."""
        from .mixers import MIXERS

        for name, default in OPTIONS.items():
            if getattr(self, name) != default and not any(name in options_of(mixer) for mixer in self.mixers):
                able = ", ".join(mixer for mixer in MIXERS if name in options_of(mixer))
                layers = ", ".join(dict.fromkeys(self.mixers))
                raise ValueError(f"{name} = {getattr(self, name)!r} is for the mixers {able}, not for {layers}")

    def _check_scaling(self) -> None:
        """Raise ValueError if the rotary positions are scaled, but no layer has any."""
        scaled = [layer for layer, _ in self.kinds_of_layers() if layer.rope_scaling is not None]
        if scaled and all(layer.rope_theta is None for layer in scaled):
            raise ValueError(f"rope_scaling = {scaled[0].rope_scaling!r} has no effect, because rope_theta is null")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as config.json has them: without options at their default."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name not in OPTIONS or value != OPTIONS[name]}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write config.json, and beside it the code that it names in `auto_map`, so that the folder loads without lrnn.

        transformers calls this whenever it saves a model. The arguments are those of `PretrainedConfig`.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        write_code(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
