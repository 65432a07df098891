"""Target `gpu`: machines with HBM and many cores. `BACKEND` is what the core discovers."""

from mapper_gpu.backend import GpuBackend

BACKEND = GpuBackend()
"""The backend object."""
