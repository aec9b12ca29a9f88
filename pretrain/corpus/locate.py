"""Find out what a source is: which files it has, of which kind, and what they are called in messages."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.corpus.open_file import SUFFIXES, is_remote, open_file
from lrnn.pretrain.corpus.rows import DataFile
from lrnn.pretrain.corpus.source import SourceArguments

BUILDERS = ("json", "csv", "parquet", "arrow", "text")
KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
ALSO_SOURCE_CODE = {".json", ".csv", ".tsv"}  # these can be documents of a folder of text, if not compressed
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
TITLES = {"json": "JSON", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow", "lines": "text", "document": "text"}
NO_DATA = [  # names of files beside data
    *("README*", "LICEN[CS]E*", "*.md", "*.sha256", "*.md5", "SHA256SUMS", "MD5SUMS"),
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json"),
]


@dataclass
class Located:
    """The files of a source.

    Attributes:
        files: the files, in order.
        name: name of the source in messages.
        kind: what its files were taken for, as a user reads it.
    """

    files: list[DataFile]
    name: str
    kind: str

    @property
    def what(self) -> str:
        """Return what the source was taken for."""
        return f"{self.name}: {self.kind}"


def locate(arguments: SourceArguments) -> Located | None:
    """Return the files of a source, or None if only `datasets.load_dataset` can read it.

    Raises:
        UserError: there is no such source, or it is not clear what to take from it.
    """
    path = os.path.expanduser(arguments.path)
    folder = Path(path)
    if not arguments.split.isidentifier():  # "train[:10%]": `datasets` cuts and joins splits
        return None
    if path in BUILDERS and (arguments.data_files or not folder.exists()):
        return _of_builder(arguments)
    if is_remote(path):
        return _without_splits(arguments, _named_files([path], arguments), path)
    if folder.is_dir():
        return _in_folder(folder, arguments)
    if folder.is_file():
        for option in ("data_files", "name"):
            if getattr(arguments, option):
                raise UserError(f"source {path} is a file; {_flag(arguments, option)} is for folders and data sets")
        return _without_splits(arguments, _named_files([path], arguments, folder.parent), path)
    if os.path.lexists(path):
        raise UserError(f"source {path} is neither a file nor a folder that can be read")
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or kind_by_name(path):
        raise UserError(f"source {path}: there is no such file or folder")
    return _of_hub(arguments)


def list_files(root: Path, include: list[str], exclude: list[str]) -> list[str]:
    """Return the files below `root` that match a glob of `include` and none of `exclude`, as sorted relative paths.

    A glob may match the whole relative path or the file's name; `*` also matches `/`. Symbolic links to folders are not
    followed; sockets, pipes and devices are left out.
    """

    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch(name, g) or fnmatch(os.path.basename(name), g) for g in globs)

    def fail(error: OSError) -> None:
        raise UserError(f"folder {error.filename}: cannot be listed ({error.strerror})") from error

    found = []
    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            usable = os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
            if usable and matches(relative, include) and not matches(relative, exclude):
                found.append(relative)
    return sorted(found)


def kind_by_name(name: str) -> str | None:
    """Return the kind that a file's suffixes say: None if they say nothing, as those of text and source code."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def kind_by_content(path: str, text_column: str) -> str:
    """Return the kind of a file of any name: by its first bytes, or "document"."""
    try:
        with open_file(path) as stream:
            head = stream.peek(6)  # type: ignore[attr-defined]
            if head.startswith(b"PAR1"):
                return "parquet"
            if head.startswith(b"ARROW1"):
                return "arrow"
            if head.startswith((b"{", b"\xef\xbb\xbf{")):
                row = json.loads(stream.readline().decode("utf-8-sig"))
                if text_column in row:
                    return "json"
    except (OSError, EOFError, ValueError):  # It is text, or the reader says what is wrong with it.
        pass
    return "document"


def _flag(arguments: SourceArguments, option: str) -> str:
    names = {"data_files": "data-files", "name": "config", "include": "include", "exclude": "exclude"}
    return f"data.stream.{option}" if arguments.of_run else f"--{names.get(option, option)}"


def _text_kind(arguments: SourceArguments, default: str = "document") -> str:
    return "lines" if (arguments.sample_by or default) == "line" else "document"


def _data_file(path: str, label: str, arguments: SourceArguments, kind: str | None = None) -> DataFile:
    """Return a file with its kind: the one given, or that of `arguments.kind`, of its name, or of its content."""
    kind = kind or arguments.kind or kind_by_name(path)
    if kind is None and _says_nothing(path) and not is_remote(path):
        kind = kind_by_content(path, arguments.text_column)
    if kind in (None, "text", "document"):
        kind = _text_kind(arguments)
    return DataFile(path, label, kind, "\t" if ".tsv" in PurePosixPath(path).suffixes else ",")


def _says_nothing(name: str) -> bool:
    """Return whether a file has a name that anything may have: "part-00000", "dump.txt"."""
    suffixes = [suffix for suffix in PurePosixPath(name).suffixes if suffix not in SUFFIXES]
    return not suffixes or suffixes[-1] in (".txt", ".text", ".dat", ".data") or suffixes[-1][1:].isdigit()


