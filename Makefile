# make demo    fine-tune the embedded tiny Llama with KaSA on the CPU, and show what it learned and forgot
# make demo-synthesis  from 40 seeds to a judged model, with a server of our own; three minutes on the CPU
# make test    run all tests; PYTEST_ARGS chooses some of them
# make test-fast  run the tests that are not marked slow, in a few minutes on two cores
# make fuzz    read FUZZ_EXAMPLES configs made at random, a tenth as many data files, a twentieth as many folders; minutes
# make typecheck  mypy; the errors of each file may only become fewer
# make lint    ruff; make format applies its layout
# make docs    write the tables of config keys in docs/configs.md from the schemas
# make configs write configs/ and the memory tables of docs/configs.md from the table of models
# make clean   remove the environment and everything written by the targets above
#
# Each target creates .venv and installs what it needs, once. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUTPUT ?= demo_output
PYTEST_ARGS ?= -n 2 --dist worksteal
FUZZ_EXAMPLES ?= 10000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WITH_SERVER := $(BIN)/python -m kasa_tune.tiny_world.endpoint --port 0 --faults 0.3 --run
PINS := pyproject.toml constraints.txt hatch_build.py Makefile
# One thread is several times faster than many on models this small.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-synthesis test test-fast fuzz typecheck lint format docs configs clean

demo: $(VENV)/.installed
	rm -rf $(DEMO_OUTPUT)
	$(BIN)/kasa-tune run kasa_finetune_single_device --config tiny_kasa output_dir=$(DEMO_OUTPUT)
	$(BIN)/kasa-tune run generate_text --config tiny_kasa_generate adapter_checkpoint=$(DEMO_OUTPUT)
	$(BIN)/kasa-tune run evaluate_model --config tiny_evaluate "adapters={kasa: $(DEMO_OUTPUT)}" output_dir=$(DEMO_OUTPUT)/evaluation
	$(BIN)/kasa-tune run report_run --config $(DEMO_OUTPUT)/config.yaml
	@echo "Open $(DEMO_OUTPUT)/report.html in a browser: losses, what was learned and forgotten, spectra, time."

demo-synthesis: $(VENV)/.installed-synthesis
	rm -rf $(DEMO_OUTPUT)
	$(WITH_SERVER) $(BIN)/kasa-tune run synthesize_data --config tiny_synthesize output_dir=$(DEMO_OUTPUT)/data \
	    endpoint.timeout=1
	$(BIN)/kasa-tune run kasa_finetune_single_device --config tiny_kasa output_dir=$(DEMO_OUTPUT)/run \
	    dataset._component_=kasa_tune.components.data.by_columns_dataset dataset.data_files=$(DEMO_OUTPUT)/data/rows.jsonl
	$(BIN)/kasa-tune run evaluate_model --config tiny_evaluate adapters.kasa=$(DEMO_OUTPUT)/run \
	    output_dir=$(DEMO_OUTPUT)/evaluation
	$(WITH_SERVER) $(BIN)/kasa-tune run judge_responses --config tiny_judge output_dir=$(DEMO_OUTPUT)/judged \
	    'evaluations=[$(DEMO_OUTPUT)/evaluation]' endpoint.timeout=1

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -m fuzz -s

typecheck: $(VENV)/.installed-test
	$(BIN)/python .ci/typecheck.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m kasa_tune.config.describe docs/configs.md

configs: $(VENV)/.installed
	$(BIN)/python -W ignore -m kasa_tune.families configs docs/configs.md

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo "kasa_tune needs Python 3.10 to 3.13; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(PINS)
	@echo "Installing kasa_tune and what it needs into $(VENV); the first time this takes a few minutes."
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-synthesis: $(VENV)/.created $(PINS)
	@echo "Installing kasa_tune and what its synthesis needs into $(VENV); the first time this takes a few minutes."
	$(PIP) -e '.[synthesis]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created $(PINS)
	@echo "Installing kasa_tune and what its tests need into $(VENV); the first time this takes a few minutes."
	$(PIP) -e '.[test,parity,tensorboard]'
	@touch $@ $(VENV)/.installed
