"""A certificate's files: written together from one mask, and held against the mask again."""

from pathlib import Path
from typing import Any

from core.artifacts import read_bytes, write_bytes, write_json, write_text
from core.choices import UserError
from core.hashes import key_of, sha256_file
from mimu import Mask
from mimu.mask import FILE
from release.facts import differing, facts_of
from release.pages import as_html, as_markdown
from release.paper import as_pdf
from release.sheet import certificate, forgotten, model_card

JSON, HTML, PDF, CARD = "certificate.json", "certificate.html", "certificate.pdf", "MODEL_CARD.md"
MOST_SHOWN = 4  # of the values in which a certificate and a mask differ


def file_of(mask: Path) -> Path:
    """The file of a mask, which is named by its folder or by the file itself."""
    return mask / FILE if mask.is_dir() else mask


def beside(mask: Path) -> Path:
    """The folder in which a mask's certificate is looked for, and written unless another one is named."""
    folder = file_of(mask).resolve().parent if mask.name in ("", "..") or not mask.is_dir() else mask
    return folder.with_name(f"{folder.name}-certificate")


def check_place(folder: Path) -> None:
    """See that a certificate may be written to a folder: nothing else stands there.

    Raises:
        UserError: something does.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where the certificate's folder has its place: choose another one")
    strange = sorted({path.name for path in folder.iterdir()} - {JSON, HTML, PDF, CARD}) if folder.is_dir() else []
    if strange:
        raise UserError(f"{folder} holds other files ({strange[0]}), among which no certificate is put: choose a new "
                        "folder")  # fmt: skip


def _texts(facts: dict[str, Any], digest: str) -> dict[str, str]:
    """The files that are text made of the facts alone."""
    page, card = certificate(facts, digest), model_card(facts, digest)
    return {HTML: as_html(page, forgotten(facts)), CARD: as_markdown(card)}


def write(folder: Path, mask: Mask, path: Path) -> list[Path]:
    """Write a certificate as JSON, HTML and PDF, and a model card; return their paths.

    Everything is made before anything is written, and the JSON comes last: where it is, the rest is.

    Args:
        folder: where nothing else stands. path: of the mask.

    Raises:
        UserError: the folder holds something else or cannot be written, or a page would not fit on paper.
    """
    check_place(folder)
    facts = facts_of(mask, sha256_file(file_of(path)))
    digest = key_of(facts)
    texts, pdf = _texts(facts, digest), as_pdf(certificate(facts, digest))
    for name, text in texts.items():
        write_text(folder / name, text)
    write_bytes(folder / PDF, pdf)
    write_json(folder / JSON, facts)
    return [folder / name for name in (HTML, PDF, JSON, CARD)]


def complaints(facts: dict[str, Any], where: Path, mask: Mask, path: Path) -> list[str]:
    """Say in what a certificate does not hold of a mask; nothing where all of it does.

    Every value and sentence is made again from the mask and compared; so are the page and the card beside the JSON, of
    which people read. The PDF is not: its bytes depend on the library that draws letters.

    Args:
        facts: as `read_certificate` gives them, from the file `where`. path: of the mask.
    """
    now = facts_of(mask, sha256_file(file_of(path)))
    named = facts["mask"].get("digest") if isinstance(facts.get("mask"), dict) else None
    if named != mask.digest:
        return [f"it is of another mask ({named}), this one is {mask.digest}"]
    wrong = list(differing(facts, now))
    if wrong:
        more = f" and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
        return [f"the mask and its card do not say the same of {', '.join(wrong[:MOST_SHOWN])}{more}"]
    made = _texts(now, key_of(now))
    there = {name: read_bytes(where.with_name(name)) for name in made if where.with_name(name).exists()}
    return [
        f"{name} is not the page of this certificate as this version of MIMU writes it"
        for name, data in there.items()
        if data != made[name].encode()
    ]
