"""The declaration of an expert, what scales it, and the shapes and dtypes of its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from .errors import ConfigError, SpecMismatch
from .wire import ITEM_SIZES

FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorSpec:
    """Trailing shape and dtype of rows: rows are [n, *shape]. `None` means any.

    >>> TensorSpec((16,), "float32").agrees(TensorSpec((16,), "bfloat16"))
    True
    """

    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            sizes = isinstance(self.shape, (list, tuple)) and all(type(dim) is int and dim >= 0 for dim in self.shape)
            if not sizes:
                raise ConfigError(f"shape must be a list of sizes, each 0 or more, not {self.shape!r}")
            object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype is not None and self.dtype not in ITEM_SIZES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; use one of {', '.join(ITEM_SIZES)}")

    def check(self, shape: tuple[int, ...], dtype: str, what: str) -> None:
        """Check rows of trailing `shape` and `dtype`; all floating-point dtypes are interchangeable.

        Raises SpecMismatch naming `what`.
        """
        if self.shape is not None and shape != self.shape:
            raise SpecMismatch(f"{what} has rows of shape {list(shape)}, expected {list(self.shape)}")
        if self.dtype is not None and dtype != self.dtype and not (dtype in FLOATING and self.dtype in FLOATING):
            raise SpecMismatch(f"{what} has dtype {dtype}, expected {self.dtype}")

    def agrees(self, other: TensorSpec) -> bool:
        """Whether rows of one spec are valid for the other."""
        shapes = self.shape is None or other.shape is None or self.shape == other.shape
        if self.dtype is None or other.dtype is None or self.dtype == other.dtype:
            return shapes
        return shapes and self.dtype in FLOATING and other.dtype in FLOATING

    def filled(self, other: TensorSpec) -> TensorSpec:
        """This spec with its unset fields taken from another one."""
        return TensorSpec(self.shape if self.shape is not None else other.shape, self.dtype or other.dtype)

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else str(list(self.shape))
        return f"{shape} {self.dtype or 'any dtype'}"


ANY = TensorSpec()
"""Rows of any shape and dtype."""


@dataclass(frozen=True, kw_only=True)
class Autoscale:
    """Between how many replicas an expert, or a pack, is scaled by its load.

    More replicas are started once rows have waited longer than `target_queue_ms` milliseconds for `up_after` seconds:
    in proportion to the excess, and at most twice as many. One is ended once rows have waited at most half of that for
    `down_after` seconds, and the others can do the work.

    Raises ConfigError for an invalid declaration.

    >>> Expert("numpy:sin", autoscale=Autoscale(max=4)).autoscale.target_queue_ms
    50.0
    """

    max: int
    min: int = 1
    target_queue_ms: float = 50.0
    up_after: float = 5.0
    down_after: float = 60.0

    def __post_init__(self) -> None:
        for name in ("min", "max"):
            count = getattr(self, name)
            if type(count) is not int or count < 1:
                raise ConfigError(f"autoscale: {name} must be a whole number of at least 1, not {count!r}")
        if self.min > self.max:
            raise ConfigError(f"autoscale: min is {self.min} and max {self.max}: min must not be above max")
        for name in ("target_queue_ms", "up_after", "down_after"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ConfigError(f"autoscale: {name} must be a number above 0, not {value!r}")


@dataclass(frozen=True)
class Expert:
    """A function from rows [n, ...] to rows [n, ...], and where and how often it runs.

    `factory` is an import string "module:attribute". A class, a callable without required arguments, or any callable
    with `args` or `kwargs` is called once and returns the expert; any other callable is the expert itself. `weights` is
    a safetensors file whose keys, shapes and dtypes are exactly those of the module's state. A factory must build the
    same in every process: random numbers of torch, numpy and Python are seeded by the declaration and the expert's id.

    `num_gpus`, `num_cpus` and `resources` are reserved in Ray by each replica; `replicas` is the number of copies;
    experts of one layer with the same `pack` name share one actor per replica. With `autoscale` the number of copies
    follows the load, from `replicas` on, or from its `min` if that is more. `runtime_env` is Ray's (code and
    packages on other nodes). `input` and `output` declare the rows; undeclared specs are probed. `framework` is the
    type of the function's rows, "torch" or "numpy"; by default numpy for functions of numpy and scipy.

    Raises ConfigError for an invalid declaration.

    >>> sine = Expert("numpy:sin")
    >>> linear = Expert("torch.nn:Linear", args=(16, 4), weights="e0.safetensors", num_gpus=0.5, replicas=2)
    >>> doubled = Expert.from_function(lambda rows: rows * 2)
    >>> doubled.ephemeral
    True
    """

    factory: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | Path | None = None
    num_gpus: float = 0.0
    num_cpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    replicas: int = 1
    autoscale: Autoscale | None = None
    pack: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    input: TensorSpec = ANY
    output: TensorSpec = ANY
    framework: str | None = None
    live: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.factory is None) == (self.live is None):
            raise ConfigError('an expert needs a factory, as in Expert("torch.nn:Linear"), or a live object')
        if self.factory is not None and not is_import_string(self.factory):
            raise ConfigError(
                f'factory must be "module:attribute", as in "torch.nn:Linear"; {_instead_of(self.factory)}'
            )
        if isinstance(self.live, type):
            raise ConfigError(f"a live expert is an object, not a class; {_instead_of(self.live)}")
        if isinstance(self.args, (str, bytes)) or not isinstance(self.args, Iterable):
            raise ConfigError(f"args must be a list of arguments, as in args=(16, 4), not {self.args!r}")
        if not isinstance(self.kwargs, Mapping):
            raise ConfigError(f"kwargs must be a map of names to arguments, not {self.kwargs!r}")
        object.__setattr__(self, "args", tuple(_plain(item) for item in self.args))
        object.__setattr__(self, "kwargs", _plain(dict(self.kwargs)))
        for name in ("replicas", "num_gpus", "num_cpus"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if type(self.replicas) is not int or self.replicas < 1:
            raise ConfigError(f"replicas must be a whole number of at least 1, not {self.replicas!r}")
        if self.autoscale is not None:
            self._check_autoscale(self.autoscale)
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value < math.inf):
                raise ConfigError(f"{name} must be a number of at least 0, not {value!r}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ConfigError(f"num_gpus above 1 must be whole, not {self.num_gpus}")
        if self.framework not in (None, "torch", "numpy"):
            raise ConfigError(f'framework must be "torch" or "numpy", not {self.framework!r}')

    def _check_autoscale(self, rule: Autoscale) -> None:
        if not isinstance(rule, Autoscale):
            raise ConfigError(f"autoscale must be an expertmesh.Autoscale, not {type(rule).__name__}")
        if self.replicas > rule.max:
            raise ConfigError(f"replicas is {self.replicas}, and autoscale allows {rule.max}: lower it, or raise max")
        object.__setattr__(self, "replicas", max(self.replicas, rule.min))

    @classmethod
    def from_module(cls, module: Any, **options: Any) -> Expert:
        """An expert from a live torch module of trusted code. It is ephemeral: a cold restart cannot restore it."""
        if not callable(module):
            raise ConfigError(f"from_module needs a module, not {type(module).__name__}")
        return cls(live=module, **options)

    @classmethod
    def from_function(cls, function: Callable[[Any], Any], **options: Any) -> Expert:
        """An expert from a live function of trusted code. It is ephemeral: a cold restart cannot restore it."""
        if not callable(function):
            raise ConfigError(f"from_function needs a function, not {type(function).__name__}")
        return cls(live=function, **options)

    @property
    def ephemeral(self) -> bool:
        """Whether the expert is a live object, which cannot be restored from a file."""
        return self.live is not None

    def placement(self) -> tuple[object, ...]:
        """The settings that decide where and how often an actor of this expert runs; equal in a pack."""
        resources = tuple(sorted(self.resources.items()))
        environment = json.dumps(self.runtime_env, sort_keys=True, default=str)
        return (self.num_gpus, self.num_cpus, resources, self.replicas, self.autoscale, environment)

    def with_specs(self, input: TensorSpec, output: TensorSpec) -> Expert:
        """A copy with these specs."""
        return replace(self, input=input, output=output)


def check_expert(value: object, what: str) -> None:
    """Check that a value is an Expert. Raises ConfigError that says how to declare one of it."""
    if not isinstance(value, Expert):
        raise ConfigError(f"{what} must be an Expert, not {type(value).__name__}; {_instead_of(value)}")


def _instead_of(value: object) -> str:
    """How to declare an expert from what was given in its place."""
    if isinstance(value, str) and is_import_string(value):
        return f'write Expert("{value}")'
    if isinstance(value, type):
        name = f"{value.__module__}:{value.__qualname__}"
        made = f"Expert.from_module({value.__name__}(...))"
        return f'pass an object of it, as in {made}, or write Expert("{name}", args=...)'
    if callable(value):
        kind = "module" if hasattr(value, "state_dict") else "function"
        return f"make an expert of this {kind} with Expert.from_{kind}"
    return f"this is {value!r}"


def _plain(value: Any) -> Any:
    """A value with the numbers of numpy in it as Python's own, so that a record can keep them."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    kind = type(value)
    is_scalar = kind.__module__ == "numpy" and kind.__name__ != "ndarray" and hasattr(value, "item")
    plain = value.item() if is_scalar else value
    return plain if isinstance(plain, (bool, int, float, str)) else value


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_import_string(text: object) -> bool:
    """Whether a text has the form "module:attribute"."""
    if not isinstance(text, str) or text.count(":") != 1:
        return False
    return all(name.isidentifier() for part in text.split(":") for name in part.split("."))
