"""Test `lrnn track`: parity can be learned with eigenvalues in [-1, 1] but not in [0, 1]; a grid resumes."""

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from matplotlib.image import imread

from lrnn import LrnnForCausalLM, environment
from lrnn.cli import main
from lrnn.records import read_metrics
from lrnn.track import training
from lrnn.track.grid import load_grid
from lrnn.track.papers import reported
from lrnn.track.report import holds_to
from lrnn.track.training import learning_rate

GRID = {
    "tasks": {"parity": {"task": "parity"}},
    "models": {
        "deltanet": {
            "mixer": "deltanet", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16,
            "conv_size": 1, "intermediate_size": 64,
        }
    },
    "seeds": [0],
    "train": {"min_length": 3, "max_length": 20, "steps": 400, "batch_size": 64, "lr": 1e-2, "weight_decay": 0.0},
    "test": {"min_length": 20, "max_length": 256, "samples": 1024, "batch_size": 256},
}  # fmt: skip


@pytest.fixture
def grid_file(tmp_path):
    """Return `grid_file(**changes)`: a YAML file of the grid above with results in tmp_path/out."""

    def write(**changes) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(json.dumps({"out": str(tmp_path / "out"), **GRID, **changes}))
        return path

    return write


def trained(cell) -> LrnnForCausalLM:
    model = LrnnForCausalLM(cell.model_config)
    model.load_state_dict(torch.load(cell.folder / "state.pt", weights_only=True)["model"])
    return model.eval()


def test_parity_needs_negative_eigenvalues(grid_file, tmp_path, capsys):
    """Trained on 3 to 20 bits for half a minute, one layer is right on all lengths to 256 with [-1, 1].

    With [0, 1] this is impossible, as the trained models themselves show on the word 0 1 0 1 ...: reading 0 1 takes the
    state S to M S + B, where M = A(1) A(0) is a product of two symmetric matrices with eigenvalues in [0, 1]. Such an M
    has real eigenvalues in [0, 1] itself, those of A(1)^1/2 A(0) A(1)^1/2, so nothing in M^n changes sign. Where an
    eigenvalue is 1, keys are orthogonal and nothing is written. The states therefore converge, those after 0 and those
    after 1 each to their own limit, and so do the logits at t and t + 2. But the parity of the word, 0 1 1 0 0 1 1 0
    ..., differs between t and t + 2, so at least half of the answers are wrong. This is the argument of
    arXiv 2411.12537, Theorem 1, for a word of period two. With -1 in the range, M may alternate.
    """
    path = grid_file()
    assert main(["track", str(path)]) == 0
    _, cells = load_grid(path)
    results = {cell.range: json.loads((cell.folder / "result.json").read_text()) for cell in cells}
    assert results["negative"]["scaled_accuracy"] >= 0.999
    assert abs(results["positive"]["scaled_accuracy"]) < 0.1 and results["positive"]["floor"] == 0.5

    word = torch.tensor([1, 2]).repeat(1, 200)
    parity_id = (word[0] == 2).cumsum(0) % 2 + 1
    with torch.no_grad():
        logits = {cell.range: trained(cell)(input_ids=word).logits[0] for cell in cells}
    late_change = {range_: (x[2:] - x[:-2]).abs().amax(-1)[200:] for range_, x in logits.items()}
    right = {range_: x.argmax(-1) == parity_id for range_, x in logits.items()}
    assert late_change["positive"].max() < 1e-4 and right["positive"][200:].float().mean() <= 0.5
    assert late_change["negative"].min() > 0.1 and right["negative"].float().mean() > 0.9
    assert set(logits["negative"][200:].argmax(-1).tolist()) == {1, 2}

    # Only the wider range has negative eigenvalues, and training came to use those near -1.
    shares = {cell.range: read_metrics(cell.folder)[-1]["eigenvalues"]["histogram"][0] for cell in cells}
    assert sum(shares["positive"][:10]) == 0 and sum(shares["negative"][:2]) > 0.1

    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert "| deltanet | [-1, 1] | 1.000 [1.000] | 1.000 [1.000] | 256 [256] | 1.000 [.999] |" in table, table
    assert "always giving the most frequent answer scores 0.000" in " ".join(table.split())
    pictures = {p: p.read_bytes() for p in (out / "accuracy-parity.png", out / "eigenvalues-parity.png")}
    for picture in pictures:
        pixels = imread(picture)[..., :3]
        colourful = (pixels.max(-1) - pixels.min(-1) > 0.2).any(0)
        assert colourful.mean() > 0.5, f"{picture} shows next to nothing"
    assert "All tasks" not in table and "every position" not in table
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["range"] for row in rows} == {"negative", "positive"} and len(rows) == sum(
        len(r["by_length"]) for r in results.values()
    )
    capsys.readouterr()
    # A second call trains nothing, and gives the same table and the same pictures.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("state.pt")}
    assert main(["track", str(path)]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("state.pt")} == before and (
        out / "table.md"
    ).read_text() == table
    assert {p: p.read_bytes() for p in pictures} == pictures


