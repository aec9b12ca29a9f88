"""Test paths in settings: relative to their file, with `~` and `$VARIABLES`, by name, and as in older versions."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

from lrnn import shipped
from lrnn.errors import UserError
from lrnn.paths import IsPath, seen_from
from lrnn.settings import FileOrFields, Section, load


class Source(Section):
    path: Annotated[str, IsPath()]
    """Input."""
    weight: float = 1.0
    """No path."""


class Stream(Section):
    path: Annotated[str, IsPath(only_if_exists=True, never=frozenset({"json"}))]
    """Folder or name."""
    data_files: Annotated[str | list[str] | None, IsPath(only_if_exists=True, within="path")] = None
    """Files."""


class Schema(Section):
    """A schema with paths at every depth."""

    named: ClassVar = shipped.RUNS
    out: Annotated[str, IsPath(holds="run.yaml")]
    """Output."""
    model: Annotated[str | dict[str, Any], FileOrFields(), IsPath(names=shipped.MODELS)] = "m.json"
    """File or fields."""
    sources: list[Source] = Field(default_factory=list)
    """Inputs."""
    stream: Stream | None = None
    """Section."""
    text: str = ""
    """No path."""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """`read(text, *overrides)` reads project/run.yaml from the folder `elsewhere`. Returns settings and notices."""
    for folder in ("project", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def read(text: str, *overrides: str, file: str = "../project/run.yaml") -> tuple[Schema, list[str]]:
        Path(file).write_text(text)
        notices: list[str] = []
        return load(Schema, file, overrides, notice=notices.append), notices

    return read


def test_paths_in_a_file_start_at_its_folder(read):
    found, notices = read(
        "out: runs/a\nmodel: {base: m.json, x: m.json}\nsources: [{path: a/b}, {path: /c}]\ntext: a/b\n"
    )
    assert found.out == "../project/runs/a" and found.model == {"base": "../project/m.json", "x": "m.json"}
    assert [source.path for source in found.sources] == ["../project/a/b", "/c"] and found.text == "a/b"
    assert not notices
    assert read("out: ./x\n", file="run.yaml")[0].out == "./x", "the file is in the current folder"


def test_paths_on_the_command_line_start_at_the_current_folder(read):
    found, _ = read("out: a\n", "out=b", "model.base=c.json", "sources=[{path: d}]", "stream.path=e")
    assert (found.out, found.model, found.sources[0].path, found.stream.path) == ("b", {"base": "c.json"}, "d", "e")


def test_every_base_has_its_own_folder(read):
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text("out: a\nmodel: b\n")
    found, _ = read("base: ../elsewhere/sub/base.yaml\nout: c\n")
    assert found.out == "../project/c" and os.path.realpath(found.model) == os.path.realpath("sub/b")


def test_home_and_variables(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    found, _ = read(
        "out: ~/runs\nsources: [{path: $DATA/a}]\n", "sources=[{path: '${DATA}/a'}, {path: ~/b}]", "text=~/c"
    )
    assert found.out == "/home/me/runs" and found.text == "~/c"
    assert [source.path for source in found.sources] == ["/data/a", "/home/me/b"]
    with pytest.raises(UserError, match=r"run\.yaml:2: sources\.0\.path = '\$NOWHERE/a': .*NOWHERE is not set"):
        read("out: a\nsources: [{path: $NOWHERE/a}]\n")
    with pytest.raises(UserError, match=r"command line: out = '~nobody-here/a': there is no user 'nobody-here'"):
        read("out: a\n", "out=~nobody-here/a")


def test_what_may_be_a_name_is_a_path_only_if_it_exists(read):
    (Path("../project") / "d.jsonl").touch()
    (Path("../project") / "json").mkdir()
    found, _ = read("out: a\nstream: {path: org/name, data_files: ['*.jsonl', 'hf://x/*.jsonl', none.csv]}\n")
    assert found.stream.path == "org/name"
    assert found.stream.data_files == ["../project/*.jsonl", "hf://x/*.jsonl", "none.csv"]
    assert read("out: a\nstream: {path: json}\n")[0].stream.path == "json"


def test_files_of_a_folder_start_at_it(read):
    """A file of the same name beside the YAML is another one."""
    for folder in ("data", "json", "."):
        (Path("../project") / folder).mkdir(exist_ok=True)
        (Path("../project") / folder / "d.jsonl").touch()
    for files in ("d.jsonl", "['*.jsonl']"):
        found, _ = read(f"out: a\nstream: {{path: data, data_files: {files}}}\n")
        assert (found.stream.path, str(found.stream.data_files)) == ("../project/data", files)
    found, _ = read("out: a\nstream: {path: json, data_files: d.jsonl}\n")  # a builder, not that folder
    assert (found.stream.path, found.stream.data_files) == ("json", "../project/d.jsonl")


def test_paths_seen_from_a_folder(tmp_path, monkeypatch):
    """They are the same from every current folder, through links, and after everything moved."""
    (tmp_path / "project/run").mkdir(parents=True)
    (tmp_path / "project/d.jsonl").touch()
    (tmp_path / "link").symlink_to("project")
    for here, file, run in (
        ("project", "d.jsonl", "run"),
        ("project", "*.jsonl", "run"),
        (".", "project/d.jsonl", "project/run"),
        ("project/run", "../d.jsonl", "."),
        ("/", str(tmp_path / "link/d.jsonl"), str(tmp_path / "project/run")),
    ):
        monkeypatch.chdir(tmp_path / here)
        assert seen_from(file, Path(run)) == f"../{Path(file).name}"
        assert seen_from("org/name", Path(run)) == "org/name" and seen_from("hf://d.jsonl", Path(run)) == "hf://d.jsonl"
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert seen_from("d.jsonl", Path("run")) == "../d.jsonl"


def test_models_that_come_with_lrnn_have_names(read):
    assert read("out: a\nmodel: 340m\n")[0].model == str(shipped.MODELS / "340m.json")
    assert read("out: a\n", "model={base: tiny}")[0].model == {"base": str(shipped.MODELS / "tiny.json")}
    Path("tiny").touch()
    assert read("out: a\n", "model=tiny")[0].model == "tiny", "a file has precedence"


def test_files_of_older_versions_are_read_as_before(read):
    Path("corpus").mkdir()
    found, (notice,) = read("out: runs/a\nsources: [{path: corpus}]\n")
    assert (found.out, found.sources[0].path) == ("runs/a", "corpus")
    assert "run.yaml:2: sources.0.path = corpus exists in the current folder, not beside the file" in notice
    (Path("../project") / "corpus").mkdir()
    found, notices = read("out: runs/a\nsources: [{path: corpus}]\n")
    assert (found.out, found.sources[0].path) == ("../project/runs/a", "../project/corpus") and not notices


def test_an_old_run_is_resumed_where_it_is(read):
    Path("runs/a").mkdir(parents=True)
    assert read("out: runs/a\n") == (Schema(out="../project/runs/a", model="m.json"), [])
    Path("runs/a/run.yaml").touch()
    found, (notice,) = read("out: runs/a\n")
    assert found.out == "runs/a" and "run.yaml:1: out = runs/a exists in the current folder" in notice


def test_a_link_is_not_left_by_dots(read, tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "corpus").mkdir()
    (tmp_path / "project" / "link").symlink_to(tmp_path / "far" / "deep")
    found, _ = read("out: a\nsources: [{path: link/../corpus}]\n")
    assert os.path.samefile(found.sources[0].path, tmp_path / "far" / "corpus")


def test_files_that_come_with_lrnn(tmp_path, monkeypatch):
    """They have names, and their paths start at the current folder, or at that of the file whose base they are."""
    from lrnn.pretrain.config import load_config, load_model_of
    from lrnn.track.grid import load_grid

    monkeypatch.chdir(tmp_path)
    for name in shipped.names(shipped.RUNS):
        by_name, by_path = load_config(name), load_config(shipped.RUNS / f"{name}.yaml")
        assert by_name == by_path and by_name.run_dir == f"runs/{name}"
        assert load_model_of(by_name).num_hidden_layers > 0
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "run.yaml").write_text("base: 340m\nsteps: 300\n")
    config = load_config("project/run.yaml")
    assert config.steps == 300 and config.model == str(shipped.MODELS / "340m.json")
    assert config.run_dir == "project/runs/340m" and config.data.corpora[0].path == "project/runs/corpora/fineweb"
    grid, _ = load_grid("s5")
    assert grid.out == "runs/track/s5"
    for read in (load_config, load_grid):
        with pytest.raises(UserError, match="nothing does not exist; give the path of a file, or the name of one that"):
            read("nothing")
    with pytest.raises(UserError, match=r"configs/340.yaml does not exist; .*: did you mean 340m\?"):
        load_config("configs/340.yaml")
    with pytest.raises(UserError, match="project is a folder; give a file"):
        load_config("project")
