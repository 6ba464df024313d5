"""Drawn archives: small, and hostile or broken where a test asks for it."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

TREE = {
    "birds/metadata.csv": b"img_id,y\n1,0\n" * 300,
    "birds/001/a.jpg": bytes(range(256)) * 20,
    "birds/002/b.jpg": b"",
}


def write_archive(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A tree as .tar, .tar.gz, .tgz or .zip, with its folders as members of their own."""
    files = TREE if files is None else files
    honest = [Path(name) for name in files if ".." not in name and not name.startswith("/")]
    folders = sorted({parent.as_posix() for path in honest for parent in path.parents} - {"."})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in folders:
                packed.writestr(f"{name}/", b"")
            for name, content in files.items():
                packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name in folders:
            tar.addfile(special(name, tarfile.DIRTYPE))
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member of a tar that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def add_special(path: Path, info: tarfile.TarInfo) -> Path:
    """Put a member behind those of a .tar."""
    with tarfile.open(path, "a") as tar:
        tar.addfile(info)
    return path


def add_zip_link(path: Path, name: str, target: str) -> Path:
    """Put a symbolic link behind the members of a .zip."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(info, target)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
