"""The Hugging Face Hub: files into a model repository in one commit, and out of it again.

Knows repositories, revisions and errors of the Hub; which files make a bundle it is told (`bundle.FILES`).

Decisions:
- A push is one commit on top of the one it looked at, so a reader sees the old bundle or the new one, and two pushes
  at once cannot mix. Files on the Hub that are already as they should be are not sent, files of the old bundle that the
  new one lacks are deleted in the same commit, and files that are none of a bundle's are left alone.
- New repositories are private. An existing one keeps its visibility, and into a public one nothing is pushed unless the
  caller says that this is meant.
- The token is the library's business (`HF_TOKEN` or `hf auth login`): it is never read into a message, a file or a log.
  Addresses in messages lose their query, which can hold a signature.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from llm_itemtok.errors import ArtifactError, HubError

MAIN = "main"
_NAME = r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
"""A name as the Hub gives them out, of an owner or of a repository."""

_AGAIN = "the repository shows what it did before; give the same command again"
_REASONS = {
    401: "the Hub does not take the token; make a new one with write access (`hf auth login`)",
    403: "the token may not write there; use one with write access to it, or another OWNER",
    409: f"the repository changed meanwhile; {_AGAIN}",
    412: f"the repository changed meanwhile; {_AGAIN}",
    429: f"the Hub asks for patience; {_AGAIN} later",
}


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo: `OWNER/NAME`.
        revision: the branch.
        commit: hash of its last commit, the new one unless nothing had to change.
        url: of the repository at that commit.
        private: whether only its owner sees it.
        uploaded: files that were new or different.
        unchanged: files that stood there already.
        deleted: files of the bundle before that this one does not have.
    """

    repo: str
    revision: str
    commit: str
    url: str
    private: bool
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]


def is_id(name: str) -> bool:
    """Whether a name can be that of a model on the Hub, `NAME` or `OWNER/NAME`, and is no place on this machine."""
    return re.fullmatch(f"(?:{_NAME}/)?{_NAME}", name) is not None and not Path(name).exists()


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a model of the Hub has in this machine's cache, from where it was loaded; None for a folder."""
    if not is_id(name):
        return None
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def push(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    ours: Sequence[str],
    revision: str | None = None,
    private: bool = True,
    message: str,
) -> Pushed:
    """Make the files of a repository these, in one commit.

    Args:
        repo: `OWNER/NAME` of a model repository; made when missing.
        files: name in the repository → file here, or content.
        ours: patterns of the names that a push may write or delete; all of `files` match one.
        revision: branch; made from the main one when missing. The main one when None.
        private: how a new repository is made; an existing one that is not must be known not to be.
        message: of the commit.

    Raises:
        HubError: if it cannot be done; the repository then shows what it did before.
    """
    assert all(_matches(name, ours) for name in files), "only files of a bundle are pushed"
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo):
        raise HubError(
            f"a Hub repository must be given as OWNER/NAME, each of letters and digits with single `.` or `-`, or `_`, "
            f"between, was: {repo!r}"
        )
    if is_offline_mode():
        raise HubError(f"{repo}: pushing needs the Hub, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it")
    if get_token() is None:
        raise HubError(
            f"{repo}: pushing needs a token with write access, found: none; `hf auth login`, or set HF_TOKEN"
        )
    branch = revision or MAIN
    api = HfApi(library_name="llm-itemtok")
    with _told(repo):
        private = _make_ready(api, repo, private)
        head, there = _look(api, repo, branch)
        additions, unchanged = _sort_out(files, there)
        deleted = sorted(name for name in there if name not in files and _matches(name, ours))
        if additions or deleted:
            head = api.create_commit(
                repo,
                [*additions, *map(CommitOperationDelete, deleted)],
                commit_message=message,
                revision=branch,
                parent_commit=head,
            ).oid
    return Pushed(
        repo=repo,
        revision=branch,
        commit=head,
        url=f"{api.endpoint}/{repo}/tree/{head}",
        private=private,
        uploaded=tuple(addition.path_in_repo for addition in additions),
        unchanged=tuple(unchanged),
        deleted=tuple(deleted),
    )


