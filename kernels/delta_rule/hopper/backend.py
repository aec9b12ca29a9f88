"""The kernels in Gluon for Hopper as a backend."""

import torch

from lrnn.kernels.common.assembler import SAFE_PTXAS, ptxas_version
from lrnn.kernels.common.dispatch import INTERPRETED
from lrnn.kernels.delta_rule.call import Call
from lrnn.kernels.delta_rule.hopper.chunk_backward import launch_chunk_backward
from lrnn.kernels.delta_rule.hopper.chunk_forward import launch_chunk_forward
from lrnn.kernels.delta_rule.hopper.chunk_inverse import launch_chunk_inverse
from lrnn.kernels.delta_rule.hopper.scan_backward import launch_scan_backward


class Hopper:
    """Gluon, for heads of 128 in 16 bits on Hopper."""

    @staticmethod
    def fits(call: Call) -> bool:
        """Return whether the kernels are made for the call.

        They are not made for other GPUs, head sizes other than 128, float32, or sequences with a chunk that is not
        full, as those of three factors per token are not. Nor are they used with an assembler that may miscompile them:
        the portable kernels have been tested with one, these have not.
        """
        if INTERPRETED or call.K != 128 or call.V != 128 or call.dtype == torch.float32 or not call.is_full:
            return False
        if torch.version.hip is not None or torch.cuda.get_device_capability(call.device)[0] != 9:
            return False
        return ptxas_version() >= SAFE_PTXAS

    chunk_inverse = staticmethod(launch_chunk_inverse)
    forward_scan = staticmethod(launch_chunk_forward)
    backward_scan = staticmethod(launch_scan_backward)
    chunk_backward = staticmethod(launch_chunk_backward)
