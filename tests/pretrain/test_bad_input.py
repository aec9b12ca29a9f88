"""Test bad input to `lrnn pretrain`: one line that names it, status 2, and nothing lost or overwritten."""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import command_server
import pytest
import torch
import yaml
from fork_server import CONTEXT
from training_group import run_command

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.eval.in_run.prompts import read_prompts
from lrnn.model_config import load_model_config
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.progress import check_same_run
from lrnn.pretrain.watch.settings import SamplesConfig
from lrnn.records import read_metrics


@pytest.fixture(scope="module")
def lrnn():
    """`lrnn(*arguments)` runs a command line in another process, and returns (status, stdout, stderr)."""
    ours, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=command_server.serve, args=(theirs,))
    server.start()
    theirs.close()  # so that the pipe closes with the process

    def run(*arguments: object) -> tuple[int, str, str]:
        ours.send([str(a) for a in arguments])
        return ours.recv()

    yield run
    ours.send(None)
    server.join(20)


@pytest.fixture
def pretrain(lrnn, base, tmp_path):
    """`pretrain(*overrides, **changes)` trains in one process; `changes` replace keys of `base()`."""

    def run(*overrides: str, nproc: int = 1, **changes) -> tuple[int, str, str]:
        (tmp_path / "run.yaml").write_text(json.dumps(base(**changes)))
        return lrnn("pretrain", tmp_path / "run.yaml", "--nproc", nproc, *overrides)

    return run


@pytest.fixture
def refused(pretrain):
    """`refused(...)` returns the one line that the command fails with."""

    def run(*overrides: str, **options) -> str:
        status, _, stderr = pretrain(*overrides, **options)
        assert status == 2 and stderr.startswith("lrnn: error: ") and stderr.count("\n") == 1, stderr
        return stderr

    return run


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the note of who holds the folder."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".running.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- configuration and files ------------------------------------------------------------------------------------------


def test_configuration(refused, tmp_path):
    assert "unknown key optim.learning_rate; valid: name, lr, " in refused("optim.learning_rate=1")
    assert "key steps = 'many': should be a valid integer" in refused("steps=many")
    assert f"model configuration {tmp_path / 'm.json'} does not exist" in refused(f"model={tmp_path / 'm.json'}")
    assert "DeepSpeed configuration none.json does not exist" in refused("deepspeed=none.json")
    assert not (tmp_path / "run").exists()


def test_no_such_configuration(lrnn, tmp_path):
    status, _, stderr = lrnn("pretrain", tmp_path / "x.yaml")
    assert status == 2
    assert stderr == (
        f"lrnn: error: configuration {tmp_path / 'x.yaml'} does not exist; "
        "give the path of a file, or the name of one that comes with lrnn: "
        "valid: 1.3b, 1.3b-hybrid, 340m, 340m-hybrid, 340m-stages, 7b-hybrid, tiny\n"
    )


