"""Kernels in Gluon on a CPU: the source of a kernel runs as Python, on mocks of what it imports from Gluon.

Triton's interpreter knows no Gluon. `launch_on_cpu` takes the place of `lrnn.kernels.common.launch.launch` instead.
Each part of `gl.warp_specialize` is a thread, of which one runs at a time: at every access to shared memory, every
barrier and every asynchronous operation it hands over to a scheduler, which resumes a random part or ends a random
operation under way. The order depends on the seed alone, not on the machine or its load. Nothing is timed and nothing
waits for time: if nothing can continue, that is a deadlock. What is slow by chance stays slow in that run, so a part
lags far behind, or copies and products end as late as the barriers allow. These things are checked:

* Shared memory is not a number until it is written, and from the start of a copy into it to its end. Nobody may read it
  then. A part that reads too early or too late finds this, or wrong numbers.
* Nobody writes where a product or a copy may still read: until the part that began it has waited for its end.
* Products and copies read what was stored by threads only after a fence of the part that stored it.
* The result of a product is not used before it was waited for. At its end a part has waited for all that it began.
* A barrier gets no more arrivals in a phase than its count, and no more bytes than were expected. With fewer, or with a
  parity in the wrong order, somebody waits forever: a `Deadlock`, which names who waits and in which line.
* Copies lie inside their matrix, loads and stores by pointers inside their tensor; shapes and element types fit.

These things are not seen: what the warps of a part do to each other (a part is one thread, and `gl.barrier` does
nothing), memory that the compiler reuses for the next buffer, layouts, registers, the size of shared memory, the order
of sums, and races that appear in no order that was tried. Matrices need not have 16 bits: with float32 for all of them
the results are those of the equations, to float32's precision.
"""

from .language import launch_on_cpu
from .scheduler import Deadlock

__all__ = ["Deadlock", "launch_on_cpu"]
