"""A router that writes down when it adopts an epoch, by the clock that all processes of a machine share.

Import this module in a process only after Ray's environment was set.
"""

from __future__ import annotations

import time

from expertmesh.cluster.channel.settings import ChannelSettings
from expertmesh.cluster.runtime.ray_actors import LogSettings, RouterActor
from expertmesh.cluster.runtime.router_process import ServiceSettings
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.request.forward import Router

from .flip_times import flip_file


class NotingRouter(Router):
    """Writes a line for each epoch that it adopts."""

    def adopt(self, epoch: Epoch) -> bool:
        newer = super().adopt(epoch)
        if newer:
            with flip_file().open("a") as file:
                file.write(f"{epoch.number} {time.monotonic()!r}\n")
        return newer


class NotingRouterActor(RouterActor):
    """The actor of such a router."""

    def __init__(self, settings: ServiceSettings, logs: LogSettings, channel: ChannelSettings | None) -> None:
        super().__init__(settings, logs, channel)
        self._service.router.__class__ = NotingRouter
