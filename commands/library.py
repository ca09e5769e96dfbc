"""One mask for every class of a user's classifier: `library`, here or over the engines that `sweep` has."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.command_line import Words, show
from commands.forget import AS_USUAL, Asked, Asking, as_user_errors, file_name
from commands.inspect import AS_IT_IS, Read, Reading, Spec
from core.choices import at_home
from core.config import UserError
from core.observe import be_quiet

if TYPE_CHECKING:
    from forgetting.answers import Answering
    from forgetting.opening import Opened
    from mimu import Mask
    from models.class_names import ClassNames
    from planning.library import Asked as ToForesee

ONE_BY_ONE = "none"
NOT_MET = ", target not met"


def library(
    spec: Spec,
    out: Path = Path("masks"),
    engine: str = ONE_BY_ONE,
    workers: int = 2,
    slurm: Words = (),
    plan: bool = False,
    asking: Asked = AS_USUAL,
    read: Read = AS_IT_IS,
) -> int:
    """Write one mask for every class that has images; what an earlier call made alike is kept.

    Args:
        spec: Which classifier.
        out: Folder for the masks, one folder for each class.
        engine: What makes them: none (this process), local (several processes), slurm or ray.
        workers: Of an engine, how many: each reads the model and all images, and makes its share of the masks.
        slurm: Parameter of submitit's executor as NAME=VALUE, e.g. timeout_min=60; once for each.
        plan: Say what that would take, from a few images and masks, and write nothing.
    """
    be_quiet(asking.quiet)
    block = Block(spec, at_home(out), asking, read)
    opened = asking.opened(read, spec)
    names = opened.loaded.classes
    if plan:
        show(block.foreseen(opened, None if engine == ONE_BY_ONE else _engine(engine, workers, slurm)))
        return 0
    if engine == ONE_BY_ONE:
        answering = opened.answering(asking.layers, lambda asked: block.check(asked, opened))
        held = _held(answering)
        rows = block.rows(opened, answering, held)
    else:
        found = _engine(engine, workers, slurm)
        held = _held(asked := opened.foreseen(asking.layers))
        block.check(asked, opened)
        rows = _fanned_out(block, held, found)
    width = max(len(names.names[label]) for label in held)
    made = missed = 0
    for row in rows:
        if not made:
            show(_line(width, "class", "weights", "forget", "retain", "change", "seconds", "mask"))
        show(_line(width, *row))
        made, missed = made + 1, missed + row[-1].endswith(NOT_MET)
    if absent := len(names) - len(held):
        show(f"{absent} classes have no images: no mask was made for them, nor was any measured on them")
    if made < len(held):
        show(f"{len(held) - made} masks are lacking: what failed is said above; the same command makes what is missing")
    return int(missed > 0 or made < len(held))


def _held(asked: "Answering") -> list[int]:
    """The classes that have images."""
    return [label for label, count in enumerate(asked.parts.counts.tolist()) if count]


def _line(width: int, name: str, *cells: str) -> str:
    """A line of the library's table: lines are shown as masks are made, so that no width can be taken from them."""
    *numbers, last = cells
    return "  ".join([name.ljust(width), *(one.rjust(8) for one in numbers), last])


