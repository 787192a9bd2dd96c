"""Files by address: a local path, or whatever fsspec opens (`s3://`, `gs://`, `https://`, `memory://`).

A read names its range, so that a member of a tar is one read and nothing is unpacked. Any failure is one line.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from abd_core.config import ConfigError
from abd_core.paths import RunError

MOST_FILES = 100_000  # that one address may stand for; LAION-2B has 231,349 shards in 18 parts
MOST_BRACES = 8  # in one address
_RANGE = re.compile(r"\{([^{}]*)\}")
_T = TypeVar("_T")


def expand(address: str) -> list[str]:
    """The addresses that one with braces stands for: `{00000..00331}` keeps the zeros, `{train,val}` is a list.

    Raises:
        ConfigError: braces that are neither, more than `MOST_BRACES`, or more than `MOST_FILES` addresses.
    """
    if address.count("{") > MOST_BRACES:
        raise ConfigError(f"address {address!r}: at most {MOST_BRACES} ranges and lists expected")
    match = _RANGE.search(address)
    if match is None:
        if "{" in address or "}" in address:
            raise ConfigError(f"address {address!r}: a range such as {{00000..00331}} or a list {{a,b}} expected")
        return [address]
    inner = match[1]
    if span := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inner):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= MOST_FILES:
            raise ConfigError(f"address {address!r}: {first} to {last} is no range of 1 to {MOST_FILES} files")
        parts = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    elif "," in inner:
        parts = inner.split(",")
    else:
        raise ConfigError(f"address {address!r}: a range such as {{00000..00331}} or a list {{a,b}} expected")
    ends = expand(address[match.end() :])
    if len(parts) * len(ends) > MOST_FILES:
        raise ConfigError(f"address {address!r}: {len(parts) * len(ends)} files, at most {MOST_FILES} expected")
    return [f"{address[: match.start()]}{part}{end}" for part in parts for end in ends]


def protocol(address: str) -> str:
    """What stands before "://"; "" for a local path. A chain such as `simplecache::s3://...` counts as its whole."""
    return address.rpartition("://")[0].removeprefix("file")


def beside(table: str, entry: str) -> str:
    """The address of what a table names: an address of the same kind, an absolute path, or one relative to the table.

    Raises:
        RunError: the table sends the reader somewhere else: from a remote file to this machine's, to another host's
            protocol, or through a chain that is not its own.
    """
    kind = protocol(table)
    if "://" in entry or "::" in entry:
        if protocol(entry) != kind or entry.count("::") != kind.count("::"):
            raise RunError(f"{table}: it names {entry!r}, which is of another kind than its own address")
        return entry
    if not kind:
        return os.path.join(os.path.dirname(table), entry)
    if posixpath.isabs(entry):
        raise RunError(f"{table}: it names {entry!r}, but only paths relative to a remote table are read")
    return posixpath.join(posixpath.dirname(table), entry)


def _told(address: str, call: Callable[[], _T]) -> _T:
    """The call's result; what goes wrong becomes a RunError of one line."""
    try:
        return call()
    except FileNotFoundError:
        raise RunError(f"missing file: {address}") from None
    except IsADirectoryError:
        raise RunError(f"{address} is a folder: a file expected") from None
    except RunError:
        raise
    except Exception as error:  # of as many kinds as there are file systems: no access, no network, no such protocol
        text = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"cannot be read: {address}: {text}") from None


@functools.lru_cache(maxsize=64)
def _local(path: str, state: tuple[int, int, int], process: int) -> IO[bytes]:
    """An open local file; a forked process opens its own, and a file that was replaced is opened again."""
    return open(path, "rb", buffering=0)


