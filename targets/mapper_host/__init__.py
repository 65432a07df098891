"""Target `host`: the CPU that the compiler runs on. `BACKEND` is what the core discovers."""

from mapper_host.backend import HostBackend

BACKEND = HostBackend()
"""The backend object."""
