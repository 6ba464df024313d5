"""Files of datasets, fetched over https: resumed where they stopped, checked, and never seen half-written.

FILE arrives as FILE.part; what the server said of its version stands in FILE.part.version.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, cast
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from .archives import is_archive, unpack
from .errors import MissingData
from .home import check_space, data_home, disk_errors, lock, write_bytes
from .pools import Report
from .spec import Card, Source

PATIENCE = 30.0
"""Seconds that a silent server is waited for."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before each further attempt after a timeout or a broken connection; counted anew after progress."""

_BLOCK = 2**18
_LATER = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be another one a moment later."""
_INSECURE = "is not https, and nothing is fetched over anything else"


class _Unusable(Exception):
    """This url will not do, and why."""


class _Interrupted(Exception):
    """This url may do when it is asked again, and why it did not now."""


def fetch_dataset(card: Card, report: Report) -> list[Path]:
    """Fetch all files of a dataset into the data home and unpack the archives among them; returns what is there.

    An archive is deleted when it is unpacked, if it can be fetched again; `.fetched-FILE` then says what it was and
    what it left, so that it is not fetched twice. Raises `MissingData` for what no program may fetch, before anything
    is fetched, and else what `fetch_file` and `unpack` raise.
    """
    if card.by_hand:
        raise MissingData(f"{card.name}: {card.by_hand}")
    for source in card.sources:
        folder = _folder(source)
        if not source.urls and not (folder / source.file).is_file() and not _unpacked(source, folder):
            raise MissingData(_advice(source, folder, []))
    return [path for source in card.sources for path in _fetch_source(source, report)]


def fetch_file(source: Source, folder: Path, report: Report) -> Path:
    """Fetch a file into a folder, from the first url that has it; a file that is whole already stays untouched.

    Its MD5 decides whether a file is whole, else its size, else what the server says. Raises `MissingData` that names
    every url and why it failed, and `DiskError`; the part that was received stays, and is gone on with.
    """
    path = folder / source.file
    part = path.with_name(f"{path.name}.part")
    with lock(path):
        if path.is_file() and not _fault(path, source):
            return path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        failures = []
        for url in source.urls:
            try:
                _fetch(url, part, source, report)
            except _Unusable as error:
                failures.append(f"{url}: {error}")
            else:
                with disk_errors(path):
                    part.replace(path)
                    _discard(part)
                return path
        raise MissingData(_advice(source, folder, failures))


# -------------------------------------------------------------------------------------------------------- datasets


def _folder(source: Source) -> Path:
    return data_home() / (source.into or "downloads")


def _fetch_source(source: Source, report: Report) -> list[Path]:
    """Fetch one source; a file, or what an archive was unpacked to."""
    folder = _folder(source)
    if not is_archive(source.file):
        return [fetch_file(source, folder, report)]
    with lock(_note(source, folder)):
        present = _unpacked(source, folder)
        if not present:
            archive = fetch_file(source, folder, report)
            present = unpack(archive, folder, report)
            identity = f"{source.md5 or _md5(archive)} {archive.stat().st_size}"
            write_bytes(_note(source, folder), os.fsencode("\n".join([identity, *(path.name for path in present)])))
        if source.urls:
            with disk_errors(folder):
                (folder / source.file).unlink(missing_ok=True)
    return present


def _note(source: Source, folder: Path) -> Path:
    """The note of an unpacked archive: its MD5 and size, then the top-level names that it left."""
    path = folder / source.file
    return path.with_name(f".fetched-{path.name}")


def _unpacked(source: Source, folder: Path) -> list[Path]:
    """What an archive was unpacked to, if that very archive was and all of it still stands; else nothing."""
    try:
        identity, *names = os.fsdecode(_note(source, folder).read_bytes()).splitlines()
        md5, size = identity.split()
    except (OSError, ValueError):
        return []
    paths = [folder / name for name in names]
    same = source.md5.lower() in ("", md5.lower()) and str(source.size) in ("0", size)
    return paths if same and all(path.exists() for path in paths) else []


def _advice(source: Source, folder: Path, failures: list[str]) -> str:
    """What to fetch by hand, and where to put it."""
    tried = f" ({'; '.join(failures)})" if failures else ": no address is known from which a program may do so"
    known = ", ".join([f"{source.size:,} bytes"] * (source.size > 0) + [f"MD5 {source.md5}"] * (source.md5 != ""))
    by_hand = f"Fetch it by hand{f' ({known})' if known else ''} and put it into {folder} under this name."
    return f"{source.file} could not be fetched{tried}. {by_hand}"


# ----------------------------------------------------------------------------------------------------------- files


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fault(path: Path, source: Source) -> str:
    """How a file differs from what is published of it; empty where it does not."""
    size = path.stat().st_size
    if source.size and size != source.size:
        return f"it has {size:,} bytes, not {source.size:,}"
    if source.md5 and (found := _md5(path)) != source.md5.lower():
        return f"its MD5 is {found}, not {source.md5}"
    return ""


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _version(part: Path) -> Path:
    """The note of what the server said of the file that a part is of."""
    return part.with_name(f"{part.name}.version")


def _discard(part: Path) -> None:
    with disk_errors(part):
        part.unlink(missing_ok=True)
        _version(part).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- transfer


def _fetch(url: str, part: Path, source: Source, report: Report) -> None:
    """Make the part the whole file; raises `_Unusable`."""
    if not _secure(url):
        raise _Unusable(_INSECURE)
    if (source.md5 or source.size) and _size(part) and not _fault(part, source):
        return  # whole, by a process that was killed before it could say so
    resumed = _receive(url, part, source, report)
    fault = _fault(part, source)
    if fault and resumed:  # perhaps of two versions of the file: that is no fault of the url
        _discard(part)
        _receive(url, part, source, report)
        fault = _fault(part, source)
    if fault:
        _discard(part)
        raise _Unusable(fault)


def _receive(url: str, part: Path, source: Source, report: Report) -> bool:
    """Receive what is missing, in as many attempts as make progress; whether the last one went on with a part."""
    most, pauses = _size(part), iter(PAUSES)
    while True:
        try:
            return _attempt(url, part, source, report)
        except _Interrupted as error:
            if _size(part) > most:
                most, pauses = _size(part), iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                raise _Unusable(str(error)) from error
            time.sleep(pause)


def _attempt(url: str, part: Path, source: Source, report: Report) -> bool:
    """Receive what is missing in one response; whether it went on with a part."""
    have = _size(part)
    with _open(url, have) as response:
        start, length = _extent(response)
        version = f"{length} {response.headers.get('ETag') or response.headers.get('Last-Modified') or ''}"
        if start not in (0, have) or (start and not source.md5 and version != _read(_version(part))):
            _discard(part)
            raise _Interrupted(f"the server cannot go on after {have:,} bytes")
        _check_answer(response, length, source)
        if start == 0:
            _discard(part)
        total = length or source.size
        check_space(part.parent, total - start, source.file)
        if start == 0:
            write_bytes(_version(part), version.encode())
        done = start
        with disk_errors(part), part.open("ab") as file:
            for block in _blocks(response, length - start if length else 0):
                file.write(block)
                done += len(block)
                report(f"fetching {source.file}", done, total)
            file.flush()
            os.fsync(file.fileno())
    if done < total:
        raise _Interrupted(f"the connection broke after {done:,} of {total:,} bytes")
    return start > 0


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _extent(response: HTTPResponse) -> tuple[int, int]:
    """Where the bytes of an answer start, -1 for one that cannot be used, and the length of the whole file, or 0."""
    if response.status == 200:
        return 0, response.length or 0
    place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
    return (int(place[1]), int(place[2])) if response.status == 206 and place else (-1, 0)


def _check_answer(response: HTTPResponse, length: int, source: Source) -> None:
    """Raise `_Unusable` for an answer that is not the file, before any of it is read."""
    if length and source.size and length != source.size:
        raise _Unusable(f"it has {length:,} bytes, not {source.size:,}")
    if response.headers.get_content_type() == "text/html" and not source.file.endswith((".html", ".htm")):
        raise _Unusable("the server answers with a web page, not with the file")
    ends = length or getattr(response, "chunked", False)
    if response.status == 200 and not (ends or source.size or source.md5):
        raise _Unusable("nothing tells how long the file is")


def _blocks(response: HTTPResponse, missing: int) -> Iterator[bytes]:
    """What is received, as it comes, at most `missing` bytes unless that is 0.

    Errors of the network, and of nothing else, become `_Interrupted`. A server that sends more or holds the connection
    is not waited for: `read1` itself does not count what it has read in every Python.
    """
    received = 0
    while not missing or received < missing:
        try:
            block = response.read1(min(_BLOCK, missing - received) if missing else _BLOCK)
        except (OSError, HTTPException) as error:
            raise _Interrupted(_why(error)) from error
        if not block:
            return
        received += len(block)
        yield block


def _open(url: str, start: int) -> HTTPResponse:
    """Ask for a file from byte `start` on. An answer that the file has no such byte (416) is an answer too."""
    request = Request(url, headers={"User-Agent": "worstgroup", **({"Range": f"bytes={start}-"} if start else {})})
    try:
        return cast(HTTPResponse, build_opener(_Redirects).open(request, timeout=PATIENCE))
    except HTTPError as error:
        if error.code == 416:
            return cast(HTTPResponse, error)
        error.close()
        later = _Interrupted if error.code in _LATER else _Unusable
        raise later(f"the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        final = isinstance(getattr(error, "reason", error), ValueError)  # a foreign certificate is one too
        raise (_Unusable if final else _Interrupted)(_why(error)) from error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer for {PATIENCE:g} s"
    return " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__


def _secure(url: str) -> bool:
    """https; plain http to this machine only."""
    place = urlsplit(url)
    return place.scheme == "https" or (place.scheme == "http" and place.hostname in ("127.0.0.1", "localhost"))


class _Redirects(HTTPRedirectHandler):
    """Follows a server elsewhere, but not away from https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """The request to follow with; raises `_Unusable` for one that is not https any more."""
        leaves = urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https"
        if leaves or not _secure(newurl):
            fp.close()
            raise _Unusable(f"it leads to {newurl}, which {_INSECURE}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
