"""A classifier that somebody else made, with what the pipeline needs of a classifier.

The pipeline knows a classifier by a few methods, whether it is one of its own (`model.HookedModel`) or any module:
`weight_graph` lays out the target weights, `prefix(images)` is what no mask changes, `head(h, weights)` goes on from
there with the weights replaced if asked, and `in_prefix` tells what the first of the two depends on. Which layers are
meant is settled here when the classifier is made; so where the pipeline names the target layers, a foreign classifier
is asked for all of its own (`mask_layer=None`).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from core.observe import log
from graphs.layout import WeightGraph
from models.classifier import Classifier
from models.prefix import NotResumable, Prefix
from models.targets import AUTO, Target, choose, find_targets, head_of, tells_nothing

INSIDE = "net."
"""What stands before a parameter's own name, because the module is wrapped."""


class ForeignClassifier(Classifier):
    """Any image classifier, and the weights of it that a mask may switch off.

    Args:
        module: maps images [B, C, H, W] to logits, or to what `logits` takes them from; used in eval mode.
        logits: the module's output -> logits [B, classes].
        images: a few real ones, [B, C, H, W], preprocessed: the forward pass is looked at with them.
        num_classes: number of logits.
        layers: names of the target weights or of their modules, or `auto`, `cut`, `all` or `deep`
            (`models.targets.choose`).

    Raises:
        UserError: there is no such weight.
    """

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[Any], Tensor],
        images: Tensor,
        num_classes: int,
        layers: Sequence[str] = (AUTO,),
    ):
        super().__init__()
        self.net, self.logits, self.num_classes = module.eval(), logits, num_classes
        self.examples = images
        closes = tells_nothing(module, logits, images)
        self.targets: tuple[Target, ...] = choose(find_targets(module, images), layers, num_classes, closes)

    def weight_graph(self, mask_layer: None = None) -> WeightGraph:
        """Layout of the graph over the target weights.

        Whether the outputs of one layer are the inputs of another is not known of a foreign model: they are not joined.
        """
        shapes = tuple(target.matrix for target in self.targets)
        names = tuple(INSIDE + target.name for target in self.targets)
        return WeightGraph(shapes, tuple(False for _ in pairwise(shapes)), names)

    def weights(self, mask_layer: None = None) -> list[nn.Parameter]:
        """The target weights as the module has them, [m, n] or [m, n, kh, kw], in the order of the forward pass."""
        return [self.net.get_parameter(target.name) for target in self.targets]

    @cached_property
    def plan(self) -> Prefix | None:
        """How the forward pass is resumed at the targets; None: the whole of it runs each time, which is said."""
        try:
            return Prefix(self.net, [target.name for target in self.targets], self.examples, self.logits)
        except NotResumable as reason:
            name = type(self.net).__name__
            log(f"the forward pass of {name} cannot be resumed, the whole of it runs each time: {reason}")
            return None

    def prefix(self, images: Tensor, mask_layer: None = None) -> Tensor:
        """What lies ahead of the first target, [B, numbers]: stored outputs, or the images where nothing can be."""
        return self.plan.before(self.net, images) if self.plan else images.flatten(1)

    def head(self, h: Tensor, mask_layer: None = None, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [B, classes] from `prefix`'s rows; `weights`, [m, n] for each target, stand in for theirs."""
        given = zip(self.targets, weights, strict=True) if weights is not None else ()
        instead = {target.name: value.reshape(target.shape) for target, value in given}
        if self.plan:
            return self.plan.after(self.net, h, instead)
        images = h.view(len(h), *self.examples.shape[1:])
        return self.logits(functional_call(self.net, instead, (images,)) if instead else self.net(images))

    def in_prefix(self, mask_layer: None = None) -> Callable[[str], bool]:
        """Tell, by name, which parameters and buffers `prefix` depends on."""
        inside = self.plan.holds(self.net) if self.plan else None
        return lambda name: inside is not None and inside(name.removeprefix(INSIDE))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.logits(self.net(images))

    @cached_property
    def class_biases(self) -> Tensor | None:
        """What the last layer adds to each logit, [classes], which no mask changes; None: it adds nothing."""
        head = head_of(find_targets(self.net, self.examples), self.num_classes)
        bias = getattr(self.net.get_submodule(head.name.rpartition(".")[0]), "bias", None)
        return bias.detach() if isinstance(bias, Tensor) and len(bias) == self.num_classes else None

    def class_gradient(self, h: Tensor, labels: Tensor, batch: int = 128) -> Tensor:
        """Mean gradient of the cross-entropy with respect to the target weights, [*graph.shape]; of no image: zeros.

        A weight that is used at several positions has no gradient of rank 1 for an image, so that no pair of vectors
        stands for it, as in the pipeline's graphs: the mean is made at once, one backward pass for each batch.

        Args:
            h: rows of the images, [S, numbers].
            labels: [S].
            batch: images at once.
        """
        shares = torch.ones(len(labels))
        parts = zip(h.split(batch), labels.split(batch), shares.split(batch), strict=True) if len(labels) else ()
        return self.gradient_sum(parts) / max(1, len(labels))

    def gradient_sum(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Sum of share * dL/dW over images, by the target weights, [*graph.shape]; one backward pass for each batch.

        Args:
            batches: rows [B, numbers], labels [B], and the share of each image in the sum, [B].
        """
        pairs = zip(self.weights(), self.targets, strict=True)
        weights = [weight.detach().reshape(target.matrix).requires_grad_() for weight, target in pairs]
        total = [torch.zeros_like(weight) for weight in weights]
        with torch.enable_grad():
            for rows, true, share in batches:
                losses = nn.functional.cross_entropy(self.head(rows, None, weights).float(), true, reduction="none")
                for sum_, gradient in zip(total, torch.autograd.grad((losses * share).sum(), weights), strict=True):
                    sum_ += gradient
        return self.weight_graph().join(total)

    def mean_activations(self, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Mean input and output of each target over images and positions, [n] and [m].

        A convolution's input channel stands at each of its taps, so that columns fit the matrix [m, n * kh * kw]. Zeros
        stand where there are no images, and where a neuron has no value of its own: a column of a grouped convolution
        reads another channel in each group, and attention's joint projection shows no output.

        Args:
            h: rows of images, [S, numbers].
        """
        inputs, outputs = ([h.new_zeros(target.matrix[side]) for target in self.targets] for side in (1, 0))

        def note(place: int, target: Target) -> Callable:
            def hook(_: nn.Module, given: tuple[Tensor, ...], output: object) -> None:
                read, said = _channel_means(given[0], target), _channel_means(output, target)
                if len(read) == target.inputs:
                    inputs[place] = read.repeat_interleave(target.matrix[1] // target.inputs)
                if len(said) == len(outputs[place]):
                    outputs[place] = said

            return hook

        owners = [self.net.get_submodule(target.name.rpartition(".")[0]) for target in self.targets]
        pairs = enumerate(zip(owners, self.targets, strict=True))
        handles = [owner.register_forward_hook(note(place, target)) for place, (owner, target) in pairs]
        try:
            if len(h):
                with torch.no_grad():
                    self.head(h)
        finally:
            for handle in handles:
                handle.remove()
        return inputs, outputs


def _channel_means(value: object, target: Target) -> Tensor:
    """Mean over everything but channels: [B, C, H, W] of a convolution, [..., C] of a linear map -> [C]; else []."""
    if not isinstance(value, Tensor):
        return torch.zeros(0)
    channels_first = len(target.shape) == 4
    dims = [dim for dim in range(value.dim()) if dim != (1 if channels_first else value.dim() - 1)]
    return value.detach().float().mean(dims)
