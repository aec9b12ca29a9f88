"""The batch script on a real SLURM of two nodes: a run to its end, and runs that SLURM stops and starts again.

LRNN_TORTURE=1 runs twenty endings (`make torture`).
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from cluster import KILL_WAIT_S
from running_job import ENDINGS, TORTURE, RunningJob
from training_group import losses, run_group

from lrnn.pretrain.config import load_config

torture = pytest.mark.skipif(not TORTURE, reason="takes minutes: make torture")
# By default, one ending sends SIGUSR1 and one SIGTERM, each to the batch script and to the tasks.
SHORT = ["usr1 --full", "pre-empted"]
STEPS_BETWEEN = 8


def endings() -> list[str]:
    if not TORTURE:
        return SHORT
    rng = random.Random(0)
    kinds = [*ENDINGS, *ENDINGS, *(rng.choice(list(ENDINGS)) for _ in range(20 - 2 * len(ENDINGS)))]
    rng.shuffle(kinds)
    return kinds


# Some steps are done before a signal arrives. A time limit may be 30 s late, which is some 200 steps.
STEPS = STEPS_BETWEEN * (len(endings()) + 3) + 200 * endings().count("time limit")


def undisturbed(run: RunningJob, tmp_path: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of the same run in two processes that SLURM neither starts nor stops."""
    config = load_config(run.folder / "run.yaml").model_dump() | {"run_dir": str(tmp_path / "undisturbed")}
    assert run_group(tmp_path, [{"config": config}]) == [0]
    return [(step, loss) for step, (loss, *_) in losses(config).items()]


def test_a_stopped_job_resumes_and_loses_nothing(slurm, corpus, tmp_path):
    started = time.monotonic()
    run = RunningJob(slurm, tmp_path / "my run", corpus, STEPS)
    assert run.submit().returncode == 0
    kinds, stopped_at = endings(), []
    for kind in kinds:
        run.wait_for_start()
        if kind == "usr1 at start":
            time.sleep(1)
        else:
            run.wait_for_step(run.last_step() + STEPS_BETWEEN)
        run.end(kind)
        stopped_at.append(run.last_step())
        assert stopped_at[-1] < STEPS, "the run was done before it could be stopped; it proves nothing"
    job = run.wait_for_end()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.log()
    assert job["NumNodes"] == "2" and job["NumTasks"] == "2"
    assert (run.folder / f"checkpoints/step-{STEPS:08d}").is_dir()

    metrics = run.metrics()
    assert {record["processes"] for record in metrics if record.get("event") == "start"} == {2}
    starts = [record["step"] for record in metrics if record.get("event") == "start"]
    at_start = [kind == "usr1 at start" for kind in kinds]
    # A job that was stopped before its first record leaves none, and the next one begins where it would have.
    assert sorted(set(starts)) == sorted({0, *stopped_at}) and starts == sorted(starts)
    assert job["Restarts"] == str(len(kinds))
    assert [step for step, _ in run.losses()] == list(range(1, STEPS + 1))  # none missing, none twice, in order
    assert run.losses() == undisturbed(run, tmp_path)  # to the last bit
    assert run.losses()[-1][1] < 0.8 * run.losses()[0][1]
    # There is one log, appended to. After `scontrol requeue` the shell ends before it can print.
    log = run.log()
    by_signal = len(kinds) - kinds.count("requeue")
    assert log.count("goes back into the queue") == by_signal, log
    assert log.count("stopped by a signal (status 75)") >= by_signal - sum(at_start), log
    assert log.count("CANCELLED AT") >= kinds.count("requeue") and log.count("new run ") == 1, log
    print(
        f"\n{len(kinds)} endings in {time.monotonic() - started:.0f} s: {dict(Counter(kinds))}; stopped at steps "
        f"{stopped_at}; {STEPS} steps, none lost, none repeated, all losses equal"
    )


