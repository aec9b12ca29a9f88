"""What an attention layer keeps for its backward pass, and takes while it runs, per token on a GPU."""

from dataclasses import dataclass

from lrnn import LrnnConfig
from lrnn.model.attention import VARLEN_OPTIONS
from lrnn.model.mixer_attention import key_heads

FLOAT32 = 4


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of an attention layer.

    Attributes:
        heads, key_heads, size: query heads, key and value heads, and their size.
        rotates: whether there are rotary positions.
        norms: norms of queries and keys per token: one per head, 2, or 0.
        windowed: whether there is a window.
        gated: whether the output has a gate.
    """

    heads: int
    key_heads: int
    size: int
    rotates: bool
    norms: int
    windowed: bool
    gated: bool

    @classmethod
    def of(cls, config: LrnnConfig) -> "AttentionSizes":
        """Return the sizes of a layer of this configuration, which is that of one layer."""
        norms = {None: 0, "head": config.num_heads + key_heads(config), "projection": 2}
        return cls(
            heads=config.num_heads,
            key_heads=key_heads(config),
            size=config.head_dim,
            rotates=config.rope_theta is not None,
            norms=norms[config.qk_norm],
            windowed=config.sliding_window is not None,
            gated=config.attention_gate,
        )

    @property
    def queries(self) -> int:
        """Width of the queries and of the output."""
        return self.heads * self.size

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.key_heads * self.size

    def kept(self, itemsize: int, packed: bool) -> float:
        """Return the bytes that are kept, besides the norm of the block and the input of the projections.

        Args:
            itemsize: bytes of a number that modules compute.
            packed: whether rows hold several documents.
        """
        # Queries, keys and values as attention reads them, its output, and the logarithm of its sums.
        read = itemsize * (2 * self.queries + 2 * self._keys_read(itemsize, packed)) + FLOAT32 * self.heads
        norms = FLOAT32 * (self.queries + self.keys + self.norms) if self.norms else 0  # their inputs, and scales
        turns = FLOAT32 * self.size if self.rotates and packed else 0  # cosines and sines; else those of one row
        gate = itemsize * 2 * self.queries if self.gated else 0  # its sigmoid, and the product
        return read + norms + turns + gate

    def used(self, itemsize: int, packed: bool) -> float:
        """Return the bytes that the backward pass holds at once, besides those that are kept.

        These are the gradients of the output, of queries, keys and values, for queries in float32 too, and those of the
        gate.
        """
        gradients = itemsize * (2 * self.queries + 2 * self._keys_read(itemsize, packed) + 2 * self.keys)
        wide = FLOAT32 * self.queries * (2 if self.rotates or self.norms else 1)
        return gradients + wide + itemsize * 2 * self.queries * self.gated

    def _keys_read(self, itemsize: int, packed: bool) -> int:
        """Return the width of the keys that attention reads, which are repeated where it does not take groups."""
        by_documents = packed or self.windowed
        takes_groups = itemsize == 2 and (not by_documents or "enable_gqa" in VARLEN_OPTIONS)
        return self.keys if takes_groups else self.queries
