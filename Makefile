PYTHON ?= python3
BIN := .venv/bin
JOBS := tests/slurm/test_jobs.py

.PHONY: setup quickstart test tests jobs torture lint docs format clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,docs,eval]'
	touch $@

quickstart: setup
	$(BIN)/lrnn quickstart

# The two processes of `tests` keep two cores busy. The jobs of SLURM mostly wait, and so run beside them.
# Compiled modules are kept even if the environment says otherwise, as that of many containers does: each of the hundred
# processes would compile lrnn again.
test: export PYTHONDONTWRITEBYTECODE =
test: setup
	$(MAKE) --no-print-directory -j 4 tests jobs lint docs

# Two processes, in the order of tests/conftest.py: the longest files first, and last what measures time, while the other
# process waits. pytest-xdist would begin with the files of most tests.
tests: setup
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore $(JOBS)

# These print nothing until they end, because the tests print in the meantime.
jobs: setup
	@printed=$$($(BIN)/pytest -q $(JOBS) 2>&1); status=$$?; echo "$$printed"; exit $$status

# Runs 300 kills instead of 9, twenty endings of a job instead of two, and other numbers of processes, in some 50
# minutes. The jobs need root and Debian, because they start their own SLURM. Exports of every mixer are used in five
# versions of transformers. Plain lm-eval reads its own tasks too, and every solution of HumanEval runs.
# Tests of recipes on a GPU run in small on the CPU.
# The whole job runs from a wheel for every form of data and kind of tokenizer, published ones among them (see the file).
torture: setup
	LRNN_TORTURE=1 $(BIN)/pytest -q -s tests/pretrain/test_torture.py tests/pretrain/test_hosts.py \
		tests/pretrain/test_stages.py tests/pretrain/test_state_passing_runs.py tests/pretrain/test_hybrid.py \
		tests/pretrain/watch/test_watched_run.py tests/track/test_workers.py tests/slurm \
		tests/eval/export/test_transformers_versions.py tests/eval/suites/test_state_tracking_suite.py \
		tests/eval/export/test_oracle.py tests/eval/export/test_olmo_hybrid.py tests/lrnn/test_packaging.py tests/lrnn/test_images.py tests/lrnn/test_whole_job.py \
		tests/lrnn/test_lazy_import.py tests/model/test_compiled.py tests/kernels/test_compile.py \
		tests/kernels/test_architectures.py tests/kernels/test_interpreted.py \
		tests/kernels/delta_rule/hopper/test_scans.py
	LRNN_REHEARSE=1 $(BIN)/pytest -q tests/gpu/recipes

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning, such as a broken link, is an error.
docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
