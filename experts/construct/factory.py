"""Builds a function over rows from a declared expert: import string, construction, weights, dtype and device."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, FailedPrecondition, Unavailable
from ..identity.canonical import canonical
from ..spec import FLOATING, Expert, TensorSpec
from ..tensors import DTYPE_NAMES, torch_dtype
from ..weights.files import load_into, load_tensors, tensors_of
from .returned import own_rows

_DRAWING = threading.RLock()
"""Held while random numbers are drawn: torch has one generator for all threads, and replicas are built concurrently.
Reentrant, because a factory may build other experts."""

_NUMPY_PACKAGES = ("numpy", "scipy")


class RowFunction:
    """An expert that is ready to run: rows [n, ...] in, rows [n, ...] out, on one device.

    Floating-point rows are cast to the dtype that the expert declares, else to that of the module's first parameter
    whose dtype rows can have: weights in 8 bits say nothing of rows. `served` are the rows that it answered last,
    `frozen` the names of the parameters that its constructor froze.
    One thread calls it at a time, since it may answer in a buffer of its own: a version is probed while it serves.
    """

    def __init__(self, function: Callable[[Any], Any], expert: Expert, device: torch.device) -> None:
        self.module = function if isinstance(function, nn.Module) else None
        self.expert = expert
        self.device = device
        self.function = function
        self.served: TensorSpec | None = None
        self._served: tuple[torch.Size, torch.dtype] | None = None
        self._calling = threading.Lock()
        self._whole = False  # whether it has answered rows of whole numbers
        self.frozen: frozenset[str] = frozenset()
        self._numpy = (expert.framework or _framework_of(function)) == "numpy"
        self._dtype = _floating_dtype(self.module, expert)

    def __call__(self, rows: Tensor, patience: float = -1.0) -> Tensor:
        """Compute rows [n, ...]. Raises ExpertFailed for a result that `own_rows` refuses.

        Raises Unavailable if another thread calls it for longer than `patience` seconds; by default it is waited for.
        """
        given, rows = rows, rows.to(self.device)
        if self._dtype is not None and rows.is_floating_point():
            rows = rows.to(self._dtype)
        if not self._calling.acquire(timeout=patience):
            raise Unavailable("it computes other rows all the while")
        try:
            result = self._call_numpy(rows) if self._numpy else self.function(rows)
            answer = own_rows(result, rows.shape[0], self.device)
        finally:
            self._calling.release()
        if (given.shape[1:], given.dtype) != self._served:
            self._served = given.shape[1:], given.dtype
            self._whole = self._whole or not given.is_floating_point()
            self.served = TensorSpec(tuple(given.shape[1:]), DTYPE_NAMES.get(given.dtype))
        return answer

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads from calling it during a block."""
        with self._calling:
            yield

    @property
    def rows_dtype(self) -> torch.dtype | None:
        """The dtype that floating-point rows are cast to; None to leave them."""
        return self._dtype

    @property
    def is_differentiable(self) -> bool:
        """Whether torch can follow what it computes: numpy's functions leave no trace."""
        return not self._numpy

    def floats_only(self, rows: Tensor) -> str:
        """The floating-point dtype that the expert computes in, if that may be why it refuses `rows`; else ""."""
        if rows.is_floating_point() or self._whole:
            return ""
        if self._dtype is not None:
            return DTYPE_NAMES.get(self._dtype, "")
        served = None if self.served is None else self.served.dtype
        return served if served in FLOATING else ""

    def _call_numpy(self, rows: Tensor) -> Any:
        if rows.dtype == torch.bfloat16:  # numpy has no bfloat16
            rows = rows.float()
        return self.function(rows.cpu().numpy())

    def on(self, device: torch.device) -> RowFunction:
        """Move the expert to another device."""
        function = self.function.to(device) if isinstance(self.function, nn.Module) else self.function
        moved = RowFunction(function, self.expert, device)
        moved.served, moved._calling, moved._whole = self.served, self._calling, self._whole
        moved.frozen = self.frozen
        return moved

    def state(self) -> dict[str, Tensor]:
        """The expert's tensors by name; empty for a plain function."""
        return tensors_of(self.module) if self.module is not None else {}


def locate(factory: str) -> Any:
    """Import the object "module:attribute". Raises ConfigError naming the wrong half."""
    module_name, _, attributes = factory.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"factory {factory!r}: importing {module_name!r} failed: {_told(error)}") from error
    for name in attributes.split("."):
        if not hasattr(target, name):
            raise ConfigError(f"factory {factory!r}: {module_name!r} has no attribute {attributes!r}")
        target = getattr(target, name)
    if not callable(target):
        raise ConfigError(f"factory {factory!r} is a {type(target).__name__}, not a class or function")
    _source_at_import(module_name)
    return target


def check_unchanged(factory: str) -> None:
    """Check that the code of a factory that this process has imported is still that of its file.

    Only the factory's own module is looked at, not what that imports. Raises FailedPrecondition.
    """
    locate(factory)
    name = factory.partition(":")[0]
    if _source_at_import(name) != _source_digest(name):
        raise FailedPrecondition(
            f"the file of module {name!r} has changed since this process imported it, so that its old code would run: "
            "give the new code a module of another name, pass it as a live object, or restart the cluster"
        )


