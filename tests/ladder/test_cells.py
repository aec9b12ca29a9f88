"""Test the cells of a ladder: names, order, the run of each, what decides its result, and what is refused."""

import json
import math
import re
from pathlib import Path

import pytest

from lrnn.errors import UserError
from lrnn.ladder.cells import load_ladder


def cells_of(path, *overrides):
    return load_ladder(path, overrides)[1]


def test_names_and_order(write, written):
    """Seeds are outermost in a grid, an arm without a range has one cell, and no cell is there twice."""
    written["grids"].append({"sizes": ["small"], "arms": ["delta"], "ranges": ["positive"], "seeds": [1, 2]})
    written["grids"].append(
        {"sizes": ["small"], "arms": ["delta"], "seeds": [0], "ranges": ["negative"], "lr": [1e-3, 2e-3]}
    )
    assert [cell.name for cell in cells_of(write())] == [
        "small/delta/negative/5K/seed-0",
        "small/delta/positive/5K/seed-0",
        "small/attention/none/5K/seed-0",
        "small/delta/negative/5K/seed-1",
        "small/delta/positive/5K/seed-1",
        "small/attention/none/5K/seed-1",
        "small/delta/positive/5K/seed-2",
        "small/delta/negative/5K/lr-0.002/seed-0",
    ]


@pytest.mark.parametrize(
    "tokens, short",
    [(308_000_000, "308M"), (1_232_000_000, "1232M"), (2_000_000_000, "2B"), (8_192, "8192"), (1_500, "1500")],
)
def test_a_budget_in_a_name_is_exact(write, written, tokens, short):
    written["grids"] = [{"sizes": ["small"], "arms": ["attention"], "seeds": [0], "tokens": [tokens]}]
    (cell,) = cells_of(write())
    assert cell.name == f"small/attention/none/{short}/seed-0"


def test_the_run_of_a_cell(write, written, tmp_path):
    written["grids"] = [{"sizes": ["large"], "arms": ["hybrid"], "seeds": [3], "lr": 2e-3, "tokens": [10_000]}]
    negative, positive = cells_of(write())
    steps = math.ceil(10_000 / (8 * 32))
    config = negative.config
    assert (negative.steps, negative.tokens, negative.tokens_per_step) == (steps, steps * 256, 256)
    assert (config.schedule.warmup_steps, config.schedule.decay_steps) == (round(0.1 * steps), round(0.25 * steps))
    # The keys of the arm change those of the size, and these those of the ladder.
    assert (config.optim.betas, config.optim.weight_decay, config.optim.eps) == ([0.9, 0.99], 0.3, 1e-6)
    assert (config.optim.lr, config.seed, config.global_batch_size, config.micro_batch_size) == (2e-3, 3, 8, 4)
    assert negative.model.intermediate_size == 160 and negative.model.max_position_embeddings == 32
    assert (negative.model.allow_neg_eigval, positive.model.allow_neg_eigval) == (True, False)
    # Paths start at the folder of the file.
    assert config.data.corpora[0].path == str(tmp_path / "corpora/code")
    assert negative.run_dir == tmp_path / "out/runs/large/hybrid/negative/10K/lr-0.002/seed-3"
    assert negative.result_folder == tmp_path / "out/results" / negative.name


def test_a_cosine_has_no_decay(write, written):
    written["run"]["schedule"] = {"name": "cosine"}
    assert all(cell.config.schedule.decay_steps == 0 for cell in cells_of(write()))


def test_settings_tell_runs_with_other_results_apart(write, written):
    """They hold what changes results, and neither folders nor the way it is computed."""
    before = cells_of(write())[0].settings
    assert json.loads(json.dumps(before)) == before
    for override in ("run.optim.betas=[0.9,0.95]", "run.data.seq_len=16", "sizes.small.model.num_heads=1", "decay=0.3"):
        assert cells_of(write(), override)[0].settings != before, override
    written["run"]["data"]["corpora"][0]["weight"] = 0.5
    assert cells_of(write())[0].settings != before
    written["run"]["data"]["corpora"][0] = {"path": "/elsewhere/code", "weight": 0.75}
    for override in (
        "out=elsewhere",
        "run.micro_batch_size=2",
        "run.zero=1",
        "run.log={every: 5}",
        "sizes.small.gpus=1",
    ):
        assert cells_of(write(), override)[0].settings == before, override


def test_both_ranges_differ_in_one_setting(write):
    negative, positive, *_ = cells_of(write())
    different = {
        key
        for key, _ in set(map(repr_item, negative.settings.items())) ^ set(map(repr_item, positive.settings.items()))
    }
    assert different == {"model.allow_neg_eigval"}


