"""Cases of what a person types, and of what the program answers: settings, configuration files and reports."""

import re
import shutil
from pathlib import Path

from benchmarks.case_outcome import QUICK, Checkout, Judged, both, case


@case("AI", "values that crash late")
def late_values(b: Checkout) -> Judged:
    shapes = ("--gcn.hidden-dim", "100000"), ("--train.lr", "inf"), ("--data.val-fraction", "1e-300")
    network = ("--output-dir", b.place / "out", "--tracker", "none", "--reporter.formats", "svg")
    judged = []
    for flag, value in shapes:
        ended = b.call([*network, flag, value])
        said = ended.code == 2 and "Traceback" not in ended.err and re.search("give a|lower gcn", ended.err) is not None
        judged.append((said, f"{flag} {value}: exit {ended.code}"))
    few = b.call([*network, "--gcn.steps", "10"])
    return both(*judged, (few.code == 0, f"--gcn.steps 10: exit {few.code}"))


@case("AV", "a target that no number of these images can show")
def hopeless_target(b: Checkout) -> Judged:
    ended = b.call(["--kappa", "auto", "--tracker", "none", "--output-dir", b.place / "out"])
    said = "images" in ended.err.strip().splitlines()[-1]
    return ended.code != 0 and said and ended.seconds < 20, f"{ended.seconds:.0f} s, {ended.last}"


@case("R", "the YAML library's own words")
def own_words(b: Checkout) -> Judged:
    judged = []
    for text in ("mask_layer: None", "forget_class: no", "train: {epochs: many}"):
        (b.place / "c.yaml").write_text(text + "\n")
        ended = b.call(["--config", b.place / "c.yaml", "--output-dir", b.place / "out"])
        field_name = text.partition(":")[0] if "{" not in text else "epochs"
        clear = ended.code == 0 or (ended.refused and "$" not in ended.err and field_name in ended.err)
        judged.append((clear, f"{text}: {ended.last[:110]}"))
    return both(*judged)


@case("S", "a sweep takes what a run takes")
def sweeps_take_all(b: Checkout) -> Judged:
    text = "sweep:\n  over:\n    forget_class: [zero, [one, two]]\n"
    (b.place / "s.yaml").write_text("train: {epochs: 1}\n" + text)
    code = f"""from pathlib import Path; from commands.sweep import load_sweep, expand
print(len(expand(*load_sweep([Path({str(b.place / "s.yaml")!r})]))))"""
    said = b.python_says(code)
    return said.stdout.strip() == "2", said.stdout.strip() or said.stderr.strip().splitlines()[-1][:150]


@case("AO", "a secret by interpolation")
def secrets(b: Checkout) -> Judged:
    (b.place / "c.yaml").write_text("dataset_path: ${oc.env:HF_TOKEN}\n")
    ended = b.call(
        ["--config", b.place / "c.yaml", "--output-dir", b.place / "out", *QUICK.split()], env={"HF_TOKEN": "sesame"}
    )
    return ended.refused and "sesame" not in ended.said, "shown" if "sesame" in ended.said else ended.last


@case("AS", "two ways in, two defaults")
def one_default(b: Checkout) -> Judged:
    code = """from core.config import PipelineConfig, plain; from core.yaml_files import load_config
from pathlib import Path
a, b = plain(PipelineConfig()), plain(load_config([Path("configs/default.yaml")]))
print(sorted(name for name in a if a[name] != b[name] and name not in ("tracker",)))"""
    said = b.python_says(code).stdout.strip()
    return said == "[]", f"fields that differ: {said}"


@case("AN", "cells of tables")
def table_cells(b: Checkout) -> Judged:
    code = """from reporting.write import as_csv, as_text
print(as_csv([["a", "b", "c"], ["=1+1", "-3.2", "@a"]])); print(as_text([["a", "b"], ["x|y", "1"]]))"""
    said = b.python_says(code).stdout
    run = re.search(r"(^|,)\"?[=@]", said, re.MULTILINE) is None and "-3.2" in said
    whole = r"x\|y" in said or "x|y" not in said
    return both((run, f"CSV: {'safe' if run else 'a formula'}"), (whole, f"Markdown: {'whole' if whole else 'split'}"))


@case("AU", "a comparison says what it did")
def comparison_says(b: Checkout) -> Judged:
    one, two = b.copy_of_default(), Path(shutil.copytree(b.default, b.place / "two"))
    ended = b.call(["report", "--compare", one, two, "--output-dir", b.place / "out"])
    named = "compare-1" in ended.said
    return ended.code == 0 and named and " ahead" not in ended.out, f"exit {ended.code}, files named: {named}"


@case("AW", "what passes for fine")
def fine_is_earned(b: Checkout) -> Judged:
    words, scores = set(), []
    for record in b.records(str(b.default)):
        score = record["methods"]["mimu"]["forget_score"]
        if 20 < score < 95:
            scores.append(score)
            words |= {one["key"] for one in record["verdicts"]["mimu"]}
    return "fine" not in words, f"forget scores {scores}: {', '.join(sorted(words))}"
