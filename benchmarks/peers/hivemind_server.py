"""Runs in hivemind's environment: a server of its own `ffn` experts, WIDTH to 4·WIDTH and back, without optimizers.

Arguments: EXPERTS WIDTH THREADS. Prints the address of its DHT, and ends with its standard input.
"""

from __future__ import annotations

import os
import sys

import torch


def main() -> None:
    """Serve until standard input ends."""
    experts, width, threads = (int(word) for word in sys.argv[1:4])
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    torch.set_num_threads(threads)
    from hivemind.moe.server import Server  # here: a start of its processes imports this module again

    server = Server.create(
        expert_uids=[f"ffn.{index}" for index in range(experts)],
        expert_cls="ffn",
        hidden_dim=width,
        optim_cls=None,
        num_handlers=2,
        max_batch_size=4096,
        device="cpu",
        start=True,
    )
    try:
        addresses = [str(address) for address in server.dht.get_visible_maddrs() if "127.0.0.1" in str(address)]
        with os.fdopen(answer, "w", encoding="utf-8") as told:
            print(addresses[0], file=told, flush=True)
        sys.stdin.read()
    finally:
        server.shutdown()


if __name__ == "__main__":
    main()
