"""The one seam between the model and its kernels. Copied into exported folders.

Modules of the model import tensor functions from here only. If lrnn is installed, they run on its kernels on CUDA and
in PyTorch on CPU, as `lrnn.kernels` decides. In an exported folder without lrnn they are the plain PyTorch files
beside this one, with the same names, arguments and results.
"""

from torch import Tensor

try:
    from lrnn.kernels.common.dispatch import use_kernels
    from lrnn.kernels.delta_rule.api import fused_gated_delta_product, fused_gated_delta_rule
    from lrnn.kernels.delta_rule.next_token import next_token
    from lrnn.kernels.gated_rms_norm import gated_rms_norm
    from lrnn.kernels.recurrences import diagonal_recurrence, rwkv7_recurrence, selective_scan
    from lrnn.kernels.reference.diagonal import signed_decay
    from lrnn.kernels.reference.documents import (
        document_ids,
        document_starts,
        longest_document,
        states_of_documents,
        states_of_rows,
    )
    from lrnn.kernels.reference.short_conv import short_conv as plain_short_conv
    from lrnn.kernels.rms_norm import rms_norm
    from lrnn.kernels.rotary import rotate
    from lrnn.kernels.short_conv.api import short_conv
    from lrnn.kernels.swiglu import swiglu
except ImportError:  # an exported folder, loaded where lrnn is not installed
    from .delta_rule import (  # type: ignore[no-redef]
        fused_gated_delta_product,
        fused_gated_delta_rule,
    )
    from .diagonal import diagonal_recurrence, signed_decay  # type: ignore[no-redef]
    from .documents import (  # type: ignore[no-redef]
        document_ids,
        document_starts,
        longest_document,
        states_of_documents,
        states_of_rows,
    )
    from .gated_rms_norm import gated_rms_norm  # type: ignore[no-redef]
    from .rms_norm import rms_norm  # type: ignore[no-redef]
    from .rotary import rotate  # type: ignore[no-redef]
    from .short_conv import short_conv  # type: ignore[no-redef]
    from .steps import rwkv7_recurrence, selective_scan  # type: ignore[no-redef]
    from .swiglu import swiglu  # type: ignore[no-redef]

    plain_short_conv = short_conv
    next_token = None  # type: ignore[assignment]  # is called only where `use_kernels` is true

    def use_kernels(x: Tensor) -> bool:
        return False


__all__ = [
    "diagonal_recurrence",
    "document_ids",
    "document_starts",
    "fused_gated_delta_product",
    "fused_gated_delta_rule",
    "gated_rms_norm",
    "longest_document",
    "next_token",
    "plain_short_conv",
    "rms_norm",
    "rotate",
    "rwkv7_recurrence",
    "selective_scan",
    "short_conv",
    "signed_decay",
    "states_of_documents",
    "states_of_rows",
    "swiglu",
    "use_kernels",
]