def _filesystem(address: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(address)


def _local_path(address: str) -> str | None:
    """The path of a local address, None for a remote one."""
    if "::" in address:
        return None
    kind, path = protocol(address), address.removeprefix("file://")
    return None if kind else os.path.expanduser(path)


def is_local(address: str) -> bool:
    """Whether it is a file of this machine."""
    return _local_path(address) is not None


def absolute(address: str) -> str:
    """The address as it reads from any working folder."""
    path = _local_path(address)
    return address if path is None else os.path.join(os.getcwd(), path)


def _ordinary(path: str) -> None:
    """Raises RunError for a device or a pipe, which may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise RunError(f"{path}: a device or a pipe: a regular file expected")


def read(address: str, *, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes from `offset` on, or all that follow. Raises RunError where the file is missing or shorter."""

    def call() -> bytes:
        path = _local_path(address)
        if path is None:
            filesystem, remote = _filesystem(address)
            return filesystem.cat_file(remote, start=offset, end=None if size < 0 else offset + size)
        if size < 0:
            _ordinary(path)
            with open(path, "rb") as f:
                f.seek(offset)
                return f.read()
        state = os.stat(path)
        held = _local(path, (state.st_dev, state.st_ino, state.st_mtime_ns), os.getpid())
        return os.pread(held.fileno(), size, offset)

    data = _told(address, call)
    if 0 <= size != len(data):
        raise RunError(f"damaged file: {address}: it ends before byte {offset + size}")
    return data


def opened(address: str) -> IO[bytes]:
    """The file, open for reading and seeking. Raises RunError."""

    def call() -> IO[bytes]:
        path = _local_path(address)
        if path is not None:
            _ordinary(path)
            return open(path, "rb")
        filesystem, remote = _filesystem(address)
        return filesystem.open(remote, "rb")

    return _told(address, call)


def stamp(address: str) -> tuple[int, str]:
    """Size in bytes, and what tells a changed file from the one before; "" where the file system has nothing for it."""

    def call() -> tuple[int, str]:
        path = _local_path(address)
        if path is not None:
            if os.path.isdir(path):
                raise IsADirectoryError
            _ordinary(path)
            state = os.stat(path)
            return state.st_size, str(state.st_mtime_ns)
        filesystem, remote = _filesystem(address)
        record = filesystem.info(remote)
        if record["type"] == "directory":
            raise IsADirectoryError
        known = [record.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created")]
        return int(record.get("size") or 0), next((str(value) for value in known if value), "")

    return _told(address, call)


def listing(address: str) -> list[tuple[str, int]]:
    """All files below a folder: path relative to it and size in bytes, sorted. Links of a local one are followed.

    Raises:
        RunError: it is no folder.
    """

    def call() -> list[tuple[str, int]]:
        path = _local_path(address)
        if path is not None:
            if not os.path.isdir(path):
                raise FileNotFoundError
            found = (Path(folder) / name for folder, names in _walk(path) for name in names)
            return [(str(file.relative_to(path)), file.stat().st_size) for file in found if file.is_file()]
        filesystem, remote = _filesystem(address)
        if not filesystem.isdir(remote):
            raise FileNotFoundError
        below = filesystem.find(remote, detail=True)
        top = remote.rstrip("/") + "/"
        return [(name.removeprefix(top), int(record.get("size") or 0)) for name, record in below.items()]

    return sorted(_told(address, call))


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder below a local one and what is in it, through links too, but for those that lead in a circle."""
    above = {top: {os.path.realpath(top)}}  # the real paths of a folder and of those that led to it
    for folder, folders, names in os.walk(top, followlinks=True):
        chain = above.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in chain]
        above |= {os.path.join(folder, name): chain | {real[name]} for name in folders}
        yield folder, names


def within(folder: str, path: str) -> str:
    """The address of a path that `listing` gave for the folder."""
    return folder.rstrip("/") + "/" + path


def is_folder(address: str) -> bool:
    """Whether a folder is there. Raises RunError where its file system cannot be asked."""

    def call() -> bool:
        path = _local_path(address)
        if path is not None:
            return os.path.isdir(path)
        filesystem, remote = _filesystem(address)
        return bool(filesystem.isdir(remote))

    return _told(address, call)
