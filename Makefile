# make setup | demo | test | test-all | lint | docs | bench | gpu | wheels | stacks | lock. The environment is made once, in .venv, and again only when
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

.PHONY: setup demo test test-all lint docs bench gpu wheels stacks lock

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

# Two processes, a file of tests at a time: what a file prepares is prepared once. Threads that wait for one another
# sleep: on cores that all share, those that spin instead make everything several times slower.
TEST := OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n 2 --dist loadfile --max-worker-restart 0

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

# The site, from the pages as they lie: build/site/index.html. Nothing is fetched. REPOSITORY=https://... is where links to files lead.
docs: setup
	$(RUN) -m sphinx -b html -c docs -d build/doctrees -W --keep-going --quiet . build/site

# With the demo's weights where `make demo` has made them.
bench: setup $(SCENES)
	$(RUN) tools/benchmark.py $(DEMO_CONFIG) $(wildcard $(DEMO)/iter_350.pth) --work-dir work_dirs/benchmark --sweep

# On a machine with a GPU, in ten minutes: the tests that are marked gpu, then the tables and the picture in work_dirs/gpu. Where
# that machine reaches no registry: make wheels where one is reached, and there make gpu WHEELS=work_dirs/wheels, with the
# torch that it has. Without a GPU: make gpu DEVICE=cpu TINY=--tiny
DEVICE ?= auto
TINY ?=
WHEELS ?=
SHARED := ../shared
GPU_RUN := $(if $(WHEELS),$(WHEELS)/venv/bin/python,$(RUN))
GPU_DATA := $(wildcard $(SHARED)/ade20k_sample/ADEChallengeData2016)
GPU_WEIGHTS := $(wildcard $(SHARED)/legacy/real_m3/recnext_m3_ade20k_sample3.pth)
GPU_REAL := projects/recnext/configs/fpn_recnext-m3_8xb4-80k_ade20k-512x512.py $(GPU_WEIGHTS) --data-root $(GPU_DATA)

gpu: $(or $(WHEELS:%=%/venv),setup) $(if $(GPU_DATA),,$(SCENES))
	began=$$(date +%s); status=0; \
	    $(GPU_RUN) -m pytest -m gpu tests/gpu --device $(DEVICE) || status=$$?; \
	    $(GPU_RUN) tools/benchmark_gpu.py $(if $(GPU_DATA),$(GPU_REAL),$(DEMO_CONFIG)) --work-dir work_dirs/gpu \
	        --device $(DEVICE) $(TINY) --seconds $$((560 - $$(date +%s) + began)) || status=$$?; \
	    exit $$status

# For Python 3.12: what such a machine lacks beside torch, torchvision, timm, opencv, matplotlib, onnx, pytest and hypothesis; in
# more/ what mmengine and mmseg import as well, and what may be there.
wheels:
	bash $(SHARED)/gpu/wheels.sh work_dirs/wheels
	$(PYTHON) -m pip download --quiet --no-deps --dest work_dirs/wheels/more --python-version 3.12 --only-binary=:all: \
	    rich markdown-it-py mdurl pygments regex scipy cattrs attrs typing-extensions

# The python3 there may itself be a virtual environment's, whose packages a further one would not see without the .pth.
%/venv: | %
	python3 -m venv --system-site-packages $@
	python3 -c 'import site; print(f"import site; [*map(site.addsitedir, {site.getsitepackages()})]")' \
	    > $$(echo $@/lib/python*/site-packages)/parent.pth
	$@/bin/pip install --no-index --no-deps --find-links $* $*/*.whl
	$@/bin/pip install --no-index --find-links $*/more rich regex scipy cattrs

# A core of the tests in an environment for each of the stacks in tests/stack/stacks.py.
stacks: setup
	$(RUN) tests/stack/stacks.py

# Bring the lock up to date with the requirements; versions that still fit stay. For newer ones: make lock UPGRADE=--upgrade
lock: setup
	$(RUN) -m uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate --quiet $(UPGRADE) \
	    --custom-compile-command 'make lock' --output-file requirements.lock requirements-dev.txt
