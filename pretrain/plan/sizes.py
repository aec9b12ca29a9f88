"""The sizes of a model that its memory and speed follow from, layer by layer."""

from collections import Counter
from dataclasses import dataclass

from lrnn import LrnnConfig
from lrnn.kernels.common.constants import HEAD_SIZES
from lrnn.kernels.delta_rule.heads import padded_sizes
from lrnn.kernels.short_conv.api import TAPS
from lrnn.model.mixer_attention import Attention
from lrnn.model.mixer_deltanet import DeltaNet, HeadSizes
from lrnn.model.mixers import MIXERS
from lrnn.model.registry import Cost
from lrnn.pretrain.plan.attention import AttentionSizes


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer.

    Attributes:
        mixer: name of the mixer.
        hidden, intermediate: sizes of the block.
        heads: heads of the mixer and their sizes.
        taps: taps of the short convolutions.
        cost: what the mixer declares.
        factors: Householder factors per token of a DeltaNet or DeltaProduct mixer; 0 for other mixers.
        gated: whether such a mixer has gates.
        attention: sizes of attention; None for other mixers.
        norms_outputs: whether norms are on what the layer adds; see `norm_position` of `LrnnConfig`.
    """

    mixer: str
    hidden: int
    intermediate: int
    heads: HeadSizes
    taps: int
    cost: Cost
    factors: int
    gated: bool
    attention: AttentionSizes | None
    norms_outputs: bool

    @classmethod
    def of(cls, config: LrnnConfig) -> "LayerSizes":
        """Return the sizes of a layer of this configuration, which is that of one layer."""
        mixer = MIXERS[config.mixer]
        is_delta = issubclass(mixer, DeltaNet)
        return cls(
            mixer=config.mixer,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=mixer.head_sizes(config) if is_delta else HeadSizes.equal(config.num_heads, config.head_dim),
            taps=config.conv_size,
            cost=mixer.cost(config),
            factors=mixer.factors(config) if is_delta else 0,
            gated=is_delta and mixer.gated,
            attention=AttentionSizes.of(config) if issubclass(mixer, Attention) else None,
            norms_outputs=config.norm_position == "post",
        )

    @property
    def padded(self) -> HeadSizes:
        """The heads as the kernels of the delta rule compute them; see `lrnn.kernels.delta_rule.heads`."""
        K, V = padded_sizes(self.heads.K, self.heads.V)
        return self.heads._replace(K=K, V=V)

    @property
    def projected(self) -> int:
        """Rows of the wide projections of a DeltaNet or DeltaProduct mixer: q, k and v of each factor, the gate."""
        return self.cost.channels + self.gated * self.heads.values

    @property
    def mlp(self) -> int:
        """Weights of the MLP."""
        return 3 * self.hidden * self.intermediate

    @property
    def matrices(self) -> int:
        """Weights of all linear maps."""
        return self.cost.weights + self.mlp

    @property
    def parameters(self) -> int:
        """Parameters, without the biases and decays of the mixer, which are a few thousand."""
        return self.matrices + self.cost.channels * self.taps + 2 * self.hidden + self.heads.V

    @property
    def mixer_is_fused(self) -> bool:
        """Whether fused layers compute the mixer too; see `FusedBlock`."""
        fits = max(self.heads.K, self.heads.V) <= HEAD_SIZES[-1] and self.taps in TAPS
        return self.factors > 0 and fits and not self.norms_outputs

    def float8_matrices(self) -> list[tuple[int, int]]:
        """Return [columns, rows] of the weights whose products are in float8 with `precision: fp8`; see `FusedBlock`.

        The projections that step sizes and decays come from are not among them.
        """
        mixer = [(self.hidden, self.projected), (self.heads.values, self.hidden)]
        mlp = [(self.hidden, 2 * self.intermediate), (self.intermediate, self.hidden)]
        return [*(mixer if self.mixer_is_fused else []), *mlp]

    @property
    def float8(self) -> int:
        """Weights whose products are in float8 with `precision: fp8`."""
        return sum(columns * rows for columns, rows in self.float8_matrices())


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        stack: the layers in their order.
        hidden, vocab: sizes of the ends.
        tied: whether the head is the embedding.
    """

    stack: tuple[LayerSizes, ...]
    hidden: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: LrnnConfig) -> "ModelSizes":
        """Return the sizes of a model."""
        return cls(
            stack=tuple(LayerSizes.of(config.layer(i)) for i in range(config.num_hidden_layers)),
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.stack)

    @property
    def kinds(self) -> Counter[LayerSizes]:
        """The layers that differ, with the number of each."""
        return Counter(self.stack)

    @property
    def state(self) -> int:
        """Numbers of fixed count that a text carries in generation."""
        return sum(layer.cost.state or 0 for layer in self.stack)

    @property
    def cache_per_token(self) -> int:
        """Numbers that each token adds to them: its keys and values."""
        return sum(layer.cost.cache_per_token for layer in self.stack)

    @property
    def float8(self) -> int:
        """Weights of all layers whose products are in float8 with `precision: fp8`."""
        return sum(layer.float8 for layer in self.stack)

    @property
    def matrices(self) -> int:
        """Weights of all linear maps, the head included and the embedding not."""
        return self.layer_matrices + self.vocab * self.hidden

    @property
    def layer_matrices(self) -> int:
        """Weights of the linear maps in layers. Muon updates these, except those of gates, less than 1% of them."""
        return sum(layer.matrices for layer in self.stack)

    @property
    def parameters(self) -> int:
        """Parameters of the model, without the biases and decays of its mixers, which are a few thousand."""
        ends = (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden
        return sum(layer.parameters for layer in self.stack) + ends