def repr_item(item):
    return item[0], repr(item[1])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("run.run_dir", "x", r"run\.run_dir follows from out of the ladder"),
        ("run.seed", 1, r"run\.seed follows from seeds of grids"),
        ("run.optim.lr", 1e-3, r"run\.optim\.lr follows from lr of sizes and grids"),
        ("run.schedule.warmup_steps", 5, r"run\.schedule\.warmup_steps follows from warmup"),
        ("sizes.small.run.steps", 10, r"sizes\.small\.run\.steps follows from tokens of sizes and grids"),
        ("arms.delta.run.model", "tiny", r"arms\.delta\.run\.model follows from model of sizes and arms"),
        ("run.stages", [], r"run\.stages cannot be given: a run of a ladder has one stage"),
        ("run.data.stream", {"path": "x"}, r"run\.data\.stream cannot be given"),
        ("arms.delta.model.allow_neg_eigval", True, r"allow_neg_eigval of delta at small is set by ranges"),
        ("grids", [{"sizes": ["huge"], "arms": ["delta"]}], r"grids\.0\.sizes names the size 'huge'.*large, small"),
        ("grids", [{"sizes": ["small"], "arms": ["gla"]}], r"grids\.0\.arms names the arm 'gla'.*delta, hybrid"),
        ("arms.delta.sizes", {"tiny": {}}, r"arms\.delta\.sizes names the size 'tiny'"),
        ("reference", "mamba", "reference names the arm 'mamba'"),
        ("sizes.small.modle", {}, r"unknown key sizes\.small\.modle; did you mean model\?"),
        ("sizes.small.gpus", 2, "gpus 2 and at_once 2"),
        ("run.optim.beta", 1, r"small/delta/negative/5K/seed-0: unknown key optim\.beta; did you mean betas\?"),
        ("run.optim", 1, r"run\.optim = 1 should be a mapping"),
        ("arms.delta.model.mixer", "delta", r"seed-0: model: mixer 'delta' is not one of"),
        ("warmup", 0.9, "warmup 0.9 and decay 0.25 are more than the whole run"),
        ("run.data.corpora", [{"path": "a/x"}, {"path": "b/x"}], "two folders are called x"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_before_anything_runs(write, written, key, value, message):
    *parents, last = key.split(".")
    section = written
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    with pytest.raises(UserError, match=message):
        cells_of(write())


def test_names_are_folders(write, written):
    written["sizes"]["../up"] = written["sizes"]["small"]
    with pytest.raises(UserError, match="pattern"):
        cells_of(write())


# Parameters of the table of sizes in millions, by which all arms of a size were chosen.
PARAMETERS = {
    ("15m", "gated_deltanet"): 15.42, ("30m", "gated_deltanet"): 30.27, ("60m", "gated_deltanet"): 61.58,
    ("15m", "gated_deltaproduct"): 15.46, ("15m", "hybrid"): 15.40, ("30m", "hybrid"): 30.11,
    ("15m", "transformer"): 15.34,
}  # fmt: skip


def test_the_ladder_that_comes_with_lrnn():
    """Arms of a size are equally large, train on 20 tokens per parameter, and all runs of the question are there."""
    from lrnn.ladder.sizes import count_parameters

    ladder, cells = load_ladder("ranges")
    rates = [cell for cell in cells if "/lr-" in cell.name]
    main = [cell for cell in cells if cell not in rates and cell.budget == ladder.sizes[cell.size].tokens[0]]
    lengths = [cell for cell in cells if cell not in rates + main]
    assert [len(rates), len(main), len(lengths)] == [4, 7 * 3 + 4 * 3 + 2, 6]
    # The full form of the fit needs six pairs of size and tokens.
    assert len({(cell.size, cell.tokens) for cell in main + lengths}) == 6
    models = {(cell.size, cell.arm): cell for cell in main}
    assert models.keys() == PARAMETERS.keys()
    for place, cell in models.items():
        total, without_embeddings = count_parameters(cell.model)
        assert without_embeddings == pytest.approx(PARAMETERS[place] * 1e6, rel=0.01)
        assert total - without_embeddings == 2 * 16_384 * cell.model.hidden_size
        assert cell.budget == pytest.approx(20 * PARAMETERS[cell.size, "gated_deltanet"] * 1e6, rel=0.01)
    assert [size.lr for size in ladder.sizes.values()] == [2.8e-3, 2.3e-3, 1.8e-3]


def test_keys_of_a_run_keep_their_paths(tmp_path, monkeypatch, write):
    """Paths within `run` start where those of a run's own file would, `~` and variables included."""
    monkeypatch.setenv("CORPORA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    for given, found in (("$CORPORA/code", "/data/code"), ("~/code", "/home/me/code")):
        (cell, *_) = cells_of(write(), f"run.data.corpora=[{{path: {given}}}]")
        assert cell.config.data.corpora[0].path == found
    assert cells_of(write())[0].config.data.corpora[0].path == str(tmp_path / "corpora/code")


def test_the_example_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs/ladder.md").read_text()
    (tmp_path / "ladder.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    names = {cell.name for cell in cells_of(tmp_path / "ladder.yaml")}
    assert len(names) == 4 + 2 * 3 + 3
    for name in re.findall(r"`(15m/\S+)`", page):
        assert name in names or any(name == other.partition("/seed-")[0] for other in names), name