def test_failed_and_cancelled_jobs_end_and_the_same_command_resumes(slurm, corpus, tmp_path):
    """A killed task fails the job, which stays failed. A second command for a queued run is refused.

    `scancel` lets the run write its checkpoint, and does not send the job back into the queue.
    """
    run = RunningJob(slurm, tmp_path / "run", corpus, 10000)
    more = ["checkpoint.every=10"]
    assert run.submit(*more, "--dry-run").returncode == 0 and run.job == ""
    slurm.run("scontrol", "update", "PartitionName=test", "State=DOWN")  # jobs wait, so the first cannot end before
    try:
        assert run.submit(*more).returncode == 0
        first = run.job
        second = run.submit(*more)
    finally:
        slurm.run("scontrol", "update", "PartitionName=test", "State=UP")
    assert second.returncode == 2 and run.job == first
    assert f"already has job {first} " in second.stderr and f"scancel {first}" in second.stderr
    run.wait_for_step(12)
    slurm.run("scancel", "--signal=KILL", f"{first}.0")
    job = run.wait_for_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "137:0", "0"), run.log()

    # How many steps a job does before the signal arrives depends on the machine.
    newest = run.newest_checkpoint()
    assert 10 <= newest <= run.last_step() <= newest + 10
    done = run.last_step()
    again = run.submit(*more)
    assert again.returncode == 0 and run.job != first
    assert "resumes" in again.stdout and f"(step {newest} of 10000)" in again.stdout
    run.wait_for_step(done + 1)
    slurm.run("scancel", run.job)
    job = run.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    starts = [record["step"] for record in run.metrics() if record.get("event") == "start"]
    assert starts == [0, newest] and run.log().count("resuming ") == 1  # one log for both jobs
    run.wait_for_checkpoint()
    finished = run.submit(f"steps={run.last_step()}", "--allow-change")
    assert finished.returncode == 2 and "is finished" in finished.stderr


@torture
def test_two_nodes_train_to_the_end(slurm, corpus, tmp_path):
    run = RunningJob(slurm, tmp_path / "run", corpus, STEPS)
    assert run.submit().returncode == 0
    job = run.wait_for_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), run.log()
    assert run.losses() == undisturbed(run, tmp_path)


@torture
@pytest.mark.parametrize(("number", "sign"), [(signal.SIGSTOP, "is lost"), (signal.SIGKILL, "Killed")])
def test_a_lost_task_ends_the_job(slurm, corpus, tmp_path, number, sign):
    """It ends within the watchdog's limit, the minute that srun waits for the other tasks, and KillWait."""
    run = RunningJob(slurm, tmp_path / "run", corpus, 10000)
    assert run.submit("watchdog.lost_seconds=10").returncode == 0
    run.wait_for_step(5)
    victim = run.process_of_task(1)
    os.kill(victim, number)
    started = time.monotonic()
    job = run.wait_for_end()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", run.log()
    assert time.monotonic() - started < 10 + 60 + KILL_WAIT_S + 15
    (line,) = [line for line in run.log().splitlines() if sign in line and ("rank 1" in line or "task 1" in line)]
    print(f"\nended {time.monotonic() - started:.0f} s after {number.name}: {line}")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{victim}").exists():
        assert time.monotonic() < deadline, "the task is left over"
        time.sleep(0.1)


@torture
def test_a_node_that_fails(slurm, corpus, tmp_path):
    """SLURM puts the job back into the queue by itself, whether or not there is time for a checkpoint."""
    run = RunningJob(slurm, tmp_path / "run", corpus, 100)
    assert run.submit("checkpoint.every=10").returncode == 0
    run.wait_for_step(35)
    slurm.run("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=test")  # the node comes back by itself
    job = run.wait_for_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), run.log()
    (_, resumed) = [record["step"] for record in run.metrics() if record.get("event") == "start"]
    steps = [step for step, _ in run.losses()]
    before = steps[: len(steps) - (100 - resumed)]
    assert before == list(range(1, len(before) + 1)) and steps[len(before) :] == list(range(resumed + 1, 101))
    assert 0 <= len(before) - resumed <= 20
    by_step: dict[int, float] = {}
    for step, loss in run.losses():
        assert by_step.setdefault(step, loss) == loss, "a repeated step has another loss"
