"""Hooks, modes and checkpoints: what looks inside a model leaves no trace, and counts what it sees."""

import pytest
import torch
from torch import nn

from core.config import Aggregations, GraphConfig, SupportedDatasets, SupportedVisionModels, UserError
from data import GraphDataset, GraphGenerator
from graphs.edge_list import MAX_EDGES, edge_index
from graphs.layout import layer_graph
from model import (
    VISION_MODELS,
    HookedMLPClassifier,
    MaskingGCN,
    apply_linear,
    capture,
    inspecting,
    save_classifier,
    vision_model_loader,
)
from utils_data import get_unlearning_dataset


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("architecture", list(SupportedVisionModels))
def test_every_model_splits_into_prefix_and_head(architecture):
    torch.manual_seed(0)
    model = vision_model_loader(architecture, 7, 3, 32).eval()
    images = torch.randn(3, 3, 32, 32)
    for layer in range(-len(model.linears), len(model.linears)):
        torch.testing.assert_close(model.head(model.prefix(images, layer), layer), model(images))
    assert all(linear.bias is None for linear in model.linears)
    assert model(images).shape == (3, 7)
    assert architecture in VISION_MODELS


def test_layer_shapes_are_those_of_the_method():
    shapes = {
        SupportedVisionModels.HookedMLPClassifier: [(128, 784), (64, 128), (10, 64)],
        SupportedVisionModels.HookedResnet: [(128, 512), (10, 128)],
    }
    for architecture, expected in shapes.items():
        model = vision_model_loader(architecture, 10, 1, 28)
        assert [tuple(linear.weight.shape) for linear in model.linears] == expected
    with pytest.raises(UserError, match="mask_layer is 3, but HookedMLPClassifier has 3 linear layers: choose from -3"):
        HookedMLPClassifier(10, 1, 8).target(3)


def test_one_weight_per_sample_is_one_after_the_other():
    h, weight = torch.randn(4, 5), torch.randn(4, 3, 5)
    expected = torch.stack([weight[i] @ h[i] for i in range(4)])
    torch.testing.assert_close(apply_linear(h, weight), expected)


def test_hook_is_there_inside_and_gone_after_even_an_error():
    model = HookedMLPClassifier(10, 1, 8)
    assert hooks(model) == 0
    with capture(model.target(-2)):
        assert hooks(model) == 1
    assert hooks(model) == 0

    def fails() -> None:
        with capture(model.target(-2)):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert hooks(model) == 0


def test_capture_counts_calls():
    shared = nn.ReLU()
    with capture(shared) as record:
        with pytest.raises(RuntimeError, match="ran 0 times"):
            record.take()
        nn.Sequential(shared, nn.Identity(), shared)(torch.ones(2))
        with pytest.raises(RuntimeError, match="ran 2 times in one forward pass"):
            record.take()


def test_cut_capture_ends_the_backward_pass_there():
    layer = nn.Linear(3, 2)
    with capture(layer, cut=True) as record:
        out = layer(torch.ones(1, 3)).sum()
        _, z = record.take()
    (delta,) = torch.autograd.grad(out, z)
    assert delta.tolist() == [[1, 1]]
    assert z.grad_fn is None


def test_inspecting_gives_every_flag_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    model[1].eval()
    model[2].weight.requires_grad_(False)

    def flags() -> list:
        return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]

    before, statistics = flags(), model[0].running_mean.clone()
    with inspecting(model):
        assert not any(flags())
        model(torch.randn(5, 3))
    assert flags() == before
    assert torch.equal(model[0].running_mean, statistics)


def test_classifier_file_round_trip_and_refusals(tmp_path):
    path, architecture = tmp_path / "c.safetensors", SupportedVisionModels.HookedMLPClassifier
    model = vision_model_loader(architecture, 10, 1, 8)
    save_classifier(model, path, architecture, (10, 1, 8), {"val_score": 1.0})
    again = vision_model_loader(architecture, 10, 1, 8, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="num_classes 10, needed 100; channels 1, needed 3"):
        vision_model_loader(architecture, 100, 3, 8, path)
    with pytest.raises(UserError, match="is a classifier, no GCN"):
        MaskingGCN.load(path)


@pytest.mark.parametrize("aggregation", list(Aggregations))
def test_gcn_file_round_trip(tmp_path, aggregation):
    gcn = MaskingGCN(5, 2, 6, aggregation)
    gcn.save(tmp_path / "g.safetensors", {"topK": 3})
    again, facts = MaskingGCN.load(tmp_path / "g.safetensors")
    x = torch.randn(1, 3, 4, 5)
    assert torch.equal(gcn(x), again(x))
    assert facts["topK"] == 3


@pytest.mark.slow
def test_graph_file_and_explicit_form(tmp_path):
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 32)
    model = HookedMLPClassifier(10, 1, 8)
    generator = GraphGenerator(model, data, -1, GraphConfig(num_samples=30, min_per_class=3, batch_size=4))
    facts = generator.generate(tmp_path)
    graphs = GraphDataset(tmp_path, transform=lambda graph: graph.clone())
    assert facts == {"num_samples": 30, "num_vertices": 640, "num_edges": 640 * 72}
    assert torch.bincount(graphs.labels).tolist() == [3] * 10
    one = graphs[4]
    assert one.edge_index.shape == (2, 640 * 72)
    assert one.y.tolist() == [int(graphs.labels[4])]
    torch.testing.assert_close(one.x.view(10, 64, 4), graphs.features([4])[0])
    torch.testing.assert_close(graphs.features([4])[0].flatten(0, 1).mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_edges_that_do_not_fit_are_refused_by_size():
    with pytest.raises(UserError, match=r"6,\d{3},\d{3},\d{3} edges \(\d+ GB\) of 1000 x 2048"):
        edge_index(layer_graph(1000, 2048))
    assert MAX_EDGES > 41_811_968  # 128 x 512 is allowed


def test_a_layer_that_maps_no_vectors_is_refused(tmp_path):
    generator = GraphGenerator(HookedMLPClassifier(10, 1, 8), get_unlearning_dataset(SupportedDatasets.DIGITS, 32))
    with pytest.raises(UserError, match="not vectors to vectors"):
        generator.flatten_in_out_activation_single_layer(torch.zeros(2, 3, 4), torch.zeros(2, 5))
