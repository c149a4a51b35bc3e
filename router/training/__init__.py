"""Passes of training from a router to the replicas that compute them, and back."""
