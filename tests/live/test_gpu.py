"""A replica on a CUDA device against one on the CPU: the same answers, and no memory that is used again too early."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from helpers.packed_kinds import KINDS
from helpers.router_in_process import load
from torch import Tensor

from expertmesh.experts.errors import TooLarge
from expertmesh.experts.grouped import Stack
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.modules import PackedExperts
from expertmesh.experts.protocol import ExpertCall, ExpertReply, Part, PartFailure, PartialSum
from expertmesh.experts.spec import FLOATING, Expert
from expertmesh.experts.staging.memory import check_memory, free_memory, within_memory
from expertmesh.experts.staging.stage import Proposal
from expertmesh.experts.sums.device_rows import _copy_streams, to_device, to_host_all
from expertmesh.experts.tensors import from_bytes, torch_dtype
from expertmesh.experts.wire import ITEM_SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
D = 64
LAG_CYCLES = 50_000_000  # of the GPU's clock: some 30 ms, in which the CPU runs far ahead
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
LINEAR = Expert("torch.nn:Linear", args=(D, D))


def rows_of(dtype: str, rows: int = 37, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATING:
        return torch.randn(rows, D, generator=generator).to(torch_dtype(dtype))
    return torch.randint(0, 2 if dtype == "bool" else 100, (rows, D), generator=generator).to(torch_dtype(dtype))


def hosts_of(**experts: Expert) -> tuple[ExpertHost, ExpertHost, dict[str, str]]:
    """One host on the CPU, one on the GPU, and the versions that both hold."""
    cpu, gpu = ExpertHost(), ExpertHost(DEVICE)
    versions = {name: load(cpu, name, expert).version for name, expert in experts.items()}
    assert versions == {name: load(gpu, name, expert).version for name, expert in experts.items()}
    return cpu, gpu, versions


def call_of(versions: dict[str, str], parts: list[tuple[str, list[int]]], rows: Tensor, **more: Any) -> ExpertCall:
    made, index = [], []
    for name, chosen in parts:
        made.append(Part(name, versions[name], len(index), len(index) + len(chosen)))
        index += chosen
    return ExpertCall(1, tuple(made), rows, torch.tensor(index, dtype=torch.int64), **more)


def check_same(found: ExpertReply, wanted: ExpertReply, tolerance: float) -> None:
    for kind in ("outputs", "sums"):
        for one, other in zip(getattr(found, kind), getattr(wanted, kind), strict=True):
            if isinstance(other, Tensor):
                assert one.device.type == "cpu"
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
            else:
                assert one == other
    assert (found.lost is None) == (wanted.lost is None)
    if wanted.lost is not None:
        assert sorted(found.lost.tolist()) == sorted(wanted.lost.tolist())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_modules_of_every_floating_dtype(dtype: str, rows: int) -> None:
    cpu, gpu, versions = hosts_of(e=Expert("helpers.samples:Half", kwargs={"width": D, "dtype": dtype}))
    call = ExpertCall(1, (Part("e", versions["e"], 0, rows),), rows_of(dtype, rows))
    reply = gpu.compute(call)
    assert reply.outputs[0].dtype == torch_dtype(dtype)
    check_same(reply, cpu.compute(call), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_functions_of_every_dtype_of_the_wire(dtype: str) -> None:
    """Floating rows are negated, whole numbers and truth values inverted: exactly what the CPU answers."""
    cpu, gpu, versions = hosts_of(e=Expert("torch:neg" if dtype in FLOATING else "torch:bitwise_not"))
    call = call_of(versions, [("e", [3, 1, 1]), ("e", [0])], rows_of(dtype))
    reply = gpu.compute(call)
    assert reply.outputs[0].dtype == torch_dtype(dtype)
    check_same(reply, cpu.compute(call), 0.0)


def test_packed_messages_with_parts_that_fail() -> None:
    """Modules, functions, numpy's functions, one that raises and one that is not there, over rows that they share."""
    cpu, gpu, versions = hosts_of(
        linear=LINEAR, sin=Expert("torch:sin"), square=Expert("numpy:square"), bad=Expert("helpers.samples:raises")
    )
    versions["gone"] = "v9-000000000000"
    parts = [("linear", [0, 5, 2]), ("bad", [1]), ("sin", []), ("square", [7, 7]), ("gone", [0]), ("linear", [36])]
    call = call_of(versions, parts, rows_of("float32"))
    reply = gpu.compute(call)
    check_same(reply, cpu.compute(call), TOLERANCE["float32"])
    assert [out.error for out in reply.outputs if isinstance(out, PartFailure)] == ["ExpertFailed", "VersionGone"]


