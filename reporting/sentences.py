"""Put a run into sentences: its answer, what speaks against each method, and what to know of the classifier.

Everything is read from the records; `tables` chooses the points that are spoken of.
"""

from collections.abc import Mapping, Sequence

from core.records import SCORES, WORDS, Record
from reporting.families import Run, classes_of, named_classes
from reporting.tables import REFERENCES, Best, best_points, choose, known
from reporting.write import Lead

DEEP = "mimu_deep"  # goes on to the features, so that its word stands beside the answer's
TERMS = {"UA": "UA", "RA": "RA", "retain_score": "TA", "MIA_efficacy": "MIA"}  # of Avg Gap
FORGOTTEN, ALIKE = 1.0, 1.0  # percent of the classes that a method leaves at most; points between methods
MANY_NAMES = 6  # of methods: from here on, those that are not meant are named where they are fewer


def warnings(records: Run) -> list[str]:
    """Say that the classifier is near chance, if it is, and name the references that failed their check."""
    near_chance = records[0]["footing"]["near_chance"]
    unfit = (one for one in records[0]["references"] if not one["sane"])
    left_out = (
        f"Retrained model {one['index']}, not used to choose or to compare with: {one['why']}." for one in unfit
    )
    return [*([f"Warning: {near_chance}."] if near_chance else []), *left_out]


def remarks(records: Run) -> list[str]:
    """Return each verdict as a sentence with its methods; also why metrics have no value."""
    said: dict[str, list[str]] = {}
    best = best_points(records)
    for one in best:
        for sentence in (*(said["sentence"] for said in one.verdicts), *_undefined(one)):
            said.setdefault(sentence, []).append(one.label)
    every = [one.label for one in best]
    found = [f"{_of_all(labels, every)}: {text}." for text, labels in said.items() if text != "nothing found"]
    same = saturated({one.method: one.values for one in best if one.method not in REFERENCES})
    return [*found, f"{same[:1].upper()}{same[1:]}."] if same else found


def saturated(values: Mapping[str, Mapping[str, float | None]]) -> str:
    """Name the terms of Avg Gap that say the same of every method that forgets, and so tell none from another.

    Args:
        values: by method.

    Returns:
        A clause; "" where there are none, or fewer than two methods forget.
    """
    names = ("forget_score", *TERMS)
    whole = [[value for name in names if known(value := one.get(name))] for one in values.values()]
    forget = [terms for left, *terms in (one for one in whole if len(one) == len(names)) if left <= FORGOTTEN]
    spans = zip(TERMS.values(), zip(*forget, strict=True), strict=True) if len(forget) > 1 else ()
    said = [f"{short} ({min(v):.1f} to {max(v):.1f} %)" for short, v in spans if max(v) - min(v) <= ALIKE]
    count = f"the {len(forget)} methods that leave at most {FORGOTTEN:.0f} % of the class"
    return f"saturated terms of Avg Gap, among {count}: {', '.join(said)}" if said else ""


def _undefined(best: Best) -> list[str]:
    """Say why metrics have no value for a method: a sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for metric, why in (best.record["undefined"].get(best.method) or {}).items():
        by_reason.setdefault(why, []).append(metric)
    return [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not defined: {why}"
            for why, names in by_reason.items()]  # fmt: skip


def _of_all(labels: Sequence[str], every: Sequence[str]) -> str:
    """Name some of all methods; where most are meant, those that are not."""
    others = [label for label in every if label not in labels]
    if len(labels) < MANY_NAMES or len(others) >= len(labels):
        return ", ".join(labels)
    return f"all methods but {', '.join(others)}" if others else "all methods"


def is_answered(records: Run) -> bool:
    """Return whether the run's answer can be put into words: its method and the untouched classifier have values."""
    answer = records[0]["answer"]
    if not {answer, "default"} <= set(records[0]["labels"]):
        return False
    record = choose(records, answer)
    needed = [record["methods"][name].get(score) for name in (answer, "default") for score in SCORES]
    return all(map(known, [*needed, record["methods"][answer].get("weights_changed")]))


def answer_of(records: Run) -> Record | None:
    """Return the record at the chosen point of the answer's method; None if several were not measured."""
    answer = records[0]["answer"]
    if any(answer in record["validation"] for record in records):
        return choose(records, answer)
    return records[0] if len(records) == 1 else None


def share_changed(record: Record) -> str:
    """Say which share of the masked layers the answer's mask switches off: "20.0 % of the layer"."""
    share = 100 * record["methods"][record["answer"]]["weights_changed"] / record["num_graph_vertices"]
    return f"{share:.1f} % of the {'masked layers' if len(record['mask_layer']) > 1 else 'layer'}"


def _in_a_word(record: Record, method: str) -> list[str]:
    """Its word and what that rests on, as sentences in pieces; the word itself is a `Lead`."""
    words = (one for one in record["verdicts"][method] if one["key"] in WORDS)
    pieces = ([" In a word: ", Lead(one["key"]), f", {one['sentence']}."] for one in words)
    return [piece for some in pieces for piece in some]


def of_features(record: Record) -> list[str]:
    """What the method that goes on to the features does, where a word is said of it and it is not the answer."""
    word = _in_a_word(record, DEEP) if DEEP in record["labels"] and record["answer"] != DEEP else []
    if not word:
        return []
    values, is_or_are = record["methods"][DEEP], "are" if len(record["forget_class"]) > 1 else "is"
    return [
        f" {record['labels'][DEEP]} changes {values['weights_changed']} numbers: {classes_of(record)} {is_or_are} "
        f"recognised {values['forget_score']:.1f} % of the time, the other classes score "
        f"{values['retain_score']:.1f} %.",
        *word,
    ]


def headline(records: Run) -> str:
    """Put the run's answer into words, from the chosen point of the method that gives it; then the features' word."""
    return "".join(headline_pieces(records))


def headline_pieces(records: Run) -> list[str]:
    """The same in pieces, of which those that matter most (`Lead`) are bold where a format has bold."""
    record = choose(records, records[0]["answer"])
    after, before = record["methods"][record["answer"]], record["methods"]["default"]
    is_or_are, them = ("are", "them") if len(record["forget_class"]) > 1 else ("is", "it")
    text = (
        f"Switching off {after['weights_changed']} weights ({share_changed(record)}), {named_classes(record)} "
        f"{is_or_are} recognised {after['forget_score']:.1f} % of the time (before: "
        f"{before['forget_score']:.1f} %); the other classes score {after['retain_score']:.1f} % "
        f"(before: {before['retain_score']:.1f} %)."
    )
    auto = record["auto"]
    if auto and not auto["achieved"]:
        target = f"forget score <= {auto['tau']} %, retain score at most {auto['epsilon']} points lower"
        text = (
            f"Not achievable: no kappa tried shows {target}, with 95 % intervals on validation images. The best "
            f"trade-off found, not to be taken for {them} forgotten: {text}"
        )
    return [text, *_in_a_word(record, record["answer"]), *of_features(record)]
