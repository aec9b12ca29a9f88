"""The training step of a cell. It is the same on CPU and GPU; on a GPU it is replayed as one CUDA graph once warm.

The models are tiny, so a step launched kernel by kernel from Python would wait for Python on a GPU. A step therefore
takes nothing from the host: its samples, its learning rate and its number are on the device, and its results stay
there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.model.cache import LrnnCache
from lrnn.pretrain.optim import parameter_groups
from lrnn.track.grid import Cell, TrainSettings
from lrnn.track.tasks.base import IGNORE
from lrnn.track.tasks.counter_rng import Field, happens, sample_keys, split_seed

LR_WARMUP = 0.1  # share of the steps
SAMPLE_TOKENS = 2**22  # tokens of the samples drawn at once: 32 MB of ids, and the same of labels
EAGER_STEPS = 3  # steps before a capture: kernels are compiled, and libraries and the optimizer allocate memory


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step (from 0): linear warm-up over the first tenth, then a cosine to `min_lr`."""
    warmup = max(1, round(LR_WARMUP * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, settings.steps - warmup)
    return settings.min_lr + 0.5 * (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share))


def new_model(cell: Cell, device: torch.device) -> LrnnForCausalLM:
    """Return the untrained model of a cell, initialised from its seed."""
    torch.manual_seed(cell.seed)
    return LrnnForCausalLM(cell.model_config).to(device).train()


