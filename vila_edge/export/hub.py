"""What a repository on the Hugging Face hub holds, and which of it a checkpoint needs."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, ModelCardData, constants, metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from vila_edge.errors import CheckpointError, InputError, UsageError, VilaEdgeError
from vila_edge.export.layouts import PULLED_FROM

UNKNOWN = "unknown"
KINDS = (
    *("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "README.md"),
)
TORCH_KINDS = ("*.bin", "*.pt")
# What a name like vocab.* or LICENSE* must not bring in: programs, and files that some readers run as one.
NEVER = (".bin", ".ckpt", ".dll", ".exe", ".h5", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".py", ".sh", ".so")
# Torch files without weights: what a trainer leaves, and scales that only a tower of 8 bits needs.
NO_WEIGHTS = ("optimizer*", "rng_state*", "scaler*", "scheduler*", "training_args*", "*_states.pt", "*-smooth-scale.pt")
PARTS = ("llm", "vision_tower", "mm_projector")

_REPO = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}(?<![.-])/\w[\w.-]{0,95}(?<![.-])", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*", re.ASCII)
_TIMEOUT = 30.0  # seconds for an answer about a repository; the default is for ever

TransportError: type[Exception] = HfHubHTTPError.__bases__[0]  # the HTTPError of httpx or, from 2.0 on, of httpx2


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest`: sha256, or git's sha1 of a small file, or "" if the hub does not say."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """What a pull fetches."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    license: str  # an identifier such as cc-by-nc-4.0, or UNKNOWN
    license_link: str
    cached: Path | None  # the snapshot to copy from, where the hub cannot be reached

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def parse_id(text: str) -> tuple[str, str | None]:
    """Repository and revision of ORG/NAME[@REV]. Raises UsageError."""
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or repo.endswith(".git"):
        raise UsageError(
            f"{plain(text)!r} is not a repository on the hub, expected ORG/NAME or ORG/NAME@REVISION",
            "for example Efficient-Large-Model/VILA1.5-3b; neither an address nor a path",
        )
    if at and not _REVISION.fullmatch(revision):
        raise UsageError(f"{plain(revision)!r} after @ is not a revision, expected a branch, a tag or a commit")
    return repo, revision or None


def make_plan(repo: str, revision: str | None, torch_files: bool = False) -> Plan:
    """Ask the hub what a repository holds, or its cache if the hub cannot be reached, and choose from that.

    Raises UsageError, InputError, CheckpointError or VilaEdgeError.
    """
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise UsageError(f"HF_ENDPOINT is {plain(constants.ENDPOINT)!r}, expected an address like https://host")
    cached = None
    with hub_errors(repo, revision):
        try:
            files, commit, card = _ask(repo, revision)
        except (OfflineModeIsEnabled, TransportError) as error:
            cached = None if isinstance(error, HfHubHTTPError) else _find_cached(repo, revision, torch_files)
            if cached is None:
                raise
            files, commit, card = _look(cached)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise InputError(f"{page(repo)}: its commit is {plain(commit)!r}, expected 40 hexadecimal digits")
    license, name, link = (_words(card.get(key)) for key in ("license", "license_name", "license_link"))
    license = name if license == "other" and name else license or UNKNOWN
    return Plan(repo, commit, choose(repo, files, torch_files), license, link, cached)


def choose(repo: str, files: list[RemoteFile], torch_files: bool) -> tuple[RemoteFile, ...]:
    """Weights, configs, tokenizer, licence. Raises CheckpointError, or InputError for a name that leads elsewhere."""
    paths = {_checked(repo, file.path): file for file in files}
    if PurePosixPath("config.json") not in paths:
        raise CheckpointError(f"{repo}: no config.json at its root, so it is not a checkpoint")
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    torch = {path for path in paths if _is_torch_weights(path)}
    torch -= {path for path in torch if path.match("pytorch_model*") and path.parent in safe}  # the same weights again
    root = PurePosixPath()
    parts = [PurePosixPath(part) for part in PARTS] if any(path.parts[0] == "llm" for path in paths) else [root]
    whole = root in safe and safe.isdisjoint(parts)  # three folders, and the weights of all in one file
    bare = [] if whole else [part for part in parts if part not in safe]
    # Some 4-bit releases have the weights of the llm at the root.
    only = sorted(str(path) for path in torch if path.parent in {*bare, *([root] if parts[0] in bare else [])})
    if only and not torch_files:
        raise CheckpointError(
            f"{repo}: the weights of {' and '.join(part.name or 'the model' for part in bare)} are not there as "
            f"*.safetensors, only as {', '.join(only[:3])}{', ...' if len(only) > 3 else ''}",
            "--torch-files fetches such files too; they are read without being unpickled",
        )
    if parts[0] in bare and not only:
        raise CheckpointError(f"{repo}: no weights: found neither *.safetensors nor *.bin nor *.pt")
    wanted = {path for path in paths if _is_wanted(path)} | (torch if torch_files else set())
    return tuple(paths[path] for path in sorted(wanted))


