"""Layers, gates and experts as a configuration declares them, read so that every mistake is found in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...experts.construct.factory import locate, seeded
from ...experts.construct.probe import check_declaration
from ...experts.errors import ConfigError, DataLoss, ExpertMeshError
from ...experts.identity.canonical import canonical
from ...experts.spec import Expert, TensorSpec
from ...experts.weights.files import load_into, load_tensors
from ...router import gates
from ...router.mixture.capacity import Capacity
from ...router.mixture.layer import Layer, check_name
from ..placement.plan import plan_layer
from .preflight import check_layer
from .value_tree import Located, Mistakes, suggestion

T = TypeVar("T")

_EXPERT_KEYS = tuple(item.name for item in fields(Expert) if item.name != "live")
_EXPERT_KINDS = {
    "args": "list", "kwargs": "map", "weights": "text", "resources": "map", "pack": "text", "runtime_env": "map",
    "framework": "text",
}  # fmt: skip
_LAYER_KEYS = tuple(item.name for item in fields(Layer) if item.name != "name")
_LAYER_KINDS = {
    "combine": "text", "on_missing": "text", "max_lost_mass": "number", "on_dropped": "text",
}  # fmt: skip
_CAPACITY_KINDS = {"factor": "number", "drop": "text", "minimum": "number"}
_REQUIRED = ("factory", "gate", "experts")
_ELSEWHERE = "; install it, or say where its code is: runtime_env: {working_dir: FOLDER}"
_STAND_IN = "torch.nn:Identity"  # takes the place of a factory that is wrong, so that the rest is still checked


class DeclarationReader:
    """Reads declarations; paths in them are relative to `folder`.

    Factories are imported, unless `code_elsewhere` or a runtime_env of the expert says that their code is not here.
    """

    def __init__(self, folder: Path, mistakes: Mistakes, *, code_elsewhere: bool = False) -> None:
        self._folder = folder
        self._mistakes = mistakes
        self._code_elsewhere = code_elsewhere
        self._readers: Mapping[str, Callable[[Located], object]] = {
            "input": self._input,
            "output": self._output,
            "runtime_env": self.runtime_env,
            "weights": self._weights,
        }

    def layers(self, node: Located) -> tuple[Layer, ...]:
        """Every layer of the map `layers`, those apart that cannot be built; their mistakes are noted."""
        if not self._mistakes.check_kind(node, "map", "layers"):
            return ()
        made = [self._layer(name, child) for name, child in node.items()]
        return tuple(layer for layer in made if layer is not None)

    def runtime_env(self, node: Located) -> dict[str, Any] | None:
        """A runtime_env whose local folders are absolute; a folder that is missing is noted."""
        if node.value is None or not self._mistakes.check_kind(node, "map", "runtime_env"):
            return None
        environment: dict[str, Any] = node.plain()
        for key, child in node.items():
            if key == "working_dir":
                environment[key] = self._code(child)
            elif key == "py_modules" and isinstance(child.value, list):
                environment[key] = [self._code(item) for item in child.value]
        return environment

    def _layer(self, name: str, node: Located) -> Layer | None:
        if not self._mistakes.check_kind(node, "map", f"layer {name}"):
            return None
        before = len(self._mistakes)
        arguments = self._arguments(node, "a layer", _LAYER_KEYS, _LAYER_KINDS)
        if "input" in arguments:
            arguments["input"] = self._input(node.value["input"])
        rows = arguments.get("input", TensorSpec())
        experts = self._experts(name, node, rows)
        if "shared" in arguments:
            arguments["shared"] = self._named_experts(name, node.value["shared"], "shared", rows)
        if "capacity" in arguments:
            arguments["capacity"] = self._capacity(node.value["capacity"])
        gate = self._gate(node)
        if experts:
            gate = gate or gates.Fixed([1.0] * len(experts))  # a stand-in: why it has no gate is noted already
            arguments.update(name=self._name(name, "layer", node.where), gate=gate, experts=experts)
            layer = self._build(Layer, arguments, node)
            if layer is not None and len(self._mistakes) == before:
                self._check_together(layer, node)
            return layer
        return None

    def _check_together(self, layer: Layer, node: Located) -> None:
        """Whether experts that are right each by itself fit together, and the gate with them."""
        try:
            check_layer(layer, code_elsewhere=self._code_elsewhere)
            plan_layer(layer)
        except ExpertMeshError as error:
            self._mistakes.add(node.where, str(error))

    def _experts(self, layer: str, node: Located, rows: TensorSpec) -> dict[str, Expert]:
        found = node.value.get("experts")
        if found is None or not found.value:
            self._mistakes.add(node.where_of("experts"), f"layer {layer} has no experts: give them under `experts`")
            return {}
        return self._named_experts(layer, found, "experts", rows)

    def _named_experts(self, layer: str, node: Located, key: str, rows: TensorSpec) -> dict[str, Expert]:
        if not self._mistakes.check_kind(node, "map", key):
            return {}
        return {
            self._name(name, "expert", child.where): self._expert(f"{layer}/{name}", child, rows)
            for name, child in node.items()
        }

    def _capacity(self, node: Located) -> Capacity | None:
        if not self._mistakes.check_kind(node, "map", "capacity"):
            return None
        arguments = self._arguments(node, "a capacity", _CAPACITY_KINDS, _CAPACITY_KINDS)
        if "factor" not in arguments:
            self._mistakes.add(node.where, "a capacity needs a factor, as in `capacity: {factor: 1.25}`")
            return None
        return self._build(Capacity, arguments, node)

    def _name(self, name: str, what: str, where: str) -> str:
        """The name, or one that may stand in for a name that cannot be one."""
        try:
            check_name(name, what)
            return name
        except ConfigError as error:
            self._mistakes.add(where, str(error))
            return "_".join(map(str, name.encode()))[:64] or "_"

    def _expert(self, name: str, node: Located, rows: TensorSpec) -> Expert:
        if not self._mistakes.check_kind(node, "map", f"expert {name}"):
            return Expert(_STAND_IN)
        before = len(self._mistakes)
        entries = dict(node.items())
        arguments = self._arguments(node, "an expert", _EXPERT_KEYS, _EXPERT_KINDS)
        arguments["factory"] = self._factory(name, node)
        for key, reader in self._readers.items():
            if key in arguments:
                arguments[key] = reader(entries[key])
        if "resources" in arguments:
            for resource, amount in entries["resources"].items():
                self._mistakes.check_kind(amount, "number", f"resource {resource}")
        expert = self._build(Expert, arguments, node) or Expert(_STAND_IN)
        if len(self._mistakes) == before and not self._is_elsewhere(node):
            self._check(expert, name, rows, node)
        return expert

    def _check(self, expert: Expert, name: str, rows: TensorSpec, node: Located) -> None:
        try:
            check_declaration(expert, name, rows)
        except ExpertMeshError as error:
            of_weights = isinstance(error, DataLoss) or "weights" in str(error)
            self._mistakes.add(node.where_of("weights") if of_weights else node.where, str(error))

    def _is_elsewhere(self, node: Located) -> bool:
        return self._code_elsewhere or dict(node.items()).get("runtime_env") is not None

    def _factory(self, name: str, node: Located) -> str:
        found = node.value.get("factory")
        if found is None or found.value is None:
            self._mistakes.add(node.where, f'expert {name} needs a factory, as in `factory: "torch.nn:Linear"`')
            return _STAND_IN
        try:
            Expert(found.value)
            if not self._is_elsewhere(node):
                locate(found.value)
        except ConfigError as error:
            hint = _ELSEWHERE if isinstance(error.__cause__, ModuleNotFoundError) else ""
            self._mistakes.add(found.where, f"{error}{hint}")
            return _STAND_IN
        return str(found.value)

    def _input(self, node: Located) -> TensorSpec:
        return self._spec(node, "input")

    def _output(self, node: Located) -> TensorSpec:
        return self._spec(node, "output")

    def _spec(self, node: Located, name: str) -> TensorSpec:
        if not self._mistakes.check_kind(node, "map", name):
            return TensorSpec()
        kinds = {"shape": "list", "dtype": "text"}
        return self._build(TensorSpec, self._arguments(node, f"the {name}", kinds, kinds), node) or TensorSpec()

    def _gate(self, node: Located) -> gates.Gate | None:
        found = node.value.get("gate")
        if found is None:
            self._mistakes.add(node.where, f"a layer needs a gate, of type {', '.join(gates.GATES)}")
            return None
        if not self._mistakes.check_kind(found, "map", "gate"):
            return None
        kind = found.plain().get("type")
        if kind is None:
            self._mistakes.add(found.where, f"a gate needs a type: one of {', '.join(gates.GATES)}")
            return None
        if kind not in list(gates.GATES):
            self._mistakes.add(found.where_of("type"), f"there is no gate {kind!r}{suggestion(str(kind), gates.GATES)}")
            return None
        return self._gate_of(kind, found)

    def _gate_of(self, kind: str, node: Located) -> gates.Gate | None:
        """A gate of a known kind. `weights` is its safetensors file, unless the gate has an argument of that name."""
        before = len(self._mistakes)
        known = inspect.signature(gates.GATES[kind]).parameters
        self._mistakes.check_keys(node, dict.fromkeys(("type", *known, "weights")), f"gate {kind!r}")
        arguments = node.plain()
        del arguments["type"]
        path = None
        if "weights" in known and "weights" in arguments:
            self._mistakes.check_kind(node.value["weights"], "list", "weights")
        elif arguments.pop("weights", None) is not None:
            path = self._weights(node.value["weights"])
        return self._built_gate(kind, arguments, path, node) if len(self._mistakes) == before else None

    def _built_gate(
        self, kind: str, arguments: dict[str, Any], weights: Path | None, node: Located
    ) -> gates.Gate | None:
        where = node.where
        try:
            with seeded(f"gate {kind}|{canonical(arguments)}"), torch.device("cpu"):
                gate = gates.build(kind, **arguments)
            if weights is not None:
                where = node.where_of("weights")
                load_into(gate, load_tensors(weights)[0], weights.name)
            return gate
        except (ExpertMeshError, ValueError) as error:
            self._mistakes.add(where, str(error) if isinstance(error, ExpertMeshError) else f"gate {kind!r}: {error}")
            return None

    def _weights(self, node: Located) -> Path | None:
        if not self._mistakes.check_kind(node, "text", "weights"):
            return None
        path = self._folder / str(node.value)
        if not path.is_file():
            self._mistakes.add(node.where, f"there is no weights file {str(path)!r}")
            return None
        return path

    def _code(self, node: Located) -> Any:
        if not isinstance(node.value, str) or "://" in node.value:
            return node.plain()
        path = self._folder / node.value
        if not path.exists():
            self._mistakes.add(node.where, f"there is no folder {str(path)!r} to take code from")
        return str(path)

    def _arguments(self, node: Located, what: str, known: Iterable[str], kinds: Mapping[str, str]) -> dict[str, Any]:
        """The entries of a map that are known and of the right kind; an entry that is null counts as not given."""
        self._mistakes.check_keys(node, known, what)
        return {
            key: child.plain()
            for key, child in node.items()
            if key in known
            and child.value is not None
            and (key not in kinds or self._mistakes.check_kind(child, kinds[key], key))
        }

    def _build(self, kind: Callable[..., T], arguments: dict[str, Any], node: Located) -> T | None:
        """Build a record; an argument that it refuses is noted and left out, so that the next mistake is found too."""
        while True:
            try:
                return kind(**arguments)
            except ExpertMeshError as error:
                optional = [key for key, _ in node.items() if key not in _REQUIRED]
                guilty = _guilty(kind, arguments, str(error), optional)
                self._mistakes.add(node.where if guilty is None else node.where_of(guilty), str(error))
                if guilty is None:
                    return None
                del arguments[guilty]


def _guilty(kind: Callable[..., T], arguments: dict[str, Any], message: str, optional: Iterable[str]) -> str | None:
    """The argument without which the same refusal does not come again."""
    for name in [name for name in optional if name in arguments]:
        try:
            kind(**{key: value for key, value in arguments.items() if key != name})
        except ExpertMeshError as error:
            if str(error) != message:
                return name
        except TypeError:
            continue
        else:
            return name
    return None
