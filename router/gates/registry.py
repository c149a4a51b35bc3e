"""The registry of gates: every gate by its name in YAML, and building one from a name and arguments."""

from __future__ import annotations

import inspect
from typing import Any

from ...experts.errors import ConfigError
from ...experts.suggestion import suggestion
from .adaptive import Threshold, TopP
from .base import Gate
from .cosine import Cosine
from .custom import Custom
from .expert_choice import ExpertChoice
from .fixed import Fixed
from .hashed import Hash
from .noisy import NoisyTopK
from .sigmoid import Sigmoid
from .softmax import Switch, TopK

GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (TopK, Switch, NoisyTopK, Sigmoid, Threshold, TopP, Cosine, ExpertChoice, Hash, Fixed, Custom)
}
"""Every gate by its name in YAML."""


def build(name: str, **arguments: Any) -> Gate:
    """Build a gate from its name in YAML and its arguments.

    Raises ConfigError for an unknown name or argument, with a suggestion if one is close, and for missing or bad
    arguments; InvalidRequest for a `k` that is out of range.
    """
    if name not in GATES:
        raise ConfigError(f"unknown gate {name!r}{suggestion(name, GATES)}; use one of {', '.join(sorted(GATES))}")
    parameters = inspect.signature(GATES[name]).parameters
    for argument in arguments:
        if argument not in parameters:
            hint = suggestion(argument, parameters)
            raise ConfigError(f"gate {name!r} has no argument {argument!r}{hint}; it takes {', '.join(parameters)}")
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in arguments]
    if missing:
        raise ConfigError(f"gate {name!r} needs {', '.join(missing)}")
    try:
        return GATES[name](**arguments)
    except TypeError as error:
        raise ConfigError(f"gate {name!r}: an argument has the wrong type: {error}") from error
