# install   create the virtual environment           demo   draw the demo data, train on it, write a report
# test      run the whole suite                      lint   run ruff, mypy and pip-audit      format   format and fix in place
# test-cpus   run the numerical tests as other CPUs would compute (long; SHORT=--short: two settings, few files)
# screenshots   regenerate docs/images (trains small models: minutes to an hour)
# docs      build the documentation site in output/site
# lock      write the versions of this environment, once the tests have passed, to constraints.txt
#
# In the versions of constraints.txt: make install LOCKED=1
# In an existing environment:    make test VENV=/path/to/env       (its bin/python is used, missing packages are added)
# Another interpreter or torch:  make install PYTHON=python3.12 TORCH='torch==2.11.*'
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.14
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.retoken-installed
LOCKED_STAMP := $(VENV)/.retoken-locked
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo test test-cpus lint lock docs format screenshots clean

install: $(if $(filter 1,$(LOCKED)),$(LOCKED_STAMP),$(STAMP))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): requirements.txt requirements-dev.txt | $(BIN)/python
	@echo "Installing into $(VENV) (about 6 GB with the CUDA builds, two to five minutes) ..."
	$(PIP_INSTALL) '$(TORCH)' -r requirements-dev.txt
	@touch $(STAMP)

$(LOCKED_STAMP): requirements.txt requirements-dev.txt constraints.txt | $(BIN)/python
	@echo "Installing the versions of constraints.txt into $(VENV) ..."
	$(PIP_INSTALL) '$(TORCH)' -r requirements-dev.txt -c constraints.txt
	@touch $(STAMP) $(LOCKED_STAMP)

demo: install
	$(BIN)/python -m tools.demo output/demo-data
	$(BIN)/python train.py --cfg configs/demo.yaml --data-path output/demo-data
	$(BIN)/python -m tools.report output/demo

# In WORKERS processes, one file at a time each: most tests wait for subprocesses.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# A table of instruction sets and threads: see tests/helpers/cpu_settings.py.
test-cpus: install
	$(BIN)/python -m tests.helpers.cpu_settings $(SHORT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.helpers.audit

lock: install
	$(BIN)/python -m tests.helpers.lock

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "output/site/index.html is the documentation; mkdocs serve adds its search"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshots: install
	$(BIN)/python -m tools.screenshots

clean:
	rm -rf output .pytest_cache .ruff_cache .mypy_cache