def test_a_stopped_grid_resumes_as_if_it_had_not_stopped(grid_file, tmp_path, monkeypatch):
    """Results are equal bitwise: samples are numbered, and the state holds everything else."""
    short = {"train": GRID["train"] | {"steps": 30, "log_every": 1, "checkpoint_seconds": 1e-9}, "ranges": ["negative"]}
    short["test"] = GRID["test"] | {"samples": 64}
    path = grid_file(**short)
    assert main(["track", str(path), f"out={tmp_path / 'straight'}"]) == 0
    original, calls = training.learning_rate, 0

    def stop(step, settings):
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KeyboardInterrupt
        return original(step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            main(["track", str(path)])
    assert not list((tmp_path / "out").rglob("result.json"))
    assert main(["track", str(path)]) == 0
    cell = "parity/deltanet/negative/seed-0"
    losses = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / run / cell)]
        for run in ("straight", "out")
    ]
    assert losses[0] == losses[1] and [step for step, _, _ in losses[1]] == list(range(1, 31))
    results = [json.loads((tmp_path / run / cell / "result.json").read_text()) for run in ("straight", "out")]
    assert all(result.pop("steps_per_second") > 0 for result in results)
    assert results[0] == results[1]


def test_changed_settings_are_not_mixed(grid_file, tmp_path, capsys):
    short = {"train": GRID["train"] | {"steps": 2}, "ranges": ["negative"], "test": GRID["test"] | {"samples": 8}}
    path = grid_file(**short)
    assert main(["track", str(path)]) == 0
    assert main(["track", str(path), "train.log_every=7"]) == 0
    assert main(["track", str(path), "train.lr=0.5"]) == 2
    assert "holds parity, deltanet [-1, 1], seed 0 with another task, model, training" in capsys.readouterr().err


def test_a_model_may_have_training_settings_of_its_own(grid_file, tmp_path):
    """They belong to the cell, decide its fingerprint, appear in the table, and leave other cells unchanged."""
    plain = GRID["models"]["deltanet"]
    changes = {"train": GRID["train"] | {"steps": 2}, "ranges": ["negative"], "test": GRID["test"] | {"samples": 8}}
    grid, (before,) = load_grid(grid_file(**changes))
    path = grid_file(models={"deltanet": plain, "quick": plain | {"train": {"lr": 0.05, "steps": 3}}}, **changes)
    _, (same, quick) = load_grid(path)
    assert same.fingerprint == before.fingerprint and same.train == before.train == grid.train
    assert quick.train == grid.train.model_copy(update={"lr": 0.05, "steps": 3})
    assert quick.fingerprint != same.fingerprint
    _, (_, slower) = load_grid(path, ["models.quick.train.lr=0.04"])
    assert slower.fingerprint != quick.fingerprint
    for override in ("train.concurrent=2", "train.cuda_graphs=false"):
        assert [cell.fingerprint for cell in load_grid(path, [override])[1]] == [same.fingerprint, quick.fingerprint]

    assert main(["track", str(path)]) == 0
    records = read_metrics(quick.folder)
    assert [r["step"] for r in records] == [3] and records[0]["lr"] == learning_rate(2, quick.train)
    assert "quick was trained with lr 0.05, steps 3." in (tmp_path / "out/table.md").read_text()


