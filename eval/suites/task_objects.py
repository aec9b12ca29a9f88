"""Names become lm-eval's task objects: lrnn's tasks, lm-eval's 14,000, and those of the user's folders.

Names are what `lm_eval --tasks` takes: tasks, groups, tags, patterns such as `arc_*`, and task files. lm-eval's own
tasks are indexed only if a name needs that, because it takes 8 s or more.
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrnn.errors import UserError
from lrnn.eval.suites.suites import TASK_FOLDER, RunsCode
from lrnn.settings import name_hint

PATTERN = re.compile(r"[*?\[]")


@dataclass
class Loaded:
    """lm-eval's objects, with their data. They serve one run only.

    Attributes:
        tasks: every task by name.
        groups: every group by name, which aggregates over its tasks.
        left_out: the names that were asked for, but run code.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def load_tasks(
    names: Sequence[str],
    include_path: Sequence[Path] = (),
    metadata: Mapping[str, Any] | None = None,
    code: Literal["run", "refuse", "skip"] = "run",
) -> Loaded:
    """Return the tasks and groups of some names.

    Args:
        include_path: folders of task files. They override lm-eval's tasks of the same name.
        metadata: passed to the functions that make a task's data, as by lm-eval's `--metadata`.
        code: what to do with tasks that run code written by the model. "skip" leaves out those that are named, and
            refuses groups that have some.

    Raises:
        UserError: a name is unknown, its data or a package that it needs is missing, or its file or name is wrong.
    """
    manager, wanted, left_out = choose(names, include_path, metadata, code)
    items = [item for name in wanted for item in _load(manager, name)]
    try:
        loaded = manager.load(items)
    except ValueError as error:
        raise UserError(f"--tasks: {error}; name one of the two") from error
    if in_folder := [name for name in loaded["tasks"] if "/" in name]:
        raise UserError(
            f"the task {in_folder[0]!r}: a name with a slash cannot be that of its file of samples; rename it"
        )
    if code != "run":  # also those that say so only in Python
        _refuse_code([name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)])
    return Loaded(loaded["tasks"], loaded["groups"], left_out)


def choose(
    names: Sequence[str],
    include_path: Sequence[Path] = (),
    metadata: Mapping[str, Any] | None = None,
    code: Literal["run", "refuse", "skip"] = "run",
) -> tuple[Any, list[Any], list[str]]:
    """Return lm-eval's index, the names to load from it, and those left out. No task is loaded.

    Args and Raises are those of `load_tasks`; data is not looked for.
    """
    manager = _index(names, include_path, metadata)
    found = _find(manager, names)
    unsafe = {name: sorted(set(_code_tasks(manager.task_index, name))) for name in found}
    left_out = [name for name in found if name in unsafe[name]] if code == "skip" else []
    wanted = [name for name in found if name not in left_out]
    if not wanted:
        raise UserError(f"nothing is left to run without the tasks that run code: {', '.join(left_out)}")
    if code != "run":
        _refuse_code([task for name in wanted for task in unsafe[name]])
    return manager, wanted, left_out


def _refuse_code(names: Sequence[str]) -> None:
    if names:
        raise RunsCode(
            f"{', '.join(names)}: runs code written by the model; add --allow-code-execution if this machine may do "
            "that, or --skip-code-execution to leave out named tasks that do",
            names,
        )


def _index(names: Sequence[str], include_path: Sequence[Path], metadata: Mapping[str, Any] | None) -> Any:
    """Return lm-eval's index of lrnn's and the user's tasks if these have all the names, otherwise of lm-eval's too."""
    from lm_eval.tasks import TaskManager

    def index(**options: Any) -> Any:
        folders = [str(TASK_FOLDER), *map(str, include_path)]
        return TaskManager(include_path=folders, metadata=dict(metadata or {}), **options)

    own = index(include_defaults=False)
    return own if all(_is_complete(own.task_index, name) for name in names) else index()


def _is_complete(entries: Mapping[str, Any], name: Any) -> bool:
    """Return whether an index has a name and all that it refers to. A pattern may match names that the index lacks."""
    if isinstance(name, Mapping):  # a member of a group, with settings of its own
        members = name.get("task", name.get("group"))
        return all(_is_complete(entries, member) for member in (members if isinstance(members, list) else [members]))
    members = _config(entries, name).get("task")
    return members is not None and (not isinstance(members, list) or _is_complete(entries, {"task": members}))


