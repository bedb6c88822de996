"""The evidence suite: small models trained under one protocol, with a control beside every number.

`settings` says what a run depends on, `tasks` and `speech` what it sees; `model` builds it and measures what it
remembers, `training` trains it, `probe` looks into its TTT layers, `stream` lets it run on for many windows. `grid`
reads a YAML of `grids` into runs, `runner` executes them, `store` keeps one JSON line for each. `results` finds them
again, `report` shows them, and `suite` is the command.
"""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported; compiling takes longer than training here