def test_the_result_states_its_origin(grid_file, tmp_path):
    changes = {"train": GRID["train"] | {"steps": 60}, "ranges": ["negative"], "test": GRID["test"] | {"samples": 8}}
    assert main(["track", str(grid_file(**changes))]) == 0
    result = json.loads((tmp_path / "out/parity/deltanet/negative/seed-0/result.json").read_text())
    assert result["steps_per_second"] > 0 and result["concurrent"] == 1
    facts = result["environment"]
    assert facts["device"] == "cpu" and facts["torch"] == torch.__version__ and facts["triton"] == triton.__version__
    table = (tmp_path / "out/table.md").read_text()
    assert f"Run on cpu, 1 at a time, with torch {torch.__version__}, triton {triton.__version__}" in table
    assert f"SHA-256 of the source {facts['source']}." in table and re.fullmatch("[0-9a-f]{12}", facts["source"])
    assert f"| {result['steps_per_second']:.0f} |\n" in table
    # A result without this is reported all the same.
    path = tmp_path / "out/parity/deltanet/negative/seed-0/result.json"
    path.write_text(json.dumps({k: v for k, v in result.items() if k not in ("steps_per_second", "environment")}))
    assert main(["track", str(grid_file(**changes))]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert "Run on" not in table and "| - |\n" in table


def test_every_architecture_takes_the_same_path(grid_file, tmp_path):
    """They are trained, measured and reported beside the papers' figures; mixers without a range are trained once."""
    model = GRID["models"]["deltanet"]
    mixers = [
        "gla",
        "mamba",
        "mamba2",
        "mlstm",
        "rwkv7",
        "slstm",
        "transformer",
        "gated_deltanet",
        "gated_deltaproduct",
        "deltaproduct",
    ]
    short = {
        "models": {mixer: model | {"mixer": mixer, "num_householder": 4} for mixer in mixers}
        | {"hybrid": model | {"mixer": ["deltanet", "attention", "mamba"], "num_hidden_layers": 4}},
        "test": GRID["test"] | {"samples": 8},
        "train": GRID["train"] | {"steps": 2, "batch_size": 4},
    }  # fmt: skip
    assert main(["track", str(grid_file(**short))]) == 0
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    found = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("| ")}
    ranges = {mixer: ["-"] if mixer in ("slstm", "transformer") else ["[-1, 1]", "[0, 1]"] for mixer in mixers}
    ranges |= {"rwkv7": ["[-1, 1]", "[0, 1] (1)"], "hybrid": ["[-1, 1]", "[0, 1]"]}  # the first as in its docstring
    assert set(found) == {("model", "eigenvalues")} | {(m, r) for m in ranges for r in ranges[m]}
    assert sum(line.startswith("(1) Where RWKV-7 forgets") and "-0.46" in line for line in lines) == 1
    assert "| 1.000 | " in found["slstm", "-"] and "| .000 | " in found["mamba", "[0, 1]"]
    assert "| .022 | " in found["transformer", "-"] and "| - | " in found["hybrid", "[-1, 1]"]
    record = read_metrics(tmp_path / "out/parity/hybrid/negative/seed-0")[-1]
    assert list(record["eigenvalues"]["negative_fraction"]) == ["0", "2", "3"]


