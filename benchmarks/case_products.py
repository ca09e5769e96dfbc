"""Cases of what runs leave and are given: classifiers, networks, masks, records and stages, sound or damaged."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks import case_inputs as make
from benchmarks.case_outcome import Checkout, Judged, Outcome, both, case


@case("D", "a reference that did not forget")
def references_are_checked(b: Checkout) -> Judged:
    root = make.tree(b.place / "two", ("cat", "dog"))
    ended = b.tree(root, "--forget-class", "cat", "--eval.references", "1", "--eval.metrics", "core", "retrain")
    record = b.records()[0] if b.records() else {}
    gap = record.get("methods", {}).get("mimu", {}).get("avg_gap", "no record")
    return gap is None and "retrained" in ended.said, f"Avg Gap against it: {gap if gap is None else 'a number'}"


def _given_classifier(b: Checkout, name: str) -> Outcome:
    path = next((b.default / "checkpoints/classifier").glob("*/classifier.safetensors"))
    if not (b.place / "checkpoints").exists():
        make.odd_checkpoints(path, b.place / "checkpoints")
    return b.run(["digits"], "--trained-vision-model-path", b.place / "checkpoints" / name, out=name)


@case("I", "a checkpoint in bfloat16")
def odd_dtypes(b: Checkout) -> Judged:
    ended = _given_classifier(b, "bf16.safetensors")
    return ended.refused or (ended.code == 0 and "bfloat16" in ended.said), ended.last


@case("O", "a checkpoint with NaN")
def numbers_that_are_none(b: Checkout) -> Judged:
    ended = _given_classifier(b, "nan.safetensors")
    return ended.refused and "nan.safetensors" in ended.err and "finite" in ended.err, ended.last


@case("Q", "a checkpoint of one's own")
def own_checkpoints(b: Checkout) -> Judged:
    judged = []
    for name in ("state.pt", "module.safetensors"):
        ended = _given_classifier(b, name)
        judged.append((ended.code == 0, f"{name}: {ended.last}"))
    return both(*judged)


@case("AQ", "NaN in a given network")
def network_is_blamed(b: Checkout) -> Judged:
    code = """import sys; from safetensors import safe_open; from safetensors.torch import save_file
file = safe_open(sys.argv[1], "pt"); state = {k: file.get_tensor(k) for k in file.keys()}
facts = {k: v for k, v in file.metadata().items() if k != "digest"}
next(iter(state.values())).view(-1)[0] = float("nan"); save_file(state, sys.argv[2], metadata=facts)"""
    network = b.place / "nan_gcn.safetensors"
    shipped = b.project / "pretrained/gcn_mlp.safetensors"
    subprocess.run([b.python, "-c", code, shipped, network], check=True)
    ended = b.run(["digits"], "--gcn-path", network)
    return ended.refused and network.name in ended.err, ended.last


@case("AM", "files of other origins")
def foreign_files(b: Checkout) -> Judged:
    make.bomb(b.place / "bomb/MNIST/raw")
    packed = b.run(["mnist", "--dataset-path", b.place / "bomb/MNIST/raw"], out="a")
    graphs = next((b.copy_of_default() / "datasets/Graphs").iterdir())
    victim = max(graphs.glob("*.npy"), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"")
    classifier = next((b.default / "checkpoints/classifier").glob("*/classifier.safetensors"))
    empty = b.run(["digits"], "--graph-dir", graphs, "--trained-vision-model-path", classifier, out="b")
    return both(
        (packed.refused and packed.megabytes < 1500, f".gz bomb: exit {packed.code}, {packed.megabytes:.0f} MB"),
        (empty.refused, f"empty .npy: {empty.last}"),
    )


@case("AX", "a mask meets a layer of another classifier")
def mask_knows_its_parent(b: Checkout) -> Judged:
    mask = next((b.default / "eval/metrics_and_plots/masks").glob("*/*.safetensors"))
    code = f"""import torch; from unlearn.masks import Mask, masked; from model import HookedMLPClassifier
