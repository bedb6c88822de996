# `make test` and `make demo` do all their own set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo_out
WORKERS ?= 2

.PHONY: setup browsers test test-fast demo evidence lint clean
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]"
	touch $@

# What pip does not install: Chromium and HAProxy, from Debian. Where that is not possible, their tests are skipped.
browsers:
	sh .ci/browsers

# Two processes at least: many tests wait for processes of their own. A file's tests stay together, as they share what they made.
test: setup browsers
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# For work in between: without what starts processes, trains, or takes longer than two seconds.
test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

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
