"""Classifiers that a user brings: read as their own framework reads them, bit for bit, or refused in one sentence."""

import argparse
import warnings
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from core.config import UserError
from models import frameworks
from models.preprocessing import Given
from models.specs import Loaded, describe, load, logits_of, parse

SMALL = "squeezenet1_1"  # 0.7 million weights: what the traps are set in
CLASSES = 7
GIVEN = Given(size=64, mean=(0.5,), std=(0.25,))


def network(name: str = SMALL, **settings) -> nn.Module:
    """A network of torchvision with few classes, its BatchNorm statistics no longer 0 and 1."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **settings)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


def answers(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def images_for(loaded: Loaded, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *loaded.preprocessing.shape, generator=torch.Generator().manual_seed(1))


def same(loaded: Loaded, module: nn.Module) -> bool:
    """Whether two modules answer alike, and each tensor stands on disk under the name that `disk_names` says."""
    images = images_for(loaded)
    state, disk = loaded.module.state_dict(), loaded.stored.tensors
    names = all(torch.equal(state[name], disk[old].view_as(state[name])) for name, old in loaded.disk_names.items())
    return names and torch.equal(answers(loaded, images), answers(module, images.to(loaded.dtype)))


def given(name: str, path: Path, **more) -> Loaded:
    return load(f"torchvision:{name}@{path}", **{"preprocessing": GIVEN, **more})


def refusal(spec: str, **more) -> str:
    with pytest.raises(UserError) as caught:
        load(spec, **{"preprocessing": GIVEN, **more})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- specs ------------------------------------------------------------------------------------------------


def test_a_spec_is_taken_apart_and_put_together(tmp_path):
    (tmp_path / "a@b.pt").touch()
    text = f"timm:vit_tiny.in1k,img_size=32,pool=avg,size=(3, 4)@{tmp_path}/a@b.pt"
    spec = parse(text)
    assert (spec.kind, spec.name, spec.path) == ("timm", "vit_tiny.in1k", tmp_path / "a@b.pt")
    assert dict(spec.settings)["img_size"] == 32
    assert parse(f"timm:{tmp_path}").name == ""
    own = parse(f"py:a.b/net.py:make,width=2@{tmp_path}/a@b.pt")
    assert (own.code, own.name, own.settings) == (Path("a.b/net.py"), "make", (("width", 2),))
    assert parse(str(own)) == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "names no model: write torchvision:NAME@FILE"),
        ("keras:resnet18@x", "names no model"),
        ("torchvision:resnet18", "is incomplete"),
        ("torchvision:resnet18@gone.pt", "there is no file gone.pt"),
        ("hf:gone", "there is no folder gone"),
        ("py:net.py@x", "is incomplete"),
    ],
)
def test_specs_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_architectures_and_settings_that_are_none(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    assert "did you mean 'squeezenet1_1'?" in refusal(f"torchvision:squeezenet11@{tmp_path}/x.pt")
    assert "cannot be built with" in refusal(f"torchvision:{SMALL},wide=3@{tmp_path}/x.pt")
    assert "is no setting" in refusal(f"torchvision:{SMALL},3@{tmp_path}/x.pt")


# --- every family -----------------------------------------------------------------------------------------

FAMILIES = {
    "resnet18": "fc.weight",
    "resnet50": "fc.weight",
    "mobilenet_v3_small": "classifier.3.weight",
    "efficientnet_b0": "classifier.1.weight",
    "convnext_tiny": "classifier.2.weight",
    "swin_t": "head.weight",
    "densenet121": "classifier.weight",
    "squeezenet1_1": "classifier.1.weight",
    "regnet_y_400mf": "fc.weight",  # computes with its weights when it is built
    "mnasnet0_5": "classifier.1.weight",  # refuses a state dict without a version
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_answers_as_loaded_by_itself(name, tmp_path):
    module = network(name)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    before = torch.get_rng_state()
    loaded = given(name, tmp_path / "x.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(loaded, module)
    assert (loaded.head, len(loaded.classes), loaded.module.training) == (FAMILIES[name], CLASSES, False)
    assert dict(loaded.disk_names) == {key: key for key in module.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("vgg16_bn", "init_weights=False"), ("vit_b_16", "image_size=64")])
def test_large_ones(name, settings, tmp_path, monkeypatch):
    """As above; what is drawn and then overwritten costs most of the time, so that it is not drawn."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: nn.init.zeros_(self.weight))
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *rest, **more: tensor)
    word, _, value = settings.partition("=")
    module = network(name, **{word: False if value == "False" else int(value)})
    for number, parameter in enumerate(module.parameters()):
        parameter.data.fill_(0.01 * (number % 7 - 3)).view(-1)[::3] = 0.02
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert same(load(f"torchvision:{name},{settings}@{tmp_path}/x.pt", preprocessing=GIVEN), module)


