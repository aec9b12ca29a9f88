"""DeepSpeed's settings for each ZeRO stage."""

from typing import Any

BUCKET_NUMEL = 200_000_000  # numbers per collective
PREFETCH_NUMEL = 100_000_000  # numbers of parameters that ZeRO-3 gathers ahead
PERSISTENT_NUMEL = 100_000  # parameters of ZeRO-3 up to this size stay whole on every rank
# Modules compute in bf16, on the CPU too, while parameters, gradients and reductions stay float32.
AUTOCAST = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def zero_settings(stage: int, precision: str = "bfloat16") -> dict[str, Any]:
    """Return the DeepSpeed settings of a ZeRO stage, without batch sizes and clipping.

    Args:
        stage: 1 shards the optimizer's state over the ranks, 2 the gradients too, 3 the parameters too.
        precision: "bfloat16" or "fp8", or "float32" for no autocast.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": BUCKET_NUMEL}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": PREFETCH_NUMEL,
            "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
        }
    else:
        zero |= {"contiguous_gradients": True, "reduce_scatter": True, "allgather_bucket_size": BUCKET_NUMEL}
    return {"zero_optimization": zero} | ({"torch_autocast": dict(AUTOCAST)} if precision != "float32" else {})
