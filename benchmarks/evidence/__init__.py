"""The evidence suite: small models trained under one protocol, with a control beside every number.

`settings` says what a run depends on, `tasks` and `speech` what it sees, `model` trains and evaluates it, `stream` lets
a trained model run on for many windows. `grid` reads a YAML into runs, `runner` executes them, `store` keeps one JSON
line for each. `results` finds them again; `tables`, `more_tables` and `plots` show them, and `report` puts the tables
into `docs/evidence.md`.
"""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported; compiling takes longer than training here
