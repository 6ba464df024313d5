"""Archives of others, unpacked safely: files and folders only, below one folder, whole or not at all.

Content is all that is taken over; modes, owners and times of the members are not.
"""

import errno
import filecmp
import gzip
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple, Self, cast

from .errors import CorruptFile
from .home import TEMPORARY, check_space, disk_errors, lock
from .pools import Report

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_BLOCK = 2**20
_SECTOR = 2**12
"""What a small file takes on most disks."""
_LONGEST = 255
"""Bytes of a file name that most file systems take."""
_GZIP = b"\x1f\x8b"
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    ValueError,
    NotImplementedError,
)
"""What the standard library raises for archives that are damaged or packed in a way it does not know."""
_KINDS = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
}


class _Member(NamedTuple):
    """A file of `size` bytes at a relative path, and how to read it; a folder is not read."""

    path: Path
    size: int
    read: Callable[[], AbstractContextManager[IO[bytes]]] | None


class _Refused(Exception):
    """A member that is not unpacked, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"its member {name!r} {why}")


def is_archive(name: str) -> bool:
    """Whether `unpack` takes a file of this name."""
    return name.lower().endswith(SUFFIXES)


def unpack(archive: Path, into: Path, report: Report) -> list[Path]:
    """Unpack a .tar, .tar.gz, .tgz or .zip into a folder; returns its top-level files and folders there.

    What lies in the folder already stays: it may hold the very files of the archive, and others. Raises `CorruptFile`
    for a broken archive, for a member that is a link, a device, encrypted or named out of the folder, and for a file of
    another content that stands in the way; `DiskError` for too small a disk. Then nothing of the archive appears.
    """
    work = into / f"{TEMPORARY}{archive.name}"
    with lock(work), _readable(archive), _members(archive) as members:
        total = sum(member.size for member in members)
        sectors = sum(-(-member.size // _SECTOR) * _SECTOR for member in members)
        check_space(into, sectors, f"{archive} unpacked")
        with disk_errors(into):
            made = not into.exists()
            try:
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                work.mkdir(parents=True)
                _extract(members, work, lambda done: report(f"unpacking {archive.name}", done, total))
                for path in _differing(work, into):
                    raise CorruptFile(f"{path}: is not that of {archive}, which cannot be unpacked. Move it away.")
                names = sorted(path.name for path in work.iterdir())
                _merge(work, into)
            finally:
                shutil.rmtree(work, ignore_errors=True)
                if made:
                    with suppress(OSError):  # only an empty folder can be removed so
                        into.rmdir()
    return [into / name for name in names]


# --------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Turn what is wrong with an archive into a `CorruptFile` that names it."""
    try:
        yield
    except _Refused as error:
        raise CorruptFile(f"{archive}: {error}. Nothing was unpacked; use the official archive.") from error
    except _BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise CorruptFile(f"{archive}: broken or truncated ({why}). Delete it and fetch it again.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        why = "it points to places before its start"  # where zipfile seeks without a look
        raise CorruptFile(f"{archive}: broken or truncated ({why}). Delete it and fetch it again.") from error


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    """All members of an archive that stays open, after the last of them was seen; the name tells the format."""
    if not is_archive(archive.name):
        raise CorruptFile(f"{archive}: is none of {', '.join(SUFFIXES)}")
    try:
        raw = archive.open("rb")
    except OSError as error:
        raise CorruptFile(f"{archive}: cannot be read: {error.strerror or error}") from error
    with raw:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(raw) as packed:
                yield _checked([_zip_member(packed, info) for info in packed.infolist()])
            return
        zipped = raw.read(len(_GZIP)) == _GZIP  # its bytes decide: browsers unpack a .gz and keep its name
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if zipped else raw as content:
            file = cast(IO[bytes], content)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                members = [_tar_member(tar, info) for info in tar]
                while file.read(_BLOCK):  # the checksum of a gzip is at its end
                    pass
                yield _checked(members)


class _Header(tarfile.TarInfo):
    """`tarfile` takes a header that is broken or missing for the end, and drops what follows; this one raises."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Read the next header; raises `ReadError` unless it is one, or the zeros that end an archive."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the type stubs lack it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    if info.size < 0:  # would send the listing back to where it was, for ever
        raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes")
    if info.isdir():
        return _Member(_relative(info.name), 0, None)
    if not info.isreg():
        raise _Refused(info.name, _KINDS.get(info.type, "is neither a file nor a folder"))
    return _Member(_relative(info.name), info.size, lambda: cast(IO[bytes], tar.extractfile(info)))


def _zip_member(packed: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    if not info.filename:
        raise _Refused(info.filename, "has no name")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        why = "is a symbolic link" if kind == stat.S_IFLNK else "is neither a file nor a folder"
        raise _Refused(info.filename, why)
    if info.flag_bits & 1:
        raise _Refused(info.filename, "is encrypted")
    if info.is_dir():
        return _Member(_relative(info.filename), 0, None)
    return _Member(_relative(info.filename), info.file_size, lambda: packed.open(info))


def _relative(name: str) -> Path:
    """A member's name as a path; raises `_Refused` for one that leads out of the folder on any system."""
    path = PureWindowsPath(name)  # takes slashes and backslashes, and knows drives
    if path.anchor:
        raise _Refused(name, "has an absolute name")
    if ".." in path.parts:
        raise _Refused(name, "has a name that leads out of the folder")
    if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):
        raise _Refused(name, "has too long a name")
    return Path(*path.parts)


def _checked(members: list[_Member]) -> list[_Member]:
    """The members, where they can all stand beside each other."""
    files = {member.path for member in members if member.read}
    if not files:
        raise tarfile.ReadError("it holds no files")
    folders = {parent for member in members for parent in member.path.parents}
    folders |= {member.path for member in members if not member.read}
    for path in files & folders:
        raise _Refused(str(path), "is both a file and a folder")
    return members


# --------------------------------------------------------------------------------------------------------- writing


def _extract(members: list[_Member], folder: Path, report: Callable[[int], None]) -> None:
    """Write all members; `report` is told the bytes written so far."""
    done = 0
    for path, _, read in members:
        target = folder / path
        if read is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with read() as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                file.write(block)
                done += len(block)
                report(done)


def _differing(fresh: Path, present: Path) -> Iterator[Path]:
    """What stands where a fresh file or folder has to go, and is not the same."""
    if not os.path.lexists(present):
        return
    if fresh.is_dir() and present.is_dir():
        for child in sorted(fresh.iterdir()):
            yield from _differing(child, present / child.name)
    elif not (fresh.is_file() and present.is_file() and filecmp.cmp(fresh, present, shallow=False)):
        yield present


def _merge(fresh: Path, present: Path) -> None:
    """Move a tree to where it is not yet, as few whole folders as can be; what is there stays."""
    if not os.path.lexists(present):
        shutil.move(fresh, present)  # a rename, but where a folder is a link to another disk
    elif fresh.is_dir():
        for child in sorted(fresh.iterdir()):
            _merge(child, present / child.name)
