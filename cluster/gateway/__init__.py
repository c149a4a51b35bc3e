"""What a router serves to clients: calls, swaps, health and metrics, each authorised first."""
