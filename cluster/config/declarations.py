"""Reads the layers, gates and experts of a configuration, and finds every mistake in one pass."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ...experts.construct.factory import locate, seeded
from ...experts.construct.probe import check_rows, check_weights, without_weights
from ...experts.errors import ConfigError, ExpertMeshError
from ...experts.identity.canonical import canonical
from ...experts.spec import Autoscale, Expert, TensorSpec
from ...experts.suggestion import suggestion
from ...experts.weights.files import load_into, load_tensors
from ...router import gates
from ...router.mixture.capacity import Capacity
from ...router.mixture.layer import Layer, check_name
from ..placement.plan import plan_layer
from .document import Mistakes, as_map, check_key, each, shown
from .preflight import check_layer
from .records import Readers, Record, filled, typed

_STAND_IN = Expert("torch.nn:Identity")  # replaces an invalid expert, so that the rest is checked
_ELSEWHERE = (
    "; install it, put it beside this file in a folder that only you can write to, "
    "or give the folder of its code with `runtime_env: {working_dir: FOLDER}`"
)


class DeclarationReader:
    """Reads the declarations of a file in `folder`. Each method raises a ConfigError that lists every mistake.

    Factories are imported, unless `code_elsewhere` or the expert's runtime_env says that their code is elsewhere.
    """

    def __init__(self, folder: Path, *, code_elsewhere: bool) -> None:
        self._folder = folder
        self._code_elsewhere = code_elsewhere
        self._readers: Readers = {
            "input": lambda declared: _read(TensorSpec(), declared, "input"),
            "output": lambda declared: _read(TensorSpec(), declared, "output"),
            "autoscale": _autoscale,
            "capacity": _capacity,
            "weights": self._weights,
            "runtime_env": self.runtime_env,
        }

    def layers(self, declared: object) -> tuple[Layer, ...]:
        """The layers that a map declares."""
        return tuple(each(as_map(declared, "layers"), self._layer).values())

    def runtime_env(self, declared: object) -> dict[str, Any]:
        """A runtime_env with its local folders as absolute paths."""
        environment = as_map(declared, "runtime_env")
        places = {key: place for key, place in environment.items() if key in ("working_dir", "py_modules")}
        return environment | each(places, self._code)

    def _code(self, key: object, place: Any) -> Any:
        """The place of code: a folder as an absolute path, a URL, or a list of these."""
        if isinstance(place, list):
            return list(each(dict(enumerate(place)), self._code).values())
        if not isinstance(place, str) or "://" in place:
            return place
        path = self._folder / place
        if not path.exists():
            raise ConfigError(f"there is no folder {str(path)!r}: correct the path in runtime_env")
        return str(path)

    def _weights(self, name: Any) -> Path:
        path: Path = self._folder / typed(Expert, "weights", name)
        if path.is_dir():
            raise ConfigError(f"weights {str(path)!r} is a folder: name the safetensors file in it")
        if not path.is_file():
            raise ConfigError(f"there is no weights file {str(path)!r}")
        return path

    def _layer(self, name: str, declared: object) -> Layer:
        entries, wrong, gate = dict(as_map(declared, f"layer {name}")), Mistakes(), None
        with wrong.at("experts"):
            if not entries.get("experts"):
                entries.pop("experts", None)
                raise ConfigError(f"layer {name} has no experts: list them under `experts`")
        experts, shared = (self._experts(name, key, entries.pop(key, None), wrong) for key in ("experts", "shared"))
        with wrong.at("gate"):
            gate = self._gate(entries.pop("gate", None))
        with wrong.at():
            check_name(name, "layer")
            if experts:
                layer = Layer(name, gates.Fixed([1.0] * len(experts)), experts)
                layer = filled(layer, {**entries, "shared": shared}, "a layer", wrong, self._readers)
                self._check_experts(layer, wrong)
                layer = replace(layer, gate=gate or layer.gate)
        wrong.raise_if_any()
        check_layer(layer, code_elsewhere=self._code_elsewhere)
        plan_layer(layer)
        return layer

    def _experts(self, layer: str, key: str, declared: object, wrong: Mistakes) -> dict[str, Expert]:
        """The experts of a layer; the mistakes of an invalid one are recorded, and a stand-in replaces it."""
        experts: dict[str, Expert] = {}
        with wrong.at(key):
            for name, expert in as_map({} if declared is None else declared, key).items():
                with wrong.at(key, name):
                    check_name(name, "expert")
                    experts[name] = _STAND_IN
                    experts[name] = self._expert(f"{layer}/{name}", expert)
        return experts

    def _expert(self, name: str, declared: object) -> Expert:
        entries, wrong, expert = dict(as_map(declared, f"expert {name}")), Mistakes(), _STAND_IN
        with wrong.at("factory"):
            expert = self._factory(name, entries.pop("factory", None), entries.get("runtime_env"))
        expert = filled(expert, entries, "an expert", wrong, self._readers)
        wrong.raise_if_any()
        return expert

    def _factory(self, name: str, factory: Any, environment: object) -> Expert:
        if factory is None:
            raise ConfigError(f'expert {name} needs a factory, as in `factory: "torch.nn:Linear"`')
        expert = Expert(factory)
        try:
            if not (self._code_elsewhere or environment):
                locate(factory)
        except ConfigError as error:
            hint = _ELSEWHERE if isinstance(error.__cause__, ModuleNotFoundError) else ""
            raise ConfigError(f"{error.message}{hint}") from None
        return expert

    def _check_experts(self, layer: Layer, wrong: Mistakes) -> None:
        """Check the code and weights of each valid expert, and that it accepts the layer's rows."""
        for key, experts in (("experts", layer.experts), ("shared", layer.shared)):
            for name, expert in experts.items():
                if expert is _STAND_IN or self._code_elsewhere or expert.runtime_env:
                    continue
                with wrong.at(key, name):
                    function = without_weights(expert)
                    with wrong.at(key, name, "weights"):
                        check_weights(expert, function, f"{layer.name}/{name}")
                    check_rows(expert, function, f"{layer.name}/{name}", layer.input)

    def _gate(self, declared: object) -> gates.Gate:
        """A built-in gate. `weights` is its safetensors file, unless the gate has an argument of that name."""
        if declared is None:
            raise ConfigError(f"a layer needs a gate, with one of the types {', '.join(gates.GATES)}")
        arguments, wrong, weights = dict(as_map(declared, "gate")), Mistakes(), None
        kind = arguments.pop("type", None)
        if kind is None:
            raise ConfigError(f"a gate needs a type: one of {', '.join(gates.GATES)}")
        if kind not in list(gates.GATES):
            raise ConfigError.of(
                (("type",), f"there is no gate {kind!r}{suggestion(str(kind), gates.GATES, 'it takes')}")
            )
        known = inspect.signature(gates.GATES[kind]).parameters
        for key in arguments:
            with wrong.at(key):
                check_key(key, dict.fromkeys(("type", *known, "weights")), f"gate {kind!r}")
        with wrong.at("weights"):
            value = arguments.get("weights")
            if "weights" in known and not isinstance(value, (list, type(None))):
                raise ConfigError(f"weights must be a list, not {shown(value)}")
            if "weights" not in known and value is not None:
                weights = self._weights(value)
        wrong.raise_if_any()
        arguments = {key: value for key, value in arguments.items() if key in known}
        try:
            with seeded(f"gate {kind}|{canonical(arguments)}"), torch.device("cpu"):
                gate = gates.build(kind, **arguments)
        except ValueError as error:
            raise error if isinstance(error, ExpertMeshError) else ConfigError(f"gate {kind!r}: {error}") from None
        with wrong.at("weights"):
            if weights is not None:
                load_into(gate, load_tensors(weights)[0], weights.name)
        wrong.raise_if_any()
        return gate


def _read(record: Record, declared: object, name: str) -> Record:
    wrong = Mistakes()
    record = filled(record, as_map(declared, name), f"the {name}", wrong, {})
    wrong.raise_if_any()
    return record


def _capacity(declared: object) -> Capacity:
    if as_map(declared, "capacity").get("factor") is None:
        raise ConfigError("a capacity needs a factor, as in `capacity: {factor: 1.25}`")
    return _read(Capacity(factor=1.0), declared, "capacity")


def _autoscale(declared: object) -> Autoscale:
    entries, wrong = as_map(declared, "autoscale"), Mistakes()
    for key, value in entries.items():
        with wrong.at(key):
            check_key(key, [item.name for item in fields(Autoscale)], "the autoscale")
            typed(Autoscale, key, value)
    wrong.raise_if_any()
    if "max" not in entries:
        raise ConfigError("an autoscale needs the most replicas, as in `autoscale: {min: 1, max: 4}`")
    return Autoscale(**entries)
