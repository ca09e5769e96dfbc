"""What is made on a GPU is what is made on the CPU, up to rounding. Without a GPU the CPU is held against itself, which
shows that the comparison works, and the GPU's half is skipped.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config import PipelineConfig
from data import GraphDataset
from graphs.subsets import hard_topk, sinkhorn_topk
from pipeline import Pipeline
from tests.helpers.common import tiny

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]
SCORES = {"forget_score": 3.0, "retain_score": 1.0, "forget_probability": 0.03, "forget_loss": 0.1, "retain_loss": 0.01}
"""The five metrics -> how far rounding may move them: one image of the smaller side, or a hundredth."""
ALIKE = ("default", "taylor_mask", "mimu", "mimu_refined")  # that draw nothing on the device


def config_of(folder: Path, device: str, **more) -> PipelineConfig:
    made = tiny(folder, device=device, topK_list=(300,), kappa_list=(100,), **more)
    return replace(made, eval=replace(made.eval, methods=ALIKE, metrics=("core",), references=0))


@pytest.fixture(scope="module")
def cpu(tmp_path_factory) -> Pipeline:
    """A run on the CPU; tests only read it."""
    pipeline = Pipeline(config_of(tmp_path_factory.mktemp("cpu"), "cpu"))
    pipeline.run()
    return pipeline


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kappa", [1, 40, 999])
def test_a_soft_mask_has_its_budget_and_a_hard_one_the_largest_scores(device, kappa):
    theta = torch.randn(1000, generator=torch.Generator().manual_seed(kappa))
    soft = sinkhorn_topk(theta.to(device), kappa, 0.2).cpu()
    assert float(soft.sum(dtype=torch.float64)) == pytest.approx(kappa, rel=1e-5)
    assert torch.allclose(soft, sinkhorn_topk(theta, kappa, 0.2), atol=1e-5)
    assert torch.equal(hard_topk(theta.to(device), kappa).cpu(), theta >= theta.sort().values[-kappa])


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_and_records_of_a_given_classifier(device, cpu, tmp_path):
    given = cpu.stages.classifier_path
    pipeline = Pipeline(config_of(tmp_path / "run", device, trained_vision_model_path=given))
    (record,), (expected,) = pipeline.run(), cpu.run()
    assert record["provenance"]["device"].startswith(device)
    graphs, wanted = (GraphDataset(one.stages.run_gcn_graph_generation()) for one in (pipeline, cpu))
    assert torch.equal(graphs.labels, wanted.labels)
    every = torch.arange(len(wanted))
    for made, other in zip(graphs.vectors(every).delta, wanted.vectors(every).delta, strict=True):
        assert torch.allclose(made, other, atol=1e-5)
    for name in ALIKE:
        for metric, most in SCORES.items():
            value = record["methods"][name][metric]
            assert value == pytest.approx(expected["methods"][name][metric], abs=most), (name, metric)


@pytest.mark.parametrize("device", DEVICES)
def test_a_classifier_that_is_trained_there_scores_alike(device, cpu, tmp_path):
    pipeline = Pipeline(config_of(tmp_path / "run", device))
    (record,), (expected,) = pipeline.run(), cpu.run()
    score, wanted = (one["methods"]["default"]["retain_score"] for one in (record, expected))
    assert score == pytest.approx(wanted, abs=5)
    assert {one.device.type for one in pipeline.stages.classifier.parameters()} == {device}
