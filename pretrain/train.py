"""The training loop."""

from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.guard import Verdict
from lrnn.pretrain.launch import StopRequest
from lrnn.pretrain.metrics.start_up import StartUp
from lrnn.pretrain.run import Run
from lrnn.pretrain.step import train_step
from lrnn.pretrain.watch.protocol import MakeEvaluator


def train(
    config: Config,
    ranks: Ranks,
    stop: StopRequest,
    allow_change: bool = False,
    start_up: StartUp | None = None,
    make: MakeEvaluator | None = None,
) -> int:
    """Run the training loop. With `allow_change`, a run may resume with settings that change its results.

    The time until the first step is booked in `start_up`, after what it holds. `make` makes what finds the scores and
    samples that `config.eval` and `config.samples` ask for.

    Returns:
        0 when the last step is done, `STOPPED` when `stop` ended the run early.

    Raises:
        UserError: on all ranks, if anything is wrong with the run, its data or its storage. A checkpoint holds the
            steps done so far, unless the storage is at fault.
    """
    with Run.open(config, ranks, stop, allow_change, start_up, make) as run:
        while not run.finished:
            run.watch()
            with run.phase("waiting for data"):
                batches = run.next_batches()
            if batches is None:  # A signal came or data failed; all ranks agree.
                break
            with run.phase("computing the step"), run.measuring():
                step = train_step(
                    run.engine, batches, lr=run.learning_rate(), limit=run.guard.limit, carried=run.carried
                )
            if run.judge(step, batches) is Verdict.ROLL_BACK and run.roll_back():
                continue
            run.measure(step)
            run.save_if_due()
        return run.close()
