"""The server side of a router: calls, swaps, health and metrics, each authorised first."""
