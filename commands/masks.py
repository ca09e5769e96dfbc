"""What is done with masks that are there: `verify`, `certificate`, `seal`, `restore`, `compose`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from commands.command_line import show
from commands.forget import Folder, Push, as_user_errors, check_push, opened, upload
from commands.inspect import AS_IT_IS, Read, Reading, Spec
from core.choices import at_home
from core.config import UserError
from core.observe import be_quiet

if TYPE_CHECKING:
    from torch import nn

    from mimu import Fit, Mask
    from models.class_names import ClassNames

Sealed = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SEALED")]
Removed = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REMOVED")]
Measure = Callable[["nn.Module"], dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class Tried:
    """What came of putting a mask on a model and lifting it again.

    Args:
        fit: how well the model fits the mask.
        off, new: how many weights that are switched off (or replaced) did not hold what the mask puts there.
        same: whether the model was the parent again, bit for bit, when the mask was lifted.
        scores: `forget`, `retain`, measured with the mask on: (recognised, images).
    """

    fit: "Fit"
    off: int
    new: int
    same: bool
    scores: Mapping[str, tuple[int, int]]

    @property
    def whole(self) -> bool:
        """Whether the mask was on in every place, and is off in every place."""
        return self.off == self.new == 0 and self.same


def _tried(mask: "Mask", module: "nn.Module", measure: Measure | None = None) -> Tried:
    """Put a mask on a model, measure, and lift it.

    Raises:
        MaskError: the model is not the mask's parent.
    """
    import warnings

    from mimu import ParentWarning, state_sha256

    before = state_sha256(module)
    with warnings.catch_warnings(action="ignore", category=ParentWarning):  # which the grade says
        fit = mask.apply(module)
    off, new = mask.differing(module, fit)
    scores = measure(module) if measure else {}
    mask.lift(module)
    return Tried(fit, off, new, state_sha256(module) == before, scores)


def verify(
    spec: Spec,
    mask: Folder,
    images: Path | None = None,
    certificate: Path | None = None,
    read: Read = AS_IT_IS,
    quiet: bool = False,
) -> int:
    """Check that a mask fits a model, forgets what its card says, and can be lifted bit for bit.

    Args:
        spec: Which classifier.
        mask: Folder of the mask.
        images: The folder of images that the mask was made with: the scores are measured again.
        certificate: Certificate of the mask, to be held against it; without it the one beside the mask, if there is.
        quiet: Print nothing about progress on stderr.
    """
    import copy

    from forgetting.opening import scores_again
    from mimu import Mask
    from release.facts import read_certificate

    be_quiet(quiet)
    with as_user_errors():
        loaded = Mask.load(at_home(mask))
        paper = _paper(at_home(mask), certificate and at_home(certificate))
        facts = read_certificate(paper) if paper else None
        found = opened(read, spec, images) if images else None
        if found:
            _check_classes(loaded, found.loaded.classes)
        module = copy.deepcopy(found.loaded.module) if found else read.module(spec)
        measure = partial(scores_again, found, loaded) if found else None
        tried = _tried(loaded, module, measure)
    show(f"parent: {'the very one' if tried.fit.grade == 'parent' else tried.fit.note}")
    show(f"switched off: {loaded.switched_off:,} weights, {'NOT all zero' if tried.off else 'all zero'}")
    if loaded.replaced:
        show(f"replaced: {loaded.replaced:,} weights, {'NOT all' if tried.new else 'all'} as the mask says")
    agree = _scored(loaded, tried.scores, found.images.digest()) if found else True
    if found and (other := _prepared_otherwise(loaded, found.loaded.preprocessing.describe())):
        show(f"preprocessing: not the card's, other {', '.join(other)}: the scores are of other tensors")
    show(f"lifted: {'the parent, bit for bit' if tried.same else 'NOT the parent again'}")
    stands = _stands(facts, paper, loaded, at_home(mask), tried.fit) if paper and facts else True
    return int(not (tried.whole and agree and stands))


def _check_classes(mask: "Mask", names: "ClassNames") -> None:
    """See that the classes that a mask forgets are the outputs that have their names.

    Raises:
        UserError: another output has the name of one.
    """
    for one in mask.config.forgotten:
        if one.name in names.names and one.name not in names.names[one.index : one.index + 1]:
            there = f"which is output {one.index} for it and output {names.names.index(one.name)} here ({names.source})"
            raise UserError(f"the mask forgets {one.name!r}, {there}: name them as it does, with --classes FILE")


def _prepared_otherwise(mask: "Mask", now: Mapping[str, Any]) -> list[str]:
    """What of a preprocessing is not as a mask's card has it; nothing if that says nothing."""
    card = mask.config.preprocessing or now
    return [name for name, value in now.items() if name != "source" and card.get(name) != value]


def _scored(mask: "Mask", counts: Mapping[str, tuple[int, int]], digest: str) -> bool:
    """Print scores that were measured again beside the card's; whether they agree to within one image."""
    scores, same_images = mask.config.scores or {}, digest == mask.config.data_sha256
    made_with = "those" if same_images else "others than those" if mask.config.data_sha256 else "perhaps not those"
    show(f"images: {made_with} that the mask was made with")
    agree = True
    for name, (right, images) in counts.items():
        value = 100 * right / images if images else float("nan")
        close = not same_images or (name in scores and abs(value - scores[name]) * images <= 100)
        agree &= close
        said = f"{scores[name]:.2f} %" if name in scores else "nothing"
        show(f"{name}: {value:.2f} % of {images} test images, the card says {said}{'' if close else ': NOT the same'}")
    return agree


# --- certificates -----------------------------------------------------------------------------------------