def _make_ready(api: HfApi, repo: str, private: bool) -> bool:
    """Make the repository if there is none; returns whether it is private."""
    try:
        found = bool(api.repo_info(repo).private)
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if api.repo_exists(repo, repo_type=kind):
                raise HubError(
                    f"{repo}: a model must go into a model repository, but a {kind} has this name; choose another NAME"
                ) from None
        api.create_repo(repo, private=private)
        return private
    if private and not found:
        raise HubError(
            f"{repo}: this repository is public, and everybody would see the model and the catalogue's titles; say "
            "`--public` (`private=False`) if that is meant, or choose another NAME"
        )
    return found


def _look(api: HfApi, repo: str, branch: str) -> tuple[str, dict[str, RepoFile]]:
    """Last commit of a branch, which is made when missing, and its files."""
    try:
        head = api.repo_info(repo, revision=branch).sha
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch)
        head = api.repo_info(repo, revision=branch).sha
    assert head is not None
    entries = api.list_repo_tree(repo, recursive=True, revision=head)
    return head, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _sort_out(
    files: Mapping[str, Path | bytes], there: Mapping[str, RepoFile]
) -> tuple[list[CommitOperationAdd], list[str]]:
    """Files to send, and names of those that are there already."""
    additions, unchanged = [], []
    for name, file in sorted(files.items()):
        addition = CommitOperationAdd(name, file)
        if name in there and _same(addition, there[name]):
            unchanged.append(name)
        else:
            additions.append(addition)
    return additions, unchanged


def _same(addition: CommitOperationAdd, there: RepoFile) -> bool:
    """Whether a file is on the Hub as it is here, by the hash that the Hub has of it: SHA-256, or git's for small."""
    if there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == addition.upload_info.sha256.hex())
    with addition.as_file() as file:
        content = file.read()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


def pull(repo: str, *, ours: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of a repository that match patterns, or find them in the library's cache.

    Args:
        repo: `OWNER/NAME` of a model repository.
        ours: patterns of the names wanted.
        revision: branch, tag or commit; the main branch when None.

    Returns:
        The folder they are in, one for each commit.

    Raises:
        ArtifactError: if there is no such repository or revision, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ours)))
    except RevisionNotFoundError as error:
        raise ArtifactError(f"{repo}: the repository has no branch, tag or commit {revision!r}") from error
    except HFValidationError as error:
        raise ArtifactError(f"{repo}: neither a folder here nor a Hub repository (OWNER/NAME)") from error
    except RepositoryNotFoundError as error:
        raise ArtifactError(
            f"{repo}: neither a folder here nor a Hub repository that this token may read; if it is private, log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else _first_line(error)
        raise ArtifactError(
            f"{repo}: neither a folder here nor a Hub repository that can be reached, and not in the cache\n  {offline}"
        ) from error


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what can go wrong between here and the Hub into one message with what to do."""
    try:
        yield
    except HubError:
        raise
    except (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError) as error:
        raise HubError(f"{repo}: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo}: {_reason(error)}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise HubError(f"{repo}: the connection to the Hub broke ({_first_line(error)}); {_AGAIN}") from error
    except RuntimeError as error:
        # So the library reports a large file that could not be sent; the cause says why.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        why = _reason(cause) if isinstance(cause, HfHubHTTPError) else f"{_first_line(cause)}; {_AGAIN}"
        raise HubError(f"{repo}: a file could not be sent: {why}") from error
    except ValueError as error:
        # The Hub reads the card before anything is sent, and knows which licences there are.
        raise HubError(f"{repo}: {' '.join(str(error).split())}; change README.md or `--license`") from error


def _reason(error: HfHubHTTPError) -> str:
    """What a refusal means and what to do about it."""
    status = error.response.status_code
    said = f" (the Hub says {status}: {_tidy(error.server_message or _first_line(error))})"
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        return f"there is no such repository for this token{said}; check OWNER/NAME and what the token may see"
    return _REASONS.get(status, f"the Hub failed; {_AGAIN}" if status >= 500 else "the Hub refused") + said


def _first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _tidy(lines[0]) if lines else type(error).__name__


def _tidy(text: str) -> str:
    """Take the query out of addresses: it can hold a signature."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)[:300]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
