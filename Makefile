# make demo    install, check this machine, a short benchmark, then train a small model through metate's kernels
# make test    everything CI runs
# make bench   the full benchmark; results to bench/results/
# make long    the same with far more random configurations, reruns and malformed calls: hours
# make lint    format and type checks, as the pre-commit hooks run them
# make native  the C++ tests: kernels without Python
# make sanitize  the same under AddressSanitizer and UndefinedBehaviorSanitizer
# make gpu     on a GPU machine, network or not: build, device suite, compute-sanitizer, benchmarks
# make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
NVCC := $(firstword $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test soak suite long bench lint format programs native sanitize sanitize-emulator clean install gpu gpu-build \
  gpu-record gpu-python gpu-test gpu-test-cuda gpu-test-triton gpu-test-rest gpu-sanitize gpu-bench
.DELETE_ON_ERROR:

# Environments.

$(VENV)/requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@cp requirements.txt $@

# Where nvcc is found the CUDA kernels must compile; elsewhere they are left out.
$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(NVCC),METATE_ARCHS="80;90a") \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

install: $(VENV)/installed

# What a person runs.

demo: install
	$(BIN)/metate demo

bench: install
	$(BIN)/metate bench

# Tests. The emulated CUDA kernels run on CPU tensors inside pytest, and natively under the sanitizers.

TORCH := $(BIN)/python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
comma := ,

build/sanitize/CMakeCache.txt: $(VENV)/requirements
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DMETATE_TESTS=ON \
	  -DMETATE_ARCHS= -DMETATE_SANITIZE=address$(comma)undefined

# Beside the kernels that the installation built, of which they are made.
programs: install
	$(BIN)/cmake -S . -B build/kernels -DMETATE_TESTS=ON -DMETATE_TORCH="$$($(TORCH))"
	$(BIN)/cmake --build build/kernels -j$(JOBS)

native: programs
	$(BIN)/ctest --test-dir build/kernels --output-on-failure -j$(JOBS)

sanitize: build/sanitize/CMakeCache.txt
	$(BIN)/cmake --build build/sanitize -j$(JOBS)
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j$(JOBS)

# The part of it that CI has time for.
sanitize-emulator: build/sanitize/CMakeCache.txt
	$(BIN)/cmake --build build/sanitize -j$(JOBS) --target emulator_tests
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j$(JOBS) -R "^(cuda|emulator)"

# 32 threads in an index under ThreadSanitizer for two minutes, with what the others leave of the processors.
test: programs
	$(MAKE) --no-print-directory -j2 soak suite

soak:
	$(foreach program,$(wildcard build/kernels/native_threads_*),METATE_TEST_SOAK=120 nice -n 19 $(program) &&) true

suite:
	$(BIN)/ctest --test-dir build/kernels --output-on-failure -j$(JOBS) -E "^threads"
	$(MAKE) --no-print-directory sanitize-emulator
	METATE_TEST_SOAK=30 $(BIN)/python -m pytest -q -n 2 --durations=25 tests

# The same with far more random configurations, reruns and malformed calls, a line a test as it ends. A draw takes from
# a millisecond to seconds, by operator and backend, so these have a time instead of a number: at most FUZZ_SECONDS each
# (about 130 of them, two at a time: two hours on 2 cores), or 20,000 draws; all else comes on top.
FUZZ_SECONDS ?= 120
long: export METATE_TEST_SOAK = 120
long: install native sanitize
	METATE_TEST_FUZZ=20000 METATE_TEST_SECONDS=$(FUZZ_SECONDS) METATE_TEST_RERUNS=10000 METATE_TEST_MALFORMED=1000000 \
	  METATE_TEST_BLOCKS=10000000 $(BIN)/python -m pytest -v -n 2 --durations=50 tests

