"""`python -m metate`: the `metate` command of this interpreter."""

from metate.cli import app

app(prog_name="metate")
