# Every target makes its own environment in .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint matrix bench kernels clean

demo: .venv/examples
	$(BIN)/python examples/quickstart.py
	$(BIN)/python -m examples.drifa_net.train --model fuse --epochs 5 --output outputs/fuse
	$(BIN)/python -m examples.drifa_net.figures outputs/fuse/fuse-seed0

test: .venv/dev
	$(BIN)/python -m pytest -m "not slow and not cuda"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: .venv/dev
	$(BIN)/python -m pytest -m slow tests/test_matrix.py

bench: .venv/dev
	$(BIN)/python -m benchmarks bench

kernels: .venv/dev
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist outputs

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
