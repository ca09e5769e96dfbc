"""Every table of docs/speed.md, one benchmark after the other, each in a process of its own: six minutes on 2 cores.

    uv run benchmarks/run_all.py [--docs] [--only NAME ...] [--root DIR] [--list]

With --docs each writes its table into the page as it ends; without, it prints only. --list shows the commands and runs
none. What fails is named at the end, the others run all the same, and the exit code is 1. Not among them, because each
takes longer than all of these: `message_passing.py --full`, `image_trees.py --million 1280000`, and `many_classes.py`
with a thousand classes.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = Path("/usr/share/openclipart/png")  # of the Debian package openclipart-png


def commands(root: Path, docs: bool) -> dict[str, list[list[str]]]:
    """Name -> the command lines that make one table."""
    records = root / "records"
    run = [str(ROOT / "main.py"), "run", "--output-dir", str(records), "--quiet"]
    tables = {
        "message_passing": [["message_passing.py", *_docs(docs)]],
        "whole_models": [["message_passing.py", "--whole", *_docs(docs)]],
        "graph_generation": [["graph_generation.py", *_docs(docs)]],
        "image_trees": [["image_trees.py", "--root", str(root / "trees"), *_docs(docs)]],
        "pictures": [["image_trees.py", "--pictures", str(PICTURES), *_docs(docs)]] if PICTURES.is_dir() else [],
        "sweep": [["sweep.py", *_docs(docs)]],
        "page": [run, ["page.py", "--records", str(records), *_docs(docs)]],
        "device": [["device.py", *_docs(docs)]],
    }
    return {name: [_whole(one) for one in lines] for name, lines in tables.items() if lines}


def _docs(wanted: bool) -> list[str]:
    return ["--docs"] if wanted else []


def _whole(words: list[str]) -> list[str]:
    script = words[0] if words[0].startswith("/") else str(ROOT / "benchmarks" / words[0])
    return [sys.executable, script, *words[1:]]


def main() -> None:
    """Run them, and say what each took."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--docs", action="store_true", help="write the tables to docs/results/ and into the pages")
    flags.add_argument("--only", nargs="+", help="names of some of them")
    flags.add_argument("--root", type=Path, default=Path("/tmp/mimu-benchmarks"), help="folder for what they make")
    flags.add_argument("--list", action="store_true", help="show the command lines, and run nothing")
    given = flags.parse_args()
    every = commands(given.root, given.docs)
    if unknown := set(given.only or ()) - set(every):
        flags.error(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    if given.list:
        for name in given.only or every:
            print(*(f"{name}: {shlex.join(line)}" for line in every[name]), sep="\n")
        return
    given.root.mkdir(parents=True, exist_ok=True)
    failed, begun = [], time.perf_counter()
    for name in given.only or every:
        started = time.perf_counter()
        print(f"--- {name}", flush=True)
        if any(subprocess.run(line, cwd=ROOT, check=False).returncode for line in every[name]):
            failed.append(name)
        print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"all: {time.perf_counter() - begun:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
