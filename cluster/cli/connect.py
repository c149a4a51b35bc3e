"""What every command that calls a running cluster takes: which one, and how to reach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..client.client import Client

Command = TypeVar("Command", bound=Callable[..., Any])


def cluster_options(command: Command) -> Command:
    """The options `--name`, `--endpoint` and `--ca-cert`, as arguments of these names."""
    for option in (
        click.option(
            "--ca-cert", type=click.Path(path_type=Path), help="PEM file that TLS trusts, for another machine."
        ),
        click.option("--endpoint", help="Or where it listens, as 127.0.0.1:50051."),
        click.option("--name", help="The cluster of yours on this machine; by default the only one, or `default`."),
    ):
        command = option(command)
    return command


def connect(name: str | None, endpoint: str | None, ca_cert: Path | None, timeout: float = 30.0) -> Client:
    """A client of the cluster that is meant. Raises UsageError where two are named."""
    check_one(name, endpoint)
    return Client(endpoint, name=name, timeout=timeout, ca_cert=ca_cert)


def check_one(name: str | None, endpoint: str | None) -> None:
    """Check that at most one cluster is named. Raises UsageError."""
    if name is not None and endpoint is not None:
        raise click.UsageError("give --name or --endpoint, not both")
