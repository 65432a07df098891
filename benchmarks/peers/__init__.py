"""What is timed beside mapper: one module per peer, run as `python -m benchmarks.peers.NAME` in the peers' environment."""