mask = Mask.load(__import__("pathlib").Path({str(mask)!r})); mask = mask[0] if isinstance(mask, tuple) else mask
model = HookedMLPClassifier(10, 1, 8)
with masked(model.weights(-2), mask): print("applied")"""
    said = b.python_says(code)
    refused = "applied" not in said.stdout and "another" in said.stderr
    return refused, "refused" if refused else "applied without a word"


def _again(b: Checkout, out: Path) -> Outcome:
    return b.call(["--output-dir", out, "--tracker", "none"])


def _figures(out: Path) -> dict[str, object]:
    """What the records of a folder hold of every method, seconds left out: those of a new measurement differ."""
    found = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))
    records = [json.loads(path.read_text()) for path in found]

    def scores(of: dict) -> dict:
        return {
            name: {metric: value for metric, value in values.items() if not metric.startswith("seconds")}
            for name, values in of.items()
        }

    return {one["id"]: (scores(one["methods"]), scores(one["validation"]), one["confusion"]) for one in records}


@case("AA", "damaged products")
def damage_is_seen(b: Checkout) -> Judged:
    judged, sound = [], _figures(b.default)
    for kind in ("record", "mask", "figure"):
        out = Path(shutil.copytree(b.default, b.place / kind))
        below = out / "eval/metrics_and_plots"
        if kind == "record":
            path = sorted((below / "json").glob("*/*.json"))[0]
            path.write_text(re.sub(r'("forget_loss": \d)\.(\d)', r"\1.9\2", path.read_text(), count=40))
        elif kind == "mask":
            one, two = sorted((below / "masks").glob("*/*_mimu.safetensors"))[:2]
            one.write_bytes(two.read_bytes())
            path = one
        else:
            path = sorted((below / "plots").glob("*/*.svg"))[0]
            path.write_bytes(path.read_bytes()[:1000])
        ended = _again(b, out)
        mended = path.stat().st_size > 1000 and _figures(out) == sound and path.name in ended.err
        judged.append((ended.code == 0 and mended, f"{kind}: {'made anew' if mended else 'used'}"))
    return both(*judged)


@case("AB", "a broken record")
def broken_record(b: Checkout) -> Judged:
    out = b.copy_of_default()
    sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0].write_text("")
    ended = _again(b, out)
    return ended.code == 0 and _figures(out) == _figures(b.default), ended.last


@case("AC", "a record that leads out of the folder")
def paths_stay_inside(b: Checkout) -> Judged:
    out = b.copy_of_default()
    path = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0]
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"run": "../../../../../outside", "seed": "../.."}))
    b.call(["report", "--output-dir", out])
    outside = [found.name for found in b.place.rglob("*outside*")]
    return not outside, f"written outside: {outside or 'nothing'}"


@case("AD", "one bad record")
def bad_record(b: Checkout) -> Judged:
    judged = []
    for name, value in (("methods", {"mimu": 3}), ("intervals", 7), ("mask_map", "x"), ("dataset", float("nan"))):
        out = Path(shutil.copytree(b.default, b.place / name))
        path = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        ended = b.call(["report", "--output-dir", out])
        judged.append((ended.code == 0 and "Traceback" not in ended.err, f"{name}: exit {ended.code}"))
    return both(*judged)


@case("AF", "locks of the dead, and no locks at all")
def stale_locks(b: Checkout) -> Judged:
    out = b.copy_of_default()
    stage = next((out / "checkpoints/classifier").iterdir())
    (stage.parent / f".{stage.name}.lock").touch()
    shutil.rmtree(stage)
    ended = _again(b, out)
    left = [path.name for path in out.rglob("*.lock") if path.stat().st_size == 0 and path.parent == stage.parent]
    return ended.code == 0 and not left, f"exit {ended.code}, left: {left or 'nothing'}"


@case("AR", "a damaged stage")
def damage_is_said(b: Checkout) -> Judged:
    out = b.copy_of_default()
    path = next((out / "checkpoints/classifier").glob("*/classifier.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    ended = _again(b, out)
    said = re.search(r"damaged|\bchanged|does not match", ended.err) is not None
    return ended.code == 0 and said, "said" if said else "not a word"


@case("AT", "the run of a given network")
def two_networks(b: Checkout) -> Judged:
    flags = ["--output-dir", b.place / "out", "--tracker", "none", "--train.epochs", "2", "--gcn.steps", "20"]
    flags += ["--eval.references", "0", "--eval.methods", "mimu", "random", "default", "--reporter.formats", "svg"]
    b.call([*flags, "--kappa-list", "200"])
    b.call([*flags, "--kappa-list", "400", "--gcn-path", b.project / "pretrained/gcn_mlp.safetensors"])
    runs = {record["run"] for record in b.records()}
    return len(runs) == 2, f"{len(b.records())} records, {len(runs)} runs"
