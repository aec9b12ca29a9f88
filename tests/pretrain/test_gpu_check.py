"""Test that a run is refused on a GPU that has no kernels for its model."""

import pytest
import torch

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.kernels.common.architecture import ADA, COMPILED, HOPPER
from lrnn.pretrain.gpu_check import check_kernels
from lrnn.pretrain.gpus import GPUS


def test_heads_that_do_not_fit_are_refused():
    config = LrnnConfig(mixer="gated_deltanet", head_dim=192)
    with pytest.raises(UserError) as caught:
        check_kernels(config, torch.float32, ADA)
    message = str(caught.value)
    assert message.startswith("mixer gated_deltanet with head_dim 192 in float32 cannot be trained on this GPU: ")
    assert "99 KiB" in message and "use bfloat16" in message and "\n" not in message
    check_kernels(config, torch.bfloat16, ADA)


@pytest.mark.parametrize(
    ("sizes", "named", "got"),
    [
        ({"head_dim": 300}, "head_dim 300", "got 300 for keys and 300 for values"),
        ({"head_v_dim": 512}, "head_dim 128 and head_v_dim 512", "got 128 for keys and 512 for values"),
    ],
)
def test_sizes_above_those_of_the_kernels_are_refused(sizes, named, got):
    with pytest.raises(UserError) as caught:
        check_kernels(LrnnConfig(mixer="deltanet", **sizes), torch.bfloat16, HOPPER)
    assert str(caught.value) == (
        f"mixer deltanet with {named} in bfloat16 cannot be trained on this GPU: "
        f"the kernels support head sizes up to 256; {got}"
    )
    check_kernels(LrnnConfig(mixer="deltanet", head_dim=96, head_v_dim=192), torch.bfloat16, HOPPER)


def test_other_mixers_do_not_use_these_kernels():
    check_kernels(LrnnConfig(mixer="attention", head_dim=256), torch.float32, ADA)


def test_every_gpu_that_can_be_planned_for_is_known_to_the_kernels():
    assert {gpu.capability for gpu in GPUS} <= {gpu.capability for gpu in COMPILED}