def test_names_of_old_densenets(tmp_path):
    """torchvision's own files of 2017 say `norm.1` where the module says `norm1`."""
    module = network("densenet121")
    old = {
        frameworks.re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "x.pt")
    loaded = given("densenet121", tmp_path / "x.pt")
    assert same(loaded, module)
    assert loaded.disk_names["features.denseblock1.denselayer1.norm1.weight"].endswith("denselayer1.norm.1.weight")


# --- what training scripts wrap around --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_wrappers_are_taken_off_and_remembered(prefix, container, tmp_path):
    module = network()
    state = {prefix + name: value for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters()).state_dict()
    args = argparse.Namespace(model="x", lr=0.1)
    value = {container: state, "optimizer": optimizer, "epoch": 3, "args": args} if container else state
    torch.save(value, tmp_path / "x.pt")
    loaded = given(SMALL, tmp_path / "x.pt")
    assert same(loaded, module)
    assert dict(loaded.disk_names) == {name: prefix + name for name in module.state_dict()}
    assert loaded.stored.container == (container or "")
    if container:
        assert any("left aside args, epoch, optimizer" in note for note in loaded.notes)


@pytest.mark.parametrize("container", [None, "state_dict"])
def test_what_is_no_tensor_is_left_aside_or_missing(container, tmp_path):
    module = network()

    def saved(more: dict) -> Path:
        state = {**module.state_dict(), **more}
        torch.save({container: state} if container else state, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    loaded = given(SMALL, saved({"extra": None}))
    assert same(loaded, module)
    assert any("left aside extra" in note for note in loaded.notes)
    file = saved({"classifier.1.bias": None})
    assert "does not fit the model: 1 tensor is missing (classifier.1.bias)" in refusal(f"torchvision:{SMALL}@{file}")


def test_lightning_keeps_other_things_beside_the_model(tmp_path):
    module = network()
    state = {f"net.{name}": value for name, value in module.state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(CLASSES)}, "loops": {}}, tmp_path / "x.pt")
    loaded = given(SMALL, tmp_path / "x.pt")
    assert same(loaded, module)
    assert any("under 'net.': 1 other" in note for note in loaded.notes)


def with_ema(kind: str, plain: nn.Module, average: AveragedModel) -> dict:
    if kind == "timm":
        return {"state_dict": plain.state_dict(), "state_dict_ema": average.module.state_dict()}
    if kind == "torchvision":
        return {"model": plain.state_dict(), "model_ema": average.state_dict(), "epoch": 1}
    both = {f"model.{name}": value for name, value in plain.state_dict().items()}
    return {"state_dict": both | {f"ema.module.{name}": value for name, value in average.module.state_dict().items()}}


@pytest.mark.parametrize("kind", ["timm", "torchvision", "lightning"])
def test_of_a_model_and_its_average_one_must_be_chosen(kind, tmp_path):
    plain, average = network(), AveragedModel(network())
    with torch.no_grad():
        average.module.get_parameter("classifier.1.bias").add_(1)
    torch.save(with_ema(kind, plain, average), tmp_path / "x.pt")
    said = refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt")
    assert "holds several models" in said
    assert "with --ema: ema takes the average over training, plain the weights themselves" in said
    assert same(given(SMALL, tmp_path / "x.pt", ema="plain"), plain)
    loaded = given(SMALL, tmp_path / "x.pt", ema="ema")
    assert same(loaded, average.module)
    assert kind == "lightning" or loaded.stored.copies == (("state_dict",) if kind == "timm" else ("model",))


