"""GPU memory of a run, by part, at the moment when it is largest.

P parameters, N GPUs, everything in float32 (`lrnn.pretrain.zero`): weights 4 P, the optimizer's own weights and moments
12 P / N, gradients 4 P. For the weights of matrices Muon keeps one moment instead of two. What DeepSpeed 0.19.8 holds
besides: two buckets of `reduce_bucket_size` numbers, one of which is copied while it is reduced, and the gradients of
this GPU's part, 4 P / N, from the first full bucket on. ZeRO-3 holds 4 P / N of the weights, and gathered ones up to
`stage3_max_live_parameters`.

The largest moment is one of these, all in the last micro-batch of a step or after it:

- the loss, when all layers have kept what they need;
- the backward pass of some layer, with the buckets if gradients are reduced meanwhile;
- the reduction after the backward pass, or the update, if activations are small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lrnn.pretrain.muon.optimizer import BATCH
from lrnn.pretrain.plan import activations
from lrnn.pretrain.plan.setup import Setup
from lrnn.pretrain.plan.sizes import LayerSizes

FLOAT32 = 4
MAX_LIVE = 1_000_000_000  # DeepSpeed's default of `stage3_max_live_parameters`
LOSS, BACKWARD, UPDATE = "loss", "backward", "update"  # moments of a step


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at a moment of a step, by part.

    Attributes:
        moment: "loss", "backward" for the backward pass, or "update" for the update and the reduction before it.
        parameters: weights, and under ZeRO-3 those that are gathered.
        optimizer: the optimizer's weights and moments.
        gradients: of all weights, and of this GPU's part after their reduction.
        copies: the weights of fused layers in 16 bits, or twice in float8.
        activations: what layers keep for their backward pass, and the states that rows carry from step to step.
        logits: what the head and the loss take while they run.
        workspace: what a layer's backward pass takes while it runs, or what Muon does.
        buckets: ZeRO's buckets, and the copy of one that is reduced.
    """

    moment: str
    parameters: float
    optimizer: float
    gradients: float
    copies: float
    activations: float
    logits: float
    workspace: float
    buckets: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in fields(Memory) if field.name != "moment")


def peak_memory(setup: Setup) -> Memory:
    """Return the memory of a run at the moment when it is largest."""
    return max(_moments(setup), key=lambda memory: memory.total)


def memory_at_loss(setup: Setup) -> Memory:
    """Return the memory while the loss is computed, when all layers have kept what they need."""
    kept = sum(_stack(setup, layer) for layer in setup.model.stack) + activations.kept_by_ends(setup)
    return _Held(setup).in_backward(0, kept, LOSS, logits=activations.used_by_loss(setup))


def _moments(setup: Setup) -> Iterator[Memory]:
    """Yield the memory at the moments that may be the largest."""
    held = _Held(setup)
    yield memory_at_loss(setup)
    below = sum(_stack(setup, layer) for layer in setup.model.stack)
    done = setup.model.vocab * setup.model.hidden  # gradients that the backward pass has computed
    for layer in reversed(setup.model.stack):
        below -= _stack(setup, layer)
        for weights, kept, used in _parts(setup, layer):
            yield held.in_backward(done, below + kept, workspace=used)
            done += weights
    yield from held.after_backward()


def _stack(setup: Setup, layer: LayerSizes) -> float:
    """Return the bytes that a layer keeps until its turn in the backward pass comes."""
    if setup.checkpointing == "full":
        return setup.tokens * activations.kept_by_whole_layer(setup, layer)
    return setup.tokens * (activations.kept_by_mixer(setup, layer) + activations.kept_by_mlp(setup, layer))


def _parts(setup: Setup, layer: LayerSizes) -> Iterator[tuple[int, float, float]]:
    """Yield (weights, bytes kept by the layer, bytes used) of the MLP and the mixer, in the order of the backward pass.

    A layer that is computed again keeps everything from here on, and its input.
    """
    tokens = setup.tokens
    mixer, mlp = tokens * activations.kept_by_mixer(setup, layer), tokens * activations.kept_by_mlp(setup, layer)
    if setup.checkpointing == "full":
        mixer += tokens * (activations.kept_by_whole_layer(setup, layer) + activations.saved_states(setup, layer))
    yield layer.mlp, mixer + mlp, tokens * activations.used_by_mlp(setup, layer)
    yield layer.cost.weights, mixer, tokens * activations.used_by_mixer(setup, layer)


