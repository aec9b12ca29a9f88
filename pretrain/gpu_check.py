"""Check that the GPU of a run has kernels for its model."""

import torch

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.kernels.common.architecture import Architecture
from lrnn.kernels.delta_rule.api import check_gpu
from lrnn.model.mixer_deltanet import DeltaNet
from lrnn.model.mixers import MIXERS


def check_kernels(model_config: LrnnConfig, dtype: torch.dtype, gpu: Architecture) -> None:
    """Check that a GPU has kernels for the model's heads in the dtype that modules compute in.

    Raises:
        UserError: it has none. The message says what the GPU takes.
    """
    for layer, _ in model_config.kinds_of_layers():
        mixer = MIXERS[layer.mixer]
        if not issubclass(mixer, DeltaNet):
            continue
        _, _, K, V = mixer.head_sizes(layer)
        try:
            check_gpu(K, V, dtype, gpu)
        except ValueError as error:
            sizes = f"head_dim {K}" if V == K else f"head_dim {K} and head_v_dim {V}"
            heads = f"mixer {layer.mixer} with {sizes} in {str(dtype)[6:]}"
            raise UserError(f"{heads} cannot be trained on this GPU: {error}") from None
