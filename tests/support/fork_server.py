"""A process that has imported everything, from which tests fork others. A start takes 1 s, not 9 s."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# "deepspeed" and "pandas" are otherwise imported late in a start.
CONTEXT.set_forkserver_preload(["training_worker", "deepspeed", "pandas", "lrnn.track.workers"])
