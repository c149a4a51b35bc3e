"""What commands show of a swap: how it gets on, while it is under way, and what became of it."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from ...experts.errors import ExpertMeshError
from ..client.client import Client
from ..rpc.swaps import SwapOutcome
from .output import new_console, new_table, print_json

POLL_SECONDS = 0.2


class SwapView:
    """Shows on standard error how a swap gets on: bytes sent, its phase, receipts. A thread asks for it."""

    def __init__(self, client: Client, swap_id: str, *, quiet: bool = False) -> None:
        self._client = client
        self._swap_id = swap_id
        self._quiet = quiet
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._said = ""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> SwapView:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def uploaded(self, id: str, sent: int, total: int) -> None:
        """Show how far an upload is: every chunk on a terminal, its end elsewhere."""
        if sent == total or self._console.is_terminal:
            self._say(f"uploaded {id}: {sent:,} of {total:,} bytes")

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                self._say(phase_line(self._client.swap_progress(self._swap_id, timeout=2.0)))
            except ExpertMeshError:
                continue  # it has not begun, or cannot be asked now: the outcome will tell

    def _say(self, line: str) -> None:
        with self._lock:
            if line != self._said and not self._quiet:
                self._said = line
                self._console.print(Text(line))


def phase_line(progress: dict[str, Any]) -> str:
    """One line on where a swap stands."""
    phase = progress.get("phase")
    if phase == "staging":
        return f"staging: {progress.get('receipts')} of {progress.get('needed')} replicas have loaded and verified it"
    return str(phase)


def told(outcome: SwapOutcome, done: str, seconds: float) -> str:
    """One line on what became of a swap; `done` is the verb."""
    if not outcome.committed:
        return f"rehearsed in {seconds:.1f} s: it would have been {done}, and nothing has changed"
    late = f"; {', '.join(outcome.pending)} will follow" if outcome.pending else ""
    return f"{done} in {seconds:.1f} s: epoch {outcome.epoch} serves{late}"


def print_outcome(outcome: SwapOutcome, output: str, line: str) -> None:
    """Print the versions before and after, and the drift of each."""
    if output == "json":
        print_json({key: value for key, value in asdict(outcome).items() if key != "cluster"})
        return
    rows = [(id, outcome.before.get(id), after, outcome.drift.get(id)) for id, after in sorted(outcome.after.items())]
    new_console().print(new_table(None, ("id", "before", "after", "drift"), rows))
    click.echo(line)
