"""The names of versions: their 12 hex digits identify behaviour, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..spec import Expert
from ..weights.files import tensor_digest
from .canonical import canonical, sha256
from .code_digest import RECIPE, code_digest, examined

DIGITS = 12


def version_name(counter: int, digest: str) -> str:
    """The name of a version: "v7-3fa1c2d40b9e"."""
    return f"v{counter}-{digest[:DIGITS]}"


def expert_digest(expert: Expert, behaviour: object, tensors: str, *, counter: int = 0, recipe: int = RECIPE) -> str:
    """The sha256 of an expert: factory, canonical arguments, specs, code and tensor bytes, in hexadecimal.

    `behaviour` is the module or function that runs, `tensors` the `tensor_digest` of the tensors read back from it.
    Where not all of the behaviour can be seen, the `counter` of the version is part of it: what cannot be told apart is
    treated as different.
    """
    code = examined(behaviour, recipe, live=expert.live is not None)
    return sha256(
        str(expert.factory),
        canonical(expert.args),
        canonical(dict(expert.kwargs)),
        f"{expert.input}|{expert.output}|{expert.framework}",
        code.digest,
        tensors,
        *([f"counter {counter}"] if code.opaque else []),
    )


def gate_digest(name: str, gate: object, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a gate: its kind, code with attributes, and tensor bytes, in hexadecimal."""
    return sha256(name, code_digest(gate), tensor_digest(tensors))
