# `make demo` and `make test` work on a fresh clone: each makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# dev,cuda-build: with nvcc, where there is no CUDA toolkit.
EXTRAS ?= dev

.PHONY: demo test test-triton golden-triton sanitize wheel-test abi-check lint types docs bench bench-cpu gpu clean

demo: $(VENV)/installed
	$(BIN)/avadclip-fast demo --output runs/demo

# Most tests are one thread's work, and threads of one process take time from another's; `make sanitize` runs with many.
# One process more than there are processors, as many a test waits for a process that it has started.
PROCESSES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))
PARALLEL := -n $(PROCESSES) --dist worksteal
test test-triton golden-triton: export OMP_NUM_THREADS = 1
test: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# Triton's kernels without a GPU: the tests of the ops that have one, in Triton's interpreter.
test-triton: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -k triton tests/test_triton_*.py \
		$(addprefix tests/test_,$(addsuffix .py,$(notdir $(basename $(filter-out kernels/_%,$(wildcard kernels/*.py)))))) $(ARGS)

# The authors' numbers of both whole models by the Triton kernels, in the interpreter: ten minutes. Needs ../shared.
golden-triton: $(VENV)/installed
	TRITON_INTERPRET=1 AVADCLIP_FAST_BACKEND=triton $(BIN)/python -m pytest tests/test_models.py -k authors $(ARGS)

# Of the C++ operators, and of nothing that lies beside the package.
CPP_TESTS := operators topk_mean mil_loss distance_graph similarity_graph uniform_pool pack_rows linear_act

# Address and undefined-behaviour sanitizers over the C++ operators, built apart, under their tests. (Over the device
# code, emulated on the host, they are in `make test`.) One target a function: instrumented, all clones are alike. Tile
# units are emulated in AVX-512: sanitizers cannot see into them, and few processors have them.
# Python itself is not instrumented, so that the runtimes go first; it leaks at exit, which is no concern here. What a
# sanitizer finds, it says on stderr before it ends the process: pytest must not hold that back.
SANITIZED := -g1 -DAVADCLIP_ONE_TARGET -DAVADCLIP_EMULATED_TILES -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIMES := libasan.so libubsan.so libstdc++.so
sanitize: export PYTHONPATH = build/sanitize/lib:.
sanitize: export PYTHONSAFEPATH = 1
sanitize: export OMP_WAIT_POLICY = PASSIVE
sanitize: $(VENV)/installed
	rm -rf build/sanitize
	CXX="c++ $(SANITIZED)" CUDA_HOME=none $(BIN)/python setup.py --quiet build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	export LD_PRELOAD="$(foreach name,$(RUNTIMES),$$(c++ -print-file-name=$(name)))" ASAN_OPTIONS=detect_leaks=0; \
	$(BIN)/python -c 'from avadclip_fast import _build; assert "sanitize" in _build.__file__ and not _build.CPP_MISSING' && \
	$(BIN)/python -m pytest --capture=sys -k 'cpp or amx or Tiles or Operators' tests/test_csrc.py $(CPP_TESTS:%=tests/test_%.py) $(ARGS)

# The source distribution, a wheel built from it alone, and tests on the wheel where there is no source. Only what it
# depends on comes from here: a path in a .pth file brings packages, not the editable install that lies beside them.
# A program that uses all of it is checked against the types that the wheel brings.
wheel-test: export PYTHONSAFEPATH = 1
wheel-test: $(VENV)/installed
	rm -rf dist && mkdir -p build
	$(BIN)/python -m build --no-isolation
	tar -tzf dist/*.tar.gz | cut -d/ -f2- | sort > build/contents
	git ls-files csrc kernels | sort | comm -23 - build/contents > build/missing
	@if [ -s build/missing ]; then echo "not in the source distribution:"; cat build/missing; exit 1; fi
	set -e; away=$$(mktemp -d); trap 'rm -rf $$away' EXIT; python=$$away/venv/bin/python; \
	$(BIN)/python -m venv --without-pip $$away/venv; \
	$(BIN)/python -m pip --python $$python install --quiet --no-deps dist/*.whl; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(echo $$away/venv/lib/python3*/site-packages)/dependencies.pth; \
	cp -r tests pyproject.toml $$away; cd $$away; \
	venv/bin/avadclip-fast env; \
	ls venv/lib/python3*/site-packages/avadclip_fast/kernels/configs/*.json; \
	$$python -c 'import sys; from avadclip_fast import _build, kernels; print(_build.__file__); \
		sys.exit(_build.CPP_MISSING or not all(m.__file__.startswith(sys.prefix) for m in (_build, kernels)))'; \
	$(abspath $(BIN))/mypy $(AS_USER) --cache-dir $(CURDIR)/build/mypy --python-executable $$python; \
	$$python -m pytest $(patsubst %,tests/test_%.py,$(CPP_TESTS) modules checkpoints) $(ARGS)

# The promise of setup.py's TORCH_TARGET: sources and objects against the oldest torch, which it downloads (0.5 GB).
abi-check: $(VENV)/installed
	$(BIN)/python tests/abi_check.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The library by the settings of pyproject.toml, a program that uses it by mypy's strictest.
AS_USER := tests/typed_user.py --strict --config-file=
types: $(VENV)/installed
	$(BIN)/mypy
	$(BIN)/mypy $(AS_USER) --follow-imports silent --cache-dir .mypy_cache/user

# The site, into build/docs; a warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Paired ratios against loops and plain PyTorch, into bench/results/*.json, within 10 minutes on two cores.
bench-cpu: $(VENV)/installed
	for op in topk_mean mil_loss distance_graph similarity_graph uniform_pool; do \
		$(BIN)/python -m bench.bench_$$op --json || exit 1; done
	for op in linear_act folds; do $(BIN)/python -m bench.bench_$$op --rounds 5 --json || exit 1; done
	for whole in step inference; do $(BIN)/python -m bench.bench_$$whole --rounds 3 --json || exit 1; done

# On a machine with a GPU: build, tests, sanitizers, every benchmark, within 8 minutes; gpu.json and gpu.tar.gz in OUT.
gpu: $(VENV)/installed
	$(BIN)/python -m bench.gpu

# The benchmarks of `make gpu` alone.
bench: $(VENV)/installed
	$(BIN)/python -m bench.gpu --bench

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, PYTHON=... chooses it" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77'
	# without build isolation, which would fetch torch a second time
	$(BIN)/python -m pip install --no-build-isolation --editable '.[$(EXTRAS)]'
	# once more, now that torch is there: the C++ operators are built against its headers
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
