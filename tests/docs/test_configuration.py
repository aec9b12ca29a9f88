"""The configuration reference is what the schemas say, and it explains every key."""

import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import make_configuration  # noqa: E402


def test_the_page_is_up_to_date():
    assert make_configuration.page() == make_configuration.PAGE.read_text(encoding="utf-8"), (
        "docs/configuration.md is out of date: run python docs/make_configuration.py"
    )


def test_every_key_of_a_run_and_a_grid_has_a_meaning():
    for schema in (make_configuration.Config, make_configuration.GridConfig):
        for table in make_configuration.tables(schema):
            for row in table.splitlines():
                assert not row.startswith("| `") or row.rstrip("| ").endswith("."), row


def test_a_row_says_type_default_unit_bounds_and_meaning():
    tables = "".join(make_configuration.tables(make_configuration.Config))
    assert "| `keep_last` | integer | `2` | checkpoints | > 0 | Number of newest checkpoints that are kept. |" in tables
    assert "| `run_dir` | text | required |" in tables
    grid = "".join(make_configuration.tables(make_configuration.GridConfig))
    assert "| `batch_size` | integer | `null` | sequences | > 0 | Sequences per step. |" in grid