@pytest.mark.parametrize("below", ["", "/run"])
def test_run_folder_that_cannot_be_written(refused, tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    message = refused(f"run_dir={tmp_path}/taken{below}")
    assert f"run_dir {tmp_path}/taken{below} cannot be written" in message
    assert (tmp_path / "taken").read_text() == "mine"


# --- processes --------------------------------------------------------------------------------------------------------


def test_more_processes_than_sequences(refused, base):
    assert "global_batch_size=8 has too few samples for 5 processes" in refused(nproc=5)
    assert "global_batch_size=8 is not a multiple of micro_batch_size=2 times 3 processes" in refused(nproc=3)
    assert "--nproc 0 should be at least 1" in refused(nproc=0)


def test_more_processes_than_samples_of_the_corpora(base):
    raw = base()
    config = parse_config(raw, "test")
    model_config = load_model_config(config.model)
    lone = Ranks(0, 1, torch.device("cpu"), None)
    corpus = open_data(config, model_config, lone).source.corpora[0]
    raw["data"] |= {"seq_len": corpus.num_tokens // 2, "corpora": raw["data"]["corpora"][:1]}  # one sample and a half
    config = parse_config(raw, "test")
    open_data(config, model_config, lone)
    with pytest.raises(UserError, match="2 processes, but the corpora have only 1 samples"):
        open_data(config, model_config, Ranks(1, 2, torch.device("cpu"), None))


# --- corpora ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(corpora, tmp_path):
    """Return a copy of corpus `a`, to be damaged, and its first shard."""
    shutil.copytree(corpora / "a", tmp_path / "corpus")
    return tmp_path / "corpus", next((tmp_path / "corpus" / "train").glob("*.arrow"))


@pytest.fixture(scope="module")
def foreign_corpus(tmp_path_factory):
    """Return a corpus with its own tokenizer, which has a smaller vocabulary."""
    out = tmp_path_factory.mktemp("foreign") / "corpus"
    stdlib = sysconfig.get_paths()["stdlib"]
    options = ["--include", "json/*.py", "--skip-bad-files", "--processes", "1", "--train-tokenizer", "350"]
    assert main(["corpus", stdlib, *options, "--out", str(out)]) == 0
    return out


def flip_byte(file: Path) -> None:
    """Change a byte in the middle, without changing the size."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def test_corpora_with_different_tokenizers(refused, corpora, foreign_corpus, tmp_path):
    message = refused(f"data.corpora=[{{path: {corpora}/a}}, {{path: {foreign_corpus}}}]")
    assert f"corpora {corpora}/a and {foreign_corpus} were made with different tokenizers" in message
    assert f"--tokenizer {corpora}/a/tokenizer" in message
    assert not (tmp_path / "run").exists()


def test_corpus_of_another_tokenizer_than_the_model(refused, pretrain, corpora, foreign_corpus, model_json, tmp_path):
    manifest = json.loads((corpora / "a" / "manifest.json").read_text())
    own = manifest["tokenizer"]["fingerprint"]
    (tmp_path / "m.json").write_text(json.dumps(json.loads(model_json.read_text()) | {"tokenizer_fingerprint": own}))
    model = f"model={tmp_path / 'm.json'}"
    message = refused(model, f"data.corpora=[{{path: {foreign_corpus}}}]", "log.heldout_every=0")
    assert f"corpus {foreign_corpus}: made with another tokenizer than the model's" in message and own[:12] in message
    stream = f"data.stream={{path: json, data_files: x.jsonl, tokenizer: {foreign_corpus}/tokenizer}}"
    message = refused(model, "data.corpora=[]", stream, "log.heldout_every=0")
    assert f"tokenizer {foreign_corpus}/tokenizer" in message and "give the model's tokenizer" in message


def test_vocabulary_larger_than_the_embedding(refused, corpora, model_json, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(json.loads(model_json.read_text()) | {"vocab_size": 399}))
    message = refused(f"model={tmp_path / 'm.json'}")
    assert f"corpus {corpora}/a: its tokenizer has a vocabulary of 400" in message
    assert "vocab_size=399; set vocab_size to at least 400" in message
    stream = f"data.stream={{path: json, data_files: x.jsonl, tokenizer: {corpora}/a/tokenizer}}"
    message = refused(f"model={tmp_path / 'm.json'}", "data.corpora=[]", stream, "log.heldout_every=0")
    assert "has a vocabulary of 400" in message and "vocab_size=399; set vocab_size to at least 400" in message


def test_damaged_corpus(refused, corpus):
    path, shard = corpus
    override = f"data.corpora=[{{path: {path}}}]"
    name = f"corpus {path}: shard train/{shard.name}"
    good = shard.read_bytes()
    shard.write_bytes(good[:-8])
    assert f"{name} has {len(good) - 8} bytes, the manifest says {len(good)}" in refused(override)
    shard.unlink()
    assert f"{name} cannot be read (No such file" in refused(override)
    shard.write_bytes(good)
    heldout = next((path / "heldout").glob("*.arrow"))
    flip_byte(heldout)
    assert f"corpus {path}: shard heldout/{heldout.name} is corrupt in bytes" in refused(override)
    table = shard.with_name(f"{shard.name}.table")
    flip_byte(table)
    assert f"{name}.table, its table of checksums, is corrupt" in refused(override)


def test_a_corpus_without_its_tokenizer(refused, corpus, foreign_corpus):
    """Every checkpoint holds the tokenizer, so none could be written."""
    path, _ = corpus
    shutil.rmtree(path / "tokenizer")
    override = f"data.corpora=[{{path: {path}}}]"
    assert f"corpus {path}: its folder tokenizer is missing, which every checkpoint copies" in refused(override)
    shutil.copytree(foreign_corpus / "tokenizer", path / "tokenizer")
    assert f"corpus {path}: its folder tokenizer holds another tokenizer (fingerprint " in refused(override)


def test_no_corpus(refused, corpus, tmp_path):
    path, _ = corpus
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        message = refused(f"data.corpora=[{{path: {tmp_path / missing}}}]")
        assert f"corpus {tmp_path / missing}: no manifest.json" in message and "make one with `lrnn corpus`" in message
    (path / "manifest.json").write_text("{")
    assert f"corpus {path}: manifest.json is not JSON" in refused(f"data.corpora=[{{path: {path}}}]")


def test_too_little_text(refused, corpus):
    path, _ = corpus
    message = refused(f"data.corpora=[{{path: {path}}}]", "data.seq_len=10000000")
    assert f"corpus {path}: split 'train' has " in message and "too few for one sample of seq_len=10000000" in message
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["splits"]["train"] |= {"tokens": 0, "documents": 0, "shards": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert f"corpus {path}: split 'train' is empty" in refused(f"data.corpora=[{{path: {path}}}]")


def test_no_heldout_split(refused, foreign_corpus):
    message = refused(f"data.corpora=[{{path: {foreign_corpus}}}]")
    assert f"corpus {foreign_corpus}: no split 'heldout'" in message and "--heldout FRACTION" in message


def test_streams(refused, corpora, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 20)

    def stream(**changes) -> str:
        fields = {"path": "json", "data_files": f"{tmp_path}/rows.jsonl", "tokenizer": f"{corpora}/a/tokenizer"}
        return f"data.stream={json.dumps(fields | changes)}"

    off = ["data.corpora=[]", "log.heldout_every=0"]
    assert "log.heldout_every needs corpora with a held-out split" in refused("data.corpora=[]", stream())
    assert "exactly one of corpora" in refused(stream())
    assert "column 'body'" in refused(*off, stream(text_column="body"))
    assert "none.jsonl" in refused(*off, stream(data_files=f"{tmp_path}/none.jsonl"))
    assert "none.model" in refused(*off, stream(tokenizer=f"{tmp_path}/none.model"))


def test_a_stream_that_fails_in_the_middle(pretrain, corpora, tmp_path):
    """The run ends with one line and a checkpoint, and resumes without the bad rows as if it had never met them."""
    rows = ["".join(json.dumps({"text": f"row {i} " * 2}) + "\n" for i in range(k, k + 300)) for k in (0, 300)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(rows[0])
    bad = tmp_path / "in" / "b.jsonl"
    bad.write_text('{"text": "cut o\n{"text": 5}\n' + rows[1])
    stream = {"path": str(tmp_path / "in"), "tokenizer": f"{corpora}/a/tokenizer"}

    def run(name: str, **more) -> tuple[int, str, str]:
        data = {"seq_len": 64, "stream": stream | more}
        log = {"every": 1, "tensorboard": False}
        return pretrain("steps=13", "precision=float32", run_dir=str(tmp_path / name), data=data, log=log)

    status, stdout, stderr = run("broken")
    assert status == 2 and stderr.count("\n") == 1
    assert stderr.startswith(f"lrnn: error: {bad}, row 1: not JSON (Unterminated string starting at character 9)")
    assert "data.stream.skip_bad_rows=true" in stderr and "its checkpoint is written" in stderr
    done = max(losses(tmp_path / "broken"))
    assert 3 < done < 13 and f"the run stopped at step {done}," in stderr
    assert (tmp_path / "broken" / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()

    status, stdout, stderr = run("broken", skip_bad_rows=True)
    assert status == 0, stderr
    counted = f"1 x not JSON (first: {bad}, row 1); 1 x not text (first: {bad}, row 2)"
    assert f"left out of the stream: {counted}" in stdout
    status, _, stderr = run("whole", skip_bad_rows=True)
    assert status == 0, stderr
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 13
    (event,) = [record for record in read_metrics(tmp_path / "whole") if record.get("event") == "left_out"]
    assert event["left_out"]["not text"] == [1, f"{bad}, row 2"]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(trained, pretrain, tmp_path):
    """Return a copy of a run of 2 steps, with a checkpoint of each, in the folder that `base()` names."""
    if not trained.exists():
        status, _, stderr = pretrain("steps=2", "checkpoint.every=1", f"run_dir={trained}")
        assert status == 0, stderr
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def state_file(run: Path, step: int) -> Path:
    (file,) = (run / "checkpoints" / f"step-{step:08d}").glob("state-*")
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def losses(run: Path) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in read_metrics(run):
        if "loss" in record and "event" not in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def test_truncated_newest_checkpoint(run, pretrain):
    """The run resumes from the one before, says so, and repeats the lost step with the same result."""
    truncate(state_file(run, 2))
    status, stdout, stderr = pretrain("steps=3", "--allow-change")
    assert status == 0, stderr
    (warning,) = [line for line in stdout.splitlines() if "passed over" in line]
    assert str(state_file(run, 2)) in warning
    assert f"resuming {run}/checkpoints/step-00000001" in stdout
    found = losses(run)
    assert list(map(len, found.values())) == [1, 2, 1] and found[2][0] == found[2][1]


def test_no_intact_checkpoint(run, refused):
    for step in (1, 2):
        truncate(state_file(run, step))
    before = content(run)
    message = refused("steps=3")
    assert f"no checkpoint of {run} is intact: {state_file(run, 2)} has " in message
    assert "choose another run_dir" in message
    assert content(run) == before


def test_lost_manifests(run, refused):
    """Without them the run looks like a new one; it must not start again and overwrite its checkpoints."""
    for step in (1, 2):
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    before = content(run)
    assert f"no checkpoint of {run} is intact" in refused("steps=3")
    assert content(run) == before


def test_error_that_only_the_main_process_sees(run, base, tmp_path):
    """Only the main process reads checkpoints and prints the error. The other one must not wait for it."""
    for step in (1, 2):
        truncate(state_file(run, step))
    (tmp_path / "run.yaml").write_text(json.dumps(base(steps=3)))
    statuses, stderr = run_command(tmp_path, ["pretrain", str(tmp_path / "run.yaml")])
    assert statuses == [2, 2]
    assert stderr.startswith(f"lrnn: error: no checkpoint of {run} is intact")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("allow_neg_eigval", False), ("norm_eps", 1e-3), ("num_hidden_layers", 3), ("mixer", "deltanet")],
)
def test_resume_with_a_changed_model(run, refused, model_json, tmp_path, field, value):
    (tmp_path / "m.json").write_text(json.dumps(json.loads(model_json.read_text()) | {field: value}))
    before = content(run)
    message = refused("steps=3", "--allow-change", f"model={tmp_path / 'm.json'}")
    assert f"{run}/checkpoints/step-00000002 was trained with {field} = " in message
    assert f"says {value!r}" in message and "choose another run_dir" in message
    assert content(run) == before


def test_resume_of_a_checkpoint_older_than_a_field(model_json, tmp_path):
    """Such a checkpoint was trained with the present default of the field."""
    config = load_model_config(model_json)
    older = {n: value for n, value in config.to_dict().items() if n != "delta_rule_precision"}
    (tmp_path / "config.json").write_text(json.dumps(older))
    (tmp_path / "progress.json").write_text(json.dumps({"data": {}}))
    check_same_run(tmp_path, config, {})
    config.delta_rule_precision = "split"
    with pytest.raises(UserError, match="was trained with delta_rule_precision = 'standard'"):
        check_same_run(tmp_path, config, {})


def test_resume_with_changed_data(run, refused, corpora, foreign_corpus, tmp_path):
    before = content(run)

    def changed(key: str, *overrides: str) -> str:
        message = refused("steps=2", "log.heldout_every=0", *overrides)
        assert f"{run}/checkpoints/step-00000002 was trained on data with {key} = " in message, message
        assert "choose another run_dir" in message and content(run) == before
        return message

    assert "seq_len = 64, now it is 32" in changed("seq_len", "data.seq_len=32")
    assert "seed = 0, now it is 1" in (message := changed("seed", "seed=1")) and "add --allow-change" in message
    changed("reset_at_document_boundaries", "data.reset_at_document_boundaries=false")
    changed("weights", f"data.corpora=[{{path: {corpora}/a}}, {{path: {corpora}/b}}]")
    changed("corpora", f"data.corpora=[{{path: {corpora}/b}}, {{path: {corpora}/a, weight: 2}}]")
    # The same text with another tokenizer: other tokens, so other corpora as well.
    assert "allow" not in changed("corpora", f"data.corpora=[{{path: {foreign_corpus}}}]")


def test_resume_with_changed_settings(run, pretrain, refused):
    """Those that change the results are refused unless they are allowed; all are shown, and the old file is kept."""
    before, file = content(run), (run / "run.yaml").read_text()
    changes = ["steps=3", "optim.lr=0.001", "global_batch_size=4", "micro_batch_size=4", "log.heldout_every=7"]
    message = refused(*changes)
    listing = "steps = 2 (now 3), global_batch_size = 8 (now 4), optim.lr = 0.01 (now 0.001)"
    assert f"{run}/checkpoints/step-00000002 was trained with {listing}, which changes the results; add" in message
    assert content(run) == before

    status, stdout, stderr = pretrain(*changes, "--allow-change")
    assert status == 0, stderr
    assert f"resuming {run}/checkpoints/step-00000002" in stdout
    assert [r["samples"] for r in read_metrics(run) if "samples" in r] == [8, 16, 20]
    shown = {
        "steps": [2, 3], "global_batch_size": [8, 4], "micro_batch_size": [2, 4], "optim.lr": [0.01, 0.001],
        "log.heldout_every": [3, 7], "checkpoint.every": [1, 100], "run_dir": [str(run.parents[1]), str(run)],
    }  # fmt: skip
    (event,) = [r for r in read_metrics(run) if r.get("event") == "config_changed"]
    assert event["step"] == 2 and event["changed"].keys() == shown.keys()
    for key, (old, new) in shown.items():
        assert key == "run_dir" or event["changed"][key] == [old, new]
        assert key == "run_dir" or f"changed since step 2: {key} {old} -> {new}\n" in stdout
    assert (run / "run.1.yaml").read_text() == file and yaml.safe_load((run / "run.yaml").read_text())["steps"] == 3

    # The same command again needs nothing more.
    assert pretrain(*changes)[0] == 0 and not (run / "run.2.yaml").exists()


def test_resume_with_other_data(run, pretrain, corpora, foreign_corpus):
    """It is allowed if the tokenizer is the same: the run continues at its sample of the new order."""
    only = "data.corpora=[{path: %s}]"
    status, stdout, stderr = pretrain("steps=3", "seed=1", only % (corpora / "b"), "--allow-change")
    assert status == 0 and "changed since step 2: seed 0 -> 1\n" in stdout, stderr
    assert [r["samples"] for r in read_metrics(run) if "samples" in r] == [8, 16, 24]
    status, _, stderr = pretrain("steps=3", only % foreign_corpus, "--allow-change", "log.heldout_every=0")
    assert status == 2 and "the position in the data would mean something else: restore it, or choose" in stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval={every: 2}", "key eval = {'every': 2}: give either suite or tasks"),
        ("eval={suite: fast}", "key eval = {'suite': 'fast'}: every is missing: the steps between two evaluations"),
        ("eval={every: 2, suite: quick, truncate: true}", "a suite has a fixed protocol: truncate,"),
        ("eval={every: 2, tasks: [a], limit: 1.5}", "limit 1.5 should be a whole number of documents, or a fraction"),
        ("samples={every: 2}", "key samples = {'every': 2}: give either prompts or prompt_file"),
        ("samples={prompts: [a]}", "every is missing: the steps from samples to samples, or 0 for none"),
        ("eval={every: 2, tasks: [none.yaml]}", "eval: unknown task 'none.yaml'; there is no such file"),
        ("eval={every: 2, suite: code_math}", "would run in lrnn_humaneval, lrnn_mbpp, and a run does not do that"),
    ],
)
def test_what_watches_a_run(refused, tmp_path, override, message):
    """An unknown task of lm-eval is refused in the same way; it takes 8 s to list all of them."""
    assert message in refused(override)
    assert not (tmp_path / "run").exists()


def test_files_of_prompts(tmp_path):
    def prompts(name, content):
        (tmp_path / name).write_bytes(content)
        return read_prompts(SamplesConfig(every=1, prompt_file=str(tmp_path / name)))

    assert prompts("a.txt", "def f(x):\n\n  ä\n".encode()) == ["def f(x):", "  ä"]
    assert prompts("b.txt", "a\u2028b\r\nc\x0cd".encode()) == ["a\u2028b", "c\x0cd"], "only newlines end a line"
    assert prompts("b.jsonl", '{"text": "a\u2028b"}'.encode()) == ["a\u2028b"]
    assert prompts("a.jsonl", b'{"text": "a\\nb"}\n{"text": "c", "id": 1}\n') == ["a\nb", "c"]
    for name, content, message in (
        ("b.txt", b"\n \n", "holds no prompt"),
        ("c.txt", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        ("b.jsonl", b'{"text": "a"}\n{"txt": 1}\n', r"line 2 should be a row .* not \{\"txt\": 1\}"),
        ("c.jsonl", b"a\n", "line 1 is not JSON"),
        ("d.jsonl", b'{"text": "\\ud83d"}', r"line 1: half a surrogate pair, U\+D83D at character 0"),
    ):
        with pytest.raises(UserError, match=message):
            prompts(name, content)
