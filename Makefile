# make setup | demo | test | test-all | lint | bench | stacks | lock. The environment is made once, in .venv, and again only when
# the requirements change, from files with the hashes of the lock. PYTHON chooses the interpreter. To keep a torch that
# is installed already, with ranges instead of the lock: make setup VENV_ARGS=--system-site-packages LOCK=
PYTHON ?= python3
VENV_ARGS ?=
LOCK ?= requirements.lock
VENV := .venv
RUN := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-dev.txt
SCENES := data/sample-scenes
DEMO_CONFIG := projects/recnext/configs/fpn_recnext-m0_1xb4-350_sample-scenes-128x128.py
DEMO := work_dirs/demo

.PHONY: setup demo test test-all lint bench stacks lock

setup: $(VENV)/installed

# mmcv-lite would overwrite the files of a compiled mmcv: where that is installed, it stays.
$(VENV)/installed: $(REQUIREMENTS) $(LOCK)
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(RUN) -m pip show --quiet mmcv 2>/dev/null && skip='^(-r|mmcv-lite)' || skip='^-r'; \
	    awk -v skip="$$skip" '/^[^ ]/ { skipped = $$0 ~ skip } !skipped' $(or $(LOCK),$(REQUIREMENTS)) > $(VENV)/requirements.txt
	$(RUN) -m pip install $(if $(LOCK),--require-hashes) -r $(VENV)/requirements.txt
	touch $@

$(SCENES): | setup
	$(RUN) tools/make_sample_dataset.py $@

demo: setup $(SCENES)
	rm -rf $(DEMO)
	$(RUN) tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO)
	$(RUN) tools/test.py $(DEMO_CONFIG) $(DEMO)/iter_350.pth --work-dir $(DEMO) --show-dir $(DEMO)/pictures
	@echo "Pictures of image | truth | prediction: $(DEMO)/pictures"

# Two processes, a file of tests at a time: what a file prepares is prepared once.
TEST := $(RUN) -m pytest -n 2 --dist loadfile

test: setup
	$(TEST)

# The same tests at full strength: more kills, examples and hostile files.
test-all: setup
	$(TEST) --full

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/hadolint docker/Dockerfile

# With the demo's weights where `make demo` has made them.
bench: setup $(SCENES)
	$(RUN) tools/benchmark.py $(DEMO_CONFIG) $(wildcard $(DEMO)/iter_350.pth) --work-dir work_dirs/benchmark --sweep

# A core of the tests in an environment for each of the stacks in tests/stack/stacks.py.
stacks: setup
	$(RUN) tests/stack/stacks.py

# Bring the lock up to date with the requirements; versions that still fit stay. For newer ones: make lock UPGRADE=--upgrade
lock: setup
	$(RUN) -m uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate --quiet $(UPGRADE) \
	    --custom-compile-command 'make lock' --output-file requirements.lock requirements-dev.txt