def test_a_choice_that_a_file_does_not_offer(tmp_path):
    torch.save({"state_dict": network().state_dict()}, tmp_path / "x.pt")
    assert "holds no average over training, and --ema ema asks for the other" in refusal(
        f"torchvision:{SMALL}@{tmp_path}/x.pt", ema="ema"
    )
    assert same(given(SMALL, tmp_path / "x.pt", ema="plain"), network())


def test_counts_that_old_files_lack_and_averages_add(tmp_path):
    module = network("resnet18")
    state = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({**state, "n_averaged": torch.tensor(3)}, tmp_path / "x.pt")
    assert same(given("resnet18", tmp_path / "x.pt"), module)


def test_what_does_not_fit_is_counted_and_named(tmp_path):
    state = network().state_dict()
    names = list(state)
    torch.save({name + "x" * (name in names[:4]): value for name, value in state.items()}, tmp_path / "x.pt")
    said = refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt")
    missing, unexpected = sorted(names[:4])[:3], sorted(name + "x" for name in names[:4])[:3]
    assert (
        f"4 tensors are missing ({', '.join(missing)}, ...) and 4 tensors are unexpected ({', '.join(unexpected)}, ...)"
        in said
    )
    torch.save(state | {"classifier.1.bias": torch.zeros(3)}, tmp_path / "x.pt")
    assert "classifier.1.bias [3], needed [7]" in refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt")


def test_other_names_in_the_same_order_are_taken_when_asked(tmp_path):
    module = network()
    other = {f"part{number}": value for number, value in enumerate(module.state_dict().values())}
    torch.save(other, tmp_path / "x.pt")
    assert "all shapes agree in their order" in refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt")
    loaded = given(SMALL, tmp_path / "x.pt", by_order=True)
    assert same(loaded, module)
    assert loaded.disk_names[loaded.head] == f"part{list(module.state_dict()).index(loaded.head)}"
    save_file(other, tmp_path / "x.safetensors")  # which keep no order
    assert "does not fit the model in order" in refusal(f"torchvision:{SMALL}@{tmp_path}/x.safetensors", by_order=True)


