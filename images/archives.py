"""Unpack a downloaded dataset safely: tar, zip and the hub's parquet files -> folders of image files. No torch here.

An archive X.tar.gz becomes the folder X beside it by one rename, so a folder that exists is complete and an interrupted
run goes on with the next archive. Paths out of the folder, links and devices are refused, and nothing is left behind.
"""

import hashlib
import json
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

from core.artifacts import filling, write_file
from core.choices import UserError
from core.observe import log, progress

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
SPLIT_NAMES = ("train", "validation", "valid", "val", "test")


def archives_in(root: Path) -> list[Path]:
    """Archives of a folder and of its `data` folder, by name; parquet files at any depth, hidden folders apart."""
    flat = (path for folder in (root, root / "data") if folder.is_dir() for path in folder.iterdir())
    packed = [path for path in flat if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    tables = [path for path in root.rglob("*.parquet") if not any(p.startswith(".") for p in path.parts)]
    return sorted(packed) + sorted(tables)


def unpack_all(root: Path) -> list[Path]:
    """Unpack every archive of a folder into folders below it; returns those that were made.

    Raises:
        UserError: there is nothing to unpack, or an archive is damaged or unsafe.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: name the one that holds the archives with --dataset-path")
    found, made = archives_in(root), []
    if not found:
        raise UserError(f"{root} holds no {', '.join(SUFFIXES)} or .parquet file: there is nothing to unpack")
    for path in (path for path in found if path.suffix != ".parquet"):
        target = root / _stem(path)
        if target.exists():
            log(f"{path.name}: unpacked already")
            continue
        with filling(target) as part:
            _unpack(path, part)
            if not any(part.iterdir()):
                raise UserError(f"{path} holds no files: download it again")
            inner = part / target.name
            if [child.name for child in part.iterdir()] == [target.name] and inner.is_dir():  # X.zip holding X/
                aside = inner.rename(part / ".inner")
                for child in list(aside.iterdir()):
                    child.rename(part / child.name)
                aside.rmdir()
        made.append(target)
        log(f"{path.name}: unpacked")
    return made + _unpack_tables(root, [path for path in found if path.suffix == ".parquet"])


def _stem(path: Path) -> str:
    return next(path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.lower().endswith(suffix))


def _unpack(path: Path, part: Path) -> None:
    try:
        (_unzip if path.suffix.lower() == ".zip" else _untar)(path, part)
    # zipfile says RuntimeError of a password and NotImplementedError of a compression that it does not know.
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be unpacked ({what}): download it again") from None
    except OSError as error:
        if error.errno is None:  # gzip says so of damaged data
            raise UserError(f"{path} cannot be unpacked ({error}): download it again") from None
        raise


def _refuse(path: Path, member: str, why: str) -> NoReturn:
    raise UserError(f"{path} holds {member!r}, {why}: it is not safe to unpack, get it from its source again")


def _is_outside(name: str) -> bool:
    pure = PurePosixPath(name.replace("\\", "/"))
    return pure.is_absolute() or ".." in pure.parts or (bool(pure.parts) and pure.parts[0].endswith(":"))


def _untar(path: Path, part: Path) -> None:
    with tarfile.open(path, "r:*") as archive:
        for member in progress(archive, f"unpacking {path.name}"):
            if not (member.isreg() or member.isdir()):
                _refuse(path, member.name, "a link or device")
            if _is_outside(member.name):
                _refuse(path, member.name, "a path out of its folder")
            archive.extract(member, part, set_attrs=False, filter="data")
            archive.members = []  # ty: ignore[missing-attribute]  # else a million members stay in memory


def _unzip(path: Path, part: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in progress(archive.infolist(), f"unpacking {path.name}"):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                _refuse(path, member.filename, "a link or device")
            if _is_outside(member.filename):
                _refuse(path, member.filename, "a path out of its folder")
            archive.extract(member, part)


# --- the hub's parquet files ------------------------------------------------------------------------------


def _unpack_tables(root: Path, tables: list[Path]) -> list[Path]:
    """Parquet files, split by split, into <split>/<class>/<file>."""
    parts: dict[str, list[Path]] = {}
    for path in tables:
        words = (path.stem.partition("-")[0], *reversed(path.relative_to(root).parts[:-1]))
        split = next((word for word in words if word in SPLIT_NAMES), None)
        if split is None:
            raise UserError(f"{path} is of no split: put it into {root / 'parquet/train'}, or validation or test")
        if path.is_relative_to(root / split):
            raise UserError(f"{path} lies where its images would go: move it into {root / 'parquet' / split}")
        parts.setdefault(split, []).append(path)
    made = []
    for split, paths in parts.items():
        target = root / split
        if target.exists():
            log(f"{split}: unpacked already")
            continue
        with filling(target) as part:
            for path in paths:
                for name, data in progress(_images_of(path), f"unpacking {path.name}"):
                    _write_once(part / name, data)
        made.append(target)
        log(f"{split}: unpacked")
    return made


def _write_once(path: Path, data: bytes) -> None:
    """Write a file; another one of the same name gets its hash into its name."""
    if path.exists() and path.read_bytes() != data:
        path = path.with_name(f"{path.stem}-{hashlib.sha256(data).hexdigest()[:16]}{path.suffix}")
    write_file(path, data)


def _images_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """(<class>/<file>, bytes) of every row of a parquet file with an image and a class-label column.

    `datasets` reads what the columns are and what a label is called; pyarrow reads the rows (docs/data.md says why).
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, Image

    try:
        table = pyarrow.parquet.ParquetFile(path)
        facts = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        features = Features.from_dict(facts)
        image = next(name for name, feature in features.items() if isinstance(feature, Image))
        label, classes = next((name, feature) for name, feature in features.items() if isinstance(feature, ClassLabel))
        for batch in table.iter_batches(256, columns=[image, label]):
            for row in batch.to_pylist():
                data, place = row[image]["bytes"], classes.int2str(row[label])  # refuses -1: a row without a label
                name = PurePosixPath((row[image]["path"] or "").replace("\\", "/")).name
                if data is None or not _is_plain(place):
                    _refuse(path, f"{place}/{name}", "no image bytes or no plain class name")
                yield f"{place}/{name if _is_plain(name) else hashlib.sha256(data).hexdigest()}", data
    except (pyarrow.ArrowException, OSError, KeyError, StopIteration, ValueError, TypeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no image dataset of the hub ({what}): download it again") from None


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")
