"""The optimizer of a candidate, from its name: a class of torch.optim, with its own arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

PREFIX = "torch.optim:"
NEEDS_CLOSURE = ("LBFGS",)


def known_optimizers() -> list[str]:
    """The optimizers that may be named, as "torch.optim:AdamW"."""
    return sorted(f"{PREFIX}{name}" for name in dir(torch.optim) if _class_of(name) is not None)


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer of torch.optim over parameters. Nothing else is imported, whoever asks.

    Raises ConfigError for an unknown name, or arguments that it refuses.
    """
    kind = _class_of(name.removeprefix(PREFIX))
    if kind is None:
        near = get_close_matches(name, known_optimizers(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f'optimizer {name!r} is not one of torch.optim: give one as "torch.optim:AdamW", or None to take the '
            f"gradients yourself{hint}"
        )
    accepted = inspect.signature(kind).parameters
    unknown = sorted(arguments.keys() - accepted.keys() | {"params"} & arguments.keys())
    if unknown:
        known = ", ".join(key for key in accepted if key != "params")
        raise ConfigError(f"optimizer {name!r} takes no argument {unknown[0]!r}; its arguments are {known}")
    for key, value in arguments.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ConfigError(f"optimizer {name!r}: {key} must be finite, not {value!r}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        return kind(list(parameters), **given)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer {name!r} refuses its arguments: {error}") from None


def _class_of(name: str) -> Any:
    kind = getattr(torch.optim, name, None)
    is_one = inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    return kind if is_one and name not in NEEDS_CLOSURE else None
