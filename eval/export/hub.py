"""Push an exported folder to the Hugging Face hub: a branch for each checkpoint, and the newest of them on `main`."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.utils import validate_repo_id

from lrnn.errors import UserError

KEPT = {".gitattributes"}  # the hub writes it when it makes a repository
STEP = re.compile(r"step-(\d{8,})")
# Samples hold the documents of benchmarks, which should not become training data of others.
RESULTS = {"results.json", "table.md"}
PICTURES = {".csv", ".png"}
TOKENS = "https://huggingface.co/settings/tokens"


class Repository:
    """A model repository of the hub that the user may write to.

    Args:
        name: `NAME`, or `USER/NAME` or `ORGANIZATION/NAME`.
        public: whether everybody may read it. It is private otherwise, and one that exists is not changed.

    Raises:
        UserError: the name is not one, there is no token or it may not write, the repository belongs to somebody else
            or is not as private as asked for, or the hub cannot be reached.
    """

    def __init__(self, name: str, public: bool = False):
        try:
            validate_repo_id(name)
        except errors.HFValidationError as error:
            raise UserError(f"--push-to-hub {name} is not a name of the hub: {error}") from None
        self._api, self._public = HfApi(), public
        with _explained(name):
            owner, may_write = self._user()
        self.name = name if "/" in name else f"{owner}/{name}"
        if self.name.split("/")[0] not in may_write:
            raise UserError(
                f"--push-to-hub {self.name}: the token is that of {owner}, who may write to {', '.join(may_write)}; "
                "choose one of these, or log in as the owner with `hf auth login`"
            )
        with _explained(self.name):
            self._check_visibility()

    def push(self, folder: Path) -> str:
        """Upload a folder, and return its address. The same call again continues one that failed.

        A checkpoint of step N becomes the branch `step-N`, and `main` too unless there is a branch of a later step. A
        model without a step becomes `main`. A branch that exists gets a commit that makes it equal to the folder; one
        that is equal already gets none.
        """
        step = step_of(folder)
        with _explained(self.name):
            self._api.create_repo(self.name, private=not self._public, exist_ok=True)
            found = [branch.name for branch in self._api.list_repo_refs(self.name).branches]
            newest = max((int(match[1]) for name in found if (match := STEP.fullmatch(name))), default=0)
            revisions = [] if step is None else [f"step-{step:08d}"]
            if step is None or step >= newest:
                revisions.append(constants.DEFAULT_REVISION)
            for revision in revisions:
                if revision not in found:
                    self._api.create_branch(self.name, branch=revision, exist_ok=True)
                self._commit(folder, revision)
        print(f"pushed {folder} to {self.name} ({self._api.endpoint}): {' and '.join(revisions)}", flush=True)
        return f"{self._api.endpoint}/{self.name}/tree/{revisions[0]}"

    def _user(self) -> tuple[str, list[str]]:
        """Return the name of the token's user, and the owners of repositories that it may write to."""
        user = self._api.whoami()
        token = user.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise UserError(f"the hub's token of {user['name']} may only read; make one that may write at {TOKENS}")
        writers = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
        return user["name"], [user["name"], *writers]

    def _check_visibility(self) -> None:
        try:
            private = self._api.model_info(self.name).private
        except errors.RepositoryNotFoundError:
            return
        if private == self._public:
            found, remedy = ("private", "leave --public out") if private else ("public", "add --public")
            raise UserError(
                f"--push-to-hub {self.name} exists and is {found}: {remedy}, choose another name, or change it in the "
                "repository's settings on the hub"
            )

    def _commit(self, folder: Path, revision: str) -> None:
        files = {path.as_posix(): folder / path for path in _shown(folder)}
        add = [CommitOperationAdd(path, _content(path, file, self.name)) for path, file in files.items()]
        there = set(self._api.list_repo_files(self.name, revision=revision))
        remove = [CommitOperationDelete(path) for path in sorted(there - files.keys() - KEPT)]
        message = f"Upload {revision} with lrnn export"
        self._api.create_commit(self.name, [*add, *remove], commit_message=message, revision=revision)


def step_of(folder: Path) -> int | None:
    """Return the step of the checkpoint that a folder was exported from, None if its config.json names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step = (config.get("lrnn_training") or {}).get("step")
    return None if step is None else int(step)


def card_of(text: str, name: str) -> str:
    """Return a model card whose commands load the model from the hub, by `name`, instead of from a folder."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if title is None:
        return text
    folder = re.escape(title[1])
    text = text.replace(title[0], f"# {name.split('/')[1]}", 1)
    return re.sub(rf'(from_pretrained\("|pretrained=|vllm serve ){folder}(?=[", ])', rf"\g<1>{name}", text)


def _content(path: str, file: Path, name: str) -> Path | bytes:
    return card_of(file.read_text(encoding="utf-8"), name).encode() if path == "README.md" else file


def _shown(folder: Path) -> Iterator[Path]:
    """Yield the files of an exported folder that are uploaded. Of results, these are tables, figures and pictures."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in path.parts)
        result = path.parts[0] == "eval" and file.name not in RESULTS and file.suffix not in PICTURES
        if file.is_file() and not hidden and not result:
            yield path


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise UserError for whatever the hub refuses within the `with` block."""
    hub = f"the hub ({constants.ENDPOINT})"
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise UserError(f"--push-to-hub {name} needs a token of {hub}: `hf auth login`, or set HF_TOKEN") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set, unset it to reach {hub}") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"--push-to-hub {name}: {_refusal(hub, error)}") from None
    except (errors.HTTPError, OSError) as error:  # no connection, a time-out
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--push-to-hub {name}: {hub} cannot be reached ({reason}); the same command again continues"
        ) from None


def _refusal(hub: str, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        place = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"{hub} refuses the token of {place}; make one that may write at {TOKENS}"
    said = " ".join((error.server_message or str(error)).split())
    if status == 403:
        return f"{hub} does not let this token write there ({said}); see {TOKENS}"
    return f"{hub} answered with status {status} ({said}); the same command again continues"
