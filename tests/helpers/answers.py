"""Answers an attempt of a client's flow as the clients do: its route is told what came of it."""

from __future__ import annotations

from collections.abc import Callable

from expertmesh.cluster.client.retry import Answer, Attempt


def answered(attempt: Attempt, server: Callable[[Attempt], Answer]) -> Answer:
    """Begin the attempt, let `server` answer it, and end it."""
    attempt.route.begin()
    answer = server(attempt)
    attempt.route.end(answer)
    return answer
