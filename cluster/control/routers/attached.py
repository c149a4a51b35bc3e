"""The routers that have attached to a cluster, beside its controller: each fetches its orders from a mailbox here."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ....experts.errors import NotFound
from ....experts.names import is_name
from ....experts.staging.stage import Receipt
from ...machine.durable_files import write_private
from ..messages import Candidate, Desired, RouterReport, RouterUpdate
from ..orders import Order
from ..ports import RouterPort
from .follow import Routers
from .mailbox import Letter, Mailbox

log = logging.getLogger(__name__)
RECORD = "attached.json"


class AttachedRouters:
    """The mailboxes of attached routers, by name. Belongs to the event loop of the controller.

    The names of members are kept in a file: a controller that starts again must wait for them, or give them up, before
    it may tell anybody that all routers have adopted an epoch.
    """

    def __init__(self, routers: Callable[[], Awaitable[Routers]], state_dir: str) -> None:
        """`routers` waits for the controller, which may still be starting."""
        self._routers = routers
        self._record = Path(state_dir) / RECORD
        self._boxes: dict[str, Mailbox] = {}
        self._restored = False

    async def restore(self) -> None:
        """Take those as members that an earlier controller had; idempotent."""
        if not self._restored:
            self._restored = True
            for name in self._recorded():
                await self._enter(name, fresh=False)

    async def join(self, name: str, fresh: bool) -> str:
        """Take a router as a member; returns the id of its mailbox. It has served nothing yet if it is `fresh`."""
        await self.restore()
        if name in self._boxes:
            self._boxes[name].close()
        await self._enter(name, fresh=fresh)
        return self._boxes[name].id

    async def fetch(
        self, name: str, box_id: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        """What a poll gets, as `Mailbox.fetch`. Raises NotFound if it is no member, or has another mailbox."""
        box = self._boxes.get(name)
        if box is None or box.id != box_id:
            raise NotFound(f"{name} is no member: it has to join")
        return await box.fetch(answers, held, seconds)

    async def leave(self, name: str) -> None:
        """Let a router go that serves nothing any more; one that is no member has gone already."""
        await (await self._routers()).left(name)

    async def _enter(self, name: str, *, fresh: bool) -> None:
        routers = await self._routers()
        box = self._boxes[name] = Mailbox()
        self._keep()
        await routers.join(name, box, partial(self._gone, name, box), fresh=fresh)

    def _gone(self, name: str, box: Mailbox) -> None:
        box.close()
        if self._boxes.get(name) is box:
            del self._boxes[name]
            self._keep()

    def _keep(self) -> None:
        write_private(self._record, json.dumps(sorted(self._boxes)))

    def _recorded(self) -> list[str]:
        try:
            names = json.loads(self._record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except ValueError:
            log.warning("%s is damaged: routers that had attached are not waited for", self._record)
            return []
        return [name for name in names if isinstance(name, str) and is_name(name)] if isinstance(names, list) else []


class AllRouters:
    """A `RouterPort` for all routers: those whose handle is a mailbox, and `called`, which reaches the others."""

    def __init__(self, called: RouterPort) -> None:
        self._called = called

    async def declare(self, router: str, handle: Any, desired: Desired) -> None:
        """Hand over the declared layers."""
        if not isinstance(handle, Mailbox):
            return await self._called.declare(router, handle, desired)
        layers = {name: layer.without_live_objects() for name, layer in desired.layers.items()}
        await handle.ask("declare", replace(desired, layers=layers, routers={}))
        return None

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        """Hand over what is known; answers with what the router knows."""
        if not isinstance(handle, Mailbox):
            return await self._called.sync(order, router, handle, update)
        report: RouterReport = await handle.ask("sync", order, update)
        return report

    async def stage(self, order: Order, router: str, handle: Any, candidate: Candidate) -> Receipt:
        """Have a gate staged and verified."""
        if not isinstance(handle, Mailbox):
            return await self._called.stage(order, router, handle, candidate)
        receipt: Receipt = await handle.ask("stage", order, candidate)
        return receipt

    async def unload(self, order: Order, router: str, handle: Any, id: str, version: str) -> None:
        """Have a gate forgotten."""
        if not isinstance(handle, Mailbox):
            return await self._called.unload(order, router, handle, id, version)
        await handle.ask("unload", order, id, version)
        return None
