# The developer's manual: setup · demo · test · check · bench · docs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TV     := $(VENV)/torchvision/.ready

.PHONY: setup demo test test-slow test-lowest check lint types bench docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sparsight needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# Some processors need torchvision. Beside a CPU-only torch its wheel does not import, so the tests keep it apart.
$(TV): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchvision "torchvision==0.28.0"
	touch $(TV)

demo: $(READY)            ## the main job on the embedded model: table, and the path of the report
	$(BIN)/sparsight demo demo-out --overwrite

test: $(READY) $(TV)      ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(READY) $(TV) ## the minutes-long ones
	$(BIN)/python -m pytest -m "slow and not gpu"

# The oldest versions that pyproject.toml allows, and other versions of Python; needs uv. Warnings are no errors there.
LOWEST := .venv-lowest
TORCH  ?= torch
OTHER  := tests/tasks tests/data/test_records.py tests/data/test_sources.py tests/data/test_row_groups.py \
	tests/evaluation/test_metrics.py tests/checkpoint/test_folder.py tests/test_cli.py tests/test_package.py \
	tests/test_looks.py tests/test_trackers.py -k "not qwen and not smolvlm"

test-lowest:              ## the same code with the oldest versions: make test-lowest [TORCH=torch==2.13.0]
	uv venv --quiet --clear --python 3.11 $(LOWEST)
	uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable ".[report,demo,data]" "$(TORCH)"
	uv pip install --quiet --python $(LOWEST) pytest hypothesis tensorboardX num2words
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -o filterwarnings=default -m "not slow and not gpu" $(OTHER)

test-python-%:            ## the newest versions with another Python: make test-python-3.13 [TORCH=torch==2.13.0]
	uv venv --quiet --clear --python $* .venv-$*
	uv pip install --quiet --python .venv-$* --editable ".[report,demo,data]" "$(TORCH)"
	uv pip install --quiet --python .venv-$* pytest hypothesis tensorboardX num2words
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -o filterwarnings=default -m "not slow and not gpu" $(OTHER)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test    ## what CI runs

bench: $(READY)           ## one script per ratio, results in benchmarks/
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(READY)            ## guides and reference as pages with search, in docs/_build
	$(BIN)/sphinx-build -W -q docs docs/_build

clean:
	rm -rf $(VENV) .venv-* docs/_build demo-out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