def test_word_problems_are_measured_by_prefix(grid_file, tmp_path):
    """A sequence counts at length t only if every position up to t is right, so accuracy falls with the length."""
    short = {
        "tasks": {"s3": {"task": "group_word", "group": "S3"}}, "ranges": ["negative"],
        "train": GRID["train"] | {"steps": 20}, "test": GRID["test"] | {"max_length": 40, "samples": 256},
    }  # fmt: skip
    assert main(["track", str(grid_file(**short))]) == 0
    result = json.loads((tmp_path / "out/s3/deltanet/negative/seed-0/result.json").read_text())
    curve = list(result["by_length"].values())
    assert [int(n) for n in result["by_length"]] == list(range(1, 41))
    # All sequences have a position t up to the shortest test length; beyond it fewer do.
    assert curve[:20] == sorted(curve[:20], reverse=True) and curve[0] > curve[19]
    assert result["floor"] == pytest.approx(1 / 6, abs=1e-3)
    table = (tmp_path / "out/table.md").read_text()
    assert "a sequence is right at a length if every position up to there is right" in table and "(1)" not in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"p": {"task": "paritty"}}}, "unknown task 'paritty'"),
        ({"tasks": {"p": {"kind": "parity"}}}, "tasks.p should have a key task"),
        ({"models": {"m": {"mixer": "deltanett"}}}, "models.m: mixer 'deltanett' is not one of"),
        ({"models": {"m": {"mixer": ["gla", "deltanett"]}}}, "models.m: mixer[1] 'deltanett' is not one of"),
        (
            {"models": {"m": {"mixer": ["gla", {"mixer": "gla", "allow_neg_eigval": True}]}}},
            "models.m.mixer[1].allow_neg_eigval is set by the grid",
        ),
        ({"models": {"m": {"vocab_size": 7}}}, "models.m.vocab_size is set by the grid"),
        ({"models": {"m": {"heads": 7}}}, "models.m: unknown field heads"),
        ({"models": {"m": {"train": {"lrr": 1}}}}, "models.m.train: unknown key lrr; did you mean lr?"),
        ({"models": {"m": {"train": {"lr": 0.0}}}}, "models.m.train: key lr = 0.0"),
        ({"models": {"m": {"train": 7}}}, "models.m.train should be a mapping"),
        ({"models": {"m": {"train": {"max_length": 7}}}}, "models.m.train.max_length is set for the whole grid"),
        ({"ranges": ["both"]}, "key ranges.0 = 'both'"),
        ({"stepz": 1}, "unknown key stepz"),
        ({"tasks": {"p": {"task": 5}}}, "tasks.p: unknown task 5"),
        ({"tasks": {"p": {"task": ["parity"]}}}, "tasks.p: unknown task ['parity']"),
        ({"tasks": {"w": {"task": "group_word", "group": 5}}}, "tasks.w: not a list of permutations: 5"),
        ({"tasks": {"w": {"task": "group_word", "inputs": 3}}}, "tasks.w: not a list of permutations: 3"),
        ({"tasks": {"w": {"task": "group_word", "variant": 5}}}, "tasks.w: group_word: unknown variant 5"),
        ({"tasks": {"a/b": {"task": "parity"}}}, "tasks: 'a/b' should be a name"),
        ({"tasks": {"": {"task": "parity"}}}, "tasks: '' should be a name"),
        ({"models": {"..": {}}}, "models: '..' should be a name"),
        ({"seeds": [1, 0, 1]}, "seeds: 1 is given twice"),
        ({"ranges": ["negative", "negative"]}, "ranges: 'negative' is given twice"),
        ({"seeds": [2**64]}, "key seeds.0 = 18446744073709551616: should be less than"),
        ({"test": GRID["test"] | {"min_length": 300}}, "parity: min_length 300 is above max_length 256"),
    ],
)
def test_errors_come_before_any_training(grid_file, tmp_path, capsys, changes, message):
    assert main(["track", str(grid_file(**changes))]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "reason"), [("meta", "give cpu or cuda"), ("mps", "give cpu or cuda"), ("", "empty")]
)
def test_devices_that_cannot_train_are_refused(grid_file, tmp_path, capsys, device, reason):
    assert main(["track", str(grid_file()), "--device", device]) == 2
    assert f"--device {device} cannot be used" in (error := capsys.readouterr().err) and reason in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_called_out(grid_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["track", str(grid_file()), f"out={tmp_path}/file"]) == 2
    assert f"error: out {tmp_path}/file cannot be written" in capsys.readouterr().err


CONFIGS = Path(__file__).parents[2] / "configs/track"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_repository_are_valid(path):
    grid, cells = load_grid(path)
    without_range = sum(fields["mixer"] in ("transformer", "slstm") for fields in grid.models.values())
    trained = len(grid.models) * len(grid.ranges) - without_range
    assert len(cells) == len(grid.tasks) * trained * len(grid.seeds) >= 6
    assert len({cell.fingerprint for cell in cells}) == len({cell.folder for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("parameters", "figure"),
    [
        ({"task": "modular_arithmetic"}, ".971 [.826]"),
        ({"task": "modular_arithmetic_brackets"}, ".260 [.227]"),
        ({"task": "modular_arithmetic_brackets", "operators": "+-"}, ".200 [.129]"),
        ({"task": "modular_arithmetic", "modulus": 7}, "-"),
        ({"task": "modular_arithmetic", "running_values": True}, "-"),
        ({"task": "even_pairs"}, "-"),
    ],
)
def test_figures_of_the_paper_appear_only_beside_the_same_task(parameters, figure):
    assert reported(parameters, "deltanet", "negative", 2, 3) == figure


@pytest.mark.parametrize(
    ("parameters", "range_", "figure"),
    [
        ({"task": "parity"}, "negative", "1.000 (another protocol)"),
        ({"task": "modular_arithmetic"}, "negative", ".993 (another protocol)"),
        ({"task": "modular_arithmetic_brackets"}, "negative", ".935 (another protocol)"),
        ({"task": "modular_arithmetic_brackets", "operators": "+-"}, "negative", "-"),
        ({"task": "parity"}, "positive", "-"),
    ],
)
def test_figures_cited_at_second_hand_say_so(parameters, range_, figure):
    assert reported(parameters, "gated_deltanet", range_, 2, 2) == figure


def test_the_commit_tells_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        options = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", *options, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    file = tmp_path / "environment.py"
    file.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(file))
    git("init")
    assert environment._commit.__wrapped__() is None  # not tracked
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert environment._commit.__wrapped__() == commit
    file.write_text("2")
    assert environment._commit.__wrapped__() == f"{commit}-dirty"