class Training:
    """Model, optimizer and samples of a stage of a cell, after `step` of its steps.

    On a GPU it belongs to the stream that is current when it is created. This must not be the default stream, which
    cannot be captured, and must be current in every call.
    """

    def __init__(self, cell: Cell, device: torch.device, stage: int = -1, model: LrnnForCausalLM | None = None):
        """Begin a stage, by default the last, with a model (by default a new one) and a new optimizer."""
        stage = range(len(cell.stages))[stage]
        task, settings = cell.stages[stage]
        self.settings, self.stage = settings, stage
        self.model = new_model(cell, device) if model is None else model
        self.step = 0
        self.loss = self.grad_norm = torch.full((), math.nan, device=device)  # of the last step
        # Sum and number of the finite losses since the last record. A graph adds to them in place.
        self._unrecorded = torch.zeros(2, dtype=torch.float64, device=device)
        self._on_gpu = device.type == "cuda"
        self._optimizer = self._new_optimizer(decay_by_shape=False)
        self._wants_graph = self._on_gpu and settings.cuda_graphs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0
        used = sum(earlier.steps * earlier.batch_size for _, earlier in cell.stages[:stage])  # by earlier stages
        self._draw_samples = lambda numbers: task.batch(
            split_seed(cell.seed, "train"), used + numbers, settings.min_length, settings.max_length, device
        )
        self._draw_chances = lambda numbers: happens(
            sample_keys(split_seed(cell.seed, "train"), (used + numbers).to(device)),
            Field.CONTINUES, 0, settings.state_passing,
        )  # fmt: skip
        self.steps_at_once = max(1, min(settings.steps, SAMPLE_TOKENS // (settings.batch_size * settings.max_length)))
        shape = (self.steps_at_once, settings.batch_size, settings.max_length)
        self._input_ids, self._labels = torch.zeros((2, *shape), dtype=torch.int64, device=device)
        self._passes_state = settings.state_passing > 0
        self._answer_table = None if task.answer_table is None else task.answer_table.to(device)
        self._pad_id = task.pad_id
        self._continues = torch.zeros(shape[:2], dtype=torch.bool, device=device)  # whether chance lets a row continue
        # Per row of the batch, after the last step: whether all answers were right, the last answer, and the state of
        # each layer. None before the first step. A graph reads and writes them in place.
        self._carried: list[Tensor] | None = None
        self._drawn = range(0)  # the steps whose samples are drawn; those of step s are in row s % steps_at_once
        self._number = torch.zeros(1, dtype=torch.int64, device=device)  # number of the next step
        if self._on_gpu:
            rates = [learning_rate(step, settings) for step in range(settings.steps)]
            self._rates = torch.tensor(rates, device=device)
            self._rate = torch.tensor(settings.lr, device=device)
            self._use_device_rate()

    def run(self, count: int) -> None:
        """Do `count` steps. On a GPU this returns while they are still queued."""
        for _ in range(count):
            self._have_samples()
            if self._wants_graph and self._graph is None and self._eager_steps >= EAGER_STEPS:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run_step()
                self._eager_steps += 1
            self.step += 1

    @property
    def is_warm(self) -> bool:
        """Return whether steps have reached their final speed."""
        return self._graph is not None or (not self._wants_graph and self._eager_steps >= EAGER_STEPS)

    def steps_until_drawing(self) -> int:
        """Return the steps, at least 1, until new samples must be drawn, which waits for all earlier steps."""
        return self._drawn.stop - self.step if self.step in self._drawn else 1

    def take_losses(self) -> Tensor:
        """Return the mean loss since the last call: float64, without losses that are not finite, or else the last."""
        total, count = self._unrecorded
        mean = torch.where(count > 0, total / count, self.loss.double())
        self._unrecorded.zero_()
        return mean

    @torch.no_grad()
    def look(self) -> None:
        """Run a forward pass over the samples of the next step, for hooks on the model. It changes nothing."""
        self._have_samples()
        self.model(input_ids=self._input_ids[self.step % self.steps_at_once], use_cache=False, logits_to_keep=1)

    def _new_optimizer(self, decay_by_shape: bool) -> torch.optim.AdamW:
        self._decay_by_shape = decay_by_shape
        return torch.optim.AdamW(
            parameter_groups(self.model, self.settings.weight_decay, decay_by_shape),
            lr=self.settings.lr,
            betas=(self.settings.betas[0], self.settings.betas[1]),
            fused=self._on_gpu,
            capturable=self._on_gpu,
        )

    def state(self) -> dict[str, Any]:
        """Return what `load` takes, on any device and with or without a graph."""
        return {
            "stage": self.stage,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "carried": self._carried,
            "unrecorded": self._unrecorded,
            "decay_by_shape": self._decay_by_shape,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from the state of a training of the same stage of the cell. Must be called before the first step."""
        self.model.load_state_dict(state["model"])
        # Files of earlier versions number the parameters by groups that were told by shape.
        self._optimizer = self._new_optimizer(state.get("decay_by_shape", True))
        # Groups hold settings of this device (fused, capturable), so those of the state are not used.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        carried = state.get("carried")  # absent in files of earlier versions
        self._carried = None if carried is None else [x.to(self._number.device, copy=True) for x in carried]
        if "unrecorded" in state:  # absent in files of earlier versions
            self._unrecorded.copy_(state["unrecorded"])
        self.step = state["step"]
        self._number.fill_(self.step)
        if self._on_gpu:
            self._use_device_rate()

    def _use_device_rate(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate  # the tensor itself, which a step overwrites

    def _have_samples(self) -> None:
        """Draw the samples of the steps from the next one up to a multiple of `steps_at_once`."""
        if self.step in self._drawn:
            return
        N, B = self.steps_at_once, self.settings.batch_size
        self._drawn = range(self.step, min((self.step // N + 1) * N, self.settings.steps))
        numbers = torch.arange(self._drawn.start * B, self._drawn.stop * B)
        batch = self._draw_samples(numbers)
        rows = slice(self.step % N, self.step % N + len(self._drawn))
        if self._passes_state:
            self._continues[rows] = self._draw_chances(numbers).view(-1, B)
        self._input_ids[rows] = batch.input_ids.view(-1, B, self.settings.max_length)
        self._labels[rows] = batch.labels.view(-1, B, self.settings.max_length)

    def _run_step(self) -> None:
        """Do one step. Under capture it must not read values back: no shape and no branch may depend on a value."""
        row = self._number % self.steps_at_once
        input_ids, labels = self._input_ids.index_select(0, row)[0], self._labels.index_select(0, row)[0]
        if self._on_gpu:
            self._rate.copy_(self._rates.index_select(0, self._number)[0])
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings)
        # None, not 0: backward then writes gradients instead of adding, and a graph writes them to the same place.
        self._optimizer.zero_grad(set_to_none=True)
        if self._passes_state:
            loss = self._loss_passing_state(input_ids, labels, self._continues.index_select(0, row)[0])
        else:
            loss = self.model(input_ids=input_ids, shift_labels=labels).loss
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm).detach()
        self._optimizer.step()
        self.loss = loss.detach()
        is_finite = self.loss.isfinite()
        self._unrecorded += torch.stack([torch.where(is_finite, self.loss, 0).double(), is_finite.double()])
        self._number += 1

    def _loss_passing_state(self, input_ids: Tensor, labels: Tensor, continues: Tensor) -> Tensor:
        """Return the loss of sequences [B, T] that continue from the previous ones where `continues` [B] is true.

        A row continues only if all its answers so far were right, because a wrong state teaches nothing. Rows therefore
        become as long as the model can follow, and it learns at the length at which it currently fails.
        """
        cache = LrnnCache(len(self.model.model.layers))
        labelled = labels != IGNORE
        if self._carried is not None:
            was_right, answer, *states = self._carried
            continues = continues & was_right
            before = torch.where(continues, answer, 0)
            joined = self._answer_table[before[:, None], labels.clamp(min=0)]  # type: ignore[index]
            labels = torch.where(labelled, joined, IGNORE)
            # A fresh state is zero. Convolutions always start fresh: their inputs are not in the cache.
            for layer, x in zip(cache.layers, states, strict=True):
                layer.state = torch.where(continues.view(-1, *[1] * (x.ndim - 1)), x, 0)
        options = {"attention_mask": input_ids != self._pad_id, "past_key_values": cache, "use_cache": True}
        logits = self.model(input_ids=input_ids, **options).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        with torch.no_grad():
            right = ((logits.argmax(-1) == labels) | ~labelled).all(1)
            last = (labelled * torch.arange(1, labels.shape[1] + 1, device=labels.device)).argmax(1, keepdim=True)
            states = [layer.state for layer in cache.layers]
            after = [x.detach() for x in (right, labels.gather(1, last)[:, 0], *states)]
            if self._carried is None:
                self._carried = [x.clone() for x in after]
            else:
                for kept, new in zip(self._carried, after, strict=True):
                    kept.copy_(new)
        return loss

    def _capture(self) -> None:
        """Record a step without doing it. The first steps, which count, have warmed everything up."""
        graph = torch.cuda.CUDAGraph()
        # The stream of the earlier steps is used, because libraries keep a workspace per stream.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._run_step()
        self._graph = graph
