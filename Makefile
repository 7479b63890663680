# Commands of the project. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

PACKAGES := client/foretell serving embedder predictor bench tests

.PHONY: demo serve test check format protos sync clean
.DELETE_ON_ERROR:

# The faiss build: `make demo EXTRA=gpu` on a machine with an NVIDIA GPU.
EXTRA ?= cpu

$(READY): constraints.txt pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e client -e '.[$(EXTRA),demo]' --group dev
	touch $(READY)

test: $(READY)
	$(BIN)/python -m pytest

# Generated code: stubs from the protos, the sync client from the async one.
.venv-protos/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/pip install --quiet --disable-pip-version-check "pip>=25.1"
	.venv-protos/bin/pip install --quiet --disable-pip-version-check --group protos
	touch $@

protos: .venv-protos/.ready
	find client/foretell -name '*_pb2*' -delete
	.venv-protos/bin/python -m grpc_tools.protoc -I protos -I third_party/googleapis \
	    --plugin=protoc-gen-mypy=.venv-protos/bin/protoc-gen-mypy \
	    --plugin=protoc-gen-mypy_grpc=.venv-protos/bin/protoc-gen-mypy_grpc \
	    --python_out=client --mypy_out=client --grpc_python_out=client --mypy_grpc_out=client \
	    $$(cd protos && find foretell -name '*.proto' | sort)
	for package in common embedder predictor; do \
	    touch client/foretell/$$package/__init__.py client/foretell/$$package/v1/__init__.py; done

clean:
	rm -rf out dist .mypy_cache .pytest_cache .ruff_cache
