"""Runs in hivemind's environment: a server of its own `ffn` experts, WIDTH to 4·WIDTH and back, without optimizers.

Arguments: EXPERTS WIDTH THREADS. Says the address of its DHT, and ends with its standard input.
"""

from __future__ import annotations

import sys

import torch

from .helper import speaking


def main() -> None:
    """Serve until standard input ends."""
    experts, width, threads = (int(word) for word in sys.argv[1:4])
    with speaking() as say:
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
            say(next(str(address) for address in server.dht.get_visible_maddrs() if "127.0.0.1" in str(address)))
            sys.stdin.read()
        finally:
            server.shutdown()


if __name__ == "__main__":
    main()
