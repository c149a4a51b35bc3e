"""Which epoch a request runs on, over a router in this process: named, leased, at least as new as one that was seen."""

from __future__ import annotations

import asyncio

import pytest
import torch
from helpers.router_in_process import RouterInProcess, load
from helpers.waiting import run_async

from expertmesh.experts.errors import (
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    VersionGone,
)
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.epochs.pinning import MAX_RECALLED
from expertmesh.router.mixture.layer import Layer

X = torch.ones(2, 3)


class TwoEpochs(RouterInProcess):
    """A mesh whose expert doubles in epoch 1 and, once `flip` was called, triples in epoch 2."""

    def __init__(self) -> None:
        super().__init__(Layer("l", gates.Fixed([1.0]), {"e": Expert.from_function(lambda rows: rows * 2)}))
        self.recalls: list[int] = []
        host = self.hosts["l/e#0"]
        self.old = dict(self.versions)
        self.new = self.old | {"l/e": load(host, "l/e", Expert.from_function(lambda rows: rows * 3), 2).version}

    def epoch(self, number: int, cluster: str = "here") -> Epoch:
        return Epoch(number, self.old if number == 1 else self.new, {"l": self.layer}, cluster)

    def flip(self) -> None:
        self.router.adopt(self.epoch(2))

    def recalling(self) -> None:
        """Let the router have epoch 1 recalled, as a controller that keeps it would."""

        async def recall(number: int) -> None:
            self.recalls.append(number)
            await asyncio.sleep(0)
            if number != 1:
                raise FailedPrecondition(f"epoch {number} is not kept any more")
            self.router.epochs.keep([self.epoch(1)])

        self.router.pinning.recall = recall

    async def factor(self, **options: object) -> tuple[int, float]:
        reply = await self.ask(X, **options)  # type: ignore[arg-type]
        return reply.summary.epoch, float(reply.output[0, 0])


def test_an_epoch_by_number_is_recalled_once_for_all_who_ask() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            assert await mesh.factor(epoch=1) == (1, 2.0)
            mesh.flip()
            assert await mesh.factor() == (2, 3.0)
            assert await mesh.factor(epoch=2) == (2, 3.0)
            with pytest.raises(VersionGone, match="epoch 1 is not loaded here"):
                await mesh.factor(epoch=1)
            mesh.recalling()
            answers = await asyncio.gather(*(mesh.factor(epoch=1) for _ in range(5)))
            assert answers == [(1, 2.0)] * 5
            assert mesh.recalls == [1]
            for number in (7, -1, 0):
                with pytest.raises(FailedPrecondition, match="not kept"):
                    await mesh.factor(epoch=number)
            await mesh.at_rest()

    run_async(main())


def test_versions_that_were_unloaded_under_a_named_epoch_are_recalled_and_no_other_epoch_answers() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            mesh.flip()
            mesh.recalling()
            assert await mesh.factor(epoch=1) == (1, 2.0)
            mesh.hosts["l/e#0"].unload("l/e", mesh.old["l/e"])
            mesh.report()
            with pytest.raises(VersionGone, match="epoch 1 cannot serve the request"):
                await mesh.factor(epoch=1)
            assert mesh.recalls == [1, 1]
            assert await mesh.factor() == (2, 3.0)
            await mesh.at_rest()

    run_async(main())


def test_whoever_waits_for_a_recall_still_gets_it_when_the_first_gives_up() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            mesh.flip()
            mesh.recalling()
            first, second = (asyncio.ensure_future(mesh.factor(epoch=1)) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
            assert await second == (1, 2.0)
            await mesh.at_rest()

    run_async(main())


def test_a_lease_answers_from_its_epoch_across_a_flip() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            lease, _, _ = mesh.router.leases.lease(30.0)
            mesh.flip()
            assert await mesh.factor(pin=lease) == (1, 2.0)
            assert await mesh.factor() == (2, 3.0)
            assert mesh.router.epochs.oldest_pinned() == 1
            mesh.router.leases.give_back(lease)
            with pytest.raises(FailedPrecondition, match="pin again"):
                await mesh.factor(pin=lease)
            with pytest.raises(InvalidRequest, match="exclude each other"):
                await mesh.factor(pin=lease, epoch=1)
            await mesh.at_rest()

    run_async(main())


def test_a_router_that_is_behind_catches_up_first() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            waiting = asyncio.ensure_future(mesh.factor(min_epoch=2))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not waiting.done()
            mesh.flip()
            assert await waiting == (2, 3.0)
            await mesh.at_rest()

    run_async(main())


def test_a_router_that_stays_behind_says_so_before_the_deadline() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            with pytest.raises(Unavailable, match=r"this router is at epoch 1, the client has seen epoch 9"):
                await mesh.factor(min_epoch=9, timeout=1.0)
            assert await mesh.factor(min_epoch=9, epoch=1) == (1, 2.0)
            await mesh.at_rest()

    run_async(main())


def test_what_was_seen_of_another_cluster_means_nothing_here() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            mesh.flip()
            assert await mesh.factor(min_epoch=9, cluster="there") == (2, 3.0)
            with pytest.raises(Unavailable):
                await mesh.factor(min_epoch=9, cluster="here", timeout=1.0)
            reply = await mesh.ask(X)
            assert reply.summary.cluster == "here"

    run_async(main())


def test_an_epoch_that_never_was_is_what_the_controller_says() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:

            async def recall(number: int) -> None:
                raise NotFound(f"there is no epoch {number}")

            mesh.router.pinning.recall = recall
            with pytest.raises(NotFound, match="there is no epoch 4"):
                await mesh.factor(epoch=4)
            await mesh.at_rest()

    run_async(main())


def test_only_so_many_epochs_are_recalled_at_a_time() -> None:
    async def main() -> None:
        async with TwoEpochs() as mesh:
            mesh.router.adopt(Epoch(100, mesh.new, {"l": mesh.layer}, "here"))
            kept: list[Epoch] = []

            async def recall(number: int) -> None:
                mesh.recalls.append(number)
                if number > 50:
                    raise FailedPrecondition(f"epoch {number} is not kept any more")
                kept.append(Epoch(number, mesh.old, {"l": mesh.layer}, "here"))
                mesh.router.epochs.keep(kept)

            mesh.router.pinning.recall = recall
            for number in range(60, 70):  # one that is not loaded takes no room
                with pytest.raises(FailedPrecondition, match="not kept"):
                    await mesh.factor(epoch=number)
            for number in range(1, MAX_RECALLED + 1):
                assert await mesh.factor(epoch=number) == (number, 2.0)
            with pytest.raises(Overloaded, match="beside the epochs 1, 2, 3, 4") as caught:
                await mesh.factor(epoch=MAX_RECALLED + 1)
            assert 0 < caught.value.retry_after <= 30
            assert await mesh.factor(epoch=1) == (1, 2.0)
            assert await mesh.factor() == (100, 3.0)
            assert MAX_RECALLED + 1 not in mesh.recalls

    run_async(main())