def page(repo: str) -> str:
    """Address of a repository, without what HF_ENDPOINT may say of a user."""
    endpoint = urlsplit(constants.ENDPOINT)
    return f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}/{repo}"


def plain(text: object) -> str:
    """What a stranger wrote, fit for a line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split())[:200])


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Failures of the hub, the network and the disk become errors that a user can act on."""
    try:
        yield
    except (TransportError, OSError, RuntimeError, ValueError) as error:
        # Beside a file that cannot be had, huggingface_hub hides why.
        missing = isinstance(error, LocalEntryNotFoundError)
        raise _explain(error.__cause__ if missing and error.__cause__ else error, repo, revision) from error


def _explain(error: BaseException, repo: str, revision: str | None) -> VilaEdgeError:
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{repo} is gated: its owner wants an agreement first", f"agree at {page(repo)}, then {log_in}"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{repo} has no branch, tag or commit {revision or constants.DEFAULT_REVISION!r}", f"see {page(repo)}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{page(repo)}: no such model repository, or it is private",
            f"check the name; if it is private, {log_in}",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return VilaEdgeError(f"HF_HUB_OFFLINE is set, and {repo} is not in the cache", "unset HF_HUB_OFFLINE")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "check HF_TOKEN, or log in again with `hf auth login`" if status in (401, 403) else "try again later"
        return VilaEdgeError(f"{page(repo)}: the hub answered {status} {error.response.reason_phrase}", hint)
    if isinstance(error, TransportError):
        return VilaEdgeError(
            f"{page(repo)} cannot be reached: {plain(error) or type(error).__name__}",
            "check the network and HF_ENDPOINT, then run the same command again",
        )
    if isinstance(error, OSError) and error.errno:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space" if full else "check the disk and the rights of the folder"
        return VilaEdgeError(
            f"cannot write {error.filename or 'the files'}: {error.strerror}",
            f"{hint}, then run the same command again",
        )
    return VilaEdgeError(f"{repo}: the download failed: {plain(error)}", "run the same command again")


_Answer = tuple[list[RemoteFile], str, dict[str, Any]]


def _ask(repo: str, revision: str | None) -> _Answer:
    """All files, the commit, and the metadata of the model card."""
    api = HfApi(library_name="vila-edge")
    try:
        info = api.model_info(repo, revision=revision, timeout=_TIMEOUT, files_metadata=True)
        files = [_remote(file) for file in info.siblings or ()]
        card = vars(info.card_data) if isinstance(info.card_data, ModelCardData) else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, HfHubHTTPError):  # status 400 is a ValueError too
            raise
        raise InputError(f"{page(repo)}: not the answer of a Hugging Face hub", "check HF_ENDPOINT") from error
    if info.gated:  # the list of files is public, the files are not
        api.auth_check(repo)
    return files, info.sha or "", card


def _remote(file: RepoSibling) -> RemoteFile:
    if file.lfs:  # its blob is a note that names the file by sha256
        return RemoteFile(file.rfilename, file.lfs.size, _digest(file.lfs.sha256))
    if file.size is None:
        raise ValueError(f"no size of {file.rfilename}")
    return RemoteFile(file.rfilename, file.size, _digest(file.blob_id))


def _find_cached(repo: str, revision: str | None, torch_files: bool) -> Path | None:
    """A snapshot in the cache that has all of what is wanted, as far as the cache can tell."""
    kinds = [*KINDS, *(f"*/{kind}" for kind in KINDS), *(TORCH_KINDS if torch_files else ())]
    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=kinds))
    return None


def _look(snapshot: Path) -> _Answer:
    """The same as `_ask`, from a snapshot in the cache: links to files that are named by their digests."""
    files = []
    for path in snapshot.rglob("*"):
        if path.is_file():
            digest = _digest(path.resolve().name)
            files.append(RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, digest))
    card = None
    with contextlib.suppress(Exception):  # a model card is written by hand; without one the licence is unknown
        card = metadata_load(snapshot / "README.md")
    return files, snapshot.name, card or {}


def _digest(text: str | None) -> str:
    return text if text and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) else ""


def _words(value: object) -> str:
    """A value of a model card, which may be a list."""
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value or "")


def _checked(repo: str, name: str) -> PurePosixPath:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in parts[0] or not {"", ".", ".."}.isdisjoint(parts):
        raise InputError(
            f"{repo} lists a file named {plain(name)!r}, which may lead out of its folder; nothing was fetched",
            "do not use this repository, and report it to the hub",
        )
    return PurePosixPath(name)


def _is_wanted(path: PurePosixPath) -> bool:
    kind = any(fnmatchcase(path.name, kind) for kind in KINDS) and path.suffix.lower() not in NEVER
    return kind and not _is_hidden(path) and str(path) != PULLED_FROM


def _is_torch_weights(path: PurePosixPath) -> bool:
    kind = any(fnmatchcase(path.name, kind) for kind in TORCH_KINDS)
    return kind and not _is_hidden(path) and not any(fnmatchcase(path.name, kind) for kind in NO_WEIGHTS)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)