def _named_files(paths: Iterable[str], arguments: SourceArguments, root: Path | None = None) -> list[DataFile]:
    """Return files by their paths; labels are relative to `root`."""
    files = []
    for path in paths:
        if path.endswith(ARCHIVES):
            raise UserError(f"source {path} is an archive; unpack it, and give the folder")
        files.append(_data_file(path, path if root is None else os.path.relpath(path, root), arguments))
    return files


def _of_builder(arguments: SourceArguments) -> Located | None:
    """Return the files of `json --data-files GLOB`, and likewise of the other builders."""
    if not arguments.data_files:
        raise UserError(
            f"source {arguments.path!r} is a kind of files; name them with {_flag(arguments, 'data_files')}, "
            "or give a file or folder instead"
        )
    paths = _resolve(arguments, None)
    if any(path.endswith(ARCHIVES) for path in paths):
        return None  # `datasets` unpacks archives.
    kind = _text_kind(arguments, "line") if arguments.path == "text" else arguments.path
    files = [_data_file(path, path, arguments, kind) for path in paths]
    return _without_splits(arguments, files, f"{arguments.path} files")


def _resolve(arguments: SourceArguments, base: Path | None) -> list[str]:
    """Return the files that `data_files` names, in the order of its globs."""
    from datasets.data_files import resolve_pattern

    globs = arguments.data_files or []
    found: dict[str, None] = {}
    for glob in [globs] if isinstance(globs, str) else globs:
        glob = os.path.expanduser(glob)
        if os.path.isdir(glob if base is None else base / glob):
            glob = os.path.join(glob, "**")
        try:
            found |= dict.fromkeys(resolve_pattern(glob, str(base or Path.cwd())))
        except Exception as error:  # Each protocol of a URL has errors of its own.
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            raise UserError(f"data files {glob}: cannot be loaded ({reason})") from error
    return list(found)


def _in_folder(folder: Path, arguments: SourceArguments) -> Located | None:
    if arguments.data_files:
        named = _named_files(_resolve(arguments, folder), arguments, folder)
        return _without_splits(arguments, named, f"folder {folder}")
    if _read_json(folder / "manifest.json").get("format") == "lrnn-corpus":
        raise UserError(f"source {folder} is a corpus already; train on it: data.corpora: [{{path: {folder}}}]")
    if (saved := _saved_data_set(folder, arguments)) is not None:
        return saved
    card = _front_matter(folder)
    if arguments.name or card & {"configs", "dataset_info"}:
        return _of_hub(arguments)
    names = list_files(folder, arguments.include or ["*"], arguments.exclude or [])
    names = [name for name in names if not (card and name == "README.md")]
    data = names if arguments.kind not in (None, "text") else _data_names(folder, names, arguments)
    if data or (card and names):
        return _data_folder(folder, data or names, arguments)
    if not names:
        raise UserError(
            f"empty corpus: no file of folder {folder} matches {arguments.include or ['*']} without "
            f"{arguments.exclude or []}"
        )
    kind = _text_kind(arguments)
    files = [DataFile(str(folder / name), name, kind) for name in names]
    return _without_splits(arguments, files, f"folder {folder}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _front_matter(folder: Path) -> set[str]:
    """Return the keys at the start of a README.md, as a data set of the hub has them."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text[3:].partition("\n---")[0]) if text.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(head) if isinstance(head, dict) else set()


def _saved_data_set(folder: Path, arguments: SourceArguments) -> Located | None:
    """Return the files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    splits = _read_json(folder / "dataset_dict.json").get("splits")
    if splits is not None:
        if arguments.split not in splits:
            raise _no_split(f"saved data set {folder}", arguments, splits)
        folder = folder / arguments.split
    state = _read_json(folder / "state.json")
    if "_data_files" not in state:
        return None
    files = [
        DataFile(str(folder / entry["filename"]), str(folder / entry["filename"]), "arrow")
        for entry in state["_data_files"]
    ]
    return _described(arguments, files, f"saved data set {folder}")


def _no_split(what: str, arguments: SourceArguments, splits: Iterable[str]) -> UserError:
    return UserError(
        f"{what} has no split {arguments.split!r}; {arguments.option('split', 'NAME')} can be one of {sorted(splits)}"
    )


def _data_names(folder: Path, names: list[str], arguments: SourceArguments) -> list[str]:
    """Return the data files among the files of a folder: none if it is a folder of text.

    Raises:
        UserError: there are data files among text, and nobody said which to take.
    """
    if arguments.kind == "text":
        return []
    data: list[str] = []
    certain: list[str] = []  # by their names, nothing but data
    other: list[str] = []
    for name in names:
        if any(part.startswith((".", "_")) for part in PurePosixPath(name).parts) or _is_beside_data(name):
            continue
        kind = kind_by_name(name)
        if kind is None and _says_nothing(name) and not name.endswith(ARCHIVES):
            found = kind_by_content(str(folder / name), arguments.text_column)
            kind = None if found == "document" else found
        (other if kind is None else data).append(name)
        if kind is not None and PurePosixPath(name).suffix not in ALSO_SOURCE_CODE:
            certain.append(name)
    if certain and other:
        raise UserError(
            f"folder {folder} holds data files ({len(data):,}, such as {certain[0]}) beside others ({len(other):,}, "
            f"such as {other[0]}); choose with --include '*{PurePosixPath(certain[0]).suffix}' or --exclude, or take "
            f"every file as a document with {arguments.option('kind', 'text')}"
        )
    return [] if other else data


def _is_beside_data(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, glob) for glob in NO_DATA)


