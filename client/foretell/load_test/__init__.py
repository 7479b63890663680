"""`foretell load-test`: an open-loop load generator for both services.

Calls are due at times that do not depend on the answers, and a call's latency counts from when it
was due: a service that stalls cannot slow its own examination down (Tene, "How NOT to measure
latency").
"""