lint: $(VENV)/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/native/*' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/native/*' | xargs $(BIN)/clang-format -i

# A GPU machine, with what is installed there: the first Python whose torch sees the GPU, no virtual environment, no
# network. Each part can be run alone, ends within MINUTES, and tells as it goes: to bench/results/, and to $OUT. What
# is worth most comes first, and all parts run even where one before them fails.

MINUTES ?= 9
# Looked for once, when a part first asks: torch takes seconds to start.
GPU_PYTHON = $(eval GPU_PYTHON := $(shell for p in $(PYTHON) $(BIN)/python; do \
  $$p -c "import torch; assert torch.cuda.is_available()" 2>/dev/null && command -v $$p && break; done))$(GPU_PYTHON)
WORKERS = $(shell $(GPU_PYTHON) -c "import importlib.util as u; print('-n 8' if u.find_spec('xdist') else '')")
SITE := build/gpu/site
RESULTS := bench/results
SANITIZER := $(firstword $(shell command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null))
GPU_TESTS := gpu-test-cuda gpu-test-triton gpu-test-rest
GPU_BENCHES := $(addprefix gpu-bench-,attention paged_attention quant_linear moe pq)
ON_GPU = PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)/$(SITE) timeout -s INT -k 20
# log <name> <files>: both keep the exit status of the command before.
log = 2>&1 | tee $(RESULTS)/gpu-$(1).log $(if $(OUT),"$(OUT)/gpu-$(1).log"); \
  status=$$?; $(if $(and $(OUT),$(2)),cp $(2) "$(OUT)/";) exit $$status

gpu-%: SHELL := /bin/bash
gpu-%: .SHELLFLAGS := -o pipefail -c

gpu: gpu-build
	$(MAKE) -k -j1 gpu-record $(GPU_TESTS) gpu-sanitize $(GPU_BENCHES) GPU_PYTHON=$(GPU_PYTHON)

gpu-python:
	@test -n "$(GPU_PYTHON)" || { echo "make gpu: no Python here has a torch that sees a GPU" >&2; exit 1; }
	@test -n "$(NVCC)" || { echo "make gpu: no nvcc here" >&2; exit 1; }
	@mkdir -p $(RESULTS)

gpu-build: gpu-python
	rm -rf $(SITE)
	python=$(GPU_PYTHON); PATH="$${python%/*}:$$PATH" METATE_ARCHS="80;90a" \
	  $$python -m pip install --no-build-isolation --no-deps --target $(SITE) . $(call log,build)

# What the GPU makes of every instruction, for the emulator to repeat ever after.
gpu-record: gpu-python
	@mkdir -p build/gpu
	for source in tests/native/*.cu; do name=$$(basename $$source .cu); \
	  $(NVCC) -std=c++20 -O3 -Icsrc -arch=native $$source -o build/gpu/$$name && build/gpu/$$name $(RESULTS)/$$name.bin \
	    || exit; \
	done $(call log,record,$(RESULTS)/*.bin)

# CUDA's kernels, Triton's, everything else. Each test tells at once how it ended.
gpu-test: $(GPU_TESTS)
gpu-test-cuda: CHOICE := cuda-cuda
gpu-test-triton: CHOICE := cuda-triton or test_triton
gpu-test-rest: CHOICE := not cuda-cuda and not cuda-triton and not test_triton
$(GPU_TESTS): gpu-python
	CUDA_LAUNCH_BLOCKING=1 $(ON_GPU) $(MINUTES)m $(GPU_PYTHON) -m pytest -v $(WORKERS) tests -k "$(CHOICE)" \
	  $(call log,$(@:gpu-%=%))

# The tools share the time.
gpu-sanitize: gpu-python
	@test -n "$(SANITIZER)" || { echo "make gpu: no compute-sanitizer here" >&2; exit 1; }
	{ status=0; for tool in memcheck racecheck synccheck initcheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(ON_GPU) $$(($(MINUTES) * 15)) \
	      $(SANITIZER) --tool $$tool --error-exitcode 99 --padding 4096 --kernel-name kns=metate \
	      $(GPU_PYTHON) -m pytest -v tests/test_ops.py -k "parity and cuda-cuda" || status=1; \
	  done; exit $$status; } $(call log,sanitize)

gpu-bench: $(GPU_BENCHES)
$(GPU_BENCHES): gpu-bench-%: gpu-python
	$(ON_GPU) $(MINUTES)m $(GPU_PYTHON) -m metate bench $* --json $(RESULTS)/gpu-$*.json \
	  $(call log,bench-$*,$(RESULTS)/gpu-$*.json)

clean:
	rm -rf build python/metate/*.so python/metate/build.json
