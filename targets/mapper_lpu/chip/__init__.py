"""The chip as compiled code: numerics, functional units, and the loop over cycles.

A folder of its own, so that the cache of compiled code depends on these files alone.
"""
