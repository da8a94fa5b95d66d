"""The manifest of a checkpoint: which files it has, their sizes and digests, so that damage is seen.

Orbax restores a flipped bit without a word and takes a step with truncated files for the latest. The manifest is
written last, in the background, inside the folder that the commit then renames: a committed step has one.
"""

import concurrent.futures
import enum
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator

from etils import epath

FILE_NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20  # fits the processor's cache: the digest reads it from there
# Orbax rewrites these two while it commits, after the manifest; jaxlm never reads them.
_BOOKKEEPING = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt", FILE_NAME})


class _Crc32:
    """CRC-32 as in zip: for damage, not for malice, which could write the manifest anew. Several times as fast."""

    def __init__(self):
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_WRITTEN = "crc32"
# By the names that manifests have; all but `_WRITTEN` are of older checkpoints.
_ALGORITHMS = {"crc32": _Crc32, "blake2b-128": functools.partial(hashlib.blake2b, digest_size=16)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, saved or matched with the model; the message is for the user."""


class Verify(enum.Enum):
    """How much of a checkpoint is checked against its manifest before it is restored.

    SIZES: every file is there and has its length (catches truncation; reads nothing).
    DIGESTS: every byte is what was written (catches all but one damaged file in four billion; reads the checkpoint
      once more).
    """

    SIZES = "sizes"
    DIGESTS = "digests"


def write_manifest(folder: epath.Path) -> None:
    """Writes `manifest.json` for every file below `folder`."""
    names = sorted(name for name in _files(folder) if name not in _BOOKKEEPING)
    with _threads() as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, _WRITTEN), names))
    files = {name: {"size": size, "digest": digest} for name, (size, digest) in zip(names, digests, strict=True)}
    manifest = {"algorithm": _WRITTEN, "files": files}
    # Within a step that is not committed yet, so that a half-written manifest is never seen.
    (folder / FILE_NAME).write_text(json.dumps(manifest, indent=1))


def check_manifest(folder: epath.Path, verify: Verify) -> None:
    """Compares `folder` with its manifest.

    Raises:
      CheckpointError: the manifest is missing or unreadable, or a file is missing, truncated or altered.
    """
    try:
        manifest = json.loads((folder / FILE_NAME).read_text())
        algorithm = manifest["algorithm"]
        expected = {name: (int(entry["size"]), str(entry["digest"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {FILE_NAME}: it was never finished.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / FILE_NAME} is damaged ({error!r}).") from None
    if algorithm not in _ALGORITHMS:
        known = ", ".join(_ALGORITHMS)
        raise CheckpointError(f"{folder / FILE_NAME} uses digests {algorithm!r}, this version knows {known}.")
    if not expected:
        raise CheckpointError(f"{folder / FILE_NAME} is damaged (it lists no files).")
    with _threads() as pool:
        digested = algorithm if verify is Verify.DIGESTS else None
        for problem in pool.map(lambda item: _problem(folder, item[0], *item[1], digested), expected.items()):
            if problem:
                raise CheckpointError(problem)


def _problem(folder: epath.Path, name: str, size: int, digest: str, algorithm: str | None) -> str | None:
    """One sentence on what is wrong with one file, or None; without an algorithm its size is all that is checked."""
    path = folder / name
    if not path.exists():
        return f"{path} is missing."
    found_size = path.stat().length
    if found_size != size:
        return f"{path} has {found_size} bytes instead of {size}."
    if algorithm is not None and _digest(path, algorithm)[1] != digest:
        return f"{path} was altered after it was written (its digest differs)."
    return None


def _digest(path: epath.Path, algorithm: str) -> tuple[int, str]:
    """Size in bytes and digest of one file, read in pieces."""
    digest, size = _ALGORITHMS[algorithm](), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)  # releases the interpreter lock
            size += len(chunk)
    return size, digest.hexdigest()


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Relative names of all files below `folder`."""
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}"


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