def test_an_expert_that_writes_into_its_rows_leaves_the_message_alone() -> None:
    cpu, gpu, versions = hosts_of(e=Expert("torch:exp_"))
    rows = rows_of("float32")
    before = rows.clone()
    reply = gpu.compute(ExpertCall(1, (Part("e", versions["e"], 0, 37),), rows))
    assert torch.equal(rows, before)
    check_same(reply, cpu.compute(ExpertCall(1, (Part("e", versions["e"], 0, 37),), before.clone())), 1e-5)


def times(rows: Tensor, by: float) -> Tensor:
    return rows * by


def nan_where_odd(rows: Tensor, by: float) -> Tensor:
    return torch.where(rows[:, :1] % 2 == 1, torch.nan, rows * by)


SUMMED: dict[str, dict[str, Callable[..., Any] | str]] = {
    "good": {},
    "a part that answers NaN": {"b": nan_where_odd},
    "a part that raises": {"b": "helpers.samples:raises"},
    "all raise": {"a": "helpers.samples:raises", "b": "helpers.samples:raises", "c": "helpers.samples:raises"},
    "one computed by numpy": {"b": "numpy:square"},
}


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_partial_sums(kind: str, dtype: str) -> None:
    """Two sums and a part beside them; whole numbers and weights of 1/4, so that every sum is exact."""
    experts = {}
    for by, name in enumerate("abc", 2):
        made = SUMMED[kind].get(name, times)
        experts[name] = Expert(made) if isinstance(made, str) else Expert.from_function(partial(made, by=float(by)))
    cpu, gpu, versions = hosts_of(**experts)
    rows = (torch.arange(5.0)[:, None] + torch.zeros(D)).to(torch_dtype(dtype))
    parts = [("a", [0, 1, 2]), ("b", [1, 2]), ("c", [0, 2]), ("a", [3, 4]), ("b", [3]), ("c", [0, 4])]
    sums = (PartialSum(0, 3, 0, 3), PartialSum(3, 5, 3, 5))
    weights = torch.arange(12) / 4
    call = call_of(versions, parts, rows, weights=weights, sums=sums)
    reply = gpu.compute(call)
    check_same(reply, cpu.compute(call), 0.0)
    assert reply.outputs[:5].count(None) == 5 - sum(isinstance(out, PartFailure) for out in reply.outputs[:5])
    assert (reply.lost is not None) == (kind == "a part that answers NaN")


def test_threads_share_a_host() -> None:
    _, gpu, versions = hosts_of(e=Expert("torch:neg"))

    def right(seed: int) -> bool:
        rows = rows_of("float32", 64 + seed, seed)
        chosen = list(range(0, 64 + seed, 2))
        (answer,) = gpu.compute(call_of(versions, [("e", chosen)], rows)).outputs
        return torch.equal(answer, -rows[chosen])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(200)))


@pytest.mark.parametrize("mode", ["double", "staged_cpu"])
def test_a_version_is_swapped(mode: str) -> None:
    cpu, gpu, versions = hosts_of(e=LINEAR)
    old = versions["e"]
    state = {"weight": rows_of("float32", D, 1) / 8, "bias": torch.ones(D)}
    proposal = Proposal(id="e", counter=2, expert=LINEAR, weights=state)
    receipts = [host.stage(proposal, old, mode) for host in (cpu, gpu)]
    new = receipts[1].version
    assert new == receipts[0].version
    assert receipts[1].tensor_digest == receipts[0].tensor_digest
    assert receipts[1].drift == pytest.approx(receipts[0].drift, rel=1e-3)

    def places() -> dict[str, str]:
        return {version: function.device.type for (_, version), function in gpu._slots.items()}

    assert places() == {old: DEVICE, new: DEVICE if mode == "double" else "cpu"}
    for version in (old, new, new, old):
        call = call_of({"e": version}, [("e", [0, 4, 4])], rows_of("float32"))
        check_same(gpu.compute(call), cpu.compute(call), TOLERANCE["float32"])
        if mode == "staged_cpu" and version == new:
            assert places() == {old: "cpu", new: DEVICE}
    both = ExpertCall(1, (Part("e", old, 0, 9), Part("e", new, 9, 37)), rows_of("float32"))
    check_same(gpu.compute(both), cpu.compute(both), TOLERANCE["float32"])
    gpu.unload("e", old)
    assert places() == {new: DEVICE}


