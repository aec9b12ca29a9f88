"""What a run's memory and speed are computed from: the model, the way it is trained, and the GPUs."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.kernels.common.architecture import COMPILED
from lrnn.pretrain.config import Config, load_model_of
from lrnn.pretrain.deepspeed_config import deepspeed_config
from lrnn.pretrain.fused.choice import uses_fused_layers
from lrnn.pretrain.fused.float8 import check_sizes
from lrnn.pretrain.gpu_check import check_kernels
from lrnn.pretrain.gpus import Gpu
from lrnn.pretrain.plan.sizes import ModelSizes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bus bandwidth of collectives: the share of a link's rate that they reach, and GB/s of a network card of 400 Gb/s.
LINK_SHARE, NETWORK_CARD = 2 / 3, 45
DEEPSPEED_BUCKET = 500_000_000  # numbers per collective where a DeepSpeed JSON does not say


@dataclass(frozen=True)
class Links:
    """Rates of the collectives, as bytes/s of bus bandwidth per GPU.

    Attributes:
        inside: between the GPUs of a node.
        between: between nodes, all network cards of a node together.
    """

    inside: float
    between: float

    @classmethod
    def of(cls, gpu: Gpu, gpus_per_node: int) -> "Links":
        """Return the rates that a GPU's links are assumed to reach, with one network card per GPU."""
        return cls(1e9 * LINK_SHARE * gpu.link, 1e9 * NETWORK_CARD * gpus_per_node)


@dataclass(frozen=True)
class Setup:
    """A way to train a model on some GPUs.

    Attributes:
        model: sizes of the model.
        gpu: the kind of GPU.
        gpus, gpus_per_node: their number, and how many a node has.
        links: rates of the collectives.
        zero: ZeRO stage.
        bucket: numbers per collective.
        micro_batch, seq_len: samples of a forward pass, and tokens of a sample.
        global_batch: samples of an optimizer step.
        checkpointing: `activation_checkpointing` of the run: none, mlp or full.
        precision: what modules compute in: bfloat16, float16 or float32.
        fused: whether the run trains with fused layers.
        float8: whether products of fused layers are in float8.
        muon: whether the optimizer is Muon.
        packed: whether the state is reset at documents.
        offloads: whether a DeepSpeed JSON keeps states in the host's memory, which estimates leave out.
        carries: whether rows carry states from step to step.
    """

    model: ModelSizes
    gpu: Gpu
    gpus: int
    gpus_per_node: int
    links: Links
    zero: int
    bucket: int
    micro_batch: int
    seq_len: int
    global_batch: int
    checkpointing: str
    precision: str
    fused: bool
    float8: bool
    muon: bool
    packed: bool
    offloads: bool
    carries: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step and GPU."""
        return self.global_batch // (self.micro_batch * self.gpus)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, on all GPUs."""
        return self.global_batch * self.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of a number that modules compute."""
        return 4 if self.precision == "float32" else 2

    @property
    def has_copies(self) -> bool:
        """Whether the weights of linear maps are kept in 16 bits, or twice in 8, too: see `lrnn.pretrain.fused`."""
        return self.fused and self.zero < 3

    @property
    def reduces_in_backward(self) -> bool:
        """Whether gradients are reduced during the last backward pass, and not after it."""
        return self.zero == 1 or self.micro_batches == 1

    @property
    def changes(self) -> str:
        """The changes to a configuration that make a run train so."""
        return f"zero={self.zero} micro_batch_size={self.micro_batch} activation_checkpointing={self.checkpointing}"

    def changed(self, **changes: Any) -> "Setup":
        """Return the setup with other values."""
        return replace(self, **changes)


def setup_of(
    config: Config, gpu: Gpu, gpus: int, gpus_per_node: int, links: Links, model: LrnnConfig | None = None
) -> Setup:
    """Return how a run trains its model on some GPUs.

    Args:
        config: the run's configuration.
        gpu, gpus, gpus_per_node, links: see `Setup`.
        model: the model; default that of the run.

    Raises:
        UserError: the model or the DeepSpeed JSON cannot be read, or the configuration asks for what its layers or the
            GPU cannot do. Whether the batch can be split among the GPUs is not checked.
    """
    settings = deepspeed_config(config, world_size=1)
    zero, precision = settings["zero_optimization"], _precision(settings)
    fused = uses_fused_layers(config, torch.device("cuda"), DTYPES[precision], (gpu.name, gpu.capability))
    model = model or load_model_of(config)
    check_kernels(model, DTYPES[precision], next(kind for kind in COMPILED if kind.capability == gpu.capability))
    sizes = ModelSizes.of(model)
    if config.precision == "fp8":
        for layer in sizes.kinds:
            for columns, rows in layer.float8_matrices():
                check_sizes(columns, rows)
    return Setup(
        model=sizes,
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        links=links,
        zero=zero["stage"],
        bucket=_bucket(zero, config),
        micro_batch=config.micro_batch_size,
        seq_len=config.data.seq_len,
        global_batch=config.global_batch_size,
        checkpointing=config.activation_checkpointing,
        precision=precision,
        fused=fused,
        float8=config.precision == "fp8",
        muon=config.optim.name == "muon",
        packed=config.data.reset_at_document_boundaries,
        offloads=any(name.startswith("offload_") and value for name, value in zero.items()),
        carries=bool(config.data.state_passing),
    )


def _bucket(zero: dict[str, Any], config: Config) -> int:
    """Return the numbers per collective. Raises UserError if a DeepSpeed JSON gives none."""
    size = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)
    if isinstance(size, bool) or not isinstance(size, int | float) or not size >= 1:
        raise UserError(
            f"{config.deepspeed}: zero_optimization.reduce_bucket_size is {size!r}; it should be a positive number"
        )
    return int(size)


def _precision(settings: dict[str, Any]) -> str:
    """Return what modules compute in under a DeepSpeed configuration, as `compute_dtype` does without DeepSpeed."""
    autocast = settings.get("torch_autocast", {})
    if not autocast.get("enabled"):
        return "float32"
    dtype = str(autocast.get("dtype") or "bfloat16").removeprefix("torch.")
    return {"fp16": "float16", "half": "float16", "float16": "float16"}.get(dtype, "bfloat16")
