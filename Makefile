# make demo   install, then run the main job on the built-in model and data
# make test   install, then lint, check types and run the tests
# make docs   install, then build the documentation into site/
# make browser   install Chromium where root can, for the tests that are skipped without one
# make experiments-smoke   install, then try the papers' experiments on the built-in model and data
# An existing .venv is used as it is; what is missing is installed into it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.hedgerow-installed

.PHONY: install demo docs experiments-smoke test test-slow browser lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hedgerow needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/hedgerow demo --out demo-run

experiments-smoke: install
	$(BIN)/python experiments/smoke.py

# Without the variable the theme's advice to change to its successor is a page long.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: install lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow -n 0

browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	echo "Chromium is not here: the tests of pages in a browser will be skipped" >&2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache site .hypothesis demo-run