# --- how weights are stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["old", "parametrised", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_in_parts_are_folded(kind, tmp_path):
    module = network()
    part = module.get_submodule("features.3.squeeze")
    with torch.no_grad():
        if kind == "prune":
            prune.random_unstructured(part, "weight", 0.5)
        else:
            (weight_norm if kind == "old" else parametrizations.weight_norm)(part)
        for parameter in part.parameters():
            parameter.mul_(1.25)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    loaded = given(SMALL, tmp_path / "x.pt")
    assert same(loaded, module)
    assert "features.3.squeeze.weight" not in loaded.disk_names  # what a sealed file cannot be written under
    assert any("folded" in note for note in loaded.notes)
    row = next(row for row in describe(loaded).layers if row.name == "features.3.squeeze.weight")
    assert (row.on_disk, row.maskable) == (None, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_kind_of_floats_is_kept_and_said(dtype, tmp_path):
    module = network().to(dtype)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    loaded = given(SMALL, tmp_path / "x.pt")
    assert loaded.dtype is dtype
    assert same(loaded, module)
    assert any(f"runs in {str(dtype)[6:]}" in note for note in loaded.notes)


def test_several_kinds_of_floats_run_in_float32(tmp_path):
    state = network().state_dict()
    state["classifier.1.weight"] = state["classifier.1.weight"].half()
    torch.save(state, tmp_path / "x.pt")
    loaded = given(SMALL, tmp_path / "x.pt")
    assert loaded.dtype is torch.float32
    assert any("float16, float32 on disk, runs in float32" in note for note in loaded.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_holds_no_float_weights_is_refused(tmp_path):
    spec = f"torchvision:{SMALL}@{tmp_path}/x.pt"
    one = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    packed = {"fc.scale": torch.ones(()), "fc._packed_params._packed_params": (one, None)}  # of torch's dynamic Linear
    torch.save({**network().state_dict(), **packed}, tmp_path / "x.pt")
    assert "quantised model (fc._packed_params" in refusal(spec)
    torch.save({"state_dict": {"fc.weight": one}}, tmp_path / "x.pt")
    assert "quantised model (fc.weight)" in refusal(spec)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "x.pt2")
    assert "torch.export program" in refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt2")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    assert "is an ONNX graph" in refusal(f"torchvision:{SMALL}@{tmp_path}/x.onnx")


def test_all_that_a_pickled_module_needs_is_listed(tmp_path):
    torch.save({"model": nn.Sequential(nn.Linear(2, 2), nn.ReLU())}, tmp_path / "x.pt")
    said = refusal(f"torchvision:{SMALL}@{tmp_path}/x.pt")
    for name in ("container.Sequential", "linear.Linear", "activation.ReLU"):
        assert f"torch.nn.modules.{name}" in said


# --- preprocessing and classes of torchvision -------------------------------------------------------------


def test_nothing_is_guessed_of_a_model_with_other_classes(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    spec = f"torchvision:{SMALL}@{tmp_path}/x.pt"
    assert "nothing says how this model's images become tensors: give --size, --mean" in refusal(
        spec, preprocessing=Given()
    )
    assert "does not take images [1, 64, 64]" in refusal(
        spec, preprocessing=Given(size=64, mean=(0.5,), std=(0.5,), channels="grey")
    )


def test_published_weights_are_known_by_their_hash(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "x.pt")
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    loaded = given(SMALL, tmp_path / "x.pt", preprocessing=Given())
    assert "taken because the model has 1,000 outputs" in loaded.preprocessing.source
    assert "because the model has 1,000 outputs" in loaded.classes.source
    assert any("preprocessing is assumed" in note for note in loaded.notes)
    monkeypatch.setattr(frameworks, "sha256_file", lambda path: weights.url[-12:-4] + "0" * 56)
    known = given(SMALL, tmp_path / "x.pt", preprocessing=Given())
    assert (
        known.preprocessing.source == "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1, which the file is by its hash"
    )
    assert known.classes.names == tuple(weights.meta["categories"])
    assert known.classes.find("tench") == 0


# --- a user's own file ------------------------------------------------------------------------------------

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, answer="plain", width=4):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, stride=8)
        self.head = nn.Linear(width, num_classes)
        self.answer = answer
        if answer == "normed":
            self.body = nn.utils.parametrizations.weight_norm(self.body)
        if answer == "tied":
            self.twin = self.body
    def forward(self, x):
        h = torch.relu(self.body(x)).mean((2, 3))
        out = self.head(h)
        kinds = {
            "dict": lambda: {"features": x, "out": out},
            "two": lambda: {"a": out, "b": out},
            "named": lambda: {"logits": out, "b": out},
            "tuple": lambda: (out, h),
            "sigmoid": lambda: out.sigmoid(),
            "softmax": lambda: out.softmax(1),
            "map": lambda: x,
            "text": lambda: "cat",
            "features": lambda: torch.cat((h, h), 1),
        }
        return kinds.get(self.answer, lambda: out)()

def make(num_classes, **more):
    return Net(num_classes, **more)

def none():
    return 3

def wrong(num_classes):
    raise ValueError("no such thing")
"""


@pytest.fixture
def own(tmp_path):
    """(spec with an answer, the module) of a user's file."""
    (tmp_path / "net.py").write_text(CODE)
    torch.manual_seed(0)
    loader = SourceFileLoader("net", str(tmp_path / "net.py"))
    net = module_from_spec(spec_from_loader("net", loader))
    loader.exec_module(net)
    module = net.make(5).eval()
    torch.save(module.state_dict(), tmp_path / "x.pt")
    return (
        lambda answer="plain", function="make": (
            f"py:{tmp_path}/net.py:{function}"
            + (f",answer={answer}@{tmp_path}/x.pt" if function == "make" else f"@{tmp_path}/x.pt")
        ),
        module,
    )


