"""The training step of a cell: the same on CPU and GPU, and there, once warm, replayed as one CUDA graph.

The models are tiny, so on a GPU a step that Python drives kernel by kernel waits for Python. A step therefore takes
nothing from the host: its samples, its learning rate and its number lie on the device, and what it finds stays there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.model.layers import LrnnCache
from lrnn.pretrain.optim import parameter_groups
from lrnn.track.grid import Cell, TrainSettings
from lrnn.track.tasks.base import IGNORE
from lrnn.track.tasks.counter_rng import Field, happens, sample_keys, split_seed

LR_WARMUP = 0.1  # of the steps
SAMPLE_TOKENS = 2**22  # of the samples that are drawn at once: 32 MB of ids, and as much of labels
EAGER_STEPS = 3  # ahead of a capture: kernels are compiled, libraries and the optimizer allocate what they keep


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up over the first tenth, then a cosine to `min_lr`; `step` counts from 0."""
    warmup = max(1, round(LR_WARMUP * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, settings.steps - warmup)
    return settings.min_lr + 0.5 * (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share))


def new_model(cell: Cell, device: torch.device) -> LrnnForCausalLM:
    """The model of a cell as its seed makes it."""
    torch.manual_seed(cell.seed)
    return LrnnForCausalLM(cell.model_config).to(device).train()


