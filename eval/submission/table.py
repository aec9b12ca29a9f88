"""The table of jobs that `slurm/eval.sbatch` reads: FOLDER<tab>NAME<tab>OPTION, one line per evaluation."""

from dataclasses import dataclass
from pathlib import Path

from lrnn import sbatch
from lrnn.eval.submission.models import Model, model_at
from lrnn.eval.suites.request import Request

MARK = "lrnn eval="  # begins the comment of an array, and its table follows


@dataclass(frozen=True)
class Evaluation:
    """A line of a table: a model, the name of its result folder, and the option of `lrnn eval` for what to run."""

    model: Model
    name: str
    option: str

    @property
    def out(self) -> Path:
        """The result folder."""
        return self.model.results / self.name

    @property
    def is_done(self) -> bool:
        """Whether there are results."""
        file = self.out / "results.json"
        return file.is_file() and file.stat().st_size > 0

    @property
    def line(self) -> str:
        """The line of the table."""
        return f"{self.model.folder}\t{self.name}\t{self.option}\n"


def evaluations(models: list[Model], requests: list[Request]) -> list[Evaluation]:
    """Return every request of every model."""
    return [Evaluation(model, request.name, _option(request)) for model in models for request in requests]


def _option(request: Request) -> str:
    return f"--suite={request.suite}" if request.suite else f"--tasks={','.join(request.tasks)}"


def comment(table: Path) -> str:
    """Return the comment that marks the array of a table."""
    return f"{MARK}{table}"


def queued() -> set[Path]:
    """Return the result folders of all evaluations that are queued or running, whoever submitted them."""
    found: set[Path] = set()
    for job in sbatch.jobs():
        if not job.comment.startswith(MARK):
            continue
        try:
            lines = Path(job.comment.removeprefix(MARK)).read_text().splitlines()
        except OSError:  # its tasks cannot read the table either
            continue
        number = job.number.partition("_")[2]
        mine = lines[int(number) : int(number) + 1] if number.isdigit() else lines
        for line in mine:
            folder, name, _ = line.split("\t", 2)
            found.add(model_at(Path(folder)).results / name)
    return found
