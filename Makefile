# One command each, from a fresh clone: `make demo`, `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Two workers of one thread each. Where more threads than cores are asked for, they sleep while they wait: OpenMP's
# threads would spin, and keep each other from the cores.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check checked compiled lint style types picture clean

demo: $(VENV)/installed
	$(BIN)/ppx-convert demo --bits 4 --group-size 64 --output demo-bundle
	$(BIN)/ppx-inspect demo-bundle --check

test: checked
	$(PYTEST)

# The two slow things before the tests, side by side: types, and compiling the quantizer.
checked: $(VENV)/tested
	+$(MAKE) --no-print-directory -j2 lint compiled

compiled: $(VENV)/tested
	$(BIN)/python tests/compiling.py

# For contributors, between two commits: lint, types and the fast tests.
check: checked
	$(PYTEST) -m 'not slow'

lint: style types

style: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked under the names that users import: a link makes the checkout look like the installed package.
# pyproject.toml names the folders: the packages through the link, the tests and the benchmarks as they are.
types: $(VENV)/tested
	mkdir -p build/types && ln -sfn ../.. build/types/ppx
	$(BIN)/mypy

# docs/architecture.svg, from the imports of the code as it is.
picture: $(VENV)/installed
	$(BIN)/python docs/architecture.py

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: give it as PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# moshi_mlx pins an old mlx; it runs with the current one, so it goes in without its pins.
$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps moshi_mlx
	touch $@

clean:
	rm -rf build demo-bundle demo-bundle.partial $(VENV)
