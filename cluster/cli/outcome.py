"""Progress and outcome of a swap, as commands print them."""

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
    """Prints the progress of a swap to standard error: bytes uploaded, phase, receipts. A thread polls for it."""

    def __init__(self, client: Client, swap_id: str, *, quiet: bool = False) -> None:
        self._client = client
        self._swap_id = swap_id
        self._quiet = quiet
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._last_line = ""
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
        """Print the progress of an upload: every chunk on a terminal, otherwise only the last."""
        if sent == total or self._console.is_terminal:
            self._print(f"uploaded {id}: {sent:,} of {total:,} bytes")

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                self._print(phase_line(self._client.swap_progress(self._swap_id, timeout=2.0)))
            except ExpertMeshError:
                continue  # not started yet, or unreachable for now: the outcome will say

    def _print(self, line: str) -> None:
        with self._lock:
            if line != self._last_line and not self._quiet:
                self._last_line = line
                self._console.print(Text(line), soft_wrap=True)


def phase_line(progress: dict[str, Any]) -> str:
    """One line for the current phase of a swap."""
    phase = progress.get("phase")
    if phase == "staging":
        done, needed = progress.get("receipts"), progress.get("needed")
        return f"staging: {done} of {needed} replicas have loaded and verified the new version"
    return str(phase)


def outcome_line(outcome: SwapOutcome, verb: str, seconds: float) -> str:
    """One line for the outcome of a swap; `verb` is a past participle, such as "swapped"."""
    if not outcome.committed:
        return f"dry run passed in {seconds:.1f} s: this can be {verb}, and nothing has changed"
    pending = f"; not yet on {', '.join(outcome.pending)}" if outcome.pending else ""
    return f"{verb} in {seconds:.1f} s: epoch {outcome.epoch} serves{pending}"


def print_outcome(outcome: SwapOutcome, output: str, line: str) -> None:
    """Print the versions before and after a swap, and the drift of each."""
    if output == "json":
        print_json({key: value for key, value in asdict(outcome).items() if key != "cluster"})
        return
    rows = [(id, outcome.before.get(id), after, outcome.drift.get(id)) for id, after in sorted(outcome.after.items())]
    new_console().print(new_table(None, ("id", "before", "after", "drift"), rows))
    for id, reason in sorted(outcome.unmeasured.items()):
        click.echo(f"the drift of {id} was not measured: {reason}")
    click.echo(line)
