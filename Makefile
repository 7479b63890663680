# Commands of the project; `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
PIP    := --quiet --disable-pip-version-check

# The faiss build: `make demo EXTRA=gpu` on a machine with an NVIDIA GPU.
EXTRA ?= cpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test deps-external check format protos clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

# The environment: both distributions, editable, pinned by one file.
$(READY): constraints.txt pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP) -c constraints.txt pip
	$(BIN)/python -m pip install $(PIP) -c constraints.txt -e client -e '.[$(EXTRA),demo]' --group dev
	@touch $@

# Through the environment, so that any file name will do.
export ITEMS EVENTS

demo: $(READY) ## data, training, predictions, a report in out/demo (FULL=1; ITEMS=... EVENTS=...)
	$(BIN)/python -m serving.demo run $(if $(FULL),--full) \
	    $(if $(ITEMS),--items "$$ITEMS") $(if $(EVENTS),--events "$$EVENTS")

serve: $(READY) ## both services on their default ports over the demo's data and model
	$(BIN)/python -m serving.demo serve

# Two processes share the tests; each goes through a run of them as they stand, for neighbours share
# services, and the one that is done first takes half of what the other has left.
test: $(READY) ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

deps-external: ## Debian and npm packages of the tests marked external (apt-get as root)
	apt-get update
	apt-get install -y --no-install-recommends prometheus \
	    protobuf-compiler protobuf-compiler-grpc-java-plugin protoc-gen-go protoc-gen-go-grpc
	npm install --no-audit --no-fund --no-package-lock --prefix client/node

check: $(READY) ## format, lint, types, contracts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking protos --against protos/released.binpb
	rm -rf out/generated
	$(MAKE) --silent protos OUT=out/generated
	cd out/generated/foretell && for each in *; do \
	    diff -r -x __pycache__ $$each ../../../client/foretell/$$each || exit 1; done

format: $(READY) ## write the format and the lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Generated code: stubs from the protos, the sync client from the async one. The stubs' compiler
# has an environment of its own, because generated code binds its users to a protobuf version:
# an older compiler leaves them a wide range.
OUT ?= client
PROTOC := .venv-protos/bin/python -m grpc_tools.protoc
STUBS  := $(addprefix $(OUT)/foretell/,common embedder predictor)

.venv-protos/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip install $(PIP) -c constraints.txt pip
	.venv-protos/bin/python -m pip install $(PIP) --group protos
	@touch $@

protos: $(READY) .venv-protos/.ready ## generate the stubs and the sync client
	rm -rf $(STUBS)
	mkdir -p $(OUT)
	PATH=.venv-protos/bin:$$PATH $(PROTOC) -I protos -I third_party/googleapis \
	    --python_out=$(OUT) --mypy_out=quiet:$(OUT) \
	    --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) \
	    $$(cd protos && find foretell -name '*.proto' | sort)
	touch $(STUBS:%=%/__init__.py) $(STUBS:%=%/v1/__init__.py)
	$(BIN)/python client/generate_sync.py $(OUT)

clean: ## remove what the commands above made, the environment apart
	rm -rf out dist .mypy_cache .pytest_cache .ruff_cache
