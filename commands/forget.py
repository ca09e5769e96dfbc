"""Forget a class of a classifier that a user already has: `forget`, and what its neighbours share with it."""

import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from commands.command_line import Group, Words, show
from commands.inspect import AS_IT_IS, Read, Spec
from core.choices import at_home
from core.config import UserError
from core.observe import be_quiet, log

if TYPE_CHECKING:
    from commands.inspect import Reading
    from core.config import AutoConfig
    from forgetting.answers import Answer, Answering, Ways
    from forgetting.opening import Opened
    from mimu import Mask

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")]
Push = Annotated[str | None, tyro.conf.arg(metavar="REPO")]
Classes = Annotated[Words, tyro.conf.arg(name="class", metavar="CLASS")]
DEPTHS = ("suppress", "erase")
MOST_NAMES = 5  # of classes, in one line
AS_FLAG = re.compile(r"ema='(\w+)'")  # how the package names the choice that is --copies here
NO_FLAG = ", or say any_parent=True"  # what programs alone can ask the package for


@contextmanager
def as_user_errors() -> Generator[None]:
    """Turn what the package `mimu` refuses into what the command line says."""
    from mimu import MaskError

    try:
        yield
    except MaskError as error:
        raise UserError(AS_FLAG.sub(r"--copies \1", str(error)).replace(NO_FLAG, "")) from None


@dataclass(frozen=True)
class Asking(Group):
    """What is asked of a model: in which weights a mask is sought, how, and of what size."""

    images: Path | None = None
    """Folder with a subfolder of images for each class."""
    layer: Words = ()
    """Weight to mask, by name; once for each. Or auto (the default, the last before the head), cut (the last stages,
    as many as nothing goes around), all, or deep (the default to erase)."""
    depth: str = "suppress"
    """suppress: the outputs forget. erase: the features too; 2 % of the last stages' weights unless kappa says more."""
    kappa: str = "auto"
    """How many weights: auto (as few as meet the target), a number, or a share such as 0.3%."""
    way: str = "refined"
    """refined, robust (against new BatchNorm statistics; refined with kappa auto is this), first_order, network (the
    graph network that is shipped, alone) or network_refined (descent from there)."""
    tau: float = 2.0
    """Target of auto: forget score at most, percent, with 95 % confidence."""
    epsilon: float = 1.0
    """Target of auto: loss of retain score at most, points, with 95 % confidence."""
    quiet: bool = False
    """Print nothing about progress on stderr."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the weights to mask."""
        from forgetting.artefact import usual_layers

        return self.layer or usual_layers(self.chosen())

    def opened(self, read: "Reading", spec: str) -> "Opened":
        """Load the model, and index the images.

        Raises:
            UserError: no images are named, or either cannot be used.
        """
        if self.images is None:
            raise UserError("images are needed for this: give a folder of them with --images")
        return opened(read, spec, self.images)

    def target(self) -> "AutoConfig":
        """What `auto` asks of a mask.

        Raises:
            UserError: a limit is no share.
        """
        from forgetting.answers import TARGET

        if not (0 <= self.tau <= 100 and 0 <= self.epsilon <= 100):
            raise UserError(
                f"--tau is {self.tau:g} and --epsilon {self.epsilon:g}: give percent and points from 0 to 100"
            )
        return replace(TARGET, tau=self.tau, epsilon=self.epsilon)

    def chosen(self) -> "Ways":
        """How the weights are chosen.

        Raises:
            UserError: there is no such way.
        """
        from forgetting.answers import Ways

        ways = [way for way in Ways if way is not Ways.erase]
        if self.way not in ways:
            raise UserError(f"--way is {self.way!r}: choose from {', '.join(ways)}")
        if self.depth not in DEPTHS:
            raise UserError(f"--depth is {self.depth!r}: choose from {', '.join(DEPTHS)}")
        changed = [name for name in ("way", "tau", "epsilon") if getattr(self, name) != getattr(AS_USUAL, name)]
        if self.depth == "erase" and changed:
            raise UserError("--way, --tau and --epsilon say how outputs are made to forget: leave them out to erase")
        return Ways.erase if self.depth == "erase" else Ways(self.way)

    def number(self, asked: "Answering", requests: Iterable[Sequence[int]], names: Sequence[str]) -> int | None:
        """How many weights, None for as few as meet the target.

        Raises:
            UserError: the images that there are cannot answer one of the requests, or cannot show the target.
        """
        from forgetting.artefact import kappa_of

        number = kappa_of(self.kappa, asked.model.weight_graph().num_vertices, self.chosen())
        target = self.target()
        for labels in requests:
            asked.check(labels, names)
            if number is None:
                asked.check_target(labels, target)
        return number


