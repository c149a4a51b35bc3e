"""The gRPC channel options of client and server, side by side, because they must agree. No gRPC here: plain pairs.

A server disconnects a client that pings more often than it allows, so both keepalives come from the figures below.
Messages are never compressed, and the server refuses compressed ones: a few KiB could expand to fill its memory.

What a stranger may make the server keep is bounded: a call that nobody has looked at yet holds at most `WINDOW_BYTES`,
because the server does not let gRPC widen its windows, and there are at most `MAX_PENDING` of them.
"""

from __future__ import annotations

Options = tuple[tuple[str, int], ...]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CLIENT_PING_MS = 20_000
SERVER_PING_MS = 30_000
PING_TIMEOUT_MS = 10_000
MIN_PING_INTERVAL_MS = 10_000
FIRST_RECONNECT_MS = 100
LONGEST_RECONNECT_MS = 2_000
IDENTITY_ONLY = 1
MAX_RECEIVED_BYTES = 4 * 1024 * 1024 + 64 * 1024
"""The largest message that the server receives, 4 MiB and a header; larger requests are sent in chunks."""
WINDOW_BYTES = 65_535
MAX_CONNECTIONS = 1024
MAX_CALLS_ON_CONNECTION = 4096
"""Calls in flight on one connection."""
MAX_IN_FLIGHT = 2048
"""Calls that one of our clients has in flight: what is more waits there, where the server would refuse it."""
MAX_PENDING = 8192
HANDSHAKE_MS = 10_000
IDLE_MS = 300_000
AGE_MS = 3_600_000
"""After so long, give or take a tenth, a client is asked to connect anew: no connection lasts for ever."""
AGE_GRACE_MS = 86_400_000
"""What is in flight then may take as long as the longest call."""


def client_options(max_message_bytes: int = MAX_MESSAGE_BYTES, *, loopback: bool = False) -> Options:
    """Options of a client's channel; on loopback it ignores the HTTP proxy of the environment."""
    return (
        *_both(max_message_bytes, CLIENT_PING_MS),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_MS),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0 if loopback else 1),
    )


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES, *, port_held: bool = False) -> Options:
    """Options of the gateway's server: an exclusive port, bounds, and the client's pings are allowed.

    A held port is shared with the socket of the owner that holds it, and so with this user alone.
    """
    return (
        *_both(max_message_bytes, SERVER_PING_MS),
        ("grpc.so_reuseport", int(port_held)),
        ("grpc.max_receive_message_length", min(max_message_bytes, MAX_RECEIVED_BYTES)),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_connection_age_ms", AGE_MS),
        ("grpc.max_connection_age_grace_ms", AGE_GRACE_MS),
        ("grpc.max_concurrent_streams", MAX_CALLS_ON_CONNECTION),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
    )


def _both(max_message_bytes: int, ping_ms: int) -> Options:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
    )
