"""The host: holds versions of experts in slots and computes messages of rows, without Ray or sockets."""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .construct.factory import RowFunction
from .errors import ExpertMeshError, NotFound
from .protocol import ExpertCall, ExpertReply, Part, PartFailure, TrainCall, TrainReply
from .staging.stage import Proposal, Receipt, stage
from .sums.device_rows import to_device, to_host_all
from .sums.partial_sum import add_up
from .training.desk import TrainingDesk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overdue:
    """An expert that has not returned: for how long, and how long beyond the deadline of its call (seconds).

    Or one that is `staging`: a new version whose constructor or trial has not returned.
    """

    expert: str
    seconds: float
    beyond: float
    staging: bool = False

    def __str__(self) -> str:
        who = f"the new version of {self.expert}" if self.staging else self.expert
        return f"{who} has not returned for {self.seconds:.0f} s, {self.beyond:.0f} s beyond its deadline"


class ExpertHost:
    """Runs experts in this process, each version in its own slot.

    A host computes exactly the version that a message names, or refuses. Every host has a new `incarnation`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._on_gpu = device.startswith("cuda")
        self.incarnation = uuid.uuid4().hex
        self._slots: dict[tuple[str, str], RowFunction] = {}
        self._receipts: dict[tuple[str, str], Receipt] = {}
        self._lock = threading.Lock()
        self._computing: tuple[str, float, float] | None = None
        self._staging: tuple[str, float, float] | None = None
        self._training = TrainingDesk(self._loaded, device)

    def stage(self, proposal: Proposal, replaces: str | None = None, mode: str = "double") -> Receipt:
        """Build and verify a version beside the serving ones, and compare it with the one it replaces, if loaded.

        In mode "double" both are on the device. In mode "staged_cpu" the new one stays in main memory until its first
        rows arrive; then it moves to the device, and the other versions of the expert move to main memory. A version
        that is already loaded is not built again. Raises the errors of `stage.stage`; then nothing has changed.
        """
        if proposal.version is not None and (proposal.id, proposal.version) in self._receipts:
            return self._receipts[proposal.id, proposal.version]
        old = self._slots.get((proposal.id, replaces)) if replaces is not None else None
        if old is not None and old.served is None:  # the rows of a layer are the same for all its experts
            layer = proposal.id.partition("/")[0]
            siblings = (held for key, held in list(self._slots.items()) if key[0].partition("/")[0] == layer)
            old.served = next((held.served for held in siblings if held.served is not None), None)
        place = "cpu" if mode == "staged_cpu" else self.device
        self._staging = (proposal.id, time.monotonic(), proposal.timeout)
        try:
            function, receipt = stage(proposal, old, incarnation=self.incarnation, device=place)
        finally:
            self._staging = None
        key = (receipt.id, receipt.version)
        with self._lock:
            self._slots[key] = function
            self._receipts[key] = receipt
        return receipt

    def _resident(self, expert_id: str, version: str) -> RowFunction | None:
        """The function of a slot, moved to the device if it was staged in main memory, in exchange for its siblings."""
        function = self._slots.get((expert_id, version))
        device = torch.device(self.device)
        if function is None or function.device.type == device.type:
            return function
        with self._lock:
            for key, other in list(self._slots.items()):
                if key[0] == expert_id and other.device.type == device.type:
                    self._slots[key] = other.on(torch.device("cpu"))
            self._slots[expert_id, version] = moved = function.on(device)
        return moved

    def unload(self, expert_id: str, version: str) -> None:
        """Empty the slot of a version. Raises NotFound if it is not loaded."""
        with self._lock:
            if self._slots.pop((expert_id, version), None) is None:
                raise NotFound(f"{expert_id} {version} is not loaded in this replica")
            self._receipts.pop((expert_id, version), None)

    def holds(self) -> frozenset[tuple[str, str]]:
        """The (expert, version) pairs that this host holds."""
        with self._lock:
            return frozenset(self._slots)

    def computes(self, call: ExpertCall | TrainCall) -> bool:
        """Whether a message keeps a core busy: modules do; plain functions may block on something else."""
        return isinstance(call, TrainCall) or any(
            function is not None and function.module is not None
            for function in (self._slots.get((part.expert, part.version)) for part in call.parts)
        )

    def overdue(self, seconds: float) -> Overdue | None:
        """The expert that computes or is staged now, if that takes `seconds` more than its deadline allows.

        Safe to call from another thread. What has no deadline is never overdue.
        """
        for running, staging in ((self._computing, False), (self._staging, True)):
            if running is not None:
                expert, began, timeout = running
                taken = time.monotonic() - began
                if taken - timeout > seconds:
                    return Overdue(expert, taken, taken - timeout, staging)
        return None

    @torch.inference_mode()
    def compute(self, call: ExpertCall) -> ExpertReply:
        """Compute every part of a message; a part that fails does not affect the others.

        Raises GPU errors that only surface when the answers are copied back: then the whole message has failed.
        """
        began = time.perf_counter()
        rows_N = to_device(call.rows, self.device)
        if call.row_index is not None:  # once for all parts, each of which then gets a slice
            rows_N = rows_N.index_select(0, to_device(call.row_index, self.device))
        summed = {position for total in call.sums for position in range(total.first, total.last)}
        keep = range(len(call.parts)) if self._on_gpu else summed
        outputs: Sequence[Tensor | PartFailure] = self._parts(call, rows_N, keep)
        if self._on_gpu:
            outputs = self._placed(outputs, summed)
        if not call.sums:
            return ExpertReply(self.incarnation, tuple(outputs), computed=time.perf_counter() - began)
        sums, lost = add_up(call, outputs)
        unsummed = (None if at in summed and isinstance(out, Tensor) else out for at, out in enumerate(outputs))
        return ExpertReply(self.incarnation, tuple(unsummed), sums, lost, computed=time.perf_counter() - began)

    def train(self, call: TrainCall) -> TrainReply:
        """Carry out a message of training; a part that fails does not affect the others. Raises InvalidRequest."""
        self._computing = (call.expert, time.monotonic(), call.timeout)
        try:
            return replace(self._training.answer(call), incarnation=self.incarnation)
        finally:
            self._computing = None

    def _loaded(self, expert_id: str, version: str | None) -> RowFunction | None:
        """The function of an expert in a version, or in any that is loaded."""
        if version is not None:
            return self._resident(expert_id, version)
        return next((held for (id, _), held in list(self._slots.items()) if id == expert_id), None)

    def _parts(self, call: ExpertCall, rows_N: Tensor, keep: Collection[int]) -> list[Tensor | PartFailure]:
        began, outputs = time.monotonic(), []
        try:
            for position, part in enumerate(call.parts):
                self._computing = (part.expert, began, call.timeout)
                outputs.append(self._part(part, rows_N, keep=position in keep))
        finally:
            self._computing = None
        return outputs

    def _part(self, part: Part, rows_N: Tensor, *, keep: bool) -> Tensor | PartFailure:
        """The answer of one part to its slice of the rows; left on the expert's device if `keep`, else on the CPU."""
        function = self._resident(part.expert, part.version)
        if function is None:
            return PartFailure("VersionGone", f"{part.expert} {part.version} is not loaded in this replica")
        try:
            answer = function(rows_N[part.start : part.stop])
            return answer if keep else answer.cpu()
        except ExpertMeshError as error:
            return PartFailure("ExpertFailed", f"{part.expert}: {error}")
        except BaseException as error:  # an expert is foreign code and may raise anything, also a panic of Rust
            log.exception("expert raised", extra={"expert": part.expert, "version": part.version})
            if _about_dtypes(error) and (floats := function.floats_only(rows_N)):
                given = str(rows_N.dtype).removeprefix("torch.")
                message = f"{part.expert} computes in {floats} and refuses rows of {given}: send floating-point rows"
                return PartFailure("SpecMismatch", message)
            return PartFailure(
                "ExpertFailed", f"{part.expert} raised {type(error).__name__}; see the log of its replica"
            )

    def _placed(self, outputs: Sequence[Tensor | PartFailure], summed: Collection[int]) -> list[Tensor | PartFailure]:
        """Move answers: those of the parts in `summed` to the GPU, the others to host memory."""
        answers = {at: out for at, out in enumerate(outputs) if isinstance(out, Tensor)}
        apart = [at for at in answers if at not in summed]
        placed = {at: to_device(out, self.device) for at, out in answers.items() if at in summed}
        placed.update(zip(apart, to_host_all([answers[at] for at in apart]), strict=True))
        return [placed.get(at, out) for at, out in enumerate(outputs)]


def _about_dtypes(error: BaseException) -> bool:
    """Whether an expert's error says that it cannot compute with the dtype of its rows."""
    if not isinstance(error, (TypeError, RuntimeError)):
        return False
    try:
        return re.search(r"\bd?types?\b|not implemented for '", str(error)) is not None
    except BaseException:  # noqa: BLE001 (what makes the message is foreign code, too)
        return False
