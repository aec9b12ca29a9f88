"""The model of a run, and the DeepSpeed engine around it."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.kernels.delta_rule.api import saving_states
from lrnn.model.modeling_lrnn import LrnnBlock
from lrnn.pretrain.config import Config
from lrnn.pretrain.deepspeed_config import deepspeed_config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.fused.choice import uses_fused_layers
from lrnn.pretrain.fused.layers import fuse
from lrnn.pretrain.gradient_norm import read_once
from lrnn.pretrain.muon.optimizer import MuonAdamW
from lrnn.pretrain.optim import build_optimizer
from lrnn.pretrain.weights.lazy_fills import LazyFills
from lrnn.pretrain.z_loss import LossWithZ
from lrnn.pretrain.zero_layout import slices


class ZeroOptimizer(Protocol):
    """The members of DeepSpeed's ZeRO optimizers that a run uses. `checkpoint.zero_state` also knows their insides."""

    param_groups: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer  # AdamW or Muon over this rank's slices

    def zero_grad(self) -> None: ...


class Engine(Protocol):
    """The members of `deepspeed.DeepSpeedEngine` that the loop, the held-out loss and checkpoints use."""

    module: nn.Module
    optimizer: ZeroOptimizer

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; the result has `loss`."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> object:
        """Add the gradients of `loss`; without `scale_wrt_gas` it is not divided by the number of micro-batches."""

    def step(self) -> None:
        """Clip the gradients and update the weights, unless a gradient is not finite on any rank."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next backward pass is the last one of a step."""

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """Leave gradients where they are within the `with` block, and reduce their sums at its end."""

    def was_step_applied(self) -> bool:
        """Return whether the last `step` updated the weights."""

    def get_global_grad_norm(self) -> float | Tensor:
        """Return the norm of the last step's gradient before clipping."""

    def zero_optimization_stage(self) -> int: ...

    def destroy(self) -> None:
        """Free what the engine holds; used by `lrnn bench loop`."""

    def train(self) -> object: ...

    def eval(self) -> object: ...


def build_model(
    model_config: LrnnConfig, seed: int, activation_checkpointing: bool, fill: bool = True
) -> LrnnForCausalLM:
    """Return the model with fresh float32 weights: a pure function of configuration and seed.

    With `activation_checkpointing`, layers are recomputed in the backward pass. A recomputed delta-rule layer saves its
    states, because its own backward pass follows at once.

    Without `fill`, weights that would be random are whatever memory holds, and every parameter has to be loaded. The
    state of the random numbers is the same.
    """
    torch.manual_seed(seed)
    with LazyFills() as fills:
        model = LrnnForCausalLM(model_config)
        if not fill:
            fills.forget(model.parameters())
    if fill:
        _check_finite(model)
    if activation_checkpointing:
        with warnings.catch_warnings():  # the new name of this method is missing in some versions that we admit
            warnings.simplefilter("ignore", FutureWarning)
            # The determinism check would compare the sizes of what is saved with those of the first pass.
            options = {"context_fn": lambda: (nullcontext(), saving_states()), "determinism_check": "none"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    return model.train()


def _check_finite(model: nn.Module) -> None:
    """Raise RuntimeError if a weight is infinite or NaN, which the smallest or the largest then is too."""
    for name, parameter in model.named_parameters():
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise RuntimeError(f"{name} is not finite after initialisation")


def build_engine(model: LrnnForCausalLM, config: Config, ranks: Ranks, decay_by_shape: bool = False) -> Engine:
    """Wrap the model in a DeepSpeed engine with ZeRO and the optimizer, whose state is float32.

    With `decay_by_shape` the parameters with weight decay are those of earlier versions, see `parameter_groups`.

    Raises:
        UserError: the configuration asks for fused layers on a CPU, or for what only they can do without them.
    """
    import deepspeed

    settings = deepspeed_config(config, ranks.world_size)
    stage = settings["zero_optimization"]["stage"]
    dtype = compute_dtype(settings)
    if uses_fused_layers(config, ranks.device, dtype):
        options = {"recompute_mlp": config.activation_checkpointing == "mlp", "float8": config.precision == "fp8"}
        fuse(model, dtype, partitioned=stage == 3, z_loss=config.optim.z_loss, **options)
        if stage == 3:  # A block reads the weights of the modules inside of it, so they are gathered together.
            deepspeed.utils.set_z3_leaf_modules(model, [LrnnBlock])
    if config.optim.z_loss and model.fused_loss is None:
        model.fused_loss = LossWithZ(model.lm_head, config.optim.z_loss)
    optimizer = build_optimizer(model, config.optim, ranks.device, dtype, decay_by_shape)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    if isinstance(optimizer, MuonAdamW):
        optimizer.bind(slices(engine.optimizer, stage))
    if stage < 3 and ranks.device.type == "cuda":
        read_once(engine.optimizer)
    return engine


def compute_dtype(settings: dict[str, Any]) -> torch.dtype:
    """Return what modules compute in under a DeepSpeed configuration, as DeepSpeed reads it."""
    from deepspeed.runtime.config import get_torch_autocast_dtype

    if not settings.get("torch_autocast", {}).get("enabled"):
        return torch.float32
    return get_torch_autocast_dtype(settings) or torch.bfloat16
