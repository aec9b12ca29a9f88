"""What ZeRO sends between GPUs in a step, and how long it takes.

P parameters in float32, f = (N - 1) / N for N GPUs, A micro-batches per step. A ring sends, per GPU, 2 f S bytes for an
all-reduce of S bytes and f S for a reduce-scatter or an all-gather. DeepSpeed 0.19.8, as lrnn uses it, sends per step

    ZeRO-1, ZeRO-2      gradients 8 f P (an all-reduce), updated weights 4 f P
    ZeRO-3              gradients 4 f P, weights 4 f P in every forward pass and again in every backward pass, where
                        those that are still there are not gathered again

ZeRO-1 reduces gradients during the last backward pass, all but the last bucket. ZeRO-2 and ZeRO-3 reduce them after it,
unless a step has one micro-batch. ZeRO-3 gathers ahead of the layers. Nothing else overlaps.

A ring runs at the rate of its slowest link: within a node at `Links.inside`, between nodes at most at `Links.between`,
because each of a node's rings has its share of the node's network cards. Latency is left out.
"""

from dataclasses import dataclass

from lrnn.pretrain.plan.memory import MAX_LIVE
from lrnn.pretrain.plan.setup import Setup

FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in a step.

    Attributes:
        gradients, weights: bytes.
        rate: bytes/s.
        exposed: seconds in which nothing else happens.
    """

    gradients: float
    weights: float
    rate: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Time of all collectives, if nothing overlapped."""
        return (self.gradients + self.weights) / self.rate


def traffic(setup: Setup, forward: float, backward: float) -> Traffic:
    """Return what a GPU sends in a step.

    Args:
        setup: the way the model is trained.
        forward, backward: seconds of each pass of a micro-batch, with which collectives may overlap.
    """
    n, numbers = setup.gpus, setup.model.parameters
    size = FLOAT32 * numbers * (n - 1) / n
    links = setup.links
    rate = links.inside if n <= setup.gpus_per_node else min(links.inside, links.between)
    if setup.zero < 3:
        gradients, weights = 2 * size, size
        exposed = weights / rate
    else:
        gradients = size
        again = size * max(0, numbers - MAX_LIVE) / numbers
        weights = setup.micro_batches * (size + again)
        exposed = setup.micro_batches * (max(0.0, size / rate - forward) + max(0.0, again / rate - backward))
    reduction = gradients / rate
    if setup.reduces_in_backward:
        reduction = max(reduction - backward, reduction * min(1.0, setup.bucket / numbers))
    return Traffic(gradients, weights, rate, exposed + reduction)