Asked = Annotated[Asking, tyro.conf.arg(name="")]
AS_USUAL = Asking()


# --- forget -----------------------------------------------------------------------------------------------


def forget(
    spec: Spec,
    class_: Classes = (),
    out: Path | None = None,
    methods: Words = (),
    push: Push = None,
    asking: Asked = AS_USUAL,
    read: Read = AS_IT_IS,
) -> int:
    """Find the few weights that a class depends on, and write them down as a mask.

    Args:
        spec: Which classifier.
        class_: Class to forget, by name or number; once for each.
        out: Folder for the mask; without it masks/ and the classes' names.
        methods: Method to compare with on this model (docs/methods.md), once for each; or all.
        push: Upload the mask to this model repository of the Hugging Face Hub, if it meets its target.
    """
    be_quiet(asking.quiet)
    _check_words(class_, methods)
    check_push(push)
    from forgetting.artefact import answer_to, mask_there, to_mask
    from forgetting.scores import check_clean
    from mimu import state_sha256
    from mimu.mask import check_place

    begun = time.monotonic()
    found = asking.opened(read, spec)
    names = found.loaded.classes
    labels = sorted({names.find(one) for one in class_})
    target, chosen = asking.target(), asking.chosen()
    forgotten = [names.names[label] for label in labels]
    place = at_home(out) if out else Path("masks") / file_name("+".join(forgotten))
    with as_user_errors():
        check_place(place)
    older = mask_there(place, state_sha256(found.loaded.module), forgotten)

    def weights(asked: "Answering") -> int | None:
        return asking.number(asked, [labels], names.names)

    answering = found.answering(asking.layers, weights)
    number = weights(answering)
    check_clean(answering, names)
    answer = answer_to(answering, labels, number, chosen, target)
    with as_user_errors():
        mask = to_mask(answering, answer, names, found.parent, found.loaded.preprocessing.describe(), target)
        mask.save(place)
    _show(mask)
    show(f"written: {place} ({_kilobytes(place)}), in {time.monotonic() - begun:.0f} s")
    if older:
        show("the same as before" if older.digest == mask.digest else f"the one before is replaced: {older.summary()}")
    if methods:
        _compare(found, answering, answer, methods, place)
    missed = answer.search is not None and not answer.search.achieved
    for line in _warnings(mask, len(names), missed, asking.layers):
        show(line)
    if push and missed:
        show("not pushed: the target is not met")
    else:
        upload(place, push)
    return int(missed)


def check_push(repository: str | None) -> None:
    """See that what is to be pushed has a place to go, before anything is computed.

    Raises:
        UserError: no repository can have this name.
    """
    if repository is not None:
        from release.hub import check_repository

        check_repository(repository)


def upload(place: Path, repository: str | None) -> None:
    """Upload what was written, if a repository is named.

    Raises:
        UserError: the hub does not take it.
    """
    if repository is not None:
        from release.hub import push

        show(f"pushed: {push(place, repository)}")


def opened(read: "Reading", spec: str, images: Path | None) -> "Opened":
    """Load the model, index the images, and log what classes and preprocessing were taken, and from where.

    Raises:
        UserError: either cannot be used.
    """
    found = read.opened(spec, images)
    loaded = found.loaded
    more = ", ..." * (len(loaded.classes) > MOST_NAMES)
    names = f"{', '.join(loaded.classes.names[:MOST_NAMES])}{more} ({len(loaded.classes)})"
    log(f"classes: {names}; from {loaded.classes.source}")
    log(f"preprocessing: {loaded.preprocessing.said()}")
    for note in loaded.notes:
        log(f"note: {note}")
    return found


