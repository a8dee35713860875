# `make demo`, `make test` and `make docs` start from nothing: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PYTHONS := 3.10 3.11 3.12 3.13

.PHONY: demo test test-slow test-installation lint types docs docs-check benchmark clean

demo: .venv/.installed
	$(BIN)/python -m examples.helmholtz
	$(BIN)/python -m examples.error_accumulation --preset demo --seeds 1

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --junitxml=results/slow.xml
	$(BIN)/python -m tests.random_programs_report results/slow.xml

test-installation: .venv/.installed
	$(BIN)/python -m tests.installation

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

types: .venv/.installed
	set -e; for version in $(PYTHONS); do $(BIN)/mypy --python-version $$version; done

docs: .venv/.installed-docs
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	@echo "the site is build/docs/index.html"

docs-check: .venv/.installed-docs  # the same, without running the notebooks
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees-check -D nb_execution_mode=off docs build/docs-check

benchmark: .venv/.installed
	$(BIN)/python -m tests.benchmarks.step_time
	$(BIN)/python -m tests.benchmarks.scaling

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache results
