"""The faults a Smooth L1 graph can have: their names, and how each one shows."""
