"""Forward and backward passes through one expert.

With L the loss, y = w·f(x) of a row and its weight, and g = dL/dy: dL/dw = g·f(x), dL/dx = w·g·f'(x), and likewise for
the parameters. Shapes: n rows, with any trailing shape.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import FailedPrecondition, SpecMismatch

Function = Callable[[Tensor], Tensor]

_DRAWING = threading.RLock()
"""torch has one generator for all threads of a process."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of rows [n, ...] (None where rows are not floating-point), of weights [n], and of parameters."""

    rows_n: Tensor | None
    weights_n: Tensor
    parameters: tuple[Tensor | None, ...]


def forward(function: Function, rows_n: Tensor, seed: int | None) -> Tensor:
    """The answers [n, ...] to rows. With a seed, random numbers are those of the backward pass with this seed."""
    with _random_as(seed, rows_n.device), torch.no_grad():
        return _checked(function(rows_n), rows_n)


@dataclass(frozen=True)
class Graph:
    """A forward pass that can be differentiated: its rows, and its answers [n, ...]."""

    rows_n: Tensor
    answers_n: Tensor


def graph_of(function: Function, rows_n: Tensor, seed: int | None, *, of_rows: bool = True) -> Graph:
    """A forward pass, of whose rows there will be gradients if `of_rows`."""
    with _random_as(seed, rows_n.device), torch.enable_grad():
        x = rows_n.detach()
        if x.is_floating_point() and of_rows:
            x = x.clone().requires_grad_(True)
        return Graph(x, _checked(function(x), rows_n))


def gradients_of(
    graph: Graph, gradients_n: Tensor, weights_n: Tensor | None, parameters: Sequence[nn.Parameter]
) -> Gradients:
    """The gradients for rows, weights and parameters, from `gradients_n` [n, ...], those of the weighted answers.

    Raises SpecMismatch for gradients of another shape than the answers, FailedPrecondition for an expert that is not
    differentiable.
    """
    x, answers_n = graph.rows_n, graph.answers_n
    if answers_n.shape != gradients_n.shape:
        raise SpecMismatch(
            f"the gradients have the shape {list(gradients_n.shape)}, but the answers {list(answers_n.shape)}"
        )
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    inputs = ([x] if x.requires_grad else []) + wanted
    if not answers_n.requires_grad:
        raise FailedPrecondition(
            "it is not differentiable: neither its rows nor its parameters have a gradient. Train a torch module, or a "
            "function of torch on floating-point rows"
        )
    wide = torch.float64 if answers_n.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        products_n = answers_n.to(wide) * gradients_n.to(wide)
        dots_n = products_n.reshape(len(x), math.prod(answers_n.shape[1:])).sum(dim=1)
        total = dots_n.sum() if weights_n is None else (dots_n * weights_n.to(wide)).sum()
        found = list(torch.autograd.grad(total, inputs, allow_unused=True))
    rows = found.pop(0) if x.requires_grad else None
    if rows is None and x.requires_grad:
        rows = torch.zeros_like(x)
    by_parameter = dict(zip(map(id, wanted), found, strict=True))
    return Gradients(rows, dots_n.detach(), tuple(by_parameter.get(id(parameter)) for parameter in parameters))


def backward(
    function: Function,
    rows_n: Tensor,
    gradients_n: Tensor,
    weights_n: Tensor | None,
    parameters: Sequence[nn.Parameter],
    seed: int | None,
    *,
    of_rows: bool = True,
) -> Gradients:
    """A forward pass, and its gradients as `gradients_of`; of rows only if `of_rows`."""
    graph = graph_of(function, rows_n, seed, of_rows=of_rows)
    return gradients_of(graph, gradients_n, weights_n, parameters)


def _checked(answers: object, rows_n: Tensor) -> Tensor:
    if not isinstance(answers, Tensor) or answers.shape[:1] != rows_n.shape[:1]:
        found = list(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
        raise SpecMismatch(f"an expert must return a tensor with a row for each of {len(rows_n)} rows, not {found}")
    return answers


@contextmanager
def _random_as(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for a block, and restore them afterwards; do nothing without a seed."""
    if seed is None:
        yield
        return
    with _DRAWING, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