def _config(entries: Mapping[str, Any], name: Any) -> Mapping[str, Any]:
    """Return the file of a task, group or path as a mapping; for a tag, its tasks; empty for an unknown name."""
    if isinstance(name, str) and name.endswith(".yaml"):
        return {"task": [entry for path in _files(name) for entry in _members(_read(path))]}
    entry = entries.get(name)
    if entry is None:
        return {}
    return entry.cfg if entry.cfg is not None else {"task": sorted(entry.tags)}


def _members(config: Mapping[str, Any]) -> list[Any]:
    """Return what the members of a group are; nothing for a task."""
    return config["task"] if isinstance(config.get("task"), list) else []


def _find(manager: Any, names: Sequence[str]) -> list[str]:
    """Return the exact names that some names mean, each once, in their order. Files are added to the index."""
    found: list[str] = []
    for name in names:
        is_file = name.endswith(".yaml")
        matches = [_add(manager, path) for path in _files(name)] if is_file else manager.match_tasks([name])
        if not matches:
            raise UserError(f"unknown task {name!r}; {_hint(name, manager.all_tasks)}")
        found += matches
    return list(dict.fromkeys(found))


def _files(name: str) -> list[str]:
    return sorted(glob.glob(str(Path(name).absolute())))


def _add(manager: Any, path: str) -> str:
    """Add a task file to an index, in place of one of the same name, and return its name."""
    from lm_eval.tasks._index import TaskIndex

    config = _read(path)
    name = config.get("group") or config.get("task")
    if not isinstance(name, str):
        raise UserError(f"the task file {path} names neither a task nor a group")
    manager.task_index.pop(name, None)
    TaskIndex.process_cfg(config, Path(path), manager.task_index)
    return name


def _read(path: str) -> dict[str, Any]:
    """Return a task file as a mapping, without importing the functions that it names."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=False)
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise UserError(f"the task file {path} cannot be read: {' '.join(str(error).split())}") from error


def _hint(name: str, valid: Sequence[str]) -> str:
    if name.endswith(".yaml"):
        return "there is no such file"
    if PATTERN.search(name):
        return "no task matches the pattern"
    near = name_hint(name, valid)
    return (
        near if near.startswith("did") else "`lm_eval ls tasks` lists lm-eval's; --include-path adds a folder of others"
    )


def _code_tasks(entries: Mapping[str, Any], name: Any) -> Iterator[str]:
    """Yield the tasks of a name that run code, as far as their files say so."""
    if isinstance(name, Mapping):
        name = name.get("task", name.get("group"))
    config = {"task": name} if isinstance(name, list) else _config(entries, name)
    for member in _members(config):
        yield from _code_tasks(entries, member)
    if config.get("unsafe_code"):
        yield name


def _load(manager: Any, name: str) -> list[Any]:
    """Return the tasks, or the group, of an exact name. Raise UserError with the reason if they cannot be loaded."""
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # of the task's own code, of any type
        raise UserError(_reason(name, error)) from error
    if not loaded["tasks"]:
        raise UserError(f"the group {name!r} has no tasks")
    groups = loaded["groups"]
    inner = {child for group in groups.values() for child in group.child_names}
    return [group for key, group in groups.items() if key not in inner] or list(loaded["tasks"].values())


def _reason(name: str, error: Exception) -> str:
    """Return one line that says why a task cannot be loaded, and what to do."""
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        package = getattr(error, "name", None)
        what = f"pip install {package.partition('.')[0].replace('_', '-')}" if package else "pip install 'lrnn[eval]'"
        return f"the task {name!r} needs a package that is missing ({text}): {what}"
    if "scripts are no longer supported" in text:
        return f"the task {name!r} reads a data set that needs its own code, which `datasets` no longer runs ({text})"
    on_the_hub = any(words in text for words in ("offline", "Offline", "on the Hugging Face Hub"))  # metrics too
    if isinstance(error, (ConnectionError, DatasetNotFoundError)) or on_the_hub:
        where = "where the hub can be reached, with the same HF_HOME" if config.HF_HUB_OFFLINE else "with a network"
        return f"the data of the task {name!r} is not on this machine ({text}): run `lrnn eval --fetch {name}` {where}"
    if isinstance(error, StopIteration):
        return f"the task {name!r} has no documents"
    if isinstance(error, KeyError):
        return f"the task {name!r} cannot be loaded: its data or its file has no {error}"
    return f"the task {name!r} cannot be loaded: {type(error).__name__}: {text}"
