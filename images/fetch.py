"""Download and unpack datasets, and tell which are on this machine. Nothing else ever downloads a dataset."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core.choices import NoHomeError, SupportedDatasets, UserError
from core.observe import log
from images.archives import archives_in, unpack_all
from images.specs import SPECS, DatasetSpec, dataset_root, how_to_get, read_arrays
from images.splits import open_tree_of


def download(dataset: SupportedDatasets, datasets_dir: Path, dataset_path: Path | None = None) -> Path:
    """Fetch a dataset to its place, whole or not at all, and check it; returns where it lies.

    What is there and sound is left as it is, what is damaged is replaced.

    Raises:
        UserError: it comes by another way or to another place, or the download failed.
    """
    spec = SPECS[dataset]
    if spec.torchvision:
        if dataset_path is not None:
            where = datasets_dir / spec.folder
            raise UserError(f"{dataset.value} is downloaded to {where}: choose another --output-dir, no --dataset-path")
        return _download_arrays(dataset, spec, datasets_dir)
    if spec.hub:
        return _download_tree(dataset, spec, dataset_root(dataset, dataset_path, datasets_dir), datasets_dir)
    if spec.layout:
        raise UserError(f"{dataset.value} cannot be downloaded: put {spec.files} in {spec.folder} ({spec.source})")
    raise UserError(f"{dataset.value} needs no download ({spec.files}): run it as it is")


def _is_sound(dataset: SupportedDatasets, root: Path) -> bool:
    try:
        return all(len(read_arrays(dataset, root, train)[1]) for train in (True, False))
    except UserError:
        return False


def _download_arrays(dataset: SupportedDatasets, spec: DatasetSpec, datasets_dir: Path) -> Path:
    """Let torchvision fetch into a temporary folder, check what came, then put it in place."""
    import torchvision.datasets

    target = datasets_dir / spec.folder
    if _is_sound(dataset, target):
        log(f"{dataset.value}: there already, and sound")
        return target
    datasets_dir.mkdir(parents=True, exist_ok=True)
    kind = getattr(torchvision.datasets, spec.torchvision)
    by_hand = f"put {spec.files} in {target} by hand, from {spec.source}, or try again later"
    with tempfile.TemporaryDirectory(dir=datasets_dir, prefix=".download-") as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        fresh.mkdir(), old.mkdir()
        try:
            for part in ({"split": "train"}, {"split": "test"}) if dataset == "SVHN" else ({},):
                kind(str(fresh), download=True, **part)
        except (OSError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise UserError(f"downloading {dataset.value} failed ({what}): {by_hand}") from None
        for train in (True, False):
            read_arrays(dataset, fresh / spec.folder, train)
        for made in fresh.iterdir():
            place = datasets_dir / made.name
            if place.exists():
                os.replace(place, old / made.name)
            os.replace(made, place)
    return target


def _download_tree(dataset: SupportedDatasets, spec: DatasetSpec, root: Path, datasets_dir: Path) -> Path:
    """Fetch the archives of a dataset of the hub (unfinished files go on where they stopped) and unpack them."""
    from huggingface_hub import snapshot_download

    root.mkdir(parents=True, exist_ok=True)
    try:
        patterns = ["*.tar.gz", "*.zip", "*.parquet"]
        snapshot_download(spec.hub, repo_type="dataset", local_dir=root, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises errors of several libraries, all of which mean: not fetched
        what = str(error).strip().split("\n")[0] or type(error).__name__
        by_hand = (
            f"put {spec.files} in {root} by hand, from {spec.source}, then `uv run main.py prepare {dataset.value}`"
        )
        raise UserError(f"downloading {dataset.value} failed ({what}): run it again to go on, or {by_hand}") from None
    finally:
        if not any(root.iterdir()):
            root.rmdir()
    return prepare(dataset, datasets_dir, root)


def prepare(dataset: SupportedDatasets, datasets_dir: Path, dataset_path: Path | None = None) -> Path:
    """Unpack the archives of a folder tree beside themselves and index it; returns where it lies.

    Raises:
        UserError: the dataset has no archives, one is damaged or unsafe, or no tree came of them.
    """
    if not SPECS[dataset].layout:
        raise UserError(f"{dataset.value} needs no preparing: download it, or run it as it is")
    root = dataset_root(dataset, dataset_path, datasets_dir)
    unpack_all(root)
    tree = open_tree_of(dataset, root, datasets_dir)
    present = sorted(set(tree.labels.tolist()))
    first = ", ".join(tree.classes[label] for label in present[:10]) + ", ..." * (len(present) > 10)
    for note in tree.notes:
        log(f"{tree.root}: {note}")
    log(f"{dataset.value}: {len(tree)} images of {len(present)} classes ({first}) in {tree.root}")
    return root


# --- what is here -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Presence:
    """A dataset on this machine: where it is looked for, images that are there (0: none), and what to do."""

    dataset: SupportedDatasets
    classes: int
    shape: str
    images: int
    root: Path
    note: str


def presence(dataset: SupportedDatasets, datasets_dir: Path, dataset_path: Path | None = None) -> Presence:
    """Look for a dataset and count its images; what cannot be read counts as absent, and `note` says why."""
    spec = SPECS[dataset]
    root, classes, images, note = Path(spec.folder), spec.num_classes, 0, spec.licence
    try:
        root = dataset_root(dataset, dataset_path, datasets_dir)
        if spec.layout:
            tree = open_tree_of(dataset, root, datasets_dir)
            classes, images = len(tree.classes), len(tree)
        else:
            images = sum(len(read_arrays(dataset, root, train)[1]) for train in (True, False))
    except NoHomeError as error:
        note = str(error)
    except UserError as error:
        packed = bool(spec.layout) and root.is_dir() and bool(archives_in(root))
        note = f"`uv run main.py prepare {dataset.value}`" if packed else how_to_get(dataset)
        if root.is_dir() and any(root.iterdir()) and spec.layout:
            note = f"{note} ({error})"
    shape = f"{spec.size}x{spec.size} {'grey' if spec.channels == 1 else 'colour'}"
    return Presence(dataset, classes, shape, images, root, note)


def listing(datasets_dir: Path) -> str:
    """Make a table of all datasets: classes, images that are here, where, and how to get the missing ones."""
    rows = [presence(dataset, datasets_dir) for dataset in SupportedDatasets]
    lines = [f"{'dataset':24} {'images':14} {'classes':>7} {'here':>9}  where"]
    for row in rows:
        where = "inside scikit-learn" if row.dataset == "DIGITS" else str(row.root)
        classes = str(row.classes or SPECS[row.dataset].expected_classes or "-")
        lines.append(f"{row.dataset.value:24} {row.shape:14} {classes:>7} {row.images or 'missing':>9}  {where}")
        lines.append(f"{'':24} {f'licence: {row.note}' if row.images else row.note}")
    return "\n".join(lines)
