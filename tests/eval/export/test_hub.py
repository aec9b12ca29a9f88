"""Test `lrnn export --push-to-hub` against a stand-in for the hub's API."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from export_checkpoints import random_model, write_checkpoint
from hub_server import FIRST, Hub, Repo, serving
from huggingface_hub import constants

import lrnn
from lrnn.cli import main
from lrnn.eval.export import write
from lrnn.eval.export.hub import card_of

TOKENS = {"hf_mine": ("me", "write"), "hf_reads": ("me", "read")}


@pytest.fixture
def hub(monkeypatch):
    """Return a hub to which this process is logged in as `me`. Pauses between retries are left out."""
    with serving(Hub(TOKENS)) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield made


@pytest.fixture
def folder(tmp_path):
    """Return what stands for an exported folder: files of each kind, a hidden one, and results of an evaluation."""
    return write_folder(tmp_path / "my model", 1000)


def write_folder(path: Path, step: int | None, weights: bytes = b"weights") -> Path:
    (path / "eval/fast").mkdir(parents=True)
    training = {} if step is None else {"lrnn_training": {"step": step}}
    (path / "config.json").write_text(json.dumps({"model_type": "lrnn", **training}))
    card = f'---\nlibrary_name: transformers\n---\n\n# {path.name}\n\nx.from_pretrained("{path.name}", dtype=y)\n'
    (path / "README.md").write_text(f"{card}lm_eval --model_args pretrained={path.name},z\n| arc_easy | 0.5 |\n")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights * 100)
    (path / ".lock").write_text("")
    for name in ("results.json", "table.md", "samples_arc_easy.jsonl", "lm_eval_results.json", "by_length.png"):
        (path / "eval/fast" / name).write_text(name)
    return path


def push(folder: Path, *options: str) -> int:
    return main(["export", str(folder), "--push-to-hub", *options])


def uploaded(folder: Path, name: str) -> dict[str, bytes]:
    """Return the files that a revision should have, by their paths."""
    left_out = (".lock", "samples_arc_easy.jsonl", "lm_eval_results.json")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in left_out]
    truth = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    card = truth["README.md"].decode().replace(f"# {folder.name}", f"# {name.split('/')[1]}")
    return FIRST | truth | {"README.md": card.replace(folder.name, name).encode()}


def test_a_checkpoint_becomes_a_branch_and_main(hub, folder, tmp_path, capsys):
    assert push(folder, "gdn") == 0
    repo = hub.repos["me/gdn"]
    assert repo.private and repo.revisions.keys() == {"main", "step-00001000"}
    truth = uploaded(folder, "me/gdn")
    assert repo.revisions["main"] == repo.revisions["step-00001000"] == truth
    assert b'from_pretrained("me/gdn"' in truth["README.md"] and b"| arc_easy | 0.5 |" in truth["README.md"]
    assert f"pushed {folder} to me/gdn ({hub.endpoint}): step-00001000 and main" in capsys.readouterr().out
    later, earlier = (write_folder(tmp_path / str(step), step, b"%d" % step) for step in (2000, 500))
    (later / "eval/fast/by_length.png").unlink()
    assert push(later, "me/gdn") == push(earlier, "me/gdn") == 0
    assert repo.revisions.keys() == {"main", "step-00001000", "step-00002000", "step-00000500"}
    assert repo.revisions["main"] == repo.revisions["step-00002000"] == uploaded(later, "me/gdn")
    assert repo.revisions["step-00000500"] == uploaded(earlier, "me/gdn")
    assert repo.revisions["step-00001000"] == truth


def test_the_same_push_again_changes_nothing(hub, folder):
    assert push(folder, "gdn") == 0
    commits = {name: list(made) for name, made in hub.repos["me/gdn"].commits.items()}
    hub.requests.clear()
    assert push(folder, "gdn") == 0
    assert hub.repos["me/gdn"].commits == commits
    assert not [r for r in hub.requests if r.startswith("PUT") or "/commit/" in r]


@pytest.mark.parametrize(
    "request_", ["POST .*/repos/create", "POST .*/branch/", "POST .*/commit/step", "POST .*/commit/main"]
)
def test_a_push_that_failed_is_continued(hub, folder, capsys, request_):
    hub.failures.append(request_)
    assert push(folder, "gdn") == 2
    error = capsys.readouterr().err
    assert error.count("lrnn: error:") == 1 and "Traceback" not in error
    assert f"({hub.endpoint}) answered with status 500 (the hub is out of order); the same command again" in error
    assert push(folder, "gdn") == 0
    repo = hub.repos["me/gdn"]
    assert repo.revisions["main"] == repo.revisions["step-00001000"] == uploaded(folder, "me/gdn")
    assert len([r for r in hub.requests if r.startswith("PUT")]) == 1  # the weights are sent once


def test_a_model_without_a_step_becomes_main(hub, tmp_path):
    folder = write_folder(tmp_path / "converted", None)
    assert push(folder, "lab/gdn", "--public") == 0
    assert hub.repos["lab/gdn"].revisions == {"main": uploaded(folder, "lab/gdn")}
    assert not hub.repos["lab/gdn"].private


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        (["a/b/c"], "hf_mine", "--push-to-hub a/b/c is not a name of the hub"),
        (["gdn"], "", r"--push-to-hub gdn needs a token of the hub \(http.*\): `hf auth login`, or set HF_TOKEN"),
        (["gdn"], "hf_old", "refuses the token of HF_TOKEN; make one that may write at https://"),
        (["gdn"], "hf_reads", "the hub's token of me may only read; make one that may write"),
        (["you/gdn"], "hf_mine", "--push-to-hub you/gdn: the token is that of me, who may write to me, lab; choose"),
        (["press/gdn"], "hf_mine", "--push-to-hub press/gdn: the token is that of me, who may write to me, lab"),
        (["shown"], "hf_mine", "--push-to-hub me/shown exists and is public: add --public, choose another name"),
        (["hidden", "--public"], "hf_mine", "--push-to-hub me/hidden exists and is private: leave --public out"),
    ],
)
def test_refusals_come_before_anything_is_uploaded(hub, folder, monkeypatch, capsys, options, token, message):
    hub.repos = {"me/shown": Repo(private=False), "me/hidden": Repo(private=True)}
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "nowhere"))
    assert push(folder, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lrnn: error:") and re.search(message, line)
    assert all(request.startswith("GET") for request in hub.requests)
    assert hub.repos.keys() == {"me/shown", "me/hidden"} and len(hub.repos["me/shown"].commits["main"]) == 1


def test_no_network(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert push(folder, "gdn") == 2
    assert "HF_HUB_OFFLINE is set, unset it to reach the hub" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(folder, "gdn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the hub (http://127.0.0.1:9) cannot be reached" in line and hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "name the folder to write: lrnn export SOURCE OUT"),
        (["x", "out", "--public"], "--public is about a repository of the hub; name it with --push-to-hub"),
        (["x", "--push-to-hub", "gdn"], "model folder not found: x"),
        (["x", "--push-to-hub", "gdn", "--dtype", "bfloat16"], "--dtype is for an export; name the folder to write"),
    ],
)
def test_command_lines_that_make_no_sense(hub, capsys, arguments, message):
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err and hub.requests == []


def test_a_card_of_another_author_stays():
    assert card_of("no title", "me/gdn") == "no title"


def test_an_export_is_pushed_with_the_results_of_its_checkpoint(hub, sentencepiece_model, tmp_path, monkeypatch):
    """Without --push-to-hub, not one request is made."""
    monkeypatch.setattr(write, "check_hf_folder", lambda *args: 0.0)  # other tests read folders back
    source = write_checkpoint(tmp_path / "run", random_model("gated-tied"), sentencepiece_model)
    results = tmp_path / "run/eval/step-00000010/position"
    results.mkdir(parents=True)
    (results / "results.json").write_text('{"models": []}')
    (results / "table.md").write_text("a table")
    assert main(["export", str(source), str(tmp_path / "quiet")]) == 0 and hub.requests == []
    assert main(["export", str(source), str(tmp_path / "loud"), "--push-to-hub", "gdn"]) == 0
    found = hub.repos["me/gdn"].revisions["main"]
    assert b"See [eval/position/table.md](eval/position/table.md)." in found["README.md"]
    assert found["eval/position/table.md"] == b"a table"
    assert found["model.safetensors"] == (tmp_path / "loud/model.safetensors").read_bytes()


def test_only_the_export_can_upload():
    """No other file of lrnn knows how to write to the hub."""
    package = Path(lrnn.__file__).parent
    rooms = [package, *(package / name for name in ("kernels", "pretrain", "eval"))]
    files = {file.resolve() for room in rooms for file in room.resolve().rglob("*.py")}
    writes = re.compile(r"HfApi\(|create_commit|create_repo|upload_f")
    assert {file.name for file in files if writes.search(file.read_text())} == {"hub.py"}
