"""What a run consists of: model, data and checkpoint, found and checked; its engine; how far it is."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.model_config import load_model_config
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint import zero_state
from lrnn.pretrain.config import Config
from lrnn.pretrain.data.sources import Data, HeldOut, open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import build_engine, build_model, deepspeed_config
from lrnn.pretrain.metrics.log import EigenvalueProbe
from lrnn.run_lock import RunLock
from lrnn.settings import dump


@dataclass
class Progress:
    """How far a run is; stored in every checkpoint."""

    step: int = 0  # steps done, skipped ones included
    samples: int = 0  # samples consumed: the position in the data; after a rollback more than `step` would need
    tokens: int = 0  # labels that the loss was taken over
    skipped_steps: int = 0
    optimizer_step: int = 0  # updates applied
    stream: dict[str, Any] | None = None  # position in a streamed source
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)  # of the last steps, by which a spike is known


@dataclass
class Run:
    """What a run needs before there is an engine; all of it is checked."""

    model_config: LrnnConfig
    data: Data
    heldout: HeldOut
    saved: Path | None  # the checkpoint to go on from
    progress: Progress


def open_run(config: Config, ranks: Ranks, exits: ExitStack) -> Run:
    """Find and check model, data and checkpoint, and hold the run's folder until `exits` is closed.

    Raises UserError on all ranks for whatever is wrong with them.
    """
    run_dir = Path(config.run_dir)

    def open_parts() -> Run:
        model_config = load_model_config(config.model)
        deepspeed_config(config, ranks.world_size)
        data = open_data(config, model_config, ranks)
        return Run(model_config, data, HeldOut(data, config, ranks), None, Progress())

    def open_folder() -> Path | None:
        exits.enter_context(RunLock(run_dir))
        return checkpoint.find_newest(run_dir)  # it reads all checksums

    run = ranks.together(open_parts)
    run.saved = ranks.gather(ranks.together(open_folder if ranks.is_main else lambda: None))[0]
    if run.saved is not None:
        check_same_run(run.saved, run.model_config, run.data.description)
        run.progress = Progress(**checkpoint.read_progress(run.saved)["progress"])

    def write_config() -> None:
        try:
            write_atomically(run_dir / "run.yaml", dump(config))
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}: {error.filename})") from None

    ranks.together(write_config if ranks.is_main else lambda: None)
    return run


def start_engine(run: Run, config: Config, ranks: Ranks) -> tuple[Any, EigenvalueProbe]:
    """The model, with the checkpoint's weights and moments where there is one, in a DeepSpeed engine."""
    model = build_model(run.model_config, config.seed, config.activation_checkpointing)
    state = checkpoint.SavedState(run.saved) if run.saved is not None else None
    if state is not None:
        state.load_into(model)
    probe = EigenvalueProbe(model)
    engine = build_engine(model.to(ranks.device), config, ranks)
    if state is not None:
        zero_state.restore(engine, state.read, run.progress.optimizer_step)
    return engine, probe


def roll_back(run: Run, engine: Any, config: Config, ranks: Ranks) -> Path | None:
    """Put weights, moments and step of the newest intact checkpoint into the engine; the position in the data stays.

    Returns the checkpoint's folder, or None where there is none yet, and then nothing is changed.
    """

    def newest() -> Path | None:
        return checkpoint.find_newest(Path(config.run_dir)) if ranks.is_main else None

    saved = ranks.gather(ranks.together(newest))[0]
    if saved is None:
        return None
    before = Progress(**checkpoint.read_progress(saved)["progress"])
    state = checkpoint.SavedState(saved)
    zero_state.load_module(engine, state.load_into)
    zero_state.restore(engine, state.read, before.optimizer_step)
    run.progress.step, run.progress.tokens, run.progress.losses = before.step, before.tokens, before.losses
    run.progress.rollbacks += 1
    return saved


def contents_of_checkpoint(run: Run, config: Config, engine: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint says of the run as it stands: its `progress.json`, and its other small files by name."""
    run.progress.optimizer_step = zero_state.optimizer_step(engine)
    progress = {"step": run.progress.step, "progress": asdict(run.progress), "data": run.data.description}
    texts = {"config.json": run.model_config.to_json_string(use_diff=False), "run.yaml": dump(config)}
    return progress, texts


def check_same_run(saved: Path, model_config: LrnnConfig, description: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint is of another model, or its position is one in other data."""
    # A checkpoint that is older than a field was trained with what is now the field's default.
    before = LrnnConfig().to_dict() | json.loads((saved / "config.json").read_text())
    now = json.loads(model_config.to_json_string(use_diff=False))
    ignored = {"transformers_version", "dtype"}
    for key in sorted((set(before) | set(now)) - ignored):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{saved} was trained with {key} = {before.get(key)!r}, the model configuration says {now.get(key)!r}; "
                "a run resumes with the model it began with: restore the configuration, or choose another run_dir"
            )
    data_before = checkpoint.read_progress(saved)["data"]
    for key in sorted(set(data_before) | set(description)):
        if data_before.get(key) != description.get(key):
            raise UserError(
                f"{saved} was trained on data with {key} = {data_before.get(key)!r}, now it is "
                f"{description.get(key)!r}; the position in the data would mean something else: restore it, or choose "
                "another run_dir"
            )
