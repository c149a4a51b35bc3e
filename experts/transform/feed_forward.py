"""A feed-forward expert as a set of hidden units: y = Σ output column j · hidden value j of x, plus the output bias.

Shapes: R rows, D features, F hidden units, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SpecMismatch
from ..modules import FeedForward, GatedFeedForward

FeedForwardExpert = FeedForward | GatedFeedForward


def check_feed_forward(*modules: nn.Module) -> None:
    """Raise ConfigError for what is no FeedForward or GatedFeedForward; a subclass may compute something else."""
    for module in modules:
        if type(module) not in (FeedForward, GatedFeedForward):
            raise ConfigError(
                f"the expert is a {type(module).__name__}, but must be a FeedForward or GatedFeedForward: only their "
                "hidden units can be taken apart"
            )


def check_alike(modules: Sequence[nn.Module]) -> None:
    """Raise SpecMismatch for experts of different classes or activation functions."""
    first = modules[0]
    for index, module in enumerate(modules):
        if type(module) is not type(first):
            raise SpecMismatch(
                f"expert 0 is a {type(first).__name__} and expert {index} a {type(module).__name__}: "
                "give experts of one class"
            )
        if not _same(getattr(first, "activation", None), getattr(module, "activation", None)):
            raise SpecMismatch(f"experts 0 and {index} have different activation functions: give experts with one")


def _same(one: object, other: object) -> bool:
    """Whether two activations are the same function; a copied expert has its own copy of a partial one."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other or (isinstance(one, nn.Module) and type(one) is type(other) and repr(one) == repr(other))


def hidden_values(expert: FeedForwardExpert, rows_RD: Tensor) -> Tensor:
    """The hidden values [R, F] of rows, without gradient."""
    with torch.no_grad():
        up_RF: Tensor = expert.up_proj(rows_RD)
        if isinstance(expert, GatedFeedForward):
            return expert.activation(expert.gate_proj(rows_RD)) * up_RF
        return expert.activation(up_RF)


def unit_parameters(expert: FeedForwardExpert) -> Tensor:
    """All parameters of each hidden unit, a row for each: its input weights and biases, then its output column."""
    inputs = [tensor for name, tensor in expert.state_dict().items() if not name.startswith("down_proj")]
    columns = [tensor if tensor.dim() == 2 else tensor[:, None] for tensor in inputs]
    return torch.cat([*columns, expert.down_proj.weight.detach().T], dim=1)


def with_units(expert: FeedForwardExpert, units: Tensor, output_bias: Tensor | None) -> FeedForwardExpert:
    """A new expert of some of an expert's hidden units (int64 indices) with that output bias, of the same class."""
    inputs, width, outputs = expert.up_proj.in_features, len(units), expert.down_proj.out_features
    has_bias = expert.down_proj.bias is not None
    with torch.device("meta"):  # nothing is drawn and no memory taken: the tensors are given below
        taken: FeedForwardExpert
        if isinstance(expert, GatedFeedForward):
            taken = GatedFeedForward(inputs, width, bias=has_bias)
        else:
            taken = FeedForward(inputs, width, out_features=outputs, bias=has_bias)
    taken.activation = expert.activation
    state = {}
    for name, tensor in expert.state_dict().items():
        if name == "down_proj.weight":
            tensor = tensor[:, units]
        elif name != "down_proj.bias":
            tensor = tensor[units]
        elif output_bias is not None:
            tensor = output_bias
        state[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    taken.load_state_dict(state, assign=True)
    return taken.train(expert.training)