@pytest.mark.parametrize("answer", ["plain", "dict", "named", "tuple"])
def test_one_rule_finds_the_logits(answer, own):
    spec, module = own
    loaded = load(spec(answer), preprocessing=GIVEN)
    assert same(loaded, module)
    assert loaded.files[-1].name == "net.py"
    assert any("net.py was run" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("two", "a dict of a, b: name the tensor of logits 'logits'"),
        ("sigmoid", "ends in a sigmoid"),
        ("map", r"a tensor \[1, 3, 64, 64\]"),
        ("text", "answers with a str"),
        ("features", "answers with 8 numbers, which no weight of it makes alone"),
    ],
)
def test_answers_that_are_no_logits(answer, message, own):
    with pytest.raises(UserError, match=message):
        load(own[0](answer), preprocessing=GIVEN)


def test_probabilities_become_logits(own):
    spec, module = own
    loaded = load(spec("softmax"), preprocessing=GIVEN)
    images = images_for(loaded)
    assert torch.equal(loaded(images).detach(), answers(module, images).softmax(1).log())
    assert any("ends in a softmax" in note for note in loaded.notes)


def test_one_output_is_no_class(own, tmp_path):
    state = own[1].state_dict()
    torch.save(state | {"head.weight": torch.ones(1, 4), "head.bias": torch.ones(1)}, tmp_path / "x.pt")
    assert "one output" in refusal(own[0]())


def test_a_weight_that_is_computed_anew_becomes_plain(own, tmp_path):
    """A weight under weight normalisation would undo a mask with the next answer."""
    spec, module = own
    module.body = parametrizations.weight_norm(module.body)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    loaded = load(spec("normed"), preprocessing=GIVEN)
    assert torch.allclose(loaded(images_for(loaded)), answers(module, images_for(loaded)), rtol=1e-6, atol=1e-7)
    assert any("are plain now: body.weight" in note for note in loaded.notes)
    with torch.no_grad():
        loaded.module.get_parameter("body.weight")[0] = 0
    loaded(images_for(loaded))
    assert not loaded.module.get_parameter("body.weight")[0].any()


def test_tied_weights_have_one_row_and_one_name_on_disk(own, tmp_path):
    spec, module = own
    module.twin = module.body
    save_model(module, tmp_path / "x.pt")
    loaded = load(spec("tied"), preprocessing=GIVEN)
    rows = {row.name: row for row in describe(loaded).layers}
    assert rows["body.weight"].aliases == ("twin.weight",)
    assert "twin.weight" not in rows
    assert loaded.disk_names["twin.weight"] == loaded.disk_names["body.weight"]


def test_files_that_give_no_module(own, tmp_path):
    spec, _ = own
    assert "returns a int" in refusal(spec(function="none"))
    assert "has no function 'mak': did you mean 'make'?" in refusal(spec(function="mak"))
    assert "(no such thing)" in refusal(spec(function="wrong"))
    (tmp_path / "net.py").write_text("1 / 0")
    assert "cannot be run (ZeroDivisionError" in refusal(spec())


def test_a_missing_extra_is_said_with_its_command(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(frameworks, "import_module", missing)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architecture": "x"}')
    (tmp_path / "model.safetensors").touch()
    torch.save(network().state_dict(), tmp_path / "x.pt")
    assert refusal(f"hf:{tmp_path}").endswith("(No module named 'transformers'): uv sync --extra hf")
    assert refusal(f"timm:resnet18@{tmp_path}/x.pt").endswith("(No module named 'timm'): uv sync --extra timm")


def test_summary_says_what_there_is(tmp_path):
    torch.save({"model": network().state_dict()}, tmp_path / "x.pt")
    said = describe(given(SMALL, tmp_path / "x.pt"))
    facts = dict(said.facts)
    assert facts["head"] == "classifier.1.weight, with a bias for each class"
    assert facts["outputs"] == "7"
    assert facts["parameters"] == f"{sum(p.numel() for p in network().parameters()):,}"
    assert sum(row.maskable for row in said.layers) == 26  # convolutions of SqueezeNet 1.1
    assert "from the flags --size, --mean, --std" in facts["preprocessing"]
    assert logits_of(torch.ones(2, 3)).shape == (2, 3)
