"""The evaluator of a run: what it checks at the start, and what it finds between two steps."""

import copy
import logging
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.eval.export.tokenizer import export_tokenizer
from lrnn.eval.export.write import set_tokens
from lrnn.eval.in_run.answers import SAMPLE, Answers
from lrnn.eval.in_run.crew import Crew, Failed, Interrupted, describe
from lrnn.eval.in_run.prompts import read_prompts
from lrnn.eval.in_run.weights import empty_copy, fill, make_room
from lrnn.eval.model_folder import default_device
from lrnn.eval.suites.bos import decide
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine
from lrnn.pretrain.watch.protocol import Found, Sample, Wants
from lrnn.tokenizer import load_copy

T = TypeVar("T")


class InRun:
    """Scores and samples of a run.

    Args:
        config: the run's configuration; `eval`, `samples` and `seed` are used.
        model_config: the model.
        save_tokenizer: writes the tokenizer's files into a folder that it makes.
        ranks: this process among all.

    Raises:
        UserError: lm-eval is missing, or a task, its data or a prompt is not as it should be.
    """

    def __init__(
        self, config: Config, model_config: LrnnConfig, save_tokenizer: Callable[[Path], object], ranks: Ranks
    ):
        self._config, self._ranks = config, ranks
        self._model_config = copy.deepcopy(model_config)
        self._dtype: torch.dtype = getattr(torch, default_device(ranks.device.type, None)[1])
        self._prompts = read_prompts(config.samples) if config.samples.every else []
        self._tasks: Any = None
        try:
            with tempfile.TemporaryDirectory(prefix="lrnn-eval-") as root:
                self._open(save_tokenizer, Path(root, "trained"), Path(root, "exported"))
        except OSError as error:
            raise UserError(f"eval and samples cannot be prepared: {error}") from error

    def _open(self, save_tokenizer: Callable[[Path], object], trained: Path, exported: Path) -> None:
        """Take the tokenizer as an export has it, and open the tasks. The folders are needed meanwhile."""
        save_tokenizer(trained)
        tokenizer = load_copy(trained)
        self._tokenizer = export_tokenizer(tokenizer, exported)
        set_tokens(self._model_config, tokenizer)
        self._model_config.pad_token_id = self._tokenizer.pad_token_id
        self._bos = decide("auto", self._tokenizer, True)  # as an export says in its tokenizer_config.json
        if self._config.eval.every:
            self._tasks = self._open_tasks(exported)

    def _open_tasks(self, folder: Path) -> Any:
        """Return the `Tasks` on the main process, None on others, which only import what they answer with."""
        if find_spec("lm_eval") is None:
            raise UserError("eval.every needs lm-eval, which is not installed: pip install 'lrnn[eval]'")
        from lrnn.eval.in_run.tasks import Tasks
        from lrnn.eval.suites.prompts import length_of

        _drop_warnings()
        if not self._ranks.is_main:
            return None
        (folder / "config.json").write_text(self._model_config.to_json_string(use_diff=False))
        settings = self._config.eval
        max_length = settings.max_length or length_of(self._model_config, self._tokenizer)
        return Tasks(settings, folder, self._tokenizer, self._bos, max_length)

    def evaluate(self, engine: Engine, wants: Wants, turn: Callable[[], None], stopped: Callable[[], bool]) -> Found:
        """Return what is wanted; see `lrnn.pretrain.watch.protocol.Evaluator`."""
        model, error = None, None
        try:
            model = empty_copy(self._model_config, self._ranks.device, self._dtype)
            make_room(engine, self._ranks.device)
        except Exception as raised:  # of memory, above all; the others would wait in the first collective
            error = describe(raised, self._ranks)
        errors = [found for found in self._ranks.gather(error) if found is not None]
        if errors or model is None:
            return Found(errors={name: errors[0] for name in ("scores", "samples") if getattr(wants, name)})
        fill(model, engine)
        answers = Answers(model, self._tokenizer, self._bos, self._config, self._prompts, wants.step)
        crew = Crew(self._ranks, answers, turn, stopped)
        if not self._ranks.is_main:
            return crew.serve()
        found = self._lead(crew, answers, wants)
        crew.dismiss(Found(errors=found.errors, interrupted=found.interrupted))
        return found

    def _lead(self, crew: Crew, answers: Answers, wants: Wants) -> Found:
        """Ask all ranks for what is wanted, on the main process."""
        found = Found()
        if wants.scores:
            found.scores = _try("scores", lambda: self._tasks.scores(answers.lm, crew), found, self._ranks)
        if wants.samples and not found.interrupted:
            found.samples = _try("samples", lambda: self._samples(crew), found, self._ranks)
        return found

    def _samples(self, crew: Crew) -> list[Sample]:
        """Return a sample for each prompt. Each is generated by itself, so that no other decides its length."""
        texts: list[str] = []
        while len(texts) < len(self._prompts):
            numbers = range(len(texts), min(len(texts) + crew.size, len(self._prompts)))
            texts += [text for (text,) in crew.ask([(SAMPLE, [number]) for number in numbers])]
        return [Sample(*pair) for pair in zip(self._prompts, texts, strict=True)]


def _try(what: str, action: Callable[[], T], found: Found, ranks: Ranks) -> T | None:
    """Return what an action returns; None, with the reason in `found`, if it fails or is interrupted."""
    try:
        return action()
    except Interrupted:
        found.interrupted = True
    except Failed as error:
        found.errors[what] = str(error)
    except Exception as error:  # of lm-eval or a task's own code, of any type
        found.errors[what] = describe(error, ranks)
    return None


def _drop_warnings() -> None:
    """Drop what lm-eval says each time that it is given a model instead of its name."""
    logging.getLogger("lm_eval.models.huggingface").addFilter(
        lambda record: not any(text in record.getMessage() for text in ("model kwarg is not", "already-initialized"))
    )
