"""What operating systems and tools leave in folders of images, known by its name: passed over, counted, never decoded.

Damage is not litter: an empty, cut or foreign file stays what it is, and so does everything whose name is not known.
"""

import re
from pathlib import Path

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
    """Whether a file's name ends as those of images do."""
    return name[name.rfind(".") :].lower() in IMAGES if "." in name else False


def litter_file(folder: str, name: str) -> str | None:
    """What kind of litter a file is; None if it is to be read as an image.

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
    """What kind of litter a folder is; None if images are to be looked for in it."""
    if name.startswith("."):
        return "hidden folders"
    return name if name.lower() in FOLDERS else None
