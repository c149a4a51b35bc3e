"""`expertmesh doctor`: shows the checks of doctor.py."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..machine.doctor import PACKAGES, examine
from ..machine.facts import look
from .output import new_console, new_table, output_option, print_json


@click.command()
@click.option("--port", type=int, default=50051, show_default=True, help="The port that a cluster is to listen on.")
@output_option
@click.pass_context
def doctor(context: click.Context, port: int, output: str) -> None:
    """Check whether this machine can run a cluster.

    Looks at versions, cores, memory, shared memory, GPUs, the port, running and dead clusters and other Rays. Starts
    and changes nothing. Exits with 1 if a check fails.

    \b
    expertmesh doctor
    expertmesh doctor -o json | jq '.[] | select(.state != "ok")'
    """
    checks = examine(look(PACKAGES, port))
    if output == "json":
        print_json([asdict(check) for check in checks])
    else:
        rows = [(check.name, check.state, check.found, check.mend) for check in checks]
        new_console().print(new_table(None, ("check", "state", "found", "how to mend"), rows))
    if any(check.state == "fail" for check in checks):
        context.exit(1)
