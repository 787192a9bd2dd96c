# `make` alone lists what there is. The README has the same as plain commands, for a machine without make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GRIDS ?= table1 ablations
PROCESSES ?= 2
KILLS ?= 30
MINUTES ?= 30

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-browser test-faults test-gpu fuzz lock bench grid lab notebooks book data clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  The environment is made in $(VENV) by $(PYTHON); choose another with PYTHON=python3.12."

demo: $(VENV)/installed ## Poison a CLIP, defend it with ABD, print clean accuracy and attack success before and after
	mkdir -p runs/demo
	ABD_STATIC=1 $(BIN)/papermill --no-progress-bar --stdout-file - --stderr-file - book/03_defend.ipynb runs/demo/03_defend.ipynb
	$(BIN)/python -m abd_core.notebook runs/demo/03_defend.ipynb

test: $(VENV)/installed-dev ## Run every check and test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy abd_core
	$(BIN)/lint-imports
	for notebook in book/*.ipynb; do \
	    echo "pair in sync? $$notebook"; \
	    $(BIN)/jupytext --quiet --to py:percent --output - $$notebook | diff -u $${notebook%.ipynb}.py - || exit 1; \
	done
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg book/*.ipynb

test-slow: $(VENV)/installed-dev ## Run the tests that take minutes each, which `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m long

test-browser: $(VENV)/installed-dev ## Open every page of the book, and the explorer in JupyterLab, in Chromium
	$(BIN)/pytest -n0 -m "long or not long" tests/test_book.py tests/browser

test-faults: $(VENV)/installed-dev ## Kill the stages, fill the disk and so on, 20 minutes: KILLS=30 a stage
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/harness.py --kills $(KILLS)

fuzz: $(VENV)/installed-dev ## Fuzz every parser and property into data/results/fuzz.csv: MINUTES=30 a target
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES)

lock: $(VENV)/installed-dev ## Write constraints.txt: the versions of this environment, which CI installs
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==[^ ]+$$' > constraints.txt

test-gpu: $(VENV)/installed-dev ## Run the tests of the kernels on a GPU, with compute-sanitizer where there is one
	$(BIN)/pytest tests/test_infonce.py tests/test_perturb.py tests/test_graphs.py \
	    tests/test_defences.py::test_auto_augment_is_torchvision_s_imagenet_policy_on_each_image
	if command -v compute-sanitizer > /dev/null; then \
	    for tool in memcheck racecheck; do \
	        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/pytest -x \
	            tests/test_infonce.py tests/test_perturb.py -k "triton and (whole_matrix or plain_composition)" || exit 1; \
	    done; \
	fi

bench: $(VENV)/installed-bench ## Time kernels, training steps and loading on this machine into benchmarks/results.csv
	for script in infonce perturb "steps --compiled" loading audit; do \
	    set -- $$script; $(BIN)/python benchmarks/$$1.py $$2 || exit 1; \
	done

grid: $(VENV)/installed ## Attacks x defences x seeds into data/results/grid.csv: GRIDS="table1 ablations" PROCESSES=2
	$(BIN)/python -m abd_core.grid $(GRIDS) --processes $(PROCESSES)

lab: $(VENV)/installed ## Open JupyterLab on the notebooks
	$(BIN)/jupyter-lab --LabApp.default_url=/lab/tree/book

notebooks: $(VENV)/installed ## Run the notebooks in book/ again and keep their outputs, to commit them
	ABD_STATIC=1 $(BIN)/jupyter-nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.store_widget_state=False book/*.ipynb
	$(BIN)/jupyter-nbconvert --to notebook --inplace --coalesce-streams book/*.ipynb

book: $(VENV)/installed-book ## Render the book to _build/html/index.html
	$(BIN)/jupyter-book build book --config _config.yml --path-output . -W --keep-going

data: $(VENV)/installed-dev ## Redraw the embedded benchmark in data/ from its npm packages
	cd data && npm install --ignore-scripts --no-package-lock --no-audit --no-fund
	$(BIN)/python data/build.py

clean: ## Remove the environment, the runs and the rendered book
	rm -rf $(VENV) runs _build

# Stamps: an interrupted install runs again, and so does every install when pyproject.toml changes.
$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/made
	$(BIN)/python -m pip install -e . $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

$(VENV)/installed-%: pyproject.toml | $(VENV)/made
	$(BIN)/python -m pip install -e ".[$*]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@