def certificate(
    spec: Spec,
    mask: Folder,
    out: Path | None = None,
    ema: str | None = None,
    by_order: bool = False,
) -> None:
    """Write what is known of a mask on one page (HTML, PDF), as JSON, and as a model card.

    Args:
        spec: Which classifier: it must be the very parent of the mask.
        mask: Folder of the mask.
        out: Folder for the files; without it beside the mask, under its name and "-certificate".
        ema: Of a file with a model and its average over training: ema or plain.
        by_order: Take tensors in their order where names differ altogether and all shapes agree.
    """
    from mimu import Mask
    from release.files import beside, check_place, write

    folder = at_home(mask)
    place = at_home(out) if out else beside(folder)
    check_place(place)
    with as_user_errors():
        loaded = Mask.load(folder)
        tried = _tried(loaded, Reading(ema=ema, by_order=by_order).module(spec))
    if tried.fit.grade != "parent":
        raise UserError(f"{spec} is not the mask's very parent ({tried.fit.note}): a certificate is for the model that "
                        "its scores are of, give that one")  # fmt: skip
    if not tried.whole:
        raise UserError(
            f"the mask was put on {spec}, and is not as it says, or could not be lifted: nothing is written"
        )
    for path in write(place, loaded, folder):
        show(f"written: {path}")


def _paper(mask: Path, given: Path | None) -> Path | None:
    """The JSON file of the certificate that is named, by itself or by its folder; else the one beside the mask."""
    from release.files import JSON, beside

    if given is not None:
        return given / JSON if given.is_dir() else given
    usual = beside(mask) / JSON
    return usual if usual.exists() else None


def _stands(facts: dict, paper: Path, loaded: "Mask", mask: Path, fit: "Fit") -> bool:
    """Print whether what a certificate says holds of a mask and a model; return it."""
    from release.files import complaints

    wrong = complaints(facts, paper, loaded, mask)
    wrong += [] if fit.grade == "parent" else ["the model is not, to the bit, the parent that it names"]
    for one in wrong:
        show(f"certificate: {paper} does NOT hold: {one}")
    if not wrong:
        show(f"certificate: {paper} is as it was written, and says what the mask and its card say")
    return not wrong


# --- files and joint masks --------------------------------------------------------------------------------


def seal(
    spec: Spec,
    mask: Folder,
    out: Path | None = None,
    fill: str = "zero",
    removed: Path | None = None,
    copies: str | None = None,
    seed: int | None = None,
    push: Push = None,
) -> None:
    """Write a checkpoint in which a mask's weights are gone, in the parent's container.

    Args:
        spec: Which classifier, as for forget; its file or folder is copied.
        mask: Folder of the mask.
        out: Where the sealed checkpoint goes; nothing may be there.
        fill: What stands where weights are off: zero, or noise of the layer's scale (zeros show what was removed).
        removed: File for the removed values, to be locked away or destroyed: without it nothing can be restored.
        copies: What happens to averaged copies (EMA) of the weights in the file: seal or drop.
        seed: Of the noise; drawn if it is not given.
        push: Upload the sealed checkpoint, and nothing else, to this model repository of the Hugging Face Hub.
    """
    import mimu
    from models.specs import parse

    if out is None:
        raise UserError("seal needs a place for the sealed checkpoint: give --out")
    check_push(push)
    if push and removed and at_home(removed).resolve().is_relative_to(at_home(out).resolve()):
        raise UserError(f"--removed {removed} lies in what is to be pushed: put the removed values elsewhere")
    parent = parse(spec).path
    with as_user_errors():
        loaded = mimu.Mask.load(at_home(mask))
        target, kept = at_home(out), removed and at_home(removed)
        done = mimu.seal(parent, loaded, target, fill, kept, copies, seed)  # ty: ignore[invalid-argument-type]
    for name, count in done.weights.items():
        new = done.replaced.get(name, 0)
        kinds = ((count - new, fill), (new, "replaced"))
        show(f"{name}: {', '.join(f'{number:,} weights are {how}' for number, how in kinds if number or not count)}")
    for name in done.left_out:
        show(f"left out: {name}")
    show(f"written: {done.out}; load it as the parent is loaded")
    there = f"in {kept}; `restore {target} {kept}` puts them back" if kept else "kept nowhere but in the parent"
    show(f"the removed values are {there}")
    upload(target, push)


def restore(sealed: Sealed, removed: Removed, out: Path) -> None:
    """Put removed values back into a copy of a sealed checkpoint: the parent again, bit for bit.

    Args:
        sealed: What `seal` wrote.
        removed: The file of removed values that it wrote beside that.
        out: Where the restored checkpoint goes; nothing may be there.
    """
    import mimu

    with as_user_errors():
        exact = mimu.restore(at_home(sealed), at_home(removed), at_home(out))
    show(f"written: {out}; {'byte for byte' if exact else 'every tensor, bit for bit,'} the parent")


def compose(
    masks: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MASK")],
    out: Path,
    push: Push = None,
) -> None:
    """Join masks of one parent: what any switches off is off, and what any replaces is replaced.

    Args:
        masks: Folders of masks.
        out: Folder for the joint mask.
        push: Upload it to this model repository of the Hugging Face Hub.
    """
    import mimu

    check_push(push)

    with as_user_errors():
        joint = mimu.compose(*(mimu.Mask.load(at_home(one)) for one in masks))
        joint.save(at_home(out))
    shared = (joint.config.composition or {})["shared"]
    show(f"forgets {', '.join(joint.forgotten)}: {joint.changed:,} weights, {shared:,} of them in several masks")
    show(f"written: {out}; nothing was measured with all of them on: `verify` does")
    upload(at_home(out), push)
