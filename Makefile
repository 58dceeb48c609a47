# Two commands for a newcomer: `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
RUN := .venv/bin/

.PHONY: demo test lint clean

demo: .venv/demo-installed
	$(RUN)certify train --dataset mnist-5k --out runs/demo --overwrite
	$(RUN)certify eval --model runs/demo/ckpt.pt --eps 0.1 --eps 0.5 --eps 1.0 \
		--csv runs/demo/radii.csv --json runs/demo/summary.json --plot runs/demo/certified.png

test: .venv/dev-installed
	$(RUN)python -m pytest -q

lint: .venv/dev-installed
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports

.venv/bin/python:
	@echo "installing PyTorch and the rest into .venv: some minutes, about 6 GB, once"
	$(PYTHON) -m venv .venv

# The newer stamp implies the older: dev brings all that the demo needs.
.venv/demo-installed: pyproject.toml | .venv/bin/python
	test -e .venv/dev-installed || $(RUN)python -m pip install -q -e '.[demo]'
	touch $@

.venv/dev-installed: pyproject.toml | .venv/bin/python
	$(RUN)python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
