"""Other job queues at the same work, each in a virtual environment of its own: ``python -m benchmarks.peers``."""