class Training:
    """Model, optimizer and samples of a stage of a cell, after `step` of its steps.

    On a GPU all of it belongs to the stream that is current when it is made. That must not be the default one, which
    cannot be captured, and has to be current in every call.
    """

    def __init__(self, cell: Cell, device: torch.device, stage: int = -1, model: LrnnForCausalLM | None = None):
        """Begin a stage, by default the last, with a model (by default a new one) and an optimizer of its own."""
        stage = range(len(cell.stages))[stage]
        task, settings = cell.stages[stage]
        self.settings, self.stage = settings, stage
        self.model = new_model(cell, device) if model is None else model
        self.step = 0
        self.loss = self.grad_norm = torch.full((), math.nan, device=device)  # of the last step
        self._on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            fused=self._on_gpu,
            capturable=self._on_gpu,
        )
        self._wants_graph = self._on_gpu and settings.cuda_graphs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0
        used = sum(earlier.steps * earlier.batch_size for _, earlier in cell.stages[:stage])  # by stages before
        self._draw_samples = lambda numbers: task.batch(
            split_seed(cell.seed, "train"), used + numbers, settings.min_length, settings.max_length, device
        )
        self._draw_chances = lambda numbers: happens(
            sample_keys(split_seed(cell.seed, "train"), (used + numbers).to(device)),
            Field.GOES_ON, 0, settings.state_passing,
        )  # fmt: skip
        self.steps_at_once = max(1, min(settings.steps, SAMPLE_TOKENS // (settings.batch_size * settings.max_length)))
        shape = (self.steps_at_once, settings.batch_size, settings.max_length)
        self._input_ids, self._labels = torch.zeros((2, *shape), dtype=torch.int64, device=device)
        self._passes_state = settings.state_passing > 0
        self._answer_table = None if task.answer_table is None else task.answer_table.to(device)
        self._pad_id = task.pad_id
        self._goes_on = torch.zeros(shape[:2], dtype=torch.bool, device=device)  # whether a row may, by chance
        # By row of the batch, after the last step: whether its answers were right, the last of them, and the state of
        # each layer. None ahead of the first. A graph reads and writes them in place.
        self._carried: list[Tensor] | None = None
        self._drawn = range(0)  # the steps whose samples these are; that of step s in row s % steps_at_once
        self._number = torch.zeros(1, dtype=torch.int64, device=device)  # of the next step
        if self._on_gpu:
            rates = [learning_rate(step, settings) for step in range(settings.steps)]
            self._rates = torch.tensor(rates, device=device)
            self._rate = torch.tensor(settings.lr, device=device)
            self._use_device_rate()

    def run(self, count: int) -> None:
        """Do `count` steps; on a GPU this returns while they wait for their turn."""
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
        """Whether steps now take as long as they will to the end."""
        return self._graph is not None or (not self._wants_graph and self._eager_steps >= EAGER_STEPS)

    def steps_until_drawing(self) -> int:
        """Steps until new samples must be drawn, which waits for all steps before; at least 1."""
        return self._drawn.stop - self.step if self.step in self._drawn else 1

    @torch.no_grad()
    def look(self) -> None:
        """A forward pass over the samples of the next step, for hooks on the model; it changes nothing."""
        self._have_samples()
        self.model(input_ids=self._input_ids[self.step % self.steps_at_once], use_cache=False, logits_to_keep=1)

    def state(self) -> dict[str, Any]:
        """What `load` takes, on any device and in either mode."""
        return {
            "stage": self.stage,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "carried": self._carried,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of this or another training of the same stage of the cell; not after a step."""
        self.model.load_state_dict(state["model"])
        # The groups hold how this device computes (fused, capturable): those of the other say nothing.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        carried = state.get("carried")  # not in the files of earlier versions
        self._carried = None if carried is None else [x.to(self._number.device, copy=True) for x in carried]
        self.step = state["step"]
        self._number.fill_(self.step)
        if self._on_gpu:
            self._use_device_rate()

    def _use_device_rate(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate  # the tensor itself: a step overwrites it

    def _have_samples(self) -> None:
        """Draw the samples of the steps from the next one to a multiple of `steps_at_once`."""
        if self.step in self._drawn:
            return
        N, B = self.steps_at_once, self.settings.batch_size
        self._drawn = range(self.step, min((self.step // N + 1) * N, self.settings.steps))
        numbers = torch.arange(self._drawn.start * B, self._drawn.stop * B)
        batch = self._draw_samples(numbers)
        rows = slice(self.step % N, self.step % N + len(self._drawn))
        if self._passes_state:
            self._goes_on[rows] = self._draw_chances(numbers).view(-1, B)
        self._input_ids[rows] = batch.input_ids.view(-1, B, self.settings.max_length)
        self._labels[rows] = batch.labels.view(-1, B, self.settings.max_length)

    def _run_step(self) -> None:
        """One step. Under capture it may read nothing back: no shape and no branch depends on a value."""
        row = self._number % self.steps_at_once
        input_ids, labels = self._input_ids.index_select(0, row)[0], self._labels.index_select(0, row)[0]
        if self._on_gpu:
            self._rate.copy_(self._rates.index_select(0, self._number)[0])
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings)
        # None, not 0: backward then writes the gradients, in a graph every time to the same place.
        self._optimizer.zero_grad(set_to_none=True)
        if self._passes_state:
            loss = self._loss_passing_state(input_ids, labels, self._goes_on.index_select(0, row)[0])
        else:
            loss = self.model(input_ids=input_ids, shift_labels=labels).loss
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm).detach()
        self._optimizer.step()
        self.loss = loss.detach()
        self._number += 1

    def _loss_passing_state(self, input_ids: Tensor, labels: Tensor, goes_on: Tensor) -> Tensor:
        """The loss of sequences [B, T] that go on from those before where `goes_on` [B] and all was right before.

        A state that has gone wrong teaches nothing. So a row goes on as far as the model can, and the model learns at
        the length at which it fails by now.
        """
        cache = LrnnCache(len(self.model.model.layers))
        labelled = labels != IGNORE
        if self._carried is not None:
            was_right, answer, *states = self._carried
            goes_on = goes_on & was_right
            before = torch.where(goes_on, answer, 0)
            joined = self._answer_table[before[:, None], labels.clamp(min=0)]  # type: ignore[index]
            labels = torch.where(labelled, joined, IGNORE)
            # A fresh state is zero. Convolutions begin anew: their inputs are not in the cache.
            cache.state = [torch.where(goes_on.view(-1, *[1] * (x.ndim - 1)), x, 0) for x in states]
        options = {"attention_mask": input_ids != self._pad_id, "past_key_values": cache, "use_cache": True}
        logits = self.model(input_ids=input_ids, **options).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        with torch.no_grad():
            right = ((logits.argmax(-1) == labels) | ~labelled).all(1)
            last = (labelled * torch.arange(1, labels.shape[1] + 1, device=labels.device)).argmax(1, keepdim=True)
            after = [x.detach() for x in (right, labels.gather(1, last)[:, 0], *cache.state)]
            if self._carried is None:
                self._carried = [x.clone() for x in after]
            else:
                for kept, new in zip(self._carried, after, strict=True):
                    kept.copy_(new)
        return loss

    def _capture(self) -> None:
        """Record a step without doing it. The first steps, done for good, have warmed everything up."""
        graph = torch.cuda.CUDAGraph()
        # On the stream of the steps before: libraries keep their workspace by stream.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._run_step()
        self._graph = graph
