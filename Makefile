# mdiff: `make demo` and `make test` on a fresh machine with python3, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info[:2] == (3, 11) else "py312")').txt

.PHONY: demo test lint docs notebooks parity clean

demo: $(VENV)/.installed
	$(BIN)/mdiff demo --out runs/demo

# Two files at a time: most of a test is one core's compiling. Each file stays in one process, with its fixtures.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages go to site/ and open from disk (search needs a server: python -m http.server -d site).
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

notebooks: $(VENV)/.docs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

# Against PyTorch and torchmetrics.
parity: $(VENV)/.parity
	$(BIN)/python -m pytest -q parity

$(VENV)/.parity: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c $(LOCK) -e '.[parity]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c $(LOCK) -e '.[docs]'
	@touch $@

# The lock pins what the tests ran with; mdiff itself is installed on top, editable.
$(VENV)/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mdiff needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
