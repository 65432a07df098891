"""An example of a target in a distribution of its own: one arithmetic unit, one memory."""

from .backend import ScalarBackend

BACKEND = ScalarBackend()
