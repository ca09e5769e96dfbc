"""Graphs over several layers: layout, message passing, features, masks and the pipeline, each against a naive form."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from core.artifacts import appending_array
from core.config import (
    GCNConfig,
    GraphConfig,
    PipelineConfig,
    RefineConfig,
    ReporterConfig,
    SupportedDatasets,
    TrainConfig,
    UserError,
)
from core.yaml_files import load_config
from data import GraphDataset, GraphGenerator
from graphs.edge_list import edge_index
from graphs.layout import WeightGraph, layer_graph
from model import HookedMLPClassifier, HookedModel, MaskingGCN, capture
from pipeline import Pipeline
from tests.helpers.common import APART, MIXED, NET_5432
from unlearn.masks import Mask, masked, random_mask
from utils_data import Images, UnlearningDataset

GRAPHS = pytest.mark.parametrize("graph", [NET_5432, APART, MIXED], ids=["5-4-3-2", "apart", "mixed"])


def touched(graph: WeightGraph) -> list[set]:
    """The two neurons of each node, by name, from the definition."""
    found, level = [], 0
    for place, (m, n) in enumerate(graph.shapes):
        level += 0 if place and graph.joined[place - 1] else 1
        found += [{(level, j), (level + 1, i)} for i in range(m) for j in range(n)]
        level += 1
    return found


@GRAPHS
def test_edges_and_degrees_come_from_shared_neurons(graph):
    neurons = touched(graph)
    naive = {(a, b) for a in range(len(neurons)) for b in range(len(neurons)) if a != b and neurons[a] & neurons[b]}
    edges = edge_index(graph)
    assert edges.shape[1] == graph.num_edges == len(naive)
    assert {tuple(edge) for edge in edges.T.tolist()} == naive
    counted = torch.bincount(edges[0], minlength=graph.num_vertices)
    for degree, part in zip(graph.degrees, counted.split(graph.sizes), strict=True):
        assert set(part.tolist()) == {degree}


def test_whole_mlp_is_counted():
    graph = HookedMLPClassifier(10, 1, 28).weight_graph(None)
    assert graph.num_vertices == 109_184
    assert graph.degrees == (784 + 128 - 2 + 64, 128 + 64 - 2 + 784 + 10, 64 + 10 - 2 + 128)
    assert graph.num_edges == 100_352 * 974 + 8_192 * 984 + 640 * 200
    assert graph.names == ("linears.0.weight", "linears.1.weight", "linears.2.weight")


@pytest.mark.parametrize("residual", [False, True])
def test_backward_twice_and_single_precision(residual):
    """The backward pass uses up what the forward pass has kept: a second one makes it again, and gives the same."""
    torch.manual_seed(0)
    gcn, x = MaskingGCN(4, 3, 8, residual=residual), torch.randn(1, 16, 32, 4)
    theta = gcn(x)
    first, second = (torch.autograd.grad(theta.sum(), list(gcn.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(theta, gcn.double()(x.double()).float(), rtol=1e-5, atol=1e-6)


class Tiny(HookedModel):
    """5-4-3-2."""

    def __init__(self) -> None:
        super().__init__((5, 4, 3, 2))

    def embed(self, images):
        return images.flatten(1)


def tiny_setting(seed: int = 0) -> tuple[Tiny, UnlearningDataset]:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (24, 1, 1, 5), dtype=torch.uint8)
    images = Images(pixels, torch.arange(24) % 2, torch.full((1, 1, 1), 127.0), torch.full((1, 1, 1), 70.0))
    return Tiny().eval(), UnlearningDataset(
        SupportedDatasets.MNIST, dict.fromkeys(("train", "val", "test"), images), 7, 1, 0
    )


@pytest.mark.parametrize("mask_layer", [None, (-2, -1), (0, 2), -1])
def test_features_are_those_of_per_sample_autograd(mask_layer, tmp_path):
    model, data = tiny_setting()
    generator = GraphGenerator(model, data, mask_layer, GraphConfig(num_samples=120, batch_size=5))
    generator.generate(tmp_path)
    graphs, places = GraphDataset(tmp_path), model.layer_indices(mask_layer)
    images, labels = data.splits["train"].batch(torch.from_numpy(generator.choose_samples()))
    oracle = []
    for image, label in zip(images, labels, strict=True):
        columns = [[], [], [], []]
        records = {}
        for place in places:
            with capture(model.target(place)) as record:
                loss = nn.functional.cross_entropy(model(image[None]), label[None])
                records[place] = record.take()
                (gradient,) = torch.autograd.grad(loss, model.target(place).weight)
            h, z = records[place]
            for column, value in zip(columns, (h, z.T, model.target(place).weight, gradient), strict=True):
                column.append(value.detach().expand_as(gradient).flatten())
        whole = torch.stack([torch.cat(column) for column in columns], -1).double()
        oracle.append((whole - whole.mean(0)) / (whole.std(0, correction=0) + 1e-8))
    wanted = torch.stack(oracle).float()
    found = graphs.features(range(24)).flatten(1, -2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for label in range(2):
        torch.testing.assert_close(
            graphs.class_features(label).flatten(0, -2), wanted[labels == label].mean(0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("mask_layer", [None, (0, 2), (-2, -1), -3])
def test_a_mask_of_several_layers_acts_and_lifts(mask_layer, tmp_path):
    model, data = tiny_setting()
    images = data.splits["train"].batch(slice(None))[0]
    graph, weights = model.weight_graph(mask_layer), model.weights(mask_layer)
    before = [weight.detach().clone() for weight in weights]
    mask = random_mask(graph, graph.num_vertices // 2, torch.Generator().manual_seed(1))
    mask.save(tmp_path / "mask.safetensors")
    again = Mask.load(tmp_path / "mask.safetensors")
    assert again.graph == graph
    assert torch.equal(again.keep, mask.keep)
    with masked(weights, again), torch.no_grad():
        assert sum(int((weight == 0).sum()) for weight in weights) == graph.num_vertices // 2
        whole = model(images)
    keeps = graph.split(mask.keep)
    with torch.no_grad():
        by_head = model.head(
            model.prefix(images, mask_layer), mask_layer, [w * keep for w, keep in zip(weights, keeps, strict=True)]
        )
    torch.testing.assert_close(by_head, whole)
    assert all(torch.equal(old, weight) for old, weight in zip(before, weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("mask_layer", "nodes"), [(None, 64 * 128 + 128 * 64 + 640), ((-2, -1), 8_192 + 640)])
def test_pipeline_over_several_layers(mask_layer, nodes, tmp_path):
    config = PipelineConfig(
        mask_layer=mask_layer,
        topK_list=(2000,),
        kappa_list=(300,),
        output_dir=tmp_path,
        train=TrainConfig(epochs=3, batch_size=128),
        graph=GraphConfig(num_samples=640),
        gcn=GCNConfig(steps=4, requests_per_step=1, hidden_dim=4),
        refine=RefineConfig(steps=3),
        reporter=ReporterConfig(formats=()),
    )
    pipeline = Pipeline(config)
    (record,) = pipeline.run()
    assert record["num_graph_vertices"] == nodes
    assert record["mask_layer"] == ([-3, -2, -1] if mask_layer is None else [-2, -1])
    assert record["methods"]["mimu"]["weights_changed"] == 300
    mask = Mask.load(tmp_path / record["mask_paths"]["mimu"])
    assert mask.switched_off == record["methods"]["mimu_refined"]["weights_changed"] == 300
    test = pipeline.stages.data.splits["test"]
    images, labels = test.only(test.labels == 0).batch(slice(None))
    with masked(pipeline.classifier.weights(mask_layer), mask), torch.no_grad():
        right = (pipeline.classifier(images).argmax(1) == labels).double().mean()
    assert record["methods"]["mimu"]["forget_score"] == pytest.approx(100 * float(right))
    assert json.loads(next(tmp_path.rglob("layout.json")).read_text())["names"][-1] == "linears.2.weight"


def test_budgets_count_over_all_layers(tmp_path):
    with pytest.raises(UserError, match="kappa_list is 17025, but the masked layers have 17024 weights"):
        Pipeline(PipelineConfig(mask_layer=None, kappa_list=(17_025,), output_dir=tmp_path))


def test_one_layer_may_be_written_without_brackets(tmp_path):
    file = tmp_path / "c.yaml"
    for text, wanted in (("-1", (-1,)), ("[-2, -1]", (-2, -1)), ("null", None)):
        file.write_text(f"mask_layer: {text}\n")
        assert load_config([file]).mask_layer == wanted


@pytest.mark.parametrize(
    ("mask_layer", "what"),
    [((-1, 2), "name each layer once"), ((), "name each"), ((0, 5), "choose from -3")],
)
def test_layers_that_cannot_be_are_refused(mask_layer, what):
    with pytest.raises(UserError, match=what):
        Tiny().layer_indices(mask_layer)


@pytest.mark.parametrize(
    ("layer", "what"), [(nn.Linear(3, 2), "a Linear with a bias"), (nn.Conv2d(3, 2, 1, bias=False), "a Conv2d")]
)
def test_layers_that_are_no_plain_matrix_are_refused(layer, what):
    model = Tiny()
    model.linears[2] = layer
    with pytest.raises(UserError, match=f"is {what}: a masked layer must be linear and without bias"):
        model.weight_graph(-1)


def test_edges_of_a_whole_network_are_refused_before_memory_is_touched():
    graph = WeightGraph(((1000, 2048), (2048, 1000)), (False,))
    with pytest.raises(UserError, match=r"12,\d{3},\d{3},\d{3} edges \(\d+ GB\) of 1000 x 2048, 2048 x 1000"):
        edge_index(graph)


def test_arrays_grow_from_the_front_and_must_be_whole(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with appending_array(tmp_path / "a.npy", (4, 3)) as append:
        append(rows[:1])
        append(rows[1:])
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)
    with (
        pytest.raises(ValueError, match="needs 12 values, 3 were written"),
        appending_array(tmp_path / "b.npy", (4, 3)) as append,
    ):
        append(rows[:1])


def test_split_is_undone_by_join():
    values = torch.arange(2 * NET_5432.num_vertices * 3).view(2, -1, 3)
    parts = NET_5432.split(values, trailing=1)
    assert [tuple(part.shape) for part in parts] == [(2, 4, 5, 3), (2, 3, 4, 3), (2, 2, 3, 3)]
    assert torch.equal(NET_5432.join(parts, trailing=1), values)
    one = torch.rand(2, 4, 5)
    assert layer_graph(4, 5).join(layer_graph(4, 5).split(one)) is not None
    assert torch.equal(layer_graph(4, 5).join(layer_graph(4, 5).split(one)), one)
