"""One training step: forward passes, backward passes and update, with the loss as a mean over all labels."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.pretrain.data.micro_batch import MicroBatch, model_inputs
from lrnn.pretrain.engine import Engine
from lrnn.pretrain.fused.layers import refresh
from lrnn.pretrain.state_passing import CarriedStates
from lrnn.pretrain.z_loss import take_z_loss


@dataclass
class Step:
    """The result of a training step.

    Attributes:
        loss: mean over all labels of the step, on all ranks, in nats per token.
        micro_batch_losses: [micro-batches of this rank], means over their own labels.
        n_tokens: number of labels of the step, on all ranks.
        lr: learning rate of the update.
        z_loss: mean over all labels of the step, on all ranks, with its coefficient; None if there is none.
    """

    loss: float
    micro_batch_losses: Tensor
    n_tokens: int
    lr: float
    z_loss: float | None = None


def train_step(
    engine: Engine, batches: list[MicroBatch], *, lr: float, limit: float, carried: CarriedStates | None = None
) -> Step:
    """Compute a step and update the weights. The loss is the mean over all labels of the step, however they are spread.

    All ranks refuse the update if the loss is not finite or above `limit`, or a gradient is not finite;
    `engine.was_step_applied()` then returns False.

    Args:
        engine: the DeepSpeed engine.
        batches: micro-batches of this rank.
        lr: learning rate of the update.
        limit: largest loss with which the weights are updated, in nats per token.
        carried: states of this rank's rows, which the step begins with and replaces; None if each sample begins with a
            fresh state.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    device, world_size = engine.device, dist.get_world_size()
    labels = torch.tensor([batch.num_labels for batch in batches], device=device)
    n_tokens = labels.sum()
    dist.all_reduce(n_tokens)
    # DeepSpeed averages gradients over ranks, so a rank's share is its sum of losses x ranks / tokens.
    share = n_tokens.clamp(min=1) / world_size
    loss, parts = torch.zeros((), device=device), []
    refresh(engine.module)
    with one_reduction(engine, len(batches)):
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            engine.set_gradient_accumulation_boundary(last)
            inputs = model_inputs(batch, device)
            part = compute(engine, inputs, i, batch, carried, num_items_in_batch=share)
            parts.append(part.detach())
            if last:
                loss = torch.stack(parts).sum() / world_size
                dist.all_reduce(loss)
                # The loss is compared on the device before the last backward pass, so that nothing waits. A factor of
                # NaN makes every gradient NaN, and DeepSpeed skips an update with a gradient that is not finite on all
                # ranks.
                part = part * torch.where(loss.isfinite() & (loss <= limit), 1.0, torch.nan)
            engine.backward(part, scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(True)  # which the end of the context set back
    engine.step()
    z_loss = _mean_z_loss(engine, n_tokens)
    micro_batch_losses = torch.stack(parts) * share / labels.clamp(min=1)
    # On a GPU, float() waits for the end of the step.
    return Step(float(loss), micro_batch_losses, int(n_tokens), lr, z_loss)


def _mean_z_loss(engine: Engine, n_tokens: Tensor) -> float | None:
    """Return the z-loss of a step as a mean over its labels on all ranks, None if the run has none."""
    z_loss = take_z_loss(engine.module)
    if z_loss is None:
        return None
    dist.all_reduce(z_loss)
    return float(z_loss / n_tokens.clamp(min=1))


def one_reduction(engine: Engine, micro_batches: int) -> AbstractContextManager[None]:
    """Return a context in which gradients of all micro-batches are added up before they are reduced over the ranks.

    ZeRO-1 does so by itself, and overlaps the reduction with the last backward pass. ZeRO-2 and 3 would reduce after
    every micro-batch.
    """
    if micro_batches == 1 or engine.zero_optimization_stage() == 1:
        return nullcontext()
    return engine.coalesce_grad_reduction()


def compute(
    engine: Engine,
    inputs: dict[str, Tensor],
    number: int,
    batch: MicroBatch,
    carried: CarriedStates | None,
    **options: Tensor,
) -> Tensor:
    """Return the loss of this rank's micro-batch of that number, and pass on the states of its rows."""
    if carried is None:
        return engine(**inputs, **options).loss
    cache = carried.ahead(number, batch)
    loss = engine(**inputs, **options, past_key_values=cache).loss
    carried.keep(number, cache)
    return loss


def warm_up(engine: Engine, batch: MicroBatch, carried: CarriedStates | None = None) -> None:
    """Run a forward and backward pass of full shape with zero gradients: what is too large fails before step 1.

    If states are passed on, a second pass continues from those of the first.
    """
    refresh(engine.module)
    engine.set_gradient_accumulation_boundary(False)
    states = None if carried is None else carried.fresh()
    for _ in range(1 if carried is None else 2):
        loss = compute(engine, model_inputs(batch, engine.device), 0, batch, states)
        engine.backward(loss * 0.0, scale_wrt_gas=False)
    engine.optimizer.zero_grad()
    take_z_loss(engine.module)  # it is of no step
