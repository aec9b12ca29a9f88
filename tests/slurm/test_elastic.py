"""A run that resumes with another number of processes on the two nodes."""

import json
import re

import pytest
from running_job import TORTURE, RunningJob
from training_group import losses, run_group

from lrnn.pretrain.config import load_config
from lrnn.pretrain.zero import zero_settings
from lrnn.records import read_metrics

STEPS = 24


@pytest.mark.skipif(not TORTURE, reason="six starts on few cores: make torture")
def test_four_processes_resume_as_two(slurm, corpus, tmp_path):
    """Cancel 4 processes at ZeRO-1, and resume with 2 at ZeRO-3.

    The samples are the same, and the losses are within float32's noise of an undisturbed run of 2 processes.
    """
    engines = {}
    for stage in (1, 3):
        engine = zero_settings(stage)
        engine["torch_autocast"]["enabled"] = False
        engines[stage] = tmp_path / f"zero{stage}.json"
        engines[stage].write_text(json.dumps(engine))
    run = RunningJob(slurm, tmp_path / "run", corpus, STEPS)
    # Adam's first updates have the size of the learning rate for any gradient, so a large rate magnifies rounding.
    run.arguments += ["micro_batch_size=1", "optim.lr=1e-4"]
    script = run.submit("--dry-run", "zero=", f"deepspeed={engines[1]}").stdout
    assert script.count("#SBATCH --ntasks-per-node=1\n") == 1
    (tmp_path / "four.sbatch").write_text(script.replace("--ntasks-per-node=1\n", "--ntasks-per-node=2\n"))
    run.folder.mkdir()
    run.job = run.sbatch(tmp_path / "four.sbatch")
    run.wait_for_step(8)
    slurm.run("scancel", run.job)
    assert run.wait_for_end()["JobState"] == "CANCELLED"
    run.wait_for_checkpoint()
    stopped_at = run.last_step()

    done = run.submit("zero=", f"deepspeed={engines[3]}")
    assert done.returncode == 0 and f"(step {stopped_at} of {STEPS})" in done.stdout, done.stderr
    assert run.wait_for_end()["JobState"] == "COMPLETED", run.log()
    starts = [(r["step"], r["processes"]) for r in read_metrics(run.folder) if r.get("event") == "start"]
    assert starts == [(0, 4), (stopped_at, 2)]
    assert re.search(rf"resuming \S+step-{stopped_at:08d}: \S+ parameters, 2 x CPU", run.log())

    config = load_config(run.folder / "run.yaml").model_dump() | {"run_dir": str(tmp_path / "straight")}
    assert run_group(tmp_path, [{"config": config}]) == [0]
    truth, found = losses(config), losses({"run_dir": str(run.folder)})
    assert list(found) == list(truth) == list(range(1, STEPS + 1))
    for step in truth:
        assert found[step][0] == pytest.approx(truth[step][0], rel=1e-5), step
    differences = [abs(found[step][0] / truth[step][0] - 1) for step in truth]
    print(f"\n4 processes to step {stopped_at}, then 2: losses within {max(differences):.1e}")