def test_memory_of_the_device() -> None:
    size, slack = 256 * 2**20, 32 * 2**20
    before = free_memory(DEVICE)
    assert before is not None
    held = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    during = free_memory(DEVICE)
    assert during is not None
    assert during <= before - size + slack
    del held  # torch keeps it: it is free for a new version all the same
    assert (free_memory(DEVICE) or 0) >= before - slack
    check_memory(size, DEVICE)
    with pytest.raises(TooLarge, match='stage it with mode="staged_cpu"'):
        check_memory(10**15, DEVICE)
    with pytest.raises(TooLarge, match=r'ran out of memory.*mode="staged_cpu"'):
        within_memory(lambda: torch.empty(2**50, dtype=torch.uint8, device=DEVICE), DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("counts", [(100, 0, 200, 1, 99, 0, 50, 30), (1, 0, 2, 0, 0, 0, 0, 1)], ids=["many", "few"])
@torch.inference_mode()
def test_packed_experts(kind: str, dtype: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 torch's grouped matrix multiply, against one expert after the other on the CPU."""
    torch.manual_seed(0)
    experts = PackedExperts(len(counts), D, 2 * D, **KINDS[kind]).to(torch_dtype(dtype))
    offsets = [0, *itertools.accumulate(counts)]
    rows = rows_of(dtype, offsets[-1])
    monkeypatch.setattr("expertmesh.experts.grouped.FEW_ROWS", 0)  # on the CPU, never grouped
    wanted = experts(rows, offsets)
    grouped: list[int] = []
    compute = Stack.grouped

    def noted(self: Stack, rows_N: Tensor, offsets: Any) -> Tensor:
        grouped.append(rows_N.shape[0])
        return compute(self, rows_N, offsets)

    monkeypatch.setattr(Stack, "grouped", noted)
    found = experts.to(DEVICE)(to_device(rows, DEVICE), offsets)
    torch.testing.assert_close(to_host_all([found])[0], wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert bool(grouped) == (dtype == "bfloat16" and capable)


MEMORY: dict[str, Tensor] = {
    "contiguous": torch.arange(24.0).reshape(4, 6),
    "columns": torch.arange(24.0).reshape(4, 6)[:, 1:4],
    "transposed": torch.arange(24.0).reshape(4, 6).t(),
    "every other": torch.arange(24.0).reshape(4, 6)[::2],
    "expanded": torch.arange(6.0).expand(4, 6),
    "no rows": torch.empty(0, 6),
    "no columns": torch.empty(4, 0),
    "one number a row": torch.arange(4.0),
    "read-only": from_bytes(bytes(range(96)), "uint8", (4, 24)),
    "a slice of read-only": from_bytes(bytes(range(96)), "uint8", (4, 24))[1:, 3:],
    "bfloat16": torch.arange(24.0).reshape(4, 6).bfloat16(),
    "bool": torch.arange(24).reshape(4, 6) % 3 == 0,
}


@pytest.mark.parametrize("kind", MEMORY)
def test_what_goes_up_comes_down(kind: str) -> None:
    sent = MEMORY[kind]
    there = to_device(sent, DEVICE)
    assert there.device.type == DEVICE
    came = to_host_all([there])[0]
    assert (came.dtype, came.is_pinned() or came.numel() == 0) == (sent.dtype, True)
    assert torch.equal(came, sent)
    assert torch.equal(there.cpu(), sent)


@pytest.mark.parametrize("kind", MEMORY)
def test_strided_memory_of_the_device_comes_down(kind: str) -> None:
    there = MEMORY[kind].to(DEVICE)
    views = [there, there[1:], there.t() if there.dim() == 2 else there, there.expand(2, *there.shape)]
    for view, came in zip(views, to_host_all(views), strict=True):
        assert came.is_contiguous()
        assert torch.equal(came, view.cpu())


def test_what_is_there_already_stays_and_a_mixture_keeps_its_order() -> None:
    here, there = torch.arange(3.0), torch.arange(4.0, device=DEVICE)
    assert to_device(there, DEVICE).data_ptr() == there.data_ptr()
    first, second, third = to_host_all([here, there, here[:0]])
    assert first is here
    assert torch.equal(second, torch.arange(4.0))
    assert third.shape == (0,)


def test_a_negation_that_torch_only_notes_is_carried_out() -> None:
    there = torch.arange(4.0, device=DEVICE)
    noted = torch.complex(there, there).conj().imag
    assert noted.is_neg()
    assert torch.equal(to_host_all([noted])[0], -torch.arange(4.0))


def lag(stream: torch.cuda.Stream) -> None:
    """Keep a stream busy for a while: what was asked of it happens long after the CPU has gone on."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LAG_CYCLES)


def copy_streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return _copy_streams(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("rows", [1, 5000])
def test_work_waits_for_its_rows(rows: int) -> None:
    sent = rows_of("float32", rows)
    wanted = sent * 2
    to_device(sent + 1, DEVICE)  # memory that is used again holds other rows
    lag(copy_streams()[0])
    there = to_device(sent, DEVICE)
    sent.fill_(-1)  # the memory of a message is its owner's again at once
    assert torch.equal((there * 2).cpu(), wanted)


@pytest.mark.parametrize("rows", [1, 5000])
def test_pinned_memory_is_not_used_again_before_it_was_copied(rows: int) -> None:
    lag(copy_streams()[0])
    sent = [rows_of("float32", rows, seed) for seed in range(8)]
    there = [to_device(tensor, DEVICE) for tensor in sent]
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, sent, strict=True))


@pytest.mark.parametrize("rows", [1, 5000])
def test_memory_of_rows_is_not_used_again_before_they_were_computed_with(rows: int) -> None:
    sent = [rows_of("float32", rows, seed) for seed in range(8)]
    to_device(sent[0], DEVICE)
    lag(torch.cuda.current_stream())
    answers = [to_device(tensor, DEVICE) * 2 for tensor in sent]  # none of the rows outlives its line
    for answer, tensor in zip(to_host_all(answers), sent, strict=True):
        assert torch.equal(answer, tensor * 2)


@pytest.mark.parametrize("rows", [1, 5000])
def test_answers_are_complete_when_they_come(rows: int) -> None:
    there = to_device(rows_of("float32", rows), DEVICE)
    torch.cuda.synchronize()
    lag(torch.cuda.current_stream())
    answer = there * 2
    lag(copy_streams()[1])
    assert torch.equal(to_host_all([answer])[0], rows_of("float32", rows) * 2)


def test_many_roundtrips_with_contents_that_change() -> None:
    held: list[tuple[Tensor, Tensor]] = []
    for turn in range(400):
        sent = rows_of("float32", (1, 40, 3000)[turn % 3], turn)
        wanted = (sent * 2, sent[::2] + turn)
        there = to_device(sent, DEVICE)
        sent.fill_(-1)
        asked = [there * 2, there[::2] + turn]
        del there
        came = to_host_all(asked)
        del asked
        held = [*held[-40:], *zip(came, wanted, strict=True)]  # answers wait to be sent while others are computed
        assert all(torch.equal(one, other) for one, other in held)


BROKEN = """
import torch
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import ExpertCall, Part
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.staging.stage import Proposal

host = ExpertHost("cuda")
expert = Expert("torch.nn:Embedding", args=(4, 8), input=TensorSpec((), "int64"))
version = host.stage(Proposal(id="e", counter=1, expert=expert)).version
try:
    reply = host.compute(ExpertCall(1, (Part("e", version, 0, 2),), torch.tensor([0, 10**6])))
except Exception as error:
    print("RAISED", type(error).__name__, flush=True)
else:
    print("ANSWERED", reply.outputs, flush=True)
"""


def test_an_error_that_shows_late_is_raised() -> None:
    """A row number outside of a table: the device notices, after the expert returned. It spoils the whole process."""
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=150, env=environment, check=False
    )
    assert ended.stdout.startswith(("RAISED", "ANSWERED (PartFailure")), ended.stdout + ended.stderr
