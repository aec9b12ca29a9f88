PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test lint format clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,eval]'
	touch $@

quickstart: setup
	$(BIN)/lrnn eval --fetch
	$(BIN)/lrnn quickstart

test: lint
	$(BIN)/pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
