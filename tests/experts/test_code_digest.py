"""What changes the digest of code, and what does not."""

from __future__ import annotations

import collections
import functools
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgpack
import numpy as np
import pytest
import scipy.interpolate
import torch
from torch import Tensor, nn

from expertmesh.experts.construct.factory import build
from expertmesh.experts.identity.code_digest import code_digest, examined
from expertmesh.experts.identity.version_name import expert_digest
from expertmesh.experts.spec import Expert

Function = Callable[..., Any]


def compiled(source: str) -> Any:
    """What `source` calls `f`: code of its own, as a second version of a file would have."""
    scope: dict[str, Any] = {"__name__": "written", "torch": torch, "nn": nn, "functools": functools}
    code = compile(textwrap.dedent(source), "<written>", "exec")
    exec(code, scope)  # noqa: S102 (the text stands in this file)
    return scope["f"]


def affine(scale: float, *, module: nn.Module | None = None) -> Function:
    return lambda rows: rows * scale if module is None else module(rows)


def linear(value: float) -> nn.Linear:
    made = nn.Linear(2, 2)
    nn.init.constant_(made.weight, value)
    nn.init.zeros_(made.bias)
    return made


class Scale:
    factor = 2.0

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.by

    def twice(self, rows: Tensor) -> Tensor:
        return rows * self.by * 2


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by


class Block(nn.Module):
    def __init__(self, by: float = 1.0, *, table: float | None = None) -> None:
        super().__init__()
        self._by = by
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.register_buffer("table", None if table is None else torch.tensor([table]), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows) * self._by