def _data_folder(folder: Path, names: list[str], arguments: SourceArguments) -> Located:
    """Return the data files of one split: as `datasets` does, by words such as "test" in their names."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:  # all names begin with a point
        patterns = {}
    splits: dict[str, set[str]] = {}
    for split, globs in patterns.items():
        found = [path for glob in globs for path in _resolved_or_none(resolve_pattern, glob, folder)]
        splits[str(split)] = {os.path.relpath(path, folder) for path in found} & set(names)
    splits = {split: found for split, found in splits.items() if found}
    if "train" not in splits:
        splits["train"] = set(names) - set().union(*splits.values())
    chosen = [name for name in names if name in splits.get(arguments.split, set())]
    if not chosen:
        raise _no_split(f"folder {folder}", arguments, (split for split, found in splits.items() if found))
    files = [_data_file(str(folder / name), name, arguments) for name in chosen]
    of = f", split {arguments.split!r}, {len(chosen):,} of {len(names):,} files" if len(chosen) < len(names) else ""
    return _described(arguments, files, f"folder {folder}{of}")


def _resolved_or_none(resolve_pattern: Any, glob: str, folder: Path) -> list[str]:
    try:
        return resolve_pattern(glob, str(folder))
    except FileNotFoundError:
        return []


def _of_hub(arguments: SourceArguments) -> Located | None:
    """Return the files of a data set of the hub, or in a folder of that form; None if it has files of another kind."""
    import datasets

    what = f"data set {arguments.path!r}"
    try:
        builder = datasets.load_dataset_builder(arguments.path, arguments.name, data_files=arguments.data_files)
    except Exception as error:  # Whatever the hub, the network and the files of the data set make of it.
        reason = " ".join(str(error).splitlines()[:2])  # The second line lists the configurations.
        here = (
            "" if os.path.isdir(arguments.path) else "there is no such file or folder, and as a data set of the hub it "
        )
        raise UserError(f"{what}: {here}cannot be loaded ({type(error).__name__}: {reason})") from error
    config = builder.config
    modules = [c.__module__.split(".") for c in type(builder).__mro__]
    module = next((m[2] for m in modules if m[:2] == ["datasets", "packaged_modules"]), None)
    if module not in BUILDERS or not _is_plain(config):
        return None
    found = config.data_files or {}
    if arguments.split not in found:
        raise _no_split(what, arguments, map(str, found))
    paths = list(found[arguments.split])
    if any(path.endswith(ARCHIVES) for path in paths):
        return None
    kind = _text_kind(arguments) if module == "text" else module
    files = [_data_file(path, path.removeprefix("hf://datasets/"), arguments, kind) for path in paths]
    delimiter = getattr(config, "sep", ",")
    files = [DataFile(f.path, f.label, f.kind, delimiter if f.delimiter == "," else f.delimiter) for f in files]
    return _described(arguments, files, f"{what}, split {arguments.split!r}")


def _is_plain(config: Any) -> bool:
    """Return whether a configuration of a builder changes nothing about how its files are read."""
    free = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "columns"}
    default = type(config)()
    return all(getattr(config, key) == value for key, value in vars(default).items() if key not in free)


def _without_splits(arguments: SourceArguments, files: list[DataFile], where: str) -> Located:
    if arguments.split != "train":
        raise _no_split(where, arguments, ["train"])
    return _described(arguments, files, where)


def _described(arguments: SourceArguments, files: list[DataFile], where: str) -> Located:
    """Return the files, and what they were taken for."""
    for option in ("include", "exclude"):
        if getattr(arguments, option) and not Path(os.path.expanduser(arguments.path)).is_dir():
            raise UserError(f"--{option} is for folders, and {arguments.path!r} is none")
    if not files:
        raise UserError(f"empty corpus: {where} has no files")
    counts = Counter(TITLES[file.kind] for file in files)
    kinds = " and ".join(f"{count:,} {title} file{'s' * (count > 1)}" for title, count in counts.items())
    units = []
    if any(file.kind == "document" for file in files):
        units.append("every text file is a document")
    if any(file.kind == "lines" for file in files):
        units.append(f"every line is a document ({arguments.option('sample_by', 'document')}: every file)")
    if any(file.kind not in ("document", "lines") for file in files):
        units.append(f"every row is a document, its text in column {arguments.text_column!r}")
    return Located(files, where, f"{kinds}; {'; '.join(units)}")
