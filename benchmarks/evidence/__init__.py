"""The evidence suite: small models trained under one protocol, with a control beside every number.

`settings` says what a run depends on, `tasks` and `speech` what it sees, `model` trains and evaluates it, `stream` lets
a trained model run on for many windows. `grid` reads a YAML into runs, `runner` executes them, `store` keeps one JSON
line for each; `results`, `report` and `plots` make the tables and figures of `docs/evidence.md` from those lines.
"""
