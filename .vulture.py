"""Names that are used from outside of the code: by frameworks, protocols and people. Read by vulture only."""
