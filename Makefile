# Everything runs in .venv, installed from constraints.txt: the versions that are tested.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: help demo ui test test-slow check lint types security audit docs doctest serve-docs benchmark examples \
	auxiliary clean \
	benchmark-steady-state benchmark-unrolled benchmark-precision benchmark-peers benchmark-runs benchmark-scaling \
	benchmark-populations benchmark-search benchmark-search-overhead benchmark-checkpoints benchmark-distributed

help:
	@echo "make demo       set up and run the demo: auxiliary learning on digits"
	@echo "make ui         open MLflow's UI on the runs of the demo"
	@echo "make test       set up and run the tests"
	@echo "make test-slow  the long versions"
	@echo "make check      lint, strict types, security, docs build, doctests and the code of the docs"
	@echo "make audit      known vulnerabilities of the packages that are installed; needs the network"
	@echo "make benchmark  cost of the backends against loops written by hand; writes docs/benchmarks.md"
	@echo "make benchmark-steady-state, -unrolled, -precision, -peers, -runs, -scaling, -populations, -search,"
	@echo "     -search-overhead, -checkpoints, -distributed: the other pages"
	@echo "make examples   run every example in full; writes docs/examples.md"
	@echo "make auxiliary  compare all methods for auxiliary learning; writes docs/auxiliary-results.md"

# torch first: without a version, and as another package's dependency, it may bring gigabytes of GPU libraries
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/auxiliary_digits.py
	@echo "In this checkout, 'make ui' starts it."

ui: $(VENV)/.installed
	$(BIN)/hyperopt-implicit ui

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) tests

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests

check: lint types security docs doctest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

security: $(VENV)/.installed
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive hyperopt_implicit backends

# not part of check: what is known of the packages changes without anything having changed here
audit: $(VENV)/.installed
	@found=$$($(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --timeout 20 2>&1); \
	code=$$?; echo "$$found" | grep -v "^WARNING:pip_audit"; \
	if [ $$code -ne 0 ] && ! echo "$$found" | grep -q "^Found "; then \
		echo "make audit: the database of known vulnerabilities could not be asked (see above); nothing is known."; \
	fi; exit $$code

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

doctest: $(VENV)/.installed
	$(BIN)/python -m pytest --doctest-modules hyperopt_implicit backends/hyperopt_implicit_backends tests/test_docs.py

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/hypergradient.py --write docs/benchmarks.md

benchmark-steady-state: $(VENV)/.installed
	$(BIN)/python benchmarks/steady_state_page.py --write docs/benchmarks-steady-state.md

benchmark-unrolled: $(VENV)/.installed
	$(BIN)/python benchmarks/unrolled.py --write docs/benchmarks-unrolled.md

benchmark-precision: $(VENV)/.installed
	$(BIN)/python benchmarks/low_precision.py --write docs/benchmarks-precision.md

# other libraries, none of which is needed for anything else; one that does not install is left out of the page
benchmark-peers: $(VENV)/.installed
	for each in $$(grep -v '^#' benchmarks/peers.txt); do \
		$(BIN)/python -m pip install --quiet --no-deps $$each || echo "$$each does not install here; left out"; \
	done
	$(BIN)/python benchmarks/peers.py --write docs/benchmarks-peers.md

benchmark-runs: $(VENV)/.installed
	$(BIN)/python benchmarks/runs.py --write docs

benchmark-populations: $(VENV)/.installed
	$(BIN)/python benchmarks/populations.py --write docs/benchmarks-populations.md

benchmark-scaling: $(VENV)/.installed
	$(BIN)/python benchmarks/scaling.py --write

benchmark-search: $(VENV)/.installed
	$(BIN)/python benchmarks/search.py --write docs/benchmarks-search.md

benchmark-distributed: $(VENV)/.installed
	$(BIN)/python benchmarks/distributed.py --write docs/benchmarks-distributed.md

benchmark-search-overhead: $(VENV)/.installed
	$(BIN)/python benchmarks/search_overhead.py --write docs/benchmarks-search-overhead.md

benchmark-checkpoints: $(VENV)/.installed
	$(BIN)/python benchmarks/checkpoints.py --write docs/benchmarks-checkpoints.md

examples: $(VENV)/.installed
	$(BIN)/python benchmarks/examples.py docs/examples.md

auxiliary: $(VENV)/.installed
	$(BIN)/python benchmarks/examples.py docs/auxiliary-results.md

serve-docs: $(VENV)/.installed
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
