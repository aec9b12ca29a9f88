"""All ranks of a run as one that answers: the main process asks, and every rank computes its share.

A job is a kind of question and its texts. Jobs are dealt out in rounds, one for each rank. At the end of a round all
ranks hear whether one of them failed or was asked to stop, so that all leave together.
"""

from collections.abc import Callable
from typing import Any

from lrnn.pretrain.distributed import Ranks

Job = tuple[str, list[Any]]


class Failed(Exception):
    """A rank could not answer; the message says which one, and why."""


class Interrupted(Exception):
    """A rank was asked to stop."""


class Crew:
    """This rank among those that answer.

    Args:
        ranks: this process among all.
        answer: computes the answers to a job.
        turn: called before each round.
        stopped: whether this process was asked to stop.
    """

    def __init__(
        self,
        ranks: Ranks,
        answer: Callable[[Job], list[Any]],
        turn: Callable[[], None],
        stopped: Callable[[], bool],
    ):
        self._ranks, self._answer, self._turn, self._stopped = ranks, answer, turn, stopped

    @property
    def size(self) -> int:
        """Return the number of jobs of a round."""
        return self._ranks.world_size

    def ask(self, jobs: list[Job]) -> list[list[Any]]:
        """Return the answers to the jobs of a round. Only the main process calls this, while the others `serve`.

        Raises:
            Failed: a rank raised an error.
            Interrupted: a rank was asked to stop.
        """
        idle: list[Job | None] = [None] * (self.size - len(jobs))
        replies = self._round(self._ranks.scatter([("job", job) for job in [*jobs, *idle]])[1])
        errors = [error for _, error, _ in replies if error is not None]
        if errors:
            raise Failed(errors[0])
        if any(stopped for *_, stopped in replies):
            raise Interrupted
        return [answers for answers, *_ in replies[: len(jobs)]]

    def serve(self) -> Any:
        """Answer what the main process asks until it dismisses the others. Return what it said at the end."""
        while True:
            what, content = self._ranks.scatter(None)
            if what == "end":
                return content
            self._round(content)

    def dismiss(self, farewell: Any) -> None:
        """End `serve` on the other ranks."""
        self._ranks.scatter([("end", farewell)] * self.size)

    def _round(self, job: Job | None) -> list[tuple[list[Any], str | None, bool]]:
        """Compute this rank's job, and return the replies of all ranks: answers, error, and whether to stop."""
        self._turn()
        answers: list[Any] = []
        error = None
        try:
            if job is not None:
                answers = self._answer(job)
        except Exception as raised:  # Whatever happens, the other ranks wait for a reply.
            error = describe(raised, self._ranks)
        return self._ranks.gather((answers, error, self._stopped()))


def describe(error: Exception, ranks: Ranks) -> str:
    """Return an error of a rank as one line."""
    text = " ".join(str(error).split()) or "no message"
    where = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    return f"{where}{type(error).__name__}: {text}"
