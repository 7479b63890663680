"""Kills services under load and checks what is left: the parts of bench.crash."""
