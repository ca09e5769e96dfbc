"""Classes that a person names: typed text -> labels. No torch here.

What is typed is the name of a class where a class has that name, else a label (its place in the order of classes).
`label:3` says that a label is meant and `name:3` that a name is, whatever the other classes are called.
"""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from core.config import PipelineConfig, UserError
from core.observe import log, visible

LABEL, NAME = "label:", "name:"
NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)  # how a label is written: 007 is a name, or nothing
Classes = Sequence[int | str]


def same_form(name: str) -> str:
    """A name in one Unicode form and without case: two that look the same to a reader are equal then."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", visible(name)).casefold())


def _plainly(name: str) -> str:
    """A name by which a person may call a class: form, case, spaces, `_` and `-` do not matter, but a sign does."""
    form = same_form(name).strip()
    if re.fullmatch(r"[-+]?[0-9]+", form):
        return form
    return re.sub(r"[\s_-]+", " ", form).strip() or form


class _Names:
    """The classes of a dataset, looked up by what a person types."""

    def __init__(self, classes: Sequence[str], ids: Sequence[str], where: str, field: str):
        self.classes, self.ids, self.where, self.field = classes, ids, where, field
        self.exact: dict[str, list[int]] = {}
        self.plain: dict[str, list[int]] = {}
        for names in (classes, ids):
            for label, name in enumerate(names):
                for table, key in ((self.exact, same_form(name)), (self.plain, _plainly(name))):
                    if label not in table.setdefault(key, []):
                        table[key].append(label)
        self.numbered = any(NUMBER.fullmatch(name) for name in classes)

    def said(self, label: int) -> str:
        """A label with the name of its class."""
        return f"{label} ({self.classes[label]!r})"

    def label(self, number: int, typed: object) -> int:
        """A label, if there is such a one."""
        last = len(self.classes) - 1
        if not 0 <= number <= last:
            raise UserError(f"{self.field} is {typed}, but {self.where} has classes 0 to {last}: choose from them")
        return number

    def named(self, name: str) -> int | None:
        """The class of a name, if there is one."""
        found = self.exact.get(same_form(name)) or self.plain.get(_plainly(name), [])
        if len(found) > 1:
            which = ", ".join(f"{label} ({self.ids[label]})" if self.ids else str(label) for label in found)
            raise UserError(
                f"{self.field} {name!r} fits several classes of {self.where}, {which}: "
                f"give one of these instead, e.g. {LABEL}{found[0]}"
            )
        return found[0] if found else None

    def typed(self, text: str) -> int:
        """The label of what a person typed.

        Raises:
            UserError: there is no such class (with the closest names), or a name fits several.
        """
        text = visible(text)
        if text.startswith(LABEL) and NUMBER.fullmatch(text.removeprefix(LABEL).strip()):
            return self.label(int(text.removeprefix(LABEL)), text)
        name = text.removeprefix(NAME)  # of a class that is called `label:3` it is `name:label:3`
        by_name = self.named(name)
        if by_name is None and name != text:  # a class that is really called `name:...`
            by_name = self.named(text)
        number = int(text) if NUMBER.fullmatch(text.strip()) else None
        if by_name is not None:
            if number not in (None, by_name) and 0 <= number < len(self.classes):
                other = f"write {LABEL}{number} for label {self.said(number)}"
                log(f"{self.field} {text}: taken as the name of class {by_name}; {other}")
            return by_name
        if number is None:
            raise self._unknown(text, name)
        if self.numbered and number < len(self.classes):
            log(f"{self.field} {text}: no class has this name, taken as label {self.said(number)}")
        return self.label(number, text)

    def _unknown(self, text: str, name: str) -> UserError:
        word = _plainly(name)
        keys = difflib.get_close_matches(word, self.plain, 3)
        if word.isdecimal():  # 007 is nobody's label, and may have been meant for 7
            keys = [key for key in self.plain if key.isdecimal() and int(key) == int(word)] or keys
        close = [self.classes[self.plain[key][0]] for key in keys]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"e.g. {self.classes[0]!r}"
        return UserError(f"{self.field} is {text!r}, which is no class of {self.where}: {hint}")


def resolve_classes(
    given: Classes,
    classes: Sequence[str],
    ids: Sequence[str] = (),
    where: str = "the dataset",
    field: str = "forget_class",
) -> tuple[int, ...]:
    """Labels, ascending, of classes that are given by number, name or id: the same request in any order is one.

    An int is a label. A text is a name (or id) where a class has that name, else a label; `label:3` and `name:3` say
    which. The Unicode form of a name, case, spaces, `_` and `-` do not matter where no other class is named exactly so.

    Raises:
        UserError: there is no such class (with the closest names), a name fits several, or a class comes twice.
    """
    names = _Names(classes, ids, where, field)
    labels = [names.typed(one) if isinstance(one, str) else names.label(int(one), one) for one in given]
    if len(set(labels)) < len(labels):
        said = [visible(one) if isinstance(one, str) else one for one in given]
        raise UserError(f"{field} is {said}, which names a class twice: name each once")
    return tuple(sorted(labels))


def spelled(classes: Classes) -> tuple[str, ...]:
    """Labels as text that means the same wherever it is typed, whatever the classes are called; text stays."""
    return tuple(f"{LABEL}{one}" if isinstance(one, int) else one for one in classes)


def written(config: PipelineConfig) -> PipelineConfig:
    """A configuration as records keep it and people may type it: its labels are spelled out."""
    gcn = replace(config.gcn, train_classes=spelled(config.gcn.train_classes))
    return replace(config, forget_class=spelled(config.forget_class), gcn=gcn)
