"""Records made by hand, what a clock says in one, and the data that a page carries."""

import json
import re
from typing import Any

from core.artifacts import SCHEMA

METRICS = {
    "forget_loss": ("nats", "higher"),
    "retain_loss": ("nats", "lower"),
    "forget_probability": ("probability", "lower"),
    "forget_score": ("%", "lower"),
    "retain_score": ("%", "higher"),
    "unheard_of": ("furlongs", "lower"),
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def values(forget: float, retain: float, changed: int) -> dict:
    scores = {"forget_score": forget, "retain_score": retain, "unheard_of": forget / 8}
    rest = {"forget_loss": 1.0, "retain_loss": 2.0, "forget_probability": forget / 100}
    return rest | scores | {"seconds": 0.5, "weights_changed": changed}


def about(unit: str, better: str) -> dict:
    """What a record says of a metric."""
    return {"unit": unit, "better": better, "target": "", "definition": "By hand.", "first": True}


def confusion(forget: int, classes: int) -> list[list[int]]:
    """Ten images of each class, all recognised but those of class 1, of which `forget` are: the rest become class 2."""
    rows = [[10 * (i == j) for j in range(classes)] for i in range(classes)]
    rows[1] = [0, forget, 10 - forget] + [0] * (classes - 3)
    return rows


def record(
    top_k: int, kappa: int, validation: tuple, test: tuple, classes: int = 3, seed: int = 0, run: str = "abc"
) -> dict[str, Any]:
    others = {"default": values(90, 80, 0), "novel": values(40, 60, 9)}
    name, methods = f"{top_k}-{kappa}" + (f"-{seed}" if seed else ""), ("mimu", "default", "novel")
    mask = f"eval/metrics_and_plots/masks/p/{name}_mimu.safetensors"
    return {
        "schema": SCHEMA,
        "id": name,
        "run": run,
        "model": "M",
        "dataset": "D",
        "forget_class": [1],
        "forget_names": ["1"],
        "seed": seed,
        "config": {"seed": seed, "kappa_list": [kappa], "train": {"epochs": 2}},
        "provenance": {
            "commit": None,
            "dirty": False,
            "versions": {},
            "device": "cpu",
            "started": f"2026-01-0{seed + 1}",
            "seconds": {"evaluation": 1.5},
            "repeatability": "to the bit",
            "plugins": {},
        },
        "top_k": top_k,
        "kappa": kappa,
        "mask_layer": [-2],
        "num_graph_vertices": 1000,
        "num_graph_edges": 9000,
        "mask_path": mask,
        "mask_paths": {"mimu": mask},
        "mask_sha256": {"mimu": "0" * 64},
        "classifier_path": "checkpoints/none/c.safetensors",
        "gcn_path": "checkpoints/none/g.safetensors",
        "metrics": {name: about(unit, better) for name, (unit, better) in METRICS.items()},
        "images": "1f2e3d4c5b",
        "num_classes": classes,
        "split_sizes": {"train": 30, "val": 10, "test": 10},
        "classifier_sha256": f"trained-{seed}",
        "given": {"classifier": None, "graphs": None, "gcn": None},
        "code": "c0de",
        "objective": "elbo",
        "answer": "mimu",
        "auto": None,
        "labels": {"mimu": "MIMU", "default": "untouched", "novel": "a novel method"},
        "axes": {"mimu": ["topK", "kappa"], "default": [], "novel": ["kappa"]},
        "methods": {"mimu": values(*test, kappa), **others},
        "validation": {"mimu": values(*validation, kappa), **others},
        "weight_histogram": {"edges": [-1, 0, 1], "kept": [5, 4], "switched_off": [1, 0]},
        "verdicts": {name: [] for name in methods},
        "intervals": {name: {} for name in methods},
        "undefined": {name: {} for name in methods},
        "by_stage": {name: {} for name in methods},
        "mask_map": [{"layer": "w", "shape": [4, 2], "cells": [[1, 0], [2, 5]]}],
        "confusion": {"mimu": confusion(2, classes), "default": confusion(9, classes), "novel": confusion(5, classes)},
        "class_probability": {name: [1 / classes] * classes for name in methods},
        "samples": {"images": [], "labels": []},
        "costs": {"seconds": "s per request"},
        "references": [],
        "degradation": {name: {"forget_score": -2.0} for name in methods},
        "mask_efficacy": {"forget_score": 90.0},
        **{
            field: dict.fromkeys(methods)
            for field in ("settings", "tuning", "integrity", "class_score", "taken_for", "said_of_samples")
        },
        "skipped_images": [],
        "duplicates": {},
        "image_notes": [],
        "footing": {"accuracy": 90.0, "low": 80.0, "high": 95.0, "chance": 33.3, "near_chance": None},
    }


def full(top_k: int, kappa: int, forget: float, **more) -> dict:
    """A record with images to show."""
    one = record(top_k, kappa, (forget, 79), (forget, 78), **more)
    one["samples"] = {"images": [PIXEL, PIXEL], "labels": [1, 1]}
    one["said_of_samples"] |= {"mimu": [[2, 0.9], [0, 0.5]], "default": [[1, 0.99], [1, 0.8]]}
    return one


def whole(kappa: int = 100) -> dict[str, Any]:
    """A record with something in every field."""
    one = record(5, kappa, (10, 70), (12, 69))
    return one | {
        "references": [{"index": 0, "sane": False, "why": "it says so", "forget_score": 3.0, "retain_score": None}],
        "samples": {"images": ["iVBO"], "labels": [1]},
        "said_of_samples": {name: [[2, 0.5]] for name in one["labels"]},
        "settings": one["settings"] | {"novel": {"lr": 0.1}},
        "tuning": one["tuning"] | {"novel": [{"lr": 0.1, "avg_gap": None}]},
        "integrity": one["integrity"] | {"mimu": {"restored": True}},
        "skipped_images": [{"path": "a/b.png", "reason": "empty"}],
        "duplicates": {"train": {"images": 2, "example": ["a", "b"]}},
        "image_notes": ["dark"],
    }


def untimed(value: Any) -> Any:
    """A record without what a clock says."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not key.startswith(("started", "seconds"))}
    return value


def page_data(html: str) -> list[dict]:
    """The data that a page carries."""
    found = DATA.search(html)
    assert found, "the page carries no data"
    return json.loads(found[1])
