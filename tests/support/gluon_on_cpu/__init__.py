"""Run kernels in Gluon on a CPU: the source of a kernel runs as Python, on mocks of its imports from Gluon.

Triton's interpreter does not support Gluon. `launch_on_cpu` replaces `lrnn.kernels.common.launch.launch` instead. Each
part of `gl.warp_specialize` is a thread, and one thread runs at a time. At every access to shared memory, every barrier
and every asynchronous operation it yields to a scheduler, which resumes a random part or ends a random operation under
way. The order depends on the seed alone, not on the machine or its load. Nothing is timed and nothing waits for time:
if nothing can continue, that is a deadlock. A part or an operation that is slow by chance stays slow in that run, so
parts lag far behind, and copies and products end as late as the barriers allow. These things are checked:

* Shared memory is NaN until it is written, and while a copy into it is under way. It must not be read then. A part that
  reads too early or too late finds NaN or wrong numbers.
* Memory that a product or a copy may still read is not written before the part that began it has waited for its end.
* Products and copies read values stored by threads only after a fence of the part that stored them.
* The result of a product is not used before it has been waited for. At its end, a part has waited for all operations
  that it began.
* A barrier gets no more arrivals in a phase than its count, and no more bytes than were expected. With fewer, or with a
  parity in the wrong order, a part waits forever: this is a `Deadlock`, which names each waiting part and its line.
* Copies lie inside their matrix, and loads and stores by pointers inside their tensor. Shapes and element types fit.

These things are not checked: the warps of a part among themselves (a part is one thread, and `gl.barrier` does
nothing), memory that the compiler reuses for the next buffer, layouts, registers, the size of shared memory, the order
of sums, and races that appear in no order that was tried. Matrices need not have 16 bits: with float32 for all of them
the results are those of the equations, to float32's precision.
"""

from .language import launch_on_cpu
from .scheduler import Deadlock

__all__ = ["Deadlock", "launch_on_cpu"]
