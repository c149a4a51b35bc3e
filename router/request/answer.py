"""The last part of a request, when its rows are in flight: wait, cover losses, combine, reply.

Shapes: T rows of the request, K choices per row, N pairs of the batch that carries it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import (
    ExpertFailed,
    ExpertMeshError,
    InvalidRequest,
    SpecMismatch,
    Unavailable,
    VersionGone,
)
from ...experts.protocol import CallOptions, CallSummary
from ...experts.tensors import dtype_name, torch_dtype
from ..fanout.answers import DiedTogether
from ..fanout.fanout import Fanout
from ..fanout.work import Work
from ..mixture.combine import Combined, combine
from ..mixture.dispatch import Dispatch, dispatch
from ..mixture.missing import lost_pairs
from .batching import GateRequest, Routed


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """Rows `x` [T, ...] for one layer, the caller's options, and the remaining time in seconds.

    The gate reads `features` [T, ...], if given, instead of `x`. `indices` [T, K] and `weights` [T, K] are a routing of
    the caller's own. `client` identifies the sender, since clients take turns.
    """

    x: Tensor
    options: CallOptions
    timeout: float
    features: Tensor | None = None
    indices: Tensor | None = None
    weights: Tensor | None = None
    client: str = ""


@dataclass(frozen=True, eq=False)
class ForwardReply:
    """The reply: `output` [T, ...], `lost_mass` float32 [T], and on request the routing [T, K]."""

    summary: CallSummary
    output: Tensor
    lost_mass: Tensor
    indices: Tensor | None = None
    weights: Tensor | None = None


class Answer:
    """One request whose rows are in flight in a batch."""

    def __init__(self, fanout: Fanout, request: ForwardRequest, gate_request: GateRequest, routed: Routed) -> None:
        self.fanout = fanout
        self.request = request
        self.gate_request = gate_request
        self.batch = routed.batch
        self.layer = routed.batch.layer
        self.routed = routed
        options = request.options
        self.policy = self.layer.policy(options.on_missing or self.layer.on_missing)
        self.max_lost_mass = self.layer.max_lost_mass if options.max_lost_mass is None else options.max_lost_mass

    def release(self) -> None:
        """Release the batch."""
        self.routed.batch.release()

    async def complete(self) -> ForwardReply:
        """Wait for the experts that the rows need, and combine their answers."""
        handle, rows = self.routed.handle(), (self.routed.start, self.routed.stop)
        experts = handle.experts()
        shared = tuple(position for position in self.batch.assignment.work if position >= len(self.layer.experts))
        failed = await self.batch.wait(experts + shared)
        if failed and (died := self.batch.answers.died_together(experts + shared)):
            self._send_alone(died)
            return await self.complete()
        self._raise_uncovered(failed, shared)
        answers, added_up = self.batch.answers, self.batch.assignment.sums
        with torch.inference_mode():
            answered_N = answers.answered(experts)
            outputs = answers.total(experts, *rows) if added_up else answers.outputs(experts)
        fallback_T = await self._fallback(handle, None if added_up else outputs, answered_N)
        with torch.inference_mode():
            if outputs is None:
                outputs = self._no_outputs(handle.num_rows if added_up else handle.num_pairs, fallback_T)
            shared_T = answers.shared_rows(shared, *rows)
            try:
                combined = self._combine(handle, outputs, added_up, answered_N, fallback_T, shared_T)
            except Unavailable as error:
                voteless = self.layer.combine == "vote" and bool(outputs.isfinite().all())
                raise (None if failed or voteless else _rows_to_blame(self.request.x)) or error from None
            return self._reply(handle, experts, combined, used_fallback=fallback_T is not None)

    @torch.inference_mode()
    def _send_alone(self, died: Mapping[int, DiedTogether]) -> None:
        """Send the rows once more, in a batch of their own: those of another request may have killed the replica."""
        merged, request = self.batch, self.gate_request
        routing = merged.routing.slice(self.routed.start, self.routed.stop)
        handle = dispatch(routing, len(self.layer.experts))
        self.batch = self.fanout.start(
            merged.epoch,
            self.layer,
            request.x,
            routing,
            handle,
            deadline=request.deadline,
            client=request.client,
            died=died,
        )
        self.routed = Routed(self.batch, 0, request.size)
        merged.release()

    def _raise_uncovered(self, failed: dict[int, ExpertMeshError], shared: tuple[int, ...]) -> None:
        """Raise the errors that the policy does not cover.

        It never covers a version that is gone, invalid input or a failed shared expert, and "error" covers nothing.
        """
        for error in failed.values():
            if isinstance(error, (VersionGone, SpecMismatch, InvalidRequest)):
                raise error
        if any(position in failed for position in shared) or (failed and self.policy.kind == "error"):
            errors = list(failed.values())
            raise next((error for error in errors if isinstance(error, ExpertFailed)), errors[0])

    def _no_outputs(self, size: int, fallback_T: Tensor | None) -> Tensor:
        """Zeros in place of the answers, for a request without rows or one that lost every expert."""
        if fallback_T is not None:
            return fallback_T.new_zeros((size, *fallback_T.shape[1:]))
        expert = next(iter(self.layer.experts.values()))
        shape = expert.output.shape if expert.output.shape is not None else tuple(self.request.x.shape[1:])
        return torch.zeros((size, *shape), dtype=torch_dtype(expert.output.dtype or "float32"))

    async def _fallback(self, handle: Dispatch, outputs_N: Tensor | None, answered_N: Tensor | None) -> Tensor | None:
        if self.policy.kind != "fallback":
            return None
        lost_TK = lost_pairs(handle, outputs_N, answered_N)
        if lost_TK is None:
            return None
        rows = lost_TK.any(dim=1).nonzero().flatten()
        expert = f"{self.layer.name}/{self.policy.expert}"
        version = self.batch.epoch.versions[expert]
        work = Work(
            ((expert, version, int(rows.shape[0])),),
            self.request.x,
            rows,
            deadline=self.gate_request.deadline,
            client=self.request.client,
        )
        (answer,) = (await self.fanout.submit_and_wait(work)).outputs
        if not isinstance(answer, Tensor):
            raise answer or Unavailable(f"fallback expert {expert} returned no rows; retry")
        filled = answer.new_zeros((handle.num_rows, *answer.shape[1:]))
        filled[rows] = answer
        return filled

    def _combine(
        self,
        handle: Dispatch,
        outputs: Tensor,
        added_up: bool,
        answered_N: Tensor | None,
        fallback_T: Tensor | None,
        shared_T: Tensor | None,
    ) -> Combined:
        x = self.request.x
        floating = x.is_floating_point() and outputs.is_floating_point()
        return combine(
            handle,
            outputs,
            added_up=added_up,
            answered_N=answered_N,
            method=self.layer.combine,
            on_missing=self.policy,
            max_lost_mass=self.max_lost_mass,
            names=self.layer.expert_ids,
            on_dropped=self.layer.on_dropped,
            x_T=x,
            fallback_T=fallback_T,
            shared_T=shared_T,
            out_dtype=x.dtype if floating else None,
        )

    def _reply(
        self,
        handle: Dispatch,
        experts: tuple[int, ...],
        combined: Combined,
        *,
        used_fallback: bool,
    ) -> ForwardReply:
        ids, versions, lost_TK = self.layer.expert_ids, self.batch.epoch.versions, combined.lost_TK
        if lost_TK is not None:
            experts = handle.without(lost_TK).experts()
        took_part = [*(ids[expert] for expert in experts), *(self.layer.shared_ids if handle.num_rows else ())]
        if used_fallback:
            took_part.append(f"{self.layer.name}/{self.policy.expert}")
        if self.gate_request.routing is None:
            took_part.append(self.layer.gate_id)
        missing = [] if lost_TK is None else _names_of(handle, lost_TK, ids)
        summary = CallSummary(
            request_id=self.request.options.request_id or uuid.uuid4().hex,
            epoch=self.batch.epoch.number,
            versions={name: versions[name] for name in took_part},
            degraded=combined.degraded,
            missing=missing,
            max_lost_mass=float(combined.lost_mass_T.max()) if combined.degraded and handle.num_rows else 0.0,
            dropped=0 if combined.dropped_T is None else int(combined.dropped_T.sum()),
            cluster=self.batch.epoch.cluster,
        )
        if not self.request.options.return_routing:
            return ForwardReply(summary, combined.output, combined.lost_mass_T)
        rows, routing = slice(self.routed.start, self.routed.stop), self.batch.routing
        indices, weights = routing.indices_TK[rows], routing.weights_TK[rows]
        return ForwardReply(summary, combined.output, combined.lost_mass_T, indices, weights)


def _rows_to_blame(x: Tensor) -> InvalidRequest | None:
    """The caller's error, if an answer is not finite because the rows `x` are not, or nearly so; a retry is no help."""
    if not x.is_floating_point() or not x.numel():
        return None
    largest, dtype = float(x.abs().max()), dtype_name(x.dtype)
    if not math.isfinite(largest):
        return InvalidRequest("x holds NaN or infinity, and so does the answer of an expert: send finite rows")
    if largest > math.sqrt(torch.finfo(x.dtype).max):
        return InvalidRequest(
            f"x holds numbers as large as {largest:g}, and the answer to them overflows or is lost: scale the rows, or "
            f"send them in a wider dtype than {dtype}"
        )
    return None


def _names_of(handle: Dispatch, pairs_TK: Tensor, ids: Sequence[str]) -> list[str]:
    return [ids[expert] for expert in sorted({handle.expert_of(slot) for slot in handle.slots_TK[pairs_TK].tolist()})]
