"""Requests that no friend would send."""
