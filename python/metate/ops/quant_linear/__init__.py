"""Linear layers on low-bit weights: every format through one canonical form (weight.py) and one kernel a backend."""