def test_the_checksum_of_the_code_is_that_of_its_files(tmp_path, capsys):
    """It covers the files of every room, linked or not, with their names, and no other files."""
    package = tmp_path / "package"
    shutil.copytree(environment.PACKAGE, package)  # what links point to
    original = environment.source_checksum()
    checksum = environment.source_checksum.__wrapped__
    assert checksum(package) == original
    (command,) = re.findall(r'python -c "(.*)"', environment.source_checksum.__doc__)
    exec(command)
    assert capsys.readouterr().out == original + "\n"

    (package / "notes.md").write_text("not code")
    assert checksum(package) == original
    found = {original}
    for room in (".", "kernels", "pretrain", "eval", "track/tasks"):
        file = sorted((package / room).glob("*.py"))[-1]
        file.write_text(file.read_text() + "\n")
        found.add(checksum(package))
    file.rename(file.with_stem(f"{file.stem}_"))  # which leaves the order as it is
    found.add(checksum(package))
    assert len(found) == 7


def test_the_table_shows_the_curriculum(grid_file, tmp_path):
    stage = {"steps": 2, "min_length": 3, "max_length": 4, "batch_size": 5, "task": {"variant": "only_swaps"}}
    changes = {
        "tasks": {"s3": {"task": "group_word", "group": "S3"}},
        "train": GRID["train"] | {"steps": 2, "curriculum": [stage, {"steps": 1, "lr": 3e-3}]},
        "test": GRID["test"] | {"samples": 8},
    }
    assert main(["track", str(grid_file(**changes)), "ranges=[negative]"]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert "\nBefore that: lengths 3 to 4 for 2 steps of 5, lr 0.01, variant only_swaps.\n" in table
    assert "\nBefore that: lengths 3 to 20 for 1 steps of 64, lr 0.003.\n" in table
    folder = tmp_path / "out/s3/deltanet/negative/seed-0"
    assert [record["step"] for record in read_metrics(folder)] == [2, 3, 5]
    assert "a sequence continued" not in table


def test_the_speed_is_that_of_all_stages(grid_file, tmp_path):
    """The last stage consists only of first steps, which are not counted."""
    stages = {"steps": 3, "curriculum": [{"steps": 120}]}
    changes = {
        "ranges": ["negative"],
        "seeds": [0],
        "train": GRID["train"] | stages,
        "test": GRID["test"] | {"samples": 8},
    }
    assert main(["track", str(grid_file(**changes))]) == 0
    (path,) = (tmp_path / "out").rglob("result.json")
    records = read_metrics(path.parent)
    slowest, fastest = (pick(record["steps_per_second"] for record in records) for pick in (min, max))
    assert 0.5 * slowest < json.loads(path.read_text())["steps_per_second"] < 2 * fastest


def test_seeds_whose_few_samples_have_other_lengths(grid_file, tmp_path):
    changes = {"seeds": [0, 1], "ranges": ["negative"], "train": GRID["train"] | {"steps": 1}}
    changes["test"] = GRID["test"] | {"samples": 7, "min_length": 20, "max_length": 26}
    assert main(["track", str(grid_file(**changes))]) == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    assert len(results) == 2 and len(results[0]["by_length"]) != len(results[1]["by_length"])
    assert (tmp_path / "out/accuracy-parity.png").stat().st_size > 1000


def test_the_table_shows_that_words_continued(grid_file, tmp_path):
    changes = {
        "tasks": {"s3": {"task": "group_word", "group": "S3"}}, "ranges": ["negative"],
        "train": GRID["train"] | {"steps": 2, "min_length": 20, "state_passing": 0.75},
        "test": GRID["test"] | {"samples": 8},
    }  # fmt: skip
    assert main(["track", str(grid_file(**changes))]) == 0
    assert "\nWith probability 0.75 a sequence continued, in state" in (tmp_path / "out/table.md").read_text()
    stage = {"steps": 1, "state_passing": 0.5}
    changes |= {"out": str(tmp_path / "stage"), "train": GRID["train"] | {"steps": 1, "curriculum": [stage]}}
    assert main(["track", str(grid_file(**changes))]) == 0
    table = (tmp_path / "stage/table.md").read_text()
    assert "for 1 steps of 64, lr 0.01, states passed on with probability 0.5.\n" in table
    assert "\nWhere states were passed on, a sequence continued, in state" in table


@pytest.mark.parametrize(
    ("parameters", "mixer", "range_", "factors", "layers", "finding"),
    [
        ({"group": "S5"}, "deltaproduct", "negative", 4, 1, "1.00 to 150, .98 at 200, .86 at 256"),
        ({"group": "S5"}, "deltaproduct", "negative", 4, 2, "-"),
        ({"group": "S5"}, "deltaproduct", "negative", 3, 1, "-"),
        ({"group": "S5"}, "gated_deltaproduct", "negative", 4, 1, "-"),
        ({"group": "S5", "inputs": [[1, 0, 2, 3, 4]]}, "deltaproduct", "negative", 4, 1, "-"),
        ({"group": "S3"}, "deltaproduct", "negative", 1, 1, "not solved"),
        ({"group": [[1, 0]]}, "deltaproduct", "negative", 4, 1, "-"),
        ({"group": "S3"}, "deltaproduct", "positive", 2, 1, "not solved"),
        ({}, "deltaproduct", "positive", 4, 1, "not solved"),  # S5 where none is given
        ({"group": "S5"}, "deltaproduct", "positive", 4, 5, "-"),
        ({"group": "S5", "variant": "only_swaps"}, "deltaproduct", "positive", 4, 1, "-"),
        ({"group": "Z60"}, "deltaproduct", "positive", 2, 1, "-"),
        ({"group": [[1, 0]]}, "deltaproduct", "positive", 2, 1, "-"),
        # the default number of factors in a configuration does not apply to DeltaNet
        ({"group": "S5", "variant": "only_swaps"}, "deltanet", "negative", 2, 1, "solved"),
        ({"group": "S5", "variant": "only_swaps"}, "deltanet", "negative", 2, 5, "-"),
        ({"group": "S5", "variant": "three_permutations"}, "deltanet", "negative", 2, 5, "solved"),
        ({"group": "S5", "variant": "three_permutations"}, "deltanet", "negative", 2, 1, "-"),
        ({"group": "S5", "variant": "four_tokens"}, "deltanet", "negative", 2, 5, "to some 200 tokens, 2 of 3 seeds"),
        ({"group": "S5", "variant": "four_tokens"}, "gated_deltanet", "negative", 2, 5, "-"),
        ({"group": "S5"}, "deltanet", "negative", 2, 1, "not solved"),
        ({"group": "S5"}, "deltanet", "negative", 2, 5, "not solved"),
        ({"group": "S5"}, "deltanet", "positive", 2, 5, "-"),
    ],
)
def test_findings_of_the_papers_on_words(parameters, mixer, range_, factors, layers, finding):
    assert reported({"task": "group_word", **parameters}, mixer, range_, factors, layers) == finding


def test_the_length_up_to_which_a_model_holds():
    assert holds_to({"3": 1.0, "5": 0.9, "7": 0.89, "9": 1.0}) == 5
    assert holds_to({"3": 0.5, "5": 1.0}) == 0 and holds_to({"8": 1.0}) == 8


def test_learning_rate():
    grid, _ = load_grid(CONFIGS / "parity.yaml", ["train.steps=20000"])
    settings = grid.train
    assert learning_rate(0, settings) == pytest.approx(settings.lr / 2000)
    assert learning_rate(1999, settings) == learning_rate(2000, settings) == settings.lr
    middle = 2000 + 9000
    assert learning_rate(middle, settings) == pytest.approx((settings.lr + settings.min_lr) / 2)
    assert learning_rate(settings.steps, settings) == pytest.approx(settings.min_lr)
    assert all(math.isfinite(learning_rate(s, settings)) for s in range(0, settings.steps, 500))
