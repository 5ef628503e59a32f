# Everything that CI runs, one word each. `./run test` makes the environment first.
BIN := .venv/bin

.PHONY: help check lint types imports test slow fix kernels constraints
help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/  /'
check: lint types imports test  ## what a change has to pass
lint:            ## style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
types:           ## mypy, strict
	$(BIN)/mypy
imports:         ## who may import whom
	$(BIN)/lint-imports
test:            ## the tests, a few minutes
	./run test
slow:            ## the whole demo with its figures
	./run test -m slow
fix:             ## what can be mended by itself
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
kernels:         ## code of the kernels for every architecture, into build/kernels
	$(BIN)/python kernels/build.py -o build/kernels
constraints:     ## exact versions of all dependencies, for every Python at once (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev --no-header --no-annotate \
	  | grep -v -E '^(nvidia-|cuda-|triton|torch==)' > constraints.new
	(echo "# Exact versions of all that ./run installs, for Python 3.10 and newer. Written by: make constraints"; \
	  cat constraints.new; grep '^torch==' constraints.txt) > constraints.txt.new
	mv constraints.txt.new constraints.txt && rm constraints.new
