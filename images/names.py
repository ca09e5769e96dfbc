"""Interpret names: of files that are no images, of folders that are splits, and of classes that a person types.

Litter is what operating systems and tools leave in folders of images, known by its name: passed over and counted.
Damage is not litter: an empty, cut or foreign file stays what it is, and so does everything whose name is not known.

A class that a person types is one by its name where a class has that name, else by its label (its place in the order of
classes). `label:3` says that a label is meant and `name:3` that a name is, whatever the other classes are called.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from core.config import LABEL, UserError
from core.observe import log, visible

IMAGES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic", ".heif", ".ico", ".tga", ".pcx"),
}
COMMON = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")  # asked first: a tree may hold millions of these
FILES = {
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
    *("picasa.ini", "pspbrwse.jbf", "zbthumbnail.info", "sync.ffs_db", "folder.ini"),
}
FOLDERS = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "network trash folder", "temporary items", "__pycache__"),
}
TEXTS = re.compile(
    r"(readme|licen[sc]e|copying|notice|authors|citation|changelog)([-_. ].*)?\.(txt|md|rst|html?|pdf|cff|bib)"
    r"|readme|licen[sc]e|copying"
)
APPLE_DOUBLE, APPLE_SINGLE = b"\x00\x05\x16\x07", b"\x00\x05\x16\x00"


def is_image_name(name: str) -> bool:
    """Return whether a file's name ends like an image's."""
    return name[name.rfind(".") :].lower() in IMAGES if "." in name else False


def litter_file(folder: str, name: str) -> str | None:
    """Return what kind of litter a file is; None if it is to be read as an image.

    A hidden file that is named as an image is read, but for the twin (`._x.jpg`) in which macOS keeps what other file
    systems cannot hold: that begins with its own mark, or is empty.
    """
    if name.endswith(COMMON) and name[0] != ".":
        return None
    if name[0] == ".":
        if name.startswith("._"):
            return "._*" if _is_apple_double(Path(folder, name)) else None
        if name in (".DS_Store", ".directory", ".gitkeep"):
            return name
        return None if is_image_name(name) else "hidden files"
    low = name.lower()
    if low in FILES or low.startswith("~$"):
        return name.strip()
    if low.endswith(".cache"):
        return "*.cache"
    return "texts like README" if low[0] in "rlcna" and TEXTS.fullmatch(low) else None


def _is_apple_double(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in (APPLE_DOUBLE, APPLE_SINGLE, b"")
    except OSError:
        return False


def litter_folder(name: str) -> str | None:
    """Return what kind of litter a folder is; None if images are to be looked for in it."""
    if name.startswith("."):
        return "hidden folders"
    return name if name.lower() in FOLDERS else None


# --- names of folders that say what the images in them are for ------------------------------------------------------

UNSPLIT, TRAIN, VAL, TEST = range(4)
EITHER = 4  # `eval`, `holdout`: the test set, or the validation set beside a test set
WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "devel", "development"), VAL),
    **dict.fromkeys(("test", "testing", "tst"), TEST),
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), EITHER),
}
AFFIXES = (
    *("images", "image", "imgs", "img", "pictures", "pics", "photos", "data", "dataset", "sets", "set", "splits"),
    *("split", "part", "dir", "folder", "files", "samples", "jpg", "jpeg", "png", "raw"),
)


def _words(name: str) -> list[str]:
    """Split a name into its words in lower case: `trainSet_2` -> train, set."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", apart)]


def _meant(word: str) -> int | None:
    """Return the split that a word names, with or without an affix (`trainset`)."""
    if word in WORDS:
        return WORDS[word]
    return next((WORDS[rest] for end in AFFIXES if (rest := word.removesuffix(end)) != word and rest in WORDS), None)


def _read(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(split that a name speaks of, its other words but for affixes)."""
    words = _words(name)
    if (whole := WORDS.get("".join(words))) is not None:  # `train_val`, `hold-out`
        return whole, ()
    found = [split for word in words if (split := _meant(word)) is not None]
    rest = tuple(word for word in words if _meant(word) is None and word not in AFFIXES)
    return (found[0] if len(found) == 1 else None), rest


def splits_by_name(names: Sequence[str]) -> dict[str, int]:
    """Map names of sibling folders that are names of splits to their split.

    `train`, `Training`, `train_images`, `trainset` are; so are `x_train` and `x_test` where both are there.
    """
    read = {name: _read(name) for name in names}
    found = {name: split for name, (split, rest) in read.items() if split is not None and not rest}
    groups: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for name, (split, rest) in read.items():
        if split is not None and rest:
            groups[rest][name] = split
    for group in groups.values() if not found else ():
        if TRAIN in group.values() and len(set(group.values())) > 1:
            found |= group
    other = VAL if TEST in found.values() and VAL not in found.values() else TEST
    return {name: other if split == EITHER else split for name, split in found.items()}


def same_but_for_numbers(names: Sequence[str]) -> bool:
    """Return whether names differ by a number alone, as those of the parts of one split do."""
    return len({re.sub(r"\d+", "0", name) for name in names}) == 1


# --- classes that a person names: typed text -> labels --------------------------------------------------------------

NAME = "name:"
NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)  # how a label is written: 007 is a name, or nothing
Classes = Sequence[int | str]


def same_form(name: str) -> str:
    """Bring a name into one Unicode form without case, so that two that look the same are equal."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", visible(name)).casefold())