def _source_at_import(name: str) -> str:
    """The digest of a module's file when it was first asked for, after its import or a reload."""
    return _remembered(name, id(getattr(sys.modules.get(name), "__spec__", None)))


@cache
def _remembered(name: str, spec: int) -> str:
    return _source_digest(name)


def _source_digest(name: str) -> str:
    """The sha256 of a module's source in hexadecimal; empty where it has none."""
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path.endswith(".py") else ""
    except OSError:  # an archive, or a file that was removed
        return ""


def build(expert: Expert, device: str = "cpu", *, load_weights: bool = True, id: str = "") -> RowFunction:
    """Construct an expert on a device, with its weights.

    Parameters without a weights file are drawn with a seed derived from the declaration and the `id`, so that they are
    the same in every replica and after every restart, and differ between experts of one declaration.

    Raises ConfigError, SpecMismatch, NotFound or DataLoss.
    """
    place = torch.device(device)
    declared = f"{expert.factory}|{canonical(expert.args)}|{canonical(dict(expert.kwargs))}" + (f"|{id}" if id else "")
    frozen: frozenset[str] = frozenset()
    with seeded(declared), torch.device("meta" if place.type == "meta" else "cpu"):
        function = expert.live if expert.live is not None else _construct(expert)
    if isinstance(function, nn.Module):
        if expert.weights is not None and load_weights:
            load_into(function, load_tensors(expert.weights)[0], f"weights {str(expert.weights)!r}")
        function = _placed(function, place).eval()
        frozen = frozenset(name for name, parameter in function.named_parameters() if not parameter.requires_grad)
        for parameter in function.parameters():
            parameter.requires_grad_(False)
        place = _place_of(function, place)
    elif expert.weights is not None:
        raise ConfigError.of(
            (("weights",), "a plain function has no parameters to load weights into: leave out weights")
        )
    built = RowFunction(function, expert, place)
    built.frozen = frozen
    return built


def _placed(module: nn.Module, place: torch.device) -> nn.Module:
    return module.to(place) if _place_of(module, place) == place else module


def _place_of(module: nn.Module, place: torch.device) -> torch.device:
    """Where a module can be put: TorchScript modules do not go to the device "meta"."""
    is_script = isinstance(module, torch.jit.ScriptModule)
    return torch.device("cpu") if is_script and place.type == "meta" else place


def with_own_copy(expert: Expert, owner: str) -> Expert:
    """The declaration with a copy of its live object, if any: the original may be serving elsewhere.

    Raises ConfigError for an object that cannot be copied; `owner` names the owner of the copy in its message.
    """
    try:
        with torch.no_grad():  # or parameters of TorchScript become results of a computation
            return replace(expert, live=copy.deepcopy(expert.live))
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        kind = type(expert.live).__name__
        raise ConfigError(f"the live {kind} cannot be copied, and {owner} needs its own: {error}") from error


@contextmanager
def seeded(declared: str) -> Iterator[None]:
    """Seed the generators of torch (on the CPU), numpy and Python from a declaration, and restore them afterwards."""
    seed = int.from_bytes(hashlib.sha256(declared.encode()).digest()[:6], "big")
    with _DRAWING, torch.random.fork_rng(devices=[]):
        before = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _construct(expert: Expert) -> Callable[[Any], Any]:
    factory = expert.factory or ""
    target = locate(factory)
    if not (inspect.isclass(target) or expert.args or expert.kwargs or _takes_no_arguments(target)):
        return target  # type: ignore[no-any-return]
    try:
        built = target(*expert.args, **expert.kwargs)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"factory {factory!r} failed when called with its args: {_told(error)}") from error
    if not callable(built):
        raise ConfigError(f"factory {factory!r} returned a {type(built).__name__}, not a module or function")
    return built  # type: ignore[no-any-return]


def _told(error: BaseException) -> str:
    return f"it called sys.exit({error})" if isinstance(error, SystemExit) else str(error)


def _takes_no_arguments(target: Any) -> bool:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):  # builtins and ufuncs without a signature are functions over rows
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        p.default is not p.empty or p.kind is p.KEYWORD_ONLY for p in parameters if p.kind not in kinds
    ) and not (any(p.kind is p.VAR_POSITIONAL for p in parameters))


def _framework_of(function: object) -> str:
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    return "numpy" if isinstance(function, np.ufunc) or package in _NUMPY_PACKAGES else "torch"


def _floating_dtype(module: nn.Module | None, expert: Expert) -> torch.dtype | None:
    if expert.input.dtype is not None:
        declared = torch_dtype(expert.input.dtype)
        return declared if declared.is_floating_point else None
    parameters = module.parameters() if module is not None else ()
    return next((p.dtype for p in parameters if p.is_floating_point() and p.dtype in DTYPE_NAMES), None)
