"""Test that all damage to checkpoints of a real run of two processes is named, and the checkpoint passed over."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from training_group import run_group

from lrnn.pretrain.checkpoint.format import find_newest, list_checkpoints, verify

BITS = 16  # bits flipped in each file, one at a time

Damage = Callable[[Path, bytes], object]


def replace_by_folder(file: Path, content: bytes) -> None:
    file.unlink()
    file.mkdir()


def replace_by_dangling_link(file: Path, content: bytes) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES: dict[str, Damage] = {
    "one byte less": lambda file, content: file.write_bytes(content[:-1]),
    "half": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "empty": lambda file, content: file.write_bytes(b""),
    "removed": lambda file, content: file.unlink(),
    "one byte more": lambda file, content: file.write_bytes(content + b"\0"),
    "the end is zeros": lambda file, content: file.write_bytes(content[:-64] + bytes(len(content[-64:]))),
    "a folder": replace_by_folder,
    "a dangling link": replace_by_dangling_link,
}


def flip(bit: int) -> Damage:
    def damage(file: Path, content: bytes) -> None:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)

    return damage


def overwrite(other: bytes) -> Damage:
    return lambda file, content: file.write_bytes(other)


def damages_of(name: str, contents: dict[str, bytes], rng: random.Random) -> Iterator[tuple[str, Damage]]:
    yield from DAMAGES.items()
    for bit in rng.sample(range(8 * len(contents[name])), BITS):
        yield f"bit {bit} flipped", flip(bit)
    for other, content in contents.items():
        if content != contents[name]:
            yield f"content of {other}", overwrite(content)


def restore(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)  # a link would be written through
    file.write_bytes(content)


def test_every_mutation_of_a_real_checkpoint_is_seen(base, tmp_path):
    config = base(stage=2, steps=2, checkpoint={"every": 1, "keep_last": 2})
    assert run_group(tmp_path, [{"config": config}]) == [0]
    run = Path(config["run_dir"])
    before, newest = list_checkpoints(run)
    assert find_newest(run) == newest
    contents = {str(p.relative_to(newest)): p.read_bytes() for p in sorted(newest.rglob("*")) if p.is_file()}
    states = [f"state-0000{rank}-of-00002.safetensors" for rank in range(2)]
    texts = ["config.json", "manifest.json", "progress.json", "run.yaml", "tokenizer/tokenizer.model"]
    assert sorted(contents) == sorted(states + texts)

    rng = random.Random(0)
    mutations, missed = 0, []
    for name, content in contents.items():
        for what, damage in damages_of(name, contents, rng):
            damage(newest / name, content)
            warnings: list[str] = []
            found = find_newest(run, warnings.append)
            named = str(newest) if name == "manifest.json" else str(newest / name)
            if found != before or len(warnings) != 1 or named not in warnings[0]:
                missed.append((name, what, found, warnings))
            restore(newest / name, content)
            mutations += 1
    print(f"{mutations} mutations, {mutations - len(missed)} detected")
    assert not missed and mutations >= 100
    assert verify(newest) and find_newest(run) == newest, "not restored: the test proves nothing"
    what_latest_says_does_not_matter(run, before, newest)


def what_latest_says_does_not_matter(run: Path, before: Path, newest: Path) -> None:
    latest = newest.parent / "latest"
    assert latest.read_text() == f"{newest.name}\n"
    cases = [b"", f"{before.name}\n".encode(), b"step-00000099\n", b"../..\n", b"\xff\0garbage", None]
    for broken in (False, True):
        if broken:
            (newest / "progress.json").unlink()
        for content in cases:
            latest.unlink(missing_ok=True)
            if content is not None:
                latest.write_bytes(content)
            assert find_newest(run, lambda warning: None) == (before if broken else newest), content
        latest.mkdir()
        assert find_newest(run, lambda warning: None) == (before if broken else newest)
        shutil.rmtree(latest)
    latest.write_text(f"{newest.name}\n")  # the broken one
    assert find_newest(run, lambda warning: None) == before
