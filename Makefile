# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all bench lint matrix models sums chromium clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sdfit needs Python 3.11 or newer; type: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/sdfit demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow and not bench"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not bench"

bench: $(READY)
	$(BIN)/python -m pytest -m "bench and not slow" tests/bench --doctest-continue-on-failure --benchmark-columns=median,min,iqr,rounds --benchmark-warmup=on -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Other Pythons and releases: the wheel, each diffusers since 0.32, whole installs (gigabytes; MATRIX="--part wheel" for less).
matrix: $(READY)
	$(BIN)/python -m sdfit.study.lab matrix $(MATRIX)

# The shipped models, made again from the records under data/, and the registry of both folders.
models: $(READY)
	$(BIN)/sdfit fit
	$(MAKE) sums

sums:
	for d in data models; do \
	  (cd $$d && find . -type f ! -name SHA256SUMS -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum > SHA256SUMS); \
	done

# What the tests of `sdfit report` open its pages in; without it they are skipped, and say so.
chromium:
	@command -v chromium > /dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } \
	  || echo "chromium is not installed and could not be: the tests that need it are skipped"

clean:
	rm -rf .venv demo build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
