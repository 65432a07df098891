"""Names that are used from outside of the code: by frameworks and protocols. Read by vulture only."""

constraint_context  # xDSL constraints are called with it by name
type_var_mapping  # xDSL
typing_context  # numba intrinsics
