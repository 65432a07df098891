"""What is timed beside mapper; each peer is run as `python -m benchmarks.peers.NAME` where installed."""
