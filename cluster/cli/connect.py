"""The options that select a running cluster, and the client they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from ...experts.errors import NotFound
from ..client.client import Client

Command = TypeVar("Command", bound=Callable[..., Any])


def cluster_options(command: Command) -> Command:
    """Add the options `--name`, `--endpoint` and `--ca-cert`, passed as arguments of these names."""
    for option in (
        click.option(
            "--ca-cert",
            type=click.Path(path_type=Path),
            help="PEM file of the CA to trust; required for an --endpoint on another machine.",
        ),
        click.option(
            "--endpoint",
            help="Address of a router, or of several with commas, instead of --name, such as 127.0.0.1:50051.",
        ),
        click.option(
            "--name",
            show_default="the only one running, or `default`",
            help="Name of your cluster on this machine.",
        ),
    ):
        command = option(command)
    return command


def connect(name: str | None, endpoint: str | None, ca_cert: Path | None, timeout: float = 30.0) -> Client:
    """A client of the selected cluster. Raises UsageError if both a name and an endpoint are given."""
    check_one(name, endpoint)
    with advising():
        return Client(endpoints(endpoint), name=name, timeout=timeout, ca_cert=ca_cert)


@contextmanager
def advising() -> Iterator[None]:
    """Add to the error for a cluster that is not found what helps on the command line."""
    try:
        yield
    except NotFound as error:
        raise NotFound(f"{error.message} (`expertmesh serve mesh.yaml` starts one, --name chooses)") from None


def endpoints(endpoint: str | None) -> list[str] | None:
    """The addresses in an `--endpoint`, which commas separate."""
    return None if endpoint is None else [address.strip() for address in endpoint.split(",")]


def check_one(name: str | None, endpoint: str | None) -> None:
    """Raise UsageError if both a name and an endpoint are given."""
    if name is not None and endpoint is not None:
        raise click.UsageError("give --name or --endpoint, not both")
