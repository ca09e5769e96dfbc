"""Inputs that once gave a silently wrong answer, each judged by what the command line does with it today.

    uv run benchmarks/cases.py                              every kind on this checkout, about ten minutes
    uv run benchmarks/cases.py --only A F AA                some kinds
    uv run benchmarks/cases.py --project OTHER --json FILE  another checkout (its own code answers), outcomes kept

Each kind is a letter with a small input and a right outcome, judged from outside: exit code, what was printed, the
records that were written. Exit code 1 where an outcome is not the right one. Nothing outside a temporary folder is
written; mounts and other user ids need root, and such a case says "skipped" without it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import case_images, case_machine, case_products, case_words
from benchmarks.case_outcome import CASES, Checkout

KINDS = (case_images, case_machine, case_products, case_words)
"""Whose cases register in CASES when they are imported."""


def judge(letter: str, checkout: Checkout) -> dict[str, object]:
    """Run one case; an exception of the case itself counts as wrong."""
    what, function = CASES[letter]
    begun = time.monotonic()
    try:
        right, said = function(checkout)
    except (OSError, subprocess.SubprocessError, LookupError, ValueError, StopIteration) as error:
        right, said = False, f"{type(error).__name__}: {error}"[:200]
    seconds = round(time.monotonic() - begun, 1)
    return {"kind": letter, "what": what, "right": right, "said": " ".join(said.split()), "seconds": seconds}


def main() -> int:
    """Judge the kinds that were asked for; returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent)
    arguments.add_argument("--python", default=sys.executable)
    arguments.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="KIND")
    arguments.add_argument("--json", type=Path, help="write the outcomes here")
    given = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="cases-") as folder:
        Path(folder).chmod(0o755)  # another user must find it
        base = Checkout(given.project.resolve(), given.python, Path(folder), Path(folder) / "finished")
        ended = base.call(["--output-dir", base.default, "--tracker", "none"])
        print(f"default run: {ended.seconds:.0f} s, exit {ended.code}", flush=True)
        for letter in sorted(given.only, key=lambda name: (len(name), name)):
            place = Path(folder) / letter
            place.mkdir()
            rows.append(judge(letter, Checkout(base.project, base.python, place, base.default)))
            row = rows[-1]
            word = {True: "right", False: "WRONG", None: "skipped"}[row["right"]]  # ty: ignore[invalid-argument-type]
            print(f"| {row['kind']} | {row['what']} | {word} | {row['said']} |", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    wrong = [row["kind"] for row in rows if row["right"] is False]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} kinds right"
        + (f"; wrong: {', '.join(map(str, wrong))}" * bool(wrong))
    )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
