# make          build the program, optimised
# make test     install what the tests need (as root, when missing), build, run everything; the last line counts
# make demo     two hosts on this machine, two programs moved between them while a client keeps asking
# make bench    the figures of the README and of docs/benchmarks.md, which it writes there
# make chaos    agents killed and links cut at every step, and at random instants: N times as often as in the tests (13: some 1,000 migrations)
# make fuzz     everything that reads bytes of others under libFuzzer (FUZZ=executions of each); takes a C++ compiler
# make soak     a random workload of mappings moved 200 times, a million operations; one program back and forth 1,000 times
CARGO ?= cargo
N ?= 13
TARGET = $${CARGO_TARGET_DIR:-target}
SHELL = bash

.PHONY: all build test demo bench chaos fuzz soak tools
all: build

build:
	$(CARGO) build --release --bin migrate

tools:
	@tests/tools.sh

test: tools
	@tests/run.sh

demo: tools
	$(CARGO) build --release --bin migrate --package migrate --package migrate-guests --bin migrate-guest
	$(CARGO) run --release --quiet --example demo

bench: tools
	$(CARGO) build --release --package migrate-guests --bin migrate-guest
	$(CARGO) bench --quiet --bench scan --bench codec --bench kernel --bench wire --bench restore
	set -o pipefail; $(CARGO) bench --quiet --bench downtime | tee $(TARGET)/downtime.md
	$(CARGO) run --release --quiet --example figures -- $(TARGET)/downtime.md

chaos: tools
	MIGRATE_CHAOS=$(N) $(CARGO) test --test failure -- --test-threads=1 --nocapture killed_at_random at_each_step

fuzz:
	tests/fuzz/run.sh

soak: tools
	MIGRATE_SOAK=200 $(CARGO) test --test soak -- --test-threads=1 --nocapture
	MIGRATE_SOAK=1000 $(CARGO) test --test many -- --test-threads=1 --nocapture back_and_forth
	MIGRATE_SOAK=$${MIGRATE_SOAK:-20} $(CARGO) test --test vm -- --test-threads=1 --nocapture soft_dirty
