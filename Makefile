# Everything runs in .venv, which tools/setup.sh makes on first use.
PYTHON_BIN := .venv/bin/python

TEST_ARGS :=
.PHONY: help setup demo notebook test cover docs lint format benchmark results clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## make .venv ready (torch, mmcv, mmdet, mmseg); quick the second time
	@tools/setup.sh

demo: setup  ## find nuclei with a frozen backbone, E3VA and full fine-tuning: a table and a picture
	$(PYTHON_BIN) demo/run.py

notebook: setup  ## execute the demo's notebook, and write its outputs into it
	.venv/bin/jupyter-execute --inplace demo/quickstart.ipynb

test: setup  ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest $(TEST_ARGS)

cover: TEST_ARGS := --cov=e3va_mm --cov-report=term
cover: test  ## run the tests, and print how much of the package they run

docs: setup  ## build the documentation in docs/_build/html; warnings, dead links among them, are errors
	rm -rf docs/_api  # pages of modules that are gone would stay
	$(PYTHON_BIN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

lint: setup  ## check style
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .

format: setup  ## fix style
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .

# Seconds a step on two cores; BENCHMARK='--tasks upernet --sizes l --batch-sizes 2 8' for a GPU.
BENCHMARK ?= --tasks retinanet --sizes t --image-sizes 256x448 --steps 5 --warmup 1
benchmark: setup  ## memory and time of training steps: a table
	$(PYTHON_BIN) benchmarks/cost.py --out work_dirs/benchmark/results.json $(BENCHMARK)

results: setup  ## on a GPU: run what is missing in benchmarks/results/, from data/; takes hours, and goes on where it stopped
	benchmarks/reproduce.sh

clean:  ## remove the environment, all results of runs and the built documentation
	rm -rf .venv work_dirs docs/_build docs/_api
