# Every target makes its own environment in .venv and installs what it needs; test-oldest has one of its own.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-elsewhere test-oldest lint dist docs pictures matrix wild bench kernels clean

demo: .venv/examples
	$(BIN)/python -m examples.quickstart
	$(BIN)/python -m examples.drifa_net.train --model fuse --epochs 5 --output outputs/fuse
	$(BIN)/python -m examples.drifa_net.figures outputs/fuse/fuse-seed0

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not cuda"

# The suite as other processors would run it, and with one and two threads. What Inductor compiled for one would fail on another.
ELSEWHERE := OPENBLAS_CORETYPE=Haswell OPENBLAS_CORETYPE=SkylakeX OPENBLAS_CORETYPE=Zen ATEN_CPU_CAPABILITY=default \
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=2

test-elsewhere: .venv/dev
	@status=0; for variation in $(ELSEWHERE); do \
		result=$$(env $$variation TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/outputs/inductor/$$variation $(MAKE) -s test 2>&1) || status=1; \
		echo "$$variation: $$(echo "$$result" | tail -n 1)"; echo "$$result" | grep -E "^(FAILED|ERROR)" || true; \
	done; exit $$status

# The suite with the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/dev
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not cuda"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: .venv/dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

matrix: .venv/dev
	$(BIN)/python -m benchmarks.matrix

wild: .venv/wild
	$(BIN)/python -m benchmarks.wild

bench: .venv/dev
	$(BIN)/python -m benchmarks bench

# By the newest Triton, and for 9.0 by the oldest that the kernels are written for.
kernels: .venv/dev
	$(BIN)/python -m benchmarks.kernels
	test -d .venv/triton-3.6 || $(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-3.6 triton==3.6.0
	PYTHONPATH=.venv/triton-3.6 $(BIN)/python -m benchmarks.kernels --capability 90 --out benchmarks/kernels-triton-3.6.md

# The code of the page writes its pictures.
pictures: .venv/dev
	cd docs/images && $(CURDIR)/$(BIN)/python -c 'import pathlib, re; \
		[exec(code, {}) for code in re.findall("(?s)```python\n(.*?)```", pathlib.Path("../pictures.md").read_text())]'

docs: .venv/docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis dist outputs

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

.venv-oldest/dev: pyproject.toml tests/oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable ".[dev]" --constraint tests/oldest.txt
	touch $@
