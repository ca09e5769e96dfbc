"""Samplers and scores give the shapes and types that their docstrings name; jaxtyping and beartype check each call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from graphs.subsets import SAMPLERS
from unlearn.masks import feasibility_score

Points = Float[Tensor, "batch weights"]


def checked(function: Callable[..., Tensor], takes: Any, gives: Any) -> Callable[..., Tensor]:
    """The function, its first argument and its answer checked at each call against shapes with common names."""

    @jaxtyped(typechecker=beartype)
    def call(values: takes, rest: tuple) -> gives:
        return function(values, *rest)

    return lambda values, *rest: call(values, rest)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_give_one_degree_a_weight(name):
    sample = checked(SAMPLERS[name], Points, Points)
    sample(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), 4, 0.5)
    with pytest.raises(TypeCheckError):
        sample(torch.zeros(10), 4, 0.5)


def test_feasibility_gives_one_score_a_weight():
    score = checked(feasibility_score, Float[Tensor, "classes weights"], Float[Tensor, " weights"])
    score(torch.rand(5, 7, generator=torch.Generator().manual_seed(0)), 2)
    with pytest.raises(TypeCheckError):
        score(torch.rand(5, 7, 1), 2)


def test_answer_of_a_wrong_shape_fails():
    for wrong in (lambda x: x.sum(-1), lambda x: x.T, lambda x: x[:, :-1], lambda x: x.long()):
        with pytest.raises(TypeCheckError):
            checked(wrong, Points, Points)(torch.zeros(3, 10))
