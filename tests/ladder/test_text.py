"""Test the text that is made from packages, with small .deb files that go through all of it."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from lrnn.errors import UserError
from lrnn.files import sha256
from lrnn.ladder.text import assemble, extract
from lrnn.ladder.text.contamination import Benchmarks
from lrnn.ladder.text.make import make_text
from lrnn.ladder.text.table import DOMAINS, SHIPPED, read_table

QUESTION = "a baker sells nineteen loaves on monday and twice as many on tuesday how many loaves are sold in all"


def write_deb(path: Path, files: dict[str, str]) -> None:
    """Write a .deb: an `ar` archive of a format version, metadata, and the files."""
    parts = {"debian-binary": b"2.0\n", "control.tar": tar_of({"control": "Package: x\n"}), "data.tar": tar_of(files)}
    content = b"!<arch>\n"
    for name, data in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(content)


def tar_of(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def some_text(seed: int) -> str:
    return "\n".join(
        f"word{(seed * 7919 + i * 104729) % 99991} and then something else of text {seed}, {i}" for i in range(30)
    )


def prose() -> dict[str, str]:
    return {f"doc/s{d}/p{i}.txt": some_text(1000 + 10 * d + i) for d in range(10) for i in range(3)}


@pytest.fixture
def benchmarks(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    rows = {"gsm8k": {"question": QUESTION, "answer": "57"}, "humaneval": {"prompt": "x", "canonical_solution": "x"}}
    rows |= {"mbpp": {"text": "x", "code": "x"}, "math": {"problem": "x", "solution": "x"}}
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


class Maker:
    """Makes the text of two packages: `aaa` with code in 20 folders, and `bbb` with prose in 10."""

    def __init__(self, folder: Path, benchmarks: Path):
        self.folder, self.benchmarks = folder, benchmarks
        (folder / "downloads").mkdir(parents=True)
        code = {f"src/d{d}/f{i}.c": some_text(10 * d + i) for d in range(20) for i in range(4)}
        code["src/d0/asked.c"] = some_text(500) + "\n" + QUESTION.upper().replace(" ", ",\n") + "\n" + some_text(501)
        code["src/d1/again.c"] = some_text(20).replace(" ", "  ")  # src/d2/f0.c with other white space
        self.packages = {
            "aaa": {"version": "1:2-3", "root": "src/", "files": [{"domain": "code", "include": ["*.c"]}]},
            "bbb": {"version": "7", "files": [{"domain": "prose"}]},
        }
        self.said: list[str] = []
        self.write("aaa_1%3a2-3_all.deb", code)
        self.write("bbb_7_all.deb", prose())

    def write(self, name: str, files: dict[str, str]) -> None:
        write_deb(self.folder / "downloads" / name, files)
        self.packages[name[:3]] |= {"licence": "MIT", "sha256": sha256(self.folder / "downloads" / name)}

    def make(self) -> dict:
        heldout = {"code": 0.2, "mathematics": 0.1, "prose": 0.3}
        table = self.folder / "packages.yaml"
        table.write_text(yaml.safe_dump({"heldout": heldout, "packages": self.packages}))
        self.said = []
        return make_text(read_table(table), self.folder, self.benchmarks, False, 1, self.said.append)

    def rows(self, pattern: str) -> list[dict]:
        files = sorted((self.folder / "text").glob(pattern))
        return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


@pytest.fixture
def maker(tmp_path, benchmarks):
    return Maker(tmp_path / "made", benchmarks)


def test_holds_out_whole_folders_of_every_package(maker):
    manifest = maker.make()
    for domain, share, folders in (("code", 0.2, 20), ("prose", 0.3, 10)):
        train, heldout = (maker.rows(f"{domain}/{pattern}") for pattern in ("train-*.jsonl", "heldout.jsonl"))
        train_in, heldout_in = ({Path(row["path"]).parent for row in found} for found in (train, heldout))
        assert not train_in & heldout_in and len(train_in | heldout_in) == folders
        assert share - 1.5 / folders < len(heldout_in) / folders <= share
    text = maker.folder / "text"
    files = {str(file.relative_to(text)): sha256(file) for file in text.glob("*/*.jsonl")}
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
    assert manifest["packages"]["aaa"]["version"] == "1:2-3"


def test_holds_out_no_folder_that_would_be_most_of_it():
    def placed(subtree: str, size: int) -> assemble.Placed:
        return assemble.Placed("aaa", extract.Entry(0, 0, size, "code", subtree, subtree))

    documents = [placed("large", 60), *(placed(f"small{i}", 1) for i in range(940))]
    for name in range(50):  # whatever the order that its name gives it
        documents[0] = placed(f"large{name}", 60)
        chosen = assemble.held_out_subtrees(documents, {"code": 0.1})
        assert len(chosen) == 100 and ("code", f"large{name}") not in chosen


def test_leaves_out_repeated_documents_and_those_with_a_benchmark_question(maker):
    manifest = maker.make()
    found = maker.rows("*/*.jsonl")
    assert len(found) == 20 * 4 + 10 * 3
    assert len({" ".join(row["text"].split()) for row in found}) == len(found)
    assert "d0/asked.c" not in {row["path"] for row in found}
    assert manifest["packages"]["aaa"]["left_out"] == {"benchmarks": 1, "repeated": 1, "known": 0}


def test_drops_held_out_documents_that_consist_of_lines_of_train_documents(maker):
    maker.make()
    held, trained = (maker.rows(f"prose/{pattern}")[0]["path"] for pattern in ("heldout.jsonl", "train-*.jsonl"))
    long = "\n".join(f"a line of more than fifty characters, of which this is number {i}" for i in range(40))
    files = prose()
    lengths = {path: len(text) for path, text in files.items()}
    files[held] = f"Changed.\n{long}\n"[: lengths[held]]  # of the same length, so that the same folders are held out
    files[trained] = f"{long}\nAlso changed.\n"[: lengths[trained]]
    maker.write("bbb_7_all.deb", files)
    manifest = maker.make()
    assert trained in {row["path"] for row in maker.rows("prose/train-*.jsonl")}
    assert held not in {row["path"] for row in maker.rows("prose/*.jsonl")}
    assert manifest["packages"]["bbb"]["left_out"]["known"] == 1


def test_resumes_with_the_package_that_was_interrupted(maker, monkeypatch):
    manifest = maker.make()
    folder = maker.folder / "documents"
    whole, other = (folder / "bbb.jsonl").read_bytes(), (folder / "aaa.jsonl").stat().st_mtime_ns
    (folder / "bbb.json").unlink()  # as if it had been stopped while it wrote
    (folder / "bbb.jsonl").write_bytes(whole[:100])
    assert maker.make() == manifest
    assert (folder / "bbb.jsonl").read_bytes() == whole
    assert (folder / "aaa.jsonl").stat().st_mtime_ns == other
    monkeypatch.setattr(extract, "LEAST_CHARACTERS", 10**9)  # to read a package again would leave nothing of it
    assert maker.make() == manifest


def test_reads_a_package_again_whose_filters_changed(maker):
    maker.make()
    maker.packages["bbb"]["files"][0]["exclude"] = ["*/p0.txt"]
    maker.make()
    assert len(maker.rows("prose/*.jsonl")) == 20
    assert [line.split(":")[0] for line in maker.said if "left out" in line] == ["bbb"]


def test_refuses_a_package_with_another_checksum(maker):
    file = maker.folder / "downloads/bbb_7_all.deb"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"bbb_7_all\.deb has the SHA-256 .* and the table says"):
        maker.make()


def test_finds_thirteen_words_in_a_row_alone(benchmarks):
    found = Benchmarks(benchmarks)
    asked = QUESTION.split()
    assert found.share_words("Before. " + " ".join(asked[3:16]) + " after")
    assert not found.share_words(" ".join(asked[:12]) + " other " + " ".join(asked[12:]))
    assert not found.share_words("")


def test_shipped_table_is_valid():
    packages = read_table(SHIPPED).packages.values()
    assert {files.domain for package in packages for files in package.files} == set(DOMAINS)
