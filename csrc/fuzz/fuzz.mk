# Fuzz targets: csrc/fuzz/fuzz_*.c, each a program of clang's libFuzzer with csrc in
# it, under ASan and UBSan. Each is run twice: with its seeds, which have to reach
# everything that it names, then for FUZZ_S seconds with what it makes of them and
# of what it found before ($(FUZZ_BUILD)/corpus). An input that fails is kept there,
# too, and is run again by giving it to the target as its argument.

FUZZ_S       ?= 20
FUZZ_ARGS    ?=
FUZZ_CC      := clang
FUZZ_BUILD   := $(C_BUILD)/fuzz
FUZZ_FLAGS   := -std=c11 -O1 -g -Wall -Wextra -Werror -Icsrc -Icsrc/tests -Icsrc/fuzz \
    -include csrc/fuzz/alone.h -fno-omit-frame-pointer
FUZZ_TARGETS := worker rank $(C_VERBS)
FUZZ_HEADERS := $(C_HEADERS) $(wildcard csrc/fuzz/*.h) csrc/fuzz/fuzz.mk
FUZZ_LIB     := $(wildcard csrc/*.c) csrc/fuzz/fuzz.c

# fuzz_worker.c has worker.c in it, to look at what that keeps for itself.
FUZZ_LIB_worker  := $(filter-out csrc/worker.c,$(FUZZ_LIB))
FUZZ_LINK_worker := -Wl,--wrap=rfm_memfd_map,--wrap=rfm_mirror_map,--wrap=rfm_memfd_unmap
FUZZ_LIB_rank    := $(FUZZ_LIB)
FUZZ_LIB_verbs   := $(FUZZ_LIB) $(wildcard csrc/verbs/*.c) csrc/verbs/null/provider.c
# Their sides keep what inputs leave behind, for a while: leaks are looked for at the
# end only.
FUZZ_RUN_rank    := -detect_leaks=0
FUZZ_RUN_verbs   := -detect_leaks=0

FUZZ_SAN_run   := -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_SAN_cover := -fsanitize=address -fprofile-instr-generate -fcoverage-mapping

# $(1): run or cover
define fuzz_variant
$(FUZZ_BUILD)/$(1)/%.o: csrc/%.c $$(FUZZ_HEADERS)
	@mkdir -p $$(@D)
	@$$(FUZZ_CC) $$(FUZZ_FLAGS) -fsanitize=fuzzer-no-link $$(FUZZ_SAN_$(1)) -c -o $$@ $$<
endef
$(foreach variant,run cover,$(eval $(call fuzz_variant,$(variant))))
$(FUZZ_BUILD)/run/fuzz/fuzz_worker.o $(FUZZ_BUILD)/cover/fuzz/fuzz_worker.o: csrc/worker.c

# $(1): target, $(2): run or cover
define fuzz_target
$(FUZZ_BUILD)/$(2)/fuzz_$(1): $(FUZZ_BUILD)/$(2)/fuzz/fuzz_$(1).o $$(FUZZ_LIB_$(1):csrc/%.c=$(FUZZ_BUILD)/$(2)/%.o)
	@$$(FUZZ_CC) -fsanitize=fuzzer $$(FUZZ_SAN_$(2)) $$(FUZZ_LINK_$(1)) -o $$@ $$^ -lpthread -lm -ldl
endef
$(foreach variant,run cover,$(foreach target,$(FUZZ_TARGETS),$(eval $(call fuzz_target,$(target),$(variant)))))

$(FUZZ_BUILD)/seeds: csrc/fuzz/seeds.c csrc/crc32c.c $(FUZZ_HEADERS)
	@mkdir -p $(@D)
	@$(CC) $(C_FLAGS) -Icsrc/fuzz -o $@ csrc/fuzz/seeds.c csrc/crc32c.c

$(FUZZ_BUILD)/seed/.made: $(FUZZ_BUILD)/seeds
	@rm -rf $(@D) && $< $(@D) && touch $@

.PHONY: fuzz fuzz-cover $(FUZZ_TARGETS:%=check-fuzz-%)
fuzz: setup $(FUZZ_TARGETS:%=check-fuzz-%)  ## malformed input of every kind, FUZZ_S=20 seconds for each target

check-fuzz-%: C_TIMEOUT := $(shell expr $(FUZZ_S) + 300)
$(FUZZ_TARGETS:%=check-fuzz-%): check-fuzz-%: $(FUZZ_BUILD)/run/fuzz_% $(FUZZ_BUILD)/seed/.made
	@mkdir -p $(FUZZ_BUILD)/corpus/$*
	$(call report,fuzz seeds $*,env FUZZ_REACH=1 $< -runs=0 $(FUZZ_BUILD)/seed/$*)
	$(call report,fuzz $*,$< -max_total_time=$(FUZZ_S) -max_len=4096 -timeout=60 -print_final_stats=1 \
	    -artifact_prefix=$(FUZZ_BUILD)/found-$*- $(FUZZ_RUN_$*) $(FUZZ_ARGS) \
	    $(FUZZ_BUILD)/corpus/$* $(FUZZ_BUILD)/seed/$*)

# What seeds and corpus reach of each file; `llvm-cov show` with the same profile
# shows the lines.
fuzz-cover: setup $(FUZZ_TARGETS:%=$(FUZZ_BUILD)/cover/fuzz_%) $(FUZZ_BUILD)/seed/.made  ## what the fuzz targets reach
	@cd $(FUZZ_BUILD) && for target in $(FUZZ_TARGETS); do \
	    mkdir -p corpus/$$target; \
	    LLVM_PROFILE_FILE=cover/$$target.raw cover/fuzz_$$target -runs=0 corpus/$$target seed/$$target \
	        >cover/$$target.log 2>&1 || { cat cover/$$target.log; exit 1; }; \
	done
	@cd $(FUZZ_BUILD) && llvm-profdata merge -o cover/all.profile $(FUZZ_TARGETS:%=cover/%.raw) \
	    && llvm-cov report -instr-profile=cover/all.profile cover/fuzz_worker \
	        $(patsubst %,-object cover/fuzz_%,$(filter-out worker,$(FUZZ_TARGETS))) \
	        $(CURDIR)/csrc/*.c $(CURDIR)/csrc/verbs/*.c