def _plainly(name: str) -> str:
    """Return a class name as it is compared: form, case, spaces, `_` and `-` do not matter; a number's sign does."""
    form = same_form(name).strip()
    if re.fullmatch(r"[-+]?[0-9]+", form):
        return form
    return re.sub(r"[\s_-]+", " ", form).strip() or form


class _Names:
    """The classes of a dataset, looked up by what a person types."""

    def __init__(self, classes: Sequence[str], ids: Sequence[str], where: str, field: str):
        self.classes, self.ids, self.where, self.field = classes, ids, where, field
        self.exact: dict[str, list[int]] = {}
        self.plain: dict[str, list[int]] = {}
        for names in (classes, ids):
            for label, name in enumerate(names):
                for table, key in ((self.exact, same_form(name)), (self.plain, _plainly(name))):
                    if label not in table.setdefault(key, []):
                        table[key].append(label)
        self.numbered = any(NUMBER.fullmatch(name) for name in classes)

    def said(self, label: int) -> str:
        """Return a label with the name of its class."""
        return f"{label} ({self.classes[label]!r})"

    def label(self, number: int, typed: object) -> int:
        """Return a label, if there is such a one."""
        last = len(self.classes) - 1
        if not 0 <= number <= last:
            raise UserError(f"{self.field} is {typed}, but {self.where} has classes 0 to {last}: choose from them")
        return number

    def named(self, name: str) -> int | None:
        """Return the class of a name, if there is one."""
        found = self.exact.get(same_form(name)) or self.plain.get(_plainly(name), [])
        if len(found) > 1:
            which = ", ".join(f"{label} ({self.ids[label]})" if self.ids else str(label) for label in found)
            raise UserError(
                f"{self.field} {name!r} fits several classes of {self.where}, {which}: "
                f"give one of these instead, e.g. {LABEL}{found[0]}"
            )
        return found[0] if found else None

    def typed(self, text: str) -> int:
        """Return the label of what a person typed.

        Raises:
            UserError: there is no such class (with the closest names), or a name fits several.
        """
        text = visible(text)
        if text.startswith(LABEL) and NUMBER.fullmatch(text.removeprefix(LABEL).strip()):
            return self.label(int(text.removeprefix(LABEL)), text)
        name = text.removeprefix(NAME)  # of a class that is called `label:3` it is `name:label:3`
        by_name = self.named(name)
        if by_name is None and name != text:  # a class that is really called `name:...`
            by_name = self.named(text)
        number = int(text) if NUMBER.fullmatch(text.strip()) else None
        if by_name is not None:
            if number not in (None, by_name) and 0 <= number < len(self.classes):
                other = f"write {LABEL}{number} for label {self.said(number)}"
                log(f"{self.field} {text}: taken as the name of class {by_name}; {other}")
            return by_name
        if number is None:
            raise self._unknown(text, name)
        if self.numbered and number < len(self.classes):
            log(f"{self.field} {text}: no class has this name, taken as label {self.said(number)}")
        return self.label(number, text)

    def _unknown(self, text: str, name: str) -> UserError:
        word = _plainly(name)
        keys = difflib.get_close_matches(word, self.plain, 3)
        if word.isdecimal():  # 007 is nobody's label, and may have been meant for 7
            keys = [key for key in self.plain if key.isdecimal() and int(key) == int(word)] or keys
        close = [self.classes[self.plain[key][0]] for key in keys]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"e.g. {self.classes[0]!r}"
        return UserError(f"{self.field} is {text!r}, which is no class of {self.where}: {hint}")


def resolve_classes(
    given: Classes,
    classes: Sequence[str],
    ids: Sequence[str] = (),
    where: str = "the dataset",
    field: str = "forget_class",
) -> tuple[int, ...]:
    """Return the labels of classes given by number, name or id; ascending, so that their order does not matter.

    An int is a label. A text is a name (or id) where a class has that name, else a label; `label:3` and `name:3` say
    which. The Unicode form of a name, case, spaces, `_` and `-` do not matter where no other class is named exactly so.

    Raises:
        UserError: there is no such class (with the closest names), a name fits several, or a class comes twice.
    """
    names = _Names(classes, ids, where, field)
    labels = [names.typed(one) if isinstance(one, str) else names.label(int(one), one) for one in given]
    if len(set(labels)) < len(labels):
        said = [visible(one) if isinstance(one, str) else one for one in given]
        raise UserError(f"{field} is {said}, which names a class twice: name each once")
    return tuple(sorted(labels))
