"""Rows on their way to replicas and back: work, choice of replica, messages, and one batch's answers."""
