"""The kernels in plain Triton as a backend."""

from lrnn.kernels.delta_rule.call import Call
from lrnn.kernels.delta_rule.portable.chunk_backward import launch_chunk_backward
from lrnn.kernels.delta_rule.portable.chunk_forward import launch_chunk_forward
from lrnn.kernels.delta_rule.portable.chunk_inverse import launch_chunk_inverse
from lrnn.kernels.delta_rule.portable.scan_backward import launch_scan_backward


class Portable:
    """Plain Triton: for every GPU, head size, dtype and length. The readable form of each kernel."""

    @staticmethod
    def fits(call: Call) -> bool:
        """Return True."""
        return True

    chunk_inverse = staticmethod(launch_chunk_inverse)
    forward_scan = staticmethod(launch_chunk_forward)
    backward_scan = staticmethod(launch_scan_backward)
    chunk_backward = staticmethod(launch_chunk_backward)
