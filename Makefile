# make run   environment, install, the whole experiment on the embedded digits; names the report
# make test  environment, install, all tests that need no GPU, board or network
# make lint  formatting, lint, types
VENV ?= .venv
WORKSPACE ?= workspace

.PHONY: run test lint bench clean

run:
	@scripts/install.sh $(VENV) none
	@$(VENV)/bin/harness run --workspace $(WORKSPACE)

test:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

bench:
	@scripts/install.sh $(VENV) test
	@$(VENV)/bin/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only -s

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
