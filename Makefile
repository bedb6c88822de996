# `make test` and `make demo` do all their own set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo_out

.PHONY: setup test demo evidence lint clean
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

demo: setup
	$(BIN)/python -m example.demo --out $(DEMO_DIR)

# Tables and plots of docs/evidence.md from the committed results; FRESH=1 runs everything anew, BUDGET=30m what fits.
evidence: setup
	$(BIN)/python -m benchmarks.evidence $(if $(FRESH),--fresh) $(if $(BUDGET),--budget $(BUDGET)) $(if $(FRESH)$(BUDGET),,--report-only)

clean:
	rm -rf $(VENV) $(DEMO_DIR) *.egg-info