def partial(**bound: float) -> Function:
    return functools.partial(np.multiply, **bound)


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "code": (lambda rows: rows + 1, lambda rows: rows - 1),
    "constants": (lambda rows: rows + 1, lambda rows: rows + 2),
    "nested code": (lambda rows: [r + 1 for r in rows], lambda rows: [r + 2 for r in rows]),
    "names": (lambda rows: rows.sin(), lambda rows: rows.cos()),
    "closure": (affine(1.0), affine(2.0)),
    "closure over a module": (affine(1, module=linear(1.0)), affine(1, module=linear(2.0))),
    "closure over a function": (affine(affine(1.0)), affine(affine(2.0))),  # type: ignore[arg-type]
    "closure over a list of functions": (affine([affine(1.0)]), affine([affine(2.0)])),  # type: ignore[arg-type]
    "closure over an array": (affine(np.ones(2)), affine(np.zeros(2))),  # type: ignore[arg-type]
    "closure over a map with odd keys": (affine({(1, 2): 3}), affine({(1, 2): 4})),  # type: ignore[arg-type]
    "defaults": (compiled("def f(rows, by=1): return rows * by"), compiled("def f(rows, by=2): return rows * by")),
    "keyword defaults": (
        compiled("def f(rows, *, by=1): return rows * by"),
        compiled("def f(rows, *, by=2): return rows * by"),
    ),
    "bound arguments": (functools.partial(np.add, 1), functools.partial(np.add, 2)),
    "bound keywords": (partial(x2=1.0), partial(x2=2.0)),
    "functions bound": (functools.partial(np.add, 1), functools.partial(np.subtract, 1)),
    "methods": (Scale(1).__call__, Scale(1).twice),
    "objects of a method": (Scale(1).twice, Scale(2).twice),
    "objects": (Scale(1), Scale(2)),
    "objects with slots": (Slotted(1), Slotted(2)),
    "ufuncs": (np.sin, np.cos),
    "functions of numpy": (np.sort, np.cumsum),
    "builtins": (torch.sin, torch.cos),
    "functions of torch": (nn.functional.relu, nn.functional.gelu),
    "functions behind a cache": (
        compiled("@functools.lru_cache\ndef f(rows): return 1"),
        compiled("@functools.lru_cache\ndef f(rows): return 2"),
    ),
    "methods of a class": (
        compiled("class f:\n def __call__(self, rows): return rows + 1")(),
        compiled("class f:\n def __call__(self, rows): return rows + 2")(),
    ),
    "defaults of a method": (
        compiled("class f:\n def __call__(self, rows, by=1): return rows * by")(),
        compiled("class f:\n def __call__(self, rows, by=2): return rows * by")(),
    ),
    "class attributes": (compiled("class f:\n by = 1")(), compiled("class f:\n by = 2")()),
    "static methods": (
        compiled("class f:\n @staticmethod\n def g(): return 1")(),
        compiled("class f:\n @staticmethod\n def g(): return 2")(),
    ),
    "class methods": (
        compiled("class f:\n @classmethod\n def g(cls): return 1")(),
        compiled("class f:\n @classmethod\n def g(cls): return 2")(),
    ),
    "properties": (
        compiled("class f:\n @property\n def g(self): return 1")(),
        compiled("class f:\n @property\n def g(self): return 2")(),
    ),
    "base classes": (
        compiled("class b:\n def g(self): return 1\nclass f(b): pass")(),
        compiled("class b:\n def g(self): return 2\nclass f(b): pass")(),
    ),
    "hyper-parameters of torch": (nn.LayerNorm(2, eps=1e-5), nn.LayerNorm(2, eps=1e-6)),
    "heads, which torch does not print": (nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 2)),
    "attributes of a module": (Block(1.0), Block(2.0)),
    "buffers that no state holds": (Block(table=1.0), Block(table=2.0)),
    "order of modules": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
    "code of inner modules": (
        nn.Sequential(compiled("class f(nn.Module):\n def forward(self, rows): return rows + 1")()),
        nn.Sequential(compiled("class f(nn.Module):\n def forward(self, rows): return rows + 2")()),
    ),
    "what is caught": (
        compiled("def f(rows):\n try: return rows.a\n except ValueError: return rows"),
        compiled("def f(rows):\n try: return rows.a\n except KeyError: return rows"),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_whatever_changes_the_answer_changes_the_digest(case: str) -> None:
    one, other = DIFFERENT[case]
    assert code_digest(one) != code_digest(other)
    assert code_digest(one) == code_digest(one)


SAME: dict[str, tuple[Any, Any]] = {
    "closures": (affine(1.5), affine(1.5)),
    "closures over modules": (affine(1, module=linear(1.0)), affine(1, module=linear(1.0))),
    "objects": (Scale(1), Scale(1)),
    "methods": (Scale(1).twice, Scale(1).twice),
    "modules": (Block(), Block()),
    "modules of other weights, which are digested apart": (linear(1.0), linear(2.0)),
    "partials": (partial(x2=1.0), partial(x2=1.0)),
    "locks": (affine(threading.Lock()), affine(threading.Lock())),  # type: ignore[arg-type]
    "events": (affine(threading.Event()), affine(threading.Event())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", SAME)
def test_what_is_made_alike_has_one_digest(case: str) -> None:
    one, other = SAME[case]
    assert code_digest(one) == code_digest(other)


class Named(dict):  # type: ignore[type-arg]
    """A map with an attribute."""


def named_map(by: float) -> Named:
    made = Named(a=1)
    made.by = by  # type: ignore[attr-defined]
    return made


def hooked(by: float) -> nn.Module:
    module = linear(1.0)
    module.register_forward_hook(lambda _, __, rows: rows * by)
    return module


def quantised(value: float) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear(value)).eval(), {nn.Linear})  # type: ignore


def in_a_script(by: float) -> Function:
    scope = {"__name__": "__main__", "BY": by}
    exec(compile("def f(rows): return rows * BY", "<script>", "exec"), scope)  # noqa: S102 (the text stands here)
    return scope["f"]  # type: ignore[return-value]


def array_of(*items: object) -> np.ndarray[Any, Any]:
    made = np.empty(len(items), dtype=object)
    made[:] = items
    return made


HELD: dict[str, Callable[[float], Any]] = {
    "a namespace": lambda by: Scale(types.SimpleNamespace(by=by)),  # type: ignore[arg-type]
    "a namespace in a list": lambda by: Scale([1, types.SimpleNamespace(by=by)]),  # type: ignore[arg-type]
    "a spline": lambda by: affine(scipy.interpolate.CubicSpline([0.0, 1.0, 2.0], [0.0, by, 2 * by])),  # type: ignore
    "a polynomial": lambda by: np.poly1d([by, 0.0]),
    "a masked array": lambda by: affine(np.ma.masked_array([1.0, 2.0], [by > 2, False])),  # type: ignore[arg-type]
    "an array of objects": lambda by: affine(array_of(types.SimpleNamespace(by=by))),  # type: ignore[arg-type]
    "a queue": lambda by: affine(collections.deque([by])),  # type: ignore[arg-type]
    "a ufunc of one's own": lambda by: np.vectorize(affine(by)),
    "a map with attributes": lambda by: affine(named_map(by)),  # type: ignore[arg-type]
    "a quantised module": quantised,
    "a module behind a closure that is quantised": lambda by: affine(1, module=quantised(by)),
    "a hook of a module": hooked,
    "a global of a script": in_a_script,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HELD)
def test_what_a_live_object_holds_is_seen(kind: str) -> None:
    two, three, again = (examined(HELD[kind](by), live=True) for by in (2.0, 3.0, 2.0))
    assert two.digest != three.digest
    assert two == again
    assert not two.opaque


@dataclass
class Abstract(Protocol):
    """What keeps nothing but what every class of these kinds has."""

    sizes: list[int] = field(default_factory=list)
    missing: ClassVar[object] = object()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(self, rows: Tensor) -> Tensor:
        return rows


def test_what_every_class_may_have_hides_nothing() -> None:
    @dataclass
    class Made(Abstract):
        pass

    for live in (False, True):
        assert not examined(Made(), live=live).opaque
        assert examined(Made(), live=live) == examined(Made(), live=live)


HIDDEN: dict[str, Callable[[], Any]] = {
    "a generator": lambda: affine(n for n in (1, 2)),  # type: ignore[arg-type]
    "an object of compiled code": lambda: Scale(msgpack.Packer()),  # type: ignore[arg-type]
    "random numbers": lambda: Scale(np.random.default_rng(1)),  # type: ignore[arg-type]
    "a ufunc of a function": lambda: np.frompyfunc(affine(2.0), 1, 1),
    "TorchScript": lambda: torch.jit.trace(linear(1.0), torch.zeros(1, 2)),  # type: ignore[no-untyped-call]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HIDDEN)
def test_what_cannot_be_seen_is_another_version_each_time(kind: str) -> None:
    live = HIDDEN[kind]()
    assert examined(live, live=True).opaque
    digests = [expert_digest(Expert(live=live), live, "", counter=counter) for counter in (1, 2, 2)]
    assert digests[0] != digests[1] == digests[2]


def test_of_what_a_constructor_makes_only_its_own_attributes_are_compared() -> None:
    seen = [examined(Scale(types.SimpleNamespace(by=by))) for by in (2.0, 3.0)]  # type: ignore[arg-type]
    assert seen[0] == seen[1]
    assert seen[0].opaque
    assert not examined(Scale(2.0)).opaque
    curves = [examined(HELD["a spline"](by)) for by in (2.0, 3.0)]  # what a library computes with is seen
    assert curves[0] != curves[1]


def test_functions_and_classes_of_the_same_module_are_seen_behind_their_names() -> None:
    source = "def g(rows): return rows * {}\nclass H:\n by = {}\ndef f(rows): return g(rows) * H.by"
    digests = {examined(compiled(source.format(*by))).digest for by in ((1, 1), (1, 2), (2, 1))}
    assert len(digests) == 3
    assert len({code_digest(compiled(source.format(*by))) for by in ((1, 1), (1, 2), (2, 1))}) == 1  # as before


PLAIN = (
    Expert("numpy:sort"), Expert("numpy:sin"), Expert("torch:sin"), Expert("torch.nn.functional:relu"),
    Expert("torch.nn:Linear", args=(4, 4)), Expert("torch.nn:LSTM", args=(4, 4)), Expert("torch.nn:LayerNorm", (4,)),
    Expert("torch.nn:MultiheadAttention", args=(4, 2)), Expert("torch.nn:TransformerEncoderLayer", args=(4, 2)),
    Expert("scipy.special:expit"),
)  # fmt: skip


@pytest.mark.parametrize("expert", PLAIN, ids=lambda expert: expert.factory)
def test_the_digits_of_experts_that_hold_nothing_are_those_of_the_first_recipe(expert: Expert) -> None:
    function = build(expert).function
    assert expert_digest(expert, function, "", counter=7) == expert_digest(expert, function, "", counter=8, recipe=1)


def test_a_function_may_call_itself_and_a_closure_may_be_empty() -> None:
    def again(n: int) -> int:
        return again(n - 1)

    assert len(code_digest(again)) == 64

    def early() -> str:
        def reads() -> object:
            return later

        digest = code_digest(reads)
        later = 1
        assert code_digest(reads) != digest
        return digest

    assert early() == early()


def test_objects_may_know_each_other() -> None:
    one, other = Scale(1), Scale(2)
    one.by, other.by = other, one  # type: ignore[assignment]
    assert code_digest(one) == code_digest(one)


def test_an_address_in_a_printed_module_does_not_count() -> None:
    class Printed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.marker = threading.Lock()

        def extra_repr(self) -> str:
            return f"marker={self.marker}"

    assert code_digest(Printed()) == code_digest(Printed())


ELSEWHERE = """
import functools, sys
import numpy as np, torch
from torch import nn
from expertmesh.experts.identity.code_digest import code_digest
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.spec import Expert
sys.path.insert(0, sys.argv[1])
from helpers import samples
from helpers.router_in_process import load

class Held:
    kinds = {"b", "a", "c"}
    def __init__(self): self.names = frozenset({"x", "y", "z"}); self.where = {"k": (1, 2)}
    def __call__(self, rows): return rows if rows in {"p", "q", "r"} else -rows
    @property
    def width(self): return 3

def made(scale): return lambda rows: rows * scale if rows.dtype in {torch.float32, torch.float16} else rows
print(code_digest(Held()), code_digest(made(2.0)), code_digest(functools.partial(made, Held())))
print(code_digest(nn.TransformerEncoderLayer(4, 2)), code_digest(nn.LSTM(2, 2).to(torch.float16).float().__class__))
for expert in (
    Expert("helpers.samples:Affine", kwargs={"scale": 2.0, "width": 4}), Expert("helpers.samples:make_linear"),
    Expert("helpers.samples:scaled"), Expert("numpy:sort"),
    Expert("torch.nn:LSTM", args=(4, 4)), Expert("torch.nn:MultiheadAttention", args=(4, 2)),
):
    print(load(ExpertHost(), "l/e", expert, 1).version)
"""


@pytest.mark.slow
def test_digests_are_equal_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    said = []
    for seed in ("1", "2"):
        command = [sys.executable, str(script), str(Path(__file__).parent)]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.split())
    assert said[0] == said[1]
    assert len(set(said[0])) == 11