def _check_words(classes: Sequence[str], methods: Sequence[str]) -> None:
    """See that what is typed can be meant, before anything is computed.

    Raises:
        UserError: no class is named, or there is no such method.
    """
    if not classes:
        raise UserError("no class to forget is named: give --class NAME, once for each")
    if methods:
        from rivals.compared import chosen_methods

        chosen_methods(methods)


def file_name(text: str) -> str:
    """A class's name as that of a folder."""
    return re.sub(r"[^\w+.-]+", "-", text).strip(".-")[:80] or "class"


def _kilobytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1000:.1f} kB"


def _compare(found: "Opened", answering: "Answering", answer: "Answer", methods: Sequence[str], place: Path) -> None:
    """Print every method's scores on this model; all that was measured goes into a file beside the mask."""
    from core.artifacts import write_json
    from forgetting.comparison import compare, levels_of
    from reporting.write import as_text

    how, names = found.loaded.preprocessing, found.loaded.classes.names
    level = levels_of(how.mean, how.std, how.scale)
    compared = list(compare(answering, answer, found.images, names, methods, level))
    rows = [["method", *COMPARED.values()]]
    rows += [[one["label"], *(_number(one.get(name)) for name in COMPARED)] for one in compared if "why" not in one]
    show(as_text(rows))
    for one in compared:
        if "why" in one:
            show(f"{one['label']}: no values, {one['why']}")
    file = place.with_name(f"{place.name}-methods.json")
    write_json(file, {"kappa": answer.kappa, "methods": compared})
    show("nothing is compared with a model retrained without the class: there is none")
    show(f"written: {file}")


def _number(value: int | float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


COMPARED = {
    "forget_score": "forget %",
    "retain_score": "retain %",
    "forget_probability": "p(forget)",
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "weights_changed": "weights",
    "seconds": "seconds",
}
TOLD = {
    "features_before": "percent that features read by a stage tell of the class, untouched",
    "features_may": "as two small networks expect after retraining",
    "features_now": "with the mask",
    "class_bias": "bias of the forgotten classes' outputs, which no mask changes",
}


def _show(mask: "Mask") -> None:
    """Print a mask's scores beside those of the untouched model."""
    from release.facts import POINTS, scores_of
    from release.sheet import score_rows
    from reporting.write import as_text

    scores = mask.config.scores or {}
    measured = [one for one in scores_of(mask.config) if one.name != POINTS]
    show(as_text([("test images", "untouched", "masked", "95 % interval", "n"), *score_rows(measured)]))
    for name, said in TOLD.items():
        if name in scores:
            show(f"{said}: {scores[name]}")
    low, high = scores["intervals"]["retain_change"]
    show(f"retain score changes by {scores['retain_change']:+.1f} points ({low:+.1f} to {high:+.1f})")
    show(f"forgotten: {', '.join(mask.forgotten)}; {mask.summary()}")
    show(f"method: {mask.config.method}")


def _warnings(mask: "Mask", outputs: int, missed: bool, layers: Sequence[str]) -> list[str]:
    from models.targets import ALL, CUT, DEEP

    scores: Mapping[str, Any] = mask.config.scores or {}
    absent, lines = scores.get("classes_without_images", 0), []
    if scores["intervals"]["clean_forget"][0] <= 100 / outputs:
        lines.append(f"the untouched model recognises {scores['clean_forget']:.1f} % of these images, no more than "
                     "chance: see that the class is the one that is meant")  # fmt: skip
    lines += [f"{absent} classes have no images: what the mask does to them was not measured"] if absent else []
    if missed:
        lines.append("not achievable: no mask that was tried meets the target; this is the best trade-off")
        if not {ALL, CUT, DEEP} & set(layers):
            lines.append("a class may reach the head around a layer: --layer cut takes stages that nothing goes around")
    return [*lines, "the mask makes nothing smaller or faster, and whoever has the parent can lift it"]