# --- masks of some classes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Classes whose masks are made by one process, and what that needs to know: a task of an engine.

    Args:
        labels: of the classes. code: hash of the source code, which a worker compares with its own.
    """

    spec: str
    out: Path
    asking: Asking
    read: Reading
    labels: tuple[int, ...] = ()
    code: str = ""

    @property
    def label(self) -> str:
        """The classes in a few words."""
        return f"{len(self.labels)} classes from {self.labels[0]} on"

    @property
    def folder(self) -> Path:
        """Where an engine keeps files of its own."""
        return self.out / ".engine"

    def place(self, names: "ClassNames", label: int) -> Path:
        """The folder of a class's mask."""
        return self.out / file_name(f"{label}-{names.names[label]}")

    def check(self, asked: "Answering", opened: "Opened") -> None:
        """See that all masks can be sought and written, before anything is computed.

        Raises:
            UserError: one cannot, or a mask of another model has its place.
        """
        from forgetting.artefact import mask_there
        from mimu import state_sha256
        from mimu.mask import check_place

        self.asking.chosen()
        names, parent = opened.loaded.classes, state_sha256(opened.loaded.module)
        for label in _held(asked):
            place = self.place(names, label)
            with as_user_errors():
                check_place(place)
            mask_there(place, parent, [names.names[label]])
        self.asking.number(asked, [[label] for label in _held(asked)], names.names)

    def rows(self, opened: "Opened", answering: "Answering", labels: Sequence[int]) -> Iterator[tuple[str, ...]]:
        """Make the masks of some classes; yield what the table says of each as soon as it is on disk.

        Raises:
            UserError: the model does not recognise the images, or a mask that is there is damaged.
        """
        from forgetting.scores import check_clean

        names, asking = opened.loaded.classes, self.asking
        number = asking.number(answering, [], names.names)
        check_clean(answering, names)
        for label in labels:
            begun, place = time.monotonic(), self.place(names, label)
            mask, note = _kept(place, opened, answering, number, asking.way), ", there already"
            seconds = "-"
            if mask is None:
                mask, reached = self._made(opened, answering, label, number)
                note, seconds = "" if reached else NOT_MET, f"{time.monotonic() - begun:.1f}"
            yield names.names[label], *_numbers(mask), seconds, f"{place}{note}"

    def _made(self, opened: "Opened", answering: "Answering", label: int, number: int | None) -> tuple["Mask", bool]:
        """Make one mask and write it; return it, and whether it meets the target, if one was asked for."""
        from forgetting.artefact import answer_to, to_mask

        names, target = opened.loaded.classes, self.asking.target()
        answer = answer_to(answering, [label], number, self.asking.chosen(), target)
        with as_user_errors():
            mask = to_mask(answering, answer, names, opened.parent, opened.loaded.preprocessing.describe(), target)
            mask.save(self.place(names, label))
        return mask, answer.search is None or answer.search.achieved

    def foreseen(self, opened: "Opened", engine: Any) -> str:
        """What the library would take, in words: nothing is written that stays.

        Args:
            engine: what makes the masks; None: this process.

        Raises:
            UserError: they cannot be made.
        """
        from planning.library import foresee_library, said

        with tempfile.TemporaryDirectory() as folder:
            asked = self.to_foresee(opened, Path(folder), engine)
            return said(asked, foresee_library(asked))

    def to_foresee(self, opened: "Opened", folder: Path, engine: Any = None) -> "ToForesee":
        """What is asked of a plan; its masks are written below a folder that does not stay.

        Raises:
            UserError: they cannot be made.
        """
        from planning.library import Asked as ToForesee
        from training.engines import threads_of

        names, listed = opened.loaded.classes, opened.foreseen(self.asking.layers)
        self.check(listed, opened)
        number = self.asking.number(listed, [], names.names)
        aside = replace(self, out=folder)

        def make(answering: "Answering", label: int) -> int:
            aside._made(opened, answering, label, number)
            return sum(path.stat().st_size for path in aside.place(names, label).rglob("*") if path.is_file())

        workers, threads = (engine.workers, threads_of(engine.workers)) if engine else (1, None)
        return ToForesee(opened, self.asking.layers, _held(listed), make, workers, threads)

    # --- as a task ---

    def run(self, threads: int | None = None) -> dict:
        """Make the masks of `labels` in this process; what the table says of them is the outcome's `rows`."""
        import torch

        from core.hashes import check_same_code

        if threads:
            torch.set_num_threads(threads)
        be_quiet()  # the process that asks has said what was understood
        outcome: dict[str, Any] = {"status": "failed", "rows": []}
        try:
            check_same_code(self.code)
            opened = self.asking.opened(self.read, self.spec)
            for row in self.rows(opened, opened.answering(self.asking.layers), self.labels):
                outcome["rows"].append(row)
        except Exception as error:
            return outcome | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return outcome | {"status": "done"}

    def lost(self, error: str) -> dict:
        """The outcome where a process died: what it had written is found by the next call."""
        return {"status": "failed", "rows": [], "error": error}


def _kept(place: Path, opened: "Opened", answering: "Answering", number: int | None, way: str) -> "Mask | None":
    """A mask that an earlier call made of the same model, images and flags; None: there is none.

    With kappa auto it is made again: its card does not say what all of the search was asked for.

    Raises:
        UserError: what is there is damaged.
    """
    from mimu import Mask, state_sha256

    if number is None or not (place / "mask.safetensors").exists():
        return None
    with as_user_errors():
        mask = Mask.load(place)
    config = mask.config
    same = config.data_sha256 == answering.parts.digest and config.kappa == number
    same &= (config.method or "").startswith(f"{way},")
    same &= set(config.parent.targets) == {target.name for target in answering.model.targets}
    same &= config.preprocessing == opened.loaded.preprocessing.describe()
    return mask if same and config.parent.state_sha256 == state_sha256(opened.loaded.module) else None


def _numbers(mask: "Mask") -> tuple[str, ...]:
    """A mask's number of weights and scores, for the library's table."""
    scores = mask.config.scores or {}
    change = f"{scores['retain_change']:+.1f}"
    return f"{mask.changed:,}", f"{scores['forget']:.1f} %", f"{scores['retain']:.1f} %", change


# --- over an engine ---------------------------------------------------------------------------------------


def _engine(name: str, workers: int, slurm: Sequence[str]) -> Any:
    """The engine that the flags describe.

    Raises:
        UserError: there is none such.
    """
    from training.engines import EXECUTORS, Engine

    if name not in EXECUTORS:
        raise UserError(f"--engine is {name!r}: choose from {', '.join([ONE_BY_ONE, *EXECUTORS])}")
    pairs = [word.partition("=") for word in slurm]
    if wrong := [word for word, (_, equals, value) in zip(slurm, pairs, strict=True) if not equals or not value]:
        raise UserError(f"--slurm is {wrong[0]!r}: write it as NAME=VALUE")
    parameters = {key: int(value) if value.isdecimal() else value for key, _, value in pairs}
    engine = Engine(executor=name, workers=workers, slurm=parameters)
    engine.check("--{}")
    return engine


def _fanned_out(block: Block, held: Sequence[int], engine: Any) -> Iterator[tuple[str, ...]]:
    """Have one worker make every n-th mask; yield the table's lines as workers end, those of a failed one, too."""
    from core.hashes import whole_code
    from training.engines import carry_out

    shares = [tuple(held[first :: engine.workers]) for first in range(min(engine.workers, len(held)))]
    code = whole_code()
    blocks = [replace(block, labels=labels, code=code) for labels in shares]
    for _, outcome in carry_out(blocks, engine, "library"):
        yield from outcome["rows"]
