# make demo              trains the example on this machine's GPUs, or on virtual CPU devices; DEMO_ARGS="--steps 20"
# make test              builds, then runs the tests; PYTEST_ARGS="-k combine -x" picks some
# make test-newest-jax   runs the core of them with the newest jax there is, from the wheel
# make lint | wheel | clean
#
# Needs Python >= 3.12 (.ci/find-python looks for it, PYTHON=... names it), a C++ compiler and a package index for pip.
# No CUDA: nvcc comes as a wheel, unless $CUDACXX names one. All that is made lies in .venv*, build and dist.

PYTEST_ARGS ?=
DEMO_ARGS ?=
# With the newest jax each feature once: what is looked for are APIs of JAX that changed. Other layouts, sizes, formats and
# dtypes ask no other of it; of two axes one layer is kept, of empty operands the transposes, of processes how they find
# each other and ask each other for memory.
NEWEST_ARGS ?= -k "not (batched or rank or -tight or -aligned or -permuted or -one-row or -no-rows or -roomy or -choices \
  or -all-experts or -2] or -1024] or -2048] or ue8m0] or ue8m0- or mxfp8 or [float16 or -float16 or prefill \
  or -weights-True or -idx-True) and (not -two-axes or layers_over_two_axes) and (not -no-tokens or transpose) \
  and (not test_peers or make_memory)" \
  --ignore=tests/gpu --ignore=tests/slurm \
  $(addprefix --ignore=tests/test_,ahead_of_time.py benchmarks.py example.py formats.py group_host.py logfmt.py native.py \
  oracle.py packaging.py provenance.py quantized.py readme.py soak.py tuning.py) \
  $(addprefix --ignore=tests/multiprocess/test_,descriptors.py doctor.py exchange.py exchange_gpu.py groups.py \
  internode.py internode_gpu.py launch.py)

comma := ,
has_gpu := $(wildcard /proc/driver/nvidia/version)
extras := test,examples$(if $(has_gpu),$(comma)cuda)
compiled := $(shell find ffi cmake -type f) CMakeLists.txt pyproject.toml
# One more than there are processors, as a test of several processes often waits; eight at most, for the memory.
processors := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
workers := $(if $(filter gpu,$(JAX_EP_TEST_PLATFORM)),0,$(shell expr $(processors) + 1) --maxprocesses=8)

nvshmem := nvidia-nvshmem-cu13==3.4.5
# Python compiles what is imported, which is less than half.
pip := python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-newest-jax lint wheel clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(if $(has_gpu),,JAX_PLATFORMS=cpu) .venv/bin/python examples/train_moe_lm.py $(DEMO_ARGS)

test: .venv/installed
	.venv/bin/pytest -n $(workers) $(PYTEST_ARGS)

lint: .venv/lint-tools
	PATH="$(CURDIR)/.venv/bin:$$PATH" pre-commit run --all-files --show-diff-on-failure

wheel: dist/built

test-newest-jax: .venv-newest/installed
	.venv-newest/bin/python -c "import jax; print('jax', jax.__version__)"
	.venv-newest/bin/pytest -n $(workers) -W default::DeprecationWarning $(NEWEST_ARGS)

clean:
	rm -rf .venv .venv-newest build dist

# An editable install in two steps: what the build needs, and the jax of its jaxlib, which is the oldest supported; then
# the package, built in build/editable with that, so that a change of a kernel compiles one file.
.venv/tools: pyproject.toml .ci/find-python .ci/requirements
	@command -v $(CXX) >/dev/null || { echo "jax_ep needs a C++ compiler, such as g++: $(CXX) is not there." >&2; exit 1; }
	@echo "== .venv: the build's tools (half a minute, once)"
	@python=$$(.ci/find-python) && $$python -m venv .venv
	@.venv/bin/python .ci/requirements build > .venv/build-requirements.txt
	@.venv/bin/$(pip) -r .venv/build-requirements.txt \
	  || { echo "jax_ep could not be given its tools: pip reaches no package index that has them." >&2; exit 1; }
	@.venv/bin/$(pip) --no-deps $(nvshmem) \
	  || echo "jax_ep._internode, the kernels over several nodes, is left out: pip finds no $(nvshmem)." >&2
	@touch $@

.venv/installed: .venv/tools $(compiled)
	@echo "== .venv: jax_ep[$(extras)] (a minute; later only what changed)"
	@.venv/bin/$(pip) --no-build-isolation -C build-dir=build/editable -e '.[$(extras)]'
	@touch $@

.venv/lint-tools: .venv/installed
	@echo "== .venv: lint's tools"
	@.venv/bin/python .ci/requirements dev > .venv/dev-requirements.txt
	@.venv/bin/$(pip) -r .venv/dev-requirements.txt
	@touch $@

dist/built: .venv/tools $(compiled) $(shell find jax_ep -name '*.py')
	@echo "== dist: the wheel (a minute; seconds where the editable install has compiled it)"
	@rm -rf dist
	@.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  $(if $(wildcard .venv/installed),-C build-dir=build/editable) --wheel-dir dist .
	@touch $@

.venv-newest/installed: dist/built
	@echo "== .venv-newest: the wheel with the newest jax"
	@python=$$(.ci/find-python) && $$python -m venv --clear .venv-newest
	@.venv-newest/bin/$(pip) "$$(echo dist/*.whl)[test]" jax jaxlib
	@touch $@
