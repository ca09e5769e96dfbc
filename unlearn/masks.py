"""From theta to masks: mask strategies, and switching weights off and on again.

Polarity, everywhere: 1 = weight kept, 0 = weight switched off. Symbols as in docs/concepts.md.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from core.artifacts import read_tensors, write_tensors
from core.config import UserError, as_tuple
from graphs.layout import WeightGraph
from graphs.subsets import hard_topk

# --- masks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """Which weights of some layers are kept: `keep` [*graph.shape] bool, their layout, and facts that travel along."""

    keep: Tensor
    graph: WeightGraph
    facts: dict = field(default_factory=dict)

    @property
    def switched_off(self) -> int:
        """How many weights the mask switches off."""
        return int((~self.keep).sum())

    def save(self, path: Path) -> None:
        """Write safetensors, uint8, 1 = kept: `mask` [m, n] of one layer, `mask.<parameter>` [m, n] of several.

        Facts and the layers' parameter names travel as metadata.
        """
        layers = [part.to(torch.uint8).cpu().contiguous().numpy() for part in self.graph.split(self.keep)]
        names = self.graph.names or tuple(str(place) for place in range(len(layers)))
        keys = ["mask"] if len(layers) == 1 else [f"mask.{name}" for name in names]
        layout = {"names": self.graph.names, "joined": self.graph.joined, "keys": keys}
        write_tensors(path, dict(zip(keys, layers, strict=True)), self.facts | {"layout": layout})

    @classmethod
    def load(cls, path: Path | str) -> "Mask":
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        path = Path(path)
        tensors, facts = read_tensors(path, foreign=True)
        layout = facts.pop("layout", {})
        keys = layout.get("keys", ["mask"])
        if set(keys) != set(tensors) or any(t.ndim != 2 or t.max(initial=0) > 1 for t in tensors.values()):
            raise UserError(f"{path} holds no 0/1 tensor `mask`: give a mask file that `run` wrote")
        keep = [torch.from_numpy(tensors[key]).bool() for key in keys]
        shapes = tuple((part.shape[0], part.shape[1]) for part in keep)
        graph = WeightGraph(shapes, tuple(layout.get("joined", ())), tuple(layout.get("names", ())))
        return cls(graph.join(keep), graph, facts)


def random_mask(graph: WeightGraph, kappa: int, generator: torch.Generator) -> Mask:
    """Switch off kappa weights drawn uniformly without replacement."""
    return Mask(~hard_topk(torch.rand(graph.shape, generator=generator), kappa), graph)


def feasibility_score(importance: Tensor, forget_class: int | Sequence[int]) -> Tensor:
    """s_ij = mean importance for the classes to forget minus mean importance over the retained ones.

    Args:
        importance: graded importance per class [C, *shape].

    Returns:
        s [*shape].
    """
    forget, retain = _sides(importance, forget_class)
    return forget.mean(0) - retain.mean(0)


def _sides(values: Tensor, forget_class: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values of the classes to forget and of the retained ones. [C, ...] -> [F, ...], [C - F, ...]."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[list(as_tuple(forget_class))] = True
    return values[chosen], values[~chosen]


def top_mask(score: Tensor, kappa: int, graph: WeightGraph) -> Mask:
    """Switch off the kappa weights of largest score [*graph.shape]; ties go to the lower flat index."""
    return Mask(~hard_topk(score, kappa).cpu(), graph)


def set_difference_mask(importance: Tensor, forget_class: int | Sequence[int], top_k: int, graph: WeightGraph) -> Mask:
    """Switch off what is in the top-K mask of a class to forget and in no retained class's.

    Args:
        importance: [C, *graph.shape].

    Returns:
        A mask that switches off at most top_k weights for each class, possibly none.
    """
    chosen = torch.stack([hard_topk(scores, top_k) for scores in importance])
    forget, retain = _sides(chosen, forget_class)
    return Mask(~(forget.any(0) & ~retain.any(0)), graph)


def weights_sha256(weights: Sequence[Tensor]) -> str:
    """SHA-256 of the target layers' weights [m, n], inputs first: types, shapes and bits, wherever they lie."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_parent(mask: Mask, weights: Sequence[Tensor]) -> None:
    """Check that a mask from a file is applied to the weights that it was made for.

    On other weights of the same shape it would switch off places that mean nothing there. A mask made in memory
    carries no facts, and is not asked.

    Raises:
        UserError: the weights are others.
    """
    made_for = mask.facts.get("weights_sha256")
    if made_for is None and "classifier_sha256" not in mask.facts:
        return
    found = weights_sha256(weights)
    if made_for != found:
        known = f"are {made_for[:12]}" if isinstance(made_for, str) else "its file does not name"
        raise UserError(
            f"the mask is of another classifier, {mask.facts.get('classifier_path')}, whose weights {known}, these are "
            f"{found[:12]}: load that one, unmasked, or say masked(..., any_weights=True)"
        )


@contextmanager
def masked(weights: nn.Parameter | Sequence[nn.Parameter], mask: Mask, any_weights: bool = False) -> Generator[None]:
    """Switch weights off for the length of the block; afterwards the parameters are bit-identical.

    Args:
        weights: the parameters that the mask is for, one or (inputs first) several: [m, n], or [m, n, kh, kw], of which
            the mask has the matrix [m, n * kh * kw].
        mask: of the same shapes.
        any_weights: apply a mask from a file to other weights than it was made for, too.

    Raises:
        UserError: the shapes differ, or the mask's file says that it was made for other weights.
    """
    layers = [weights] if isinstance(weights, nn.Parameter) else list(weights)
    needed = tuple((len(weight), weight.numel() // len(weight)) for weight in layers)
    if mask.graph.shapes != needed:
        found, wanted = (", ".join(f"{m} x {n}" for m, n in shapes) for shapes in (mask.graph.shapes, needed))
        raise UserError(f"the mask is for {found}, the layers are {wanted}: use one made for this model and mask_layer")
    if not any_weights:
        check_parent(mask, layers)
    originals = [weight.detach().clone() for weight in layers]
    try:
        with torch.no_grad():
            for weight, keep in zip(layers, mask.graph.split(mask.keep), strict=True):
                weight.masked_fill_(~keep.reshape(weight.shape).to(weight.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(layers, originals, strict=True):
                weight.copy_(original)
