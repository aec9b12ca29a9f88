"""The forms in which training compiles the delta-rule kernels, for tests that compile them without a GPU.

Each backend lists the cases of its kernels in a file of the same name. A case is (name, kernel, types of its arguments,
values of its constants, warps, stages).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lrnn.kernels.common.architecture import HOPPER, Architecture
from lrnn.kernels.common.constants import CHUNK, HEAD_SIZES
from lrnn.kernels.common.dtypes import DTYPES, matrix_dtype
from lrnn.kernels.delta_rule.cut import query_rows
from lrnn.kernels.delta_rule.settings import Settings, choose_settings

Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int]
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HEADS = 16


@dataclass(frozen=True)
class Variant:
    """A kind of call.

    Attributes:
        suffix: added to the names of its cases.
        size: size of keys and values.
        dtype: of queries, keys and values.
        gate, normalize, split: as in `Call`.
        packed: whether documents are packed.
        factors: steps per token.
        only: the constant that a kernel must have for its case to differ enough from another variant's.
        gpu: what the kernels are compiled for.
    """

    suffix: str
    size: int = 128
    dtype: torch.dtype = torch.bfloat16
    gate: str = "raw"
    normalize: bool = True
    packed: bool = False
    split: bool = False
    factors: int = 1
    only: str = "HV"
    gpu: Architecture = HOPPER

    @property
    def settings(self) -> Settings:
        """The settings of the kernels that differ among GPUs."""
        return choose_settings(self.size, self.dtype, self.gpu)

    @property
    def element(self) -> str:
        """Triton's name for the dtype of queries, keys and values."""
        return TYPES[self.dtype]

    @property
    def matrix(self) -> str:
        """Triton's name for the dtype of the matrices C."""
        return TYPES[matrix_dtype(self.dtype, self.normalize)]

    @property
    def numbers(self) -> str:
        """The type of gates and step sizes."""
        return f"*{self.element}" if self.gate == "raw" else "*fp32"

    @property
    def constants(self) -> dict[str, Any]:
        """Values of all constants that come from the call."""
        constants: dict[str, Any] = {
            **{"H": HEADS, "HV": HEADS, "K": self.size, "V": self.size, "BT": CHUNK},
            **{"NORMALIZE": self.normalize, "IS_VARLEN": self.packed, "IS_FULL": not self.packed},
            **{"FACTORS": self.factors, "BQ": query_rows(self.factors)},
            **{"PRECISION": self.settings.precision, "SPLIT": self.split},
            **{"GATE": self.gate, "RAW_BETA": self.gate == "raw"},
        }
        if not self.packed:
            constants |= dict.fromkeys(("cu_seqlens", "chunk_table", "chunk_starts"))
        if self.gate == "none":
            constants |= dict.fromkeys(("gate", "A_log", "dt_bias"))
        return constants

    def case(
        self,
        name: str,
        kernel: Any,
        constants: dict[str, Any],
        types: dict[str, str],
        warps: int,
        stages: int = 3,
    ) -> Case:
        """Return a case of a kernel. Entries for unknown arguments are ignored, and the default type is `*fp32`."""
        scalars = dict.fromkeys(("T", "R", "stride_k", "segments", "chunks"), "i32")
        scalars |= dict.fromkeys(("scale", "beta_range", "least"), "fp32")
        scalars |= dict.fromkeys(("cu_seqlens", "chunk_table", "chunk_starts", "reach"), "*i32")
        given = self.constants | constants
        known = {n: given[n] for n in kernel.arg_names if n in given}
        types = {n: {**scalars, **types}.get(n, "*fp32") for n in kernel.arg_names if n not in known}
        return name + self.suffix, kernel, types, known, warps, stages

    def includes(self, case: Case) -> bool:
        """Return whether a kernel is compiled: if it has `only`, and not for several factors if it reads no queries."""
        _, kernel, _, constants, *_ = case
        return self.only in kernel.arg_names and (self.factors == 1 or constants.get("q", "") is not None)


# Gated training in bf16 with raw gates and normalised keys, the same on packed documents, and the variant that differs
# most from it: no gate, and step sizes and keys as given. Then the scans that split the values that enter their state,
# and, in float32 at the smallest heads, the scans and the backward pass inside chunks. Then two factors per token.
# Last, several of these at once, so that tests that compile few cases compile every branch.
VARIANTS = (
    Variant(""),
    Variant("_packed", packed=True),
    Variant("_plain", gate="none", normalize=False),
    Variant("_split", split=True, only="SPLIT"),
    Variant("_fp32", size=64, dtype=torch.float32, only="STAGES"),
    Variant("_product", factors=2, only="FACTORS"),
    Variant("_plain_product", gate="none", normalize=False, split=True, factors=2, only="FACTORS"),
)


def variants_for(gpu: Architecture) -> Iterator[Variant]:
    """Yield gated training with raw gates and normalised keys in each dtype and size of heads that a GPU has."""
    for dtype in DTYPES:
        for size in HEAD_SIZES:
            try:
                choose_settings(size, dtype, gpu)
            except ValueError:
                continue
            yield Variant(f"_{size}_{TYPES[dtype]}", size=size, dtype=dtype, gpu=gpu)