class _Held:
    """What is held whatever layers do, as the last backward pass of a step proceeds."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.whole = float(FLOAT32 * setup.model.parameters)
        self.part = self.whole / setup.gpus
        self.bucket = FLOAT32 * setup.bucket

    def in_backward(self, done: float, kept: float, moment: str = BACKWARD, **used: float) -> Memory:
        """Return the memory when so many gradients of the last micro-batch are done.

        Args:
            done: number of gradients.
            kept: bytes that layers keep.
            moment: see `Memory`.
            used: bytes that the loss (`logits`) or the running backward pass (`workspace`) takes.
        """
        accumulated = self.whole if self.setup.micro_batches > 1 else min(self.whole, FLOAT32 * done)
        if self.setup.zero == 3:
            whole = accumulated if self.setup.micro_batches > 1 else min(accumulated, self.bucket)
            return self._memory(moment, whole + self.part, self.bucket, kept, **used)
        if not self.setup.reduces_in_backward:
            return self._memory(moment, accumulated, 0.0, kept, **used)
        # Gradients that are done have moved into the buckets, and from there into this GPU's part.
        full = FLOAT32 * done > self.bucket
        left = accumulated - FLOAT32 * done if self.setup.micro_batches > 1 else 0.0
        return self._memory(moment, left + full * self.part, (2 + full) * self.bucket, kept, **used)

    def after_backward(self) -> Iterator[Memory]:
        """Yield the memory while gradients are reduced after the backward pass, and while the weights are updated."""
        if self.setup.zero == 3:
            yield self._memory(UPDATE, self.whole + self.part, 2 * self.bucket)
            return
        if not self.setup.reduces_in_backward:
            # The first bucket's gradients have moved into it, and are copied from there into this GPU's part.
            left = self.whole - min(self.whole, self.bucket)
            yield self._memory(UPDATE, left + self.part, 3 * self.bucket)
        # The part is copied into one tensor.
        yield self._memory(UPDATE, 2 * self.part, 0.0, workspace=self._orthogonalization())

    def _orthogonalization(self) -> float:
        """Return the bytes of the matrices that Muon orthogonalizes at a time, and of their products."""
        weights = self.setup.muon * self.setup.model.layer_matrices / self.setup.gpus
        return 4 * self.setup.itemsize * min(BATCH, weights)

    def _memory(
        self,
        moment: str,
        gradients: float,
        buckets: float,
        kept: float = 0.0,
        *,
        logits: float = 0.0,
        workspace: float = 0.0,
    ) -> Memory:
        setup = self.setup
        parameters = self.whole
        if setup.zero == 3:
            parameters = self.part + FLOAT32 * min(setup.model.parameters, MAX_LIVE)
        return Memory(
            moment=moment,
            parameters=parameters,
            optimizer=3 * self.part - setup.muon * FLOAT32 * setup.model.layer_matrices / setup.gpus,
            gradients=gradients,
            copies=self._copies(kept),
            activations=kept + self._carried(),
            logits=logits,
            workspace=workspace,
            buckets=buckets,
        )

    def _carried(self) -> float:
        """Return the bytes of the states of all rows of this GPU, and of those ahead of a micro-batch beside them."""
        setup = self.setup
        rows = setup.micro_batch * (setup.micro_batches + 1)
        return setup.carries * FLOAT32 * setup.model.state * rows

    def _copies(self, kept: float) -> float:
        """Return the bytes of weights in 16 bits. Autocast makes those of plain layers in each forward pass."""
        setup = self.setup
        if setup.itemsize == FLOAT32:
            return setup.has_copies * FLOAT32 * setup.model.matrices
        if setup.has_copies:
            return 2.0 * setup.model.matrices
        is_cached = not setup.fused and setup.zero < 3 and setup.checkpointing != "full" and kept > 0
        return 2.0 * setup.model.matrices * is_cached
