"""Gate, dispatch and combine against the memory floor, and the whole local layer against transformers' own experts.

    python -m benchmarks.router [--quick] [--shapes L,S] [--rows 1,32,512,8192] [--dtypes bf16,fp32] [--threads 2]

Part 1 divides the time of each step by its floor: the bytes that it must read and write, over the memory bandwidth
that a plain copy reaches in the same run. Part 2 runs our layer and the Mixtral block of transformers, with its `eager`
and its `grouped_mm` experts, on the same weights, rows, dtype and threads, in interleaved blocks, and compares the
outputs; the ratio is to the faster of the two. `--clock cpu` counts the CPU time of one thread instead of wall time,
for a machine that is busy with other things (then use `--threads 1`).

Shapes: T rows, D features, E experts, K choices a row, N pairs of a row and an expert.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.compare import interleaved, ratio
from torch import Tensor

from expertmesh.experts.modules import PackedExperts
from expertmesh.router.gates import TopK
from expertmesh.router.mixture.combine import combine
from expertmesh.router.mixture.dispatch import dispatch
from expertmesh.router.mixture.local import LocalLayer

TARGET = 1.03
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A layer of gated experts (SwiGLU)."""

    experts: int
    choices: int
    width: int
    hidden: int


SHAPES = {"L": Shape(8, 2, 1024, 4096), "S": Shape(16, 4, 512, 1024)}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.clock} clock, {options.blocks} blocks")
    with torch.inference_mode():
        for name in options.dtypes:
            for shape in options.shapes:
                layer, theirs = build(SHAPES[shape], DTYPES[name])
                for rows in options.rows:
                    x = torch.randn(rows, SHAPES[shape].width, dtype=DTYPES[name])
                    title = f"{shape} {name} {rows:5d} rows"
                    _print_steps(title, layer, x, options)
                    _print_layer(title, layer, theirs, x, options)


def build(shape: Shape, dtype: torch.dtype) -> tuple[LocalLayer, dict[str, Callable[[Tensor], Tensor]]]:
    """Our layer, and {implementation: function} of transformers' Mixtral block on the same memory."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    gate = TopK(shape.width, shape.experts, shape.choices, softmax="before")
    layer = LocalLayer(gate, PackedExperts(shape.experts, shape.width, shape.hidden)).to(dtype).eval()

    def block(implementation: str) -> Callable[[Tensor], Tensor]:
        config = MixtralConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.choices,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralSparseMoeBlock(config).eval()
        module.experts.load_state_dict(layer.experts.state_dict(), assign=True)
        module.gate.load_state_dict(gate.state_dict(), assign=True)
        return lambda x: module(x[None])[0]  # type: ignore[no-any-return]

    return layer, {name: block(name) for name in ("eager", "grouped_mm")}


def _print_layer(
    title: str, layer: LocalLayer, theirs: dict[str, Callable[[Tensor], Tensor]], x: Tensor, options: Any
) -> None:
    functions: dict[str, Callable[[], object]] = {"ours": lambda: layer(x)}
    functions |= {name: (lambda block=block: block(x)) for name, block in theirs.items()}
    times = interleaved(functions, blocks=options.blocks, clock=CLOCKS[options.clock])
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(theirs, key=medians.__getitem__)
    found = ratio(times["ours"], times[best])
    milliseconds = "  ".join(f"{name} {1000 * value:.3f}" for name, value in medians.items())
    verdict = "ok" if found.median <= TARGET else f"above {TARGET}"
    print(f"{title}  layer    ms: {milliseconds}  ratio to {best} {found}  {verdict}; {_agreement(layer, theirs, x)}")


def _agreement(layer: LocalLayer, theirs: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> str:
    """Largest difference of outputs, over the rows whose K + 1 best scores differ (ties are broken differently)."""
    scores = layer.gate.scores(x).topk((layer.gate.k or 1) + 1, dim=1).values
    clear_T = (scores[:, :-1] > scores[:, 1:]).all(dim=1)
    ours = layer(x)
    worst = max(float((block(x) - ours)[clear_T].abs().max()) for block in theirs.values()) if clear_T.any() else 0.0
    scale = float(ours.abs().max())
    return f"max difference {worst:.1e} of {scale:.1e}, {int((~clear_T).sum())} rows with ties left out"


def _print_steps(title: str, layer: LocalLayer, x: Tensor, options: Any) -> None:
    bandwidth = _bandwidth(options)
    for step, function, moved in _steps(layer, x):
        times = interleaved({step: function}, blocks=options.blocks, clock=CLOCKS[options.clock])[step]
        median, floor = statistics.median(times), moved / bandwidth
        print(f"{title}  {step:8s} us: {1e6 * median:.1f}  floor {1e6 * floor:.1f}  ratio {median / floor:.1f}")


def _steps(layer: LocalLayer, x: Tensor) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, function, bytes that it must read and write)."""
    gate = layer.gate
    routing = gate(x)
    handle = dispatch(routing, gate.num_experts)
    answers_N = layer.compute(x, handle)
    chosen = _bytes(routing.indices_TK, routing.weights_TK)
    yield "gate", lambda: gate(x), _bytes(x, *gate.parameters()) + chosen
    handed = _bytes(handle.rows_N, handle.weights_N, handle.slots_TK)
    yield "dispatch", lambda: dispatch(routing, gate.num_experts), chosen + handed
    yield "combine", lambda: combine(handle, answers_N), _bytes(answers_N, handle.slots_TK, handle.weights_N, x)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bandwidth(options: Any) -> float:
    """Bytes a second of a copy that does not fit into the cache, read and written bytes counted."""
    source = torch.ones(16 * 2**20)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, blocks=5, clock=CLOCKS[options.clock])["copy"]
    return 2 * _bytes(source) / statistics.median(times)


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="7 blocks, and 1 to 512 rows")
    parser.add_argument("--shapes", default="L,S", help="of L and S")
    parser.add_argument("--rows", help="rows of a batch")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16 and fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    options.shapes, options.dtypes = options.shapes.split(","), options.dtypes.split(",")
    default = "1,32,512" if options.quick else "1,32,512,8192"
    options.rows = [int(rows) for rows in (options.rows or default).split(",")]
    options.blocks = options.blocks or (7 if options.quick else 15)
    return options


if __name__ == "__main__":
    main()
