"""Test which cells count as done, and that results of other settings are refused with what differs."""

from dataclasses import replace
from pathlib import Path

import pytest
from ladder_results import result_of

from lrnn.errors import UserError
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.kept import Kept, begin_training, changes, result_changes
from lrnn.ladder.results import write_result


def test_cells_with_results_of_these_settings_are_done(write):
    _, cells = load_ladder(write())
    write_result(cells[0].result_folder, result_of(cells[0]))
    settings = cells[1].settings | {"run.optim.lr": 0.5}
    write_result(cells[1].result_folder, result_of(cells[1], settings=settings))
    kept = Kept.of(cells)
    assert [cell.name for cell in kept.done] == [cells[0].name] == [result.name for result in kept.results]
    assert kept.changed == {cells[1].name: {"run.optim.lr": (0.5, 1e-3)}}
    with pytest.raises(UserError, match=rf"{cells[1]} has run\.optim\.lr = 0\.5 \(now 0\.001\); .*--redo"):
        kept.refuse_changed()


def test_a_setting_of_a_newer_version_had_its_default(write):
    _, (cell, *_) = load_ladder(write())
    older = {key: value for key, value in cell.settings.items() if key not in ("run.optim.z_loss", "measure.position")}
    assert changes(older, cell.settings) == {}
    assert changes(older, cell.settings | {"run.optim.z_loss": 1e-4}) == {"run.optim.z_loss": (0.0, 1e-4)}
    assert changes(older, cell.settings | {"model.conv_size": 2}) == {"model.conv_size": (4, 2)}


def test_the_content_of_corpora_is_compared_where_they_are(write, monkeypatch):
    _, (cell, *_) = load_ladder(write())
    assert result_changes(cell, result_of(cell)) == {}  # no corpus is here
    monkeypatch.setattr(type(cell), "corpora", lambda self, if_here=False: {"code": "a", "prose": "c"})
    assert result_changes(cell, result_of(cell)) == {"corpora.prose": ("b", "c")}


def test_a_training_of_other_settings_is_known(write):
    """What is measured does not count."""
    _, (cell, *_) = load_ladder(write())
    (cell.run_dir / "cell").mkdir(parents=True)
    assert not begin_training(cell, cell.settings)
    assert not begin_training(cell, cell.settings | {"measure.tokens": 5})
    assert begin_training(cell, cell.settings | {"run.optim.lr": 5.0})
    assert not begin_training(replace(cell), cell.settings)  # the refused ones are not noted


def test_a_corpus_that_is_not_here_hides_no_other(write, monkeypatch):
    """Of two corpora one is here, with other content than a result has: the result is of other settings."""
    _, (cell, *_) = load_ladder(write())
    sources = cell.config.data.corpora
    (here,) = [source for source in sources if source.path.endswith("code")]
    Path(here.path).mkdir(parents=True)
    monkeypatch.setattr("lrnn.ladder.cells._digest", lambda path: "now")
    names = {Path(source.path).name: "then" for source in sources}
    assert result_changes(cell, result_of(cell, corpora=names)) == {"corpora.code": ("then", "now")}
