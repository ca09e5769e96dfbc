"""How large is the HTML page of 500 sweep points, and how long does a browser take to open it?

    uv run benchmarks/page.py --records DIR [--json PATH] [--docs]

DIR is an output folder with records (make some with `uv run main.py --output-dir DIR`). Its first run stands for ten of
fifty points each, same values, other seeds and kappas. Seconds are chromium's own, from the start of navigation until
the page's script has drawn the first run, beside those of an empty page.
"""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all

from core.records import read_records
from reporting.families import Run, families, runs_of
from reporting.page import as_page

RUNS, POINTS, REPEATS = 10, 50, 5
EMPTY = "<!doctype html><title>empty</title><body></body>"
CLOCK = """<script>setTimeout(() => { document.body.replaceChildren(Object.assign(document.createElement("pre"),
  { id: "took", textContent: performance.now() })); }, 0);</script></body>"""


def enlarged(run: Run) -> list[Run]:
    """RUNS runs of POINTS points each, all made from the points of one."""
    return [
        [
            run[place % len(run)] | {"run": f"{seed}", "seed": seed, "kappa": 20 * place + 20, "id": f"{seed}-{place}"}
            for place in range(POINTS)
        ]
        for seed in range(RUNS)
    ]


def opened(html: str, folder: Path) -> float:
    """Seconds until a browser has drawn the page."""
    path = folder / "page.html"
    path.write_text(html.replace("</body>", CLOCK), encoding="utf-8")
    browser = shutil.which("chromium") or sys.exit("chromium is not here: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom", path.as_uri()]
    text = subprocess.run([browser, *flags], capture_output=True, text=True, check=True).stdout
    found = re.search(r'id="took">([\d.]+)', text)
    assert found, "the page did not finish"
    return float(found[1]) / 1000


def main() -> None:
    """Measure, print, keep."""
    options = parser(__doc__)
    options.add_argument("--records", type=Path, required=True)
    for_pages(options)
    given = options.parse_args()
    runs = enlarged(runs_of(read_records(given.records))[0])
    begun = time.perf_counter()
    html = as_page(families(runs), {})
    made = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as name:
        taken = [(opened(html, Path(name)), opened(EMPTY, Path(name))) for _ in range(REPEATS)]
    full, empty = (statistics.median(pair[place] for pair in taken) for place in (0, 1))
    megabytes = len(html.encode()) / 1e6
    print(f"page of {RUNS * POINTS} points: {megabytes:.2f} MB, made in {made:.1f} s")
    print(f"opened in {full:.2f} s, an empty page in {empty:.2f} s (medians of {REPEATS})")
    keep(given.json, {"megabytes": megabytes, "made": made, "opened": full, "empty": empty})
    what = f"the page of {RUNS * POINTS} sweep points: size, seconds to open in chromium (an empty page: {empty:.2f})"
    rows = [["what", "value"], [what, f"{megabytes:.1f} MB, {full:.2f} s"]]
    publish_all(given.docs, {"speed_page": (f"median of {REPEATS} openings", rows)})


if __name__ == "__main__":
    main()
