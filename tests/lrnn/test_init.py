"""Test `lrnn init`: a project whose run, model and scripts are those of a configuration, with paths of its own."""

import json

import pytest
import yaml

from lrnn import cli, shipped

VARIANTS = ["340m-stages"]  # of other runs, with `base`


@pytest.mark.parametrize("name", sorted(set(shipped.names(shipped.RUNS)) - set(VARIANTS)))
def test_a_project(name, tmp_path, capsys):
    project = tmp_path / "new" / "my project"
    assert cli.main(["init", str(project), "--config", name]) == 0
    assert "README.md" in capsys.readouterr().out
    run = yaml.safe_load((project / "run.yaml").read_text())
    theirs = yaml.safe_load((shipped.RUNS / f"{name}.yaml").read_text())
    own = {"run_dir": f"runs/{name}", "model": "model.json", "data": theirs["data"] | {"corpora": [{"path": "corpus"}]}}
    assert run == theirs | own
    assert (project / "model.json").read_text() == (shipped.MODELS / f"{name}.json").read_text()
    scripts = {script.name for script in shipped.BATCH_SCRIPTS.iterdir()}
    assert {script.name for script in (project / "slurm").iterdir()} == scripts >= {"train.sbatch", "eval.sbatch"}
    readme = (project / "README.md").read_text()
    assert readme.startswith("# my project\n")
    vocab_size = json.loads((project / "model.json").read_text())["vocab_size"]
    assert f"`--train-tokenizer {vocab_size}`" in readme and f"{vocab_size:,} token ids" in readme


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_another_run_is_refused(name, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["init", str(tmp_path / "project"), "--config", name])
    assert f"invalid choice: '{name}'" in capsys.readouterr().err and not (tmp_path / "project").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "model.json").write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path}/model.json exists and is not overwritten; give another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    (tmp_path / "file").touch()
    assert cli.main(["init", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
