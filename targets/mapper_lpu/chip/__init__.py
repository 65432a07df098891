"""The chip as compiled code: numerics, functional units, and the loop over cycles. Kept in a folder of its own so that
the compiled cache depends on these files alone."""
