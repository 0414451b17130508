# SPDX-License-Identifier: Apache-2.0

define TEST_HELP
make unit                       the fast tests: vet, lint, and what needs no machines
make test                       build, unit, and the scenarios on machines of the test bed (needs root)
make scenario S=singlenode [R=TestName]  one package of scenarios
make conformance [SMOKE=1]      upstream's conformance suite on machines of the test bed (needs root); see docs/conformance.md
make lint                       go vet, staticcheck and gofmt
make run [FLAGS='…']            build, then run a server on this machine in the foreground (needs root)
make dependencies               write the list of what the binary is made of anew
make clean-tests                remove what tests left behind, the cached Debian root included
endef

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
REPORT      := go run ./scripts/testreport $(if $(TEST_COUNTS),-count '$(TEST_COUNTS)')
SOURCES      = $(wildcard cmd pkg scripts tests)
EVERYTHING   = $(SOURCES:%=./%/...)
# Packages below tests/ that need no machines.
UNIT_TESTS  := tests/policy tests/image tests/registry tests/history tests/conformance
UNIT         = $(patsubst %,./%/...,$(wildcard cmd pkg scripts) $(UNIT_TESTS))
SCENARIOS    = $(shell go list ./tests/... | grep -vE '/($(subst tests/,,$(subst $(eval ) ,|,$(UNIT_TESTS))))(/|$$)')
# A cluster that starts needs most of two cores, and 1 GiB of memory. The scenarios of tests/ha measure seconds: they run alone.
PARALLEL    ?= 2

.PHONY: unit unit-tests test scenario scenarios lint run dependencies clean-tests

unit: unit-tests lint

unit-tests: assets
	@echo "  TEST    unit"
	@$(REPORT) -- -timeout 10m $(UNIT)

scenarios: build
	@echo "  TEST    scenarios"
	@status=0; for s in '$(filter-out %/tests/ha,$(SCENARIOS))' '$(filter %/tests/ha,$(SCENARIOS))'; do \
		$(REPORT) -v -- -count 1 -parallel 4 -p $(PARALLEL) -timeout 40m $$s || status=1; done; exit $$status

scenario: build
	@$(REPORT) -v -- -count 1 -parallel 4 -timeout 40m $(if $(R),-run '$(R)') ./tests/$(S)

# All of it runs, also after a failure: one finding must not hide the others.
test: build
	@status=0; for t in unit-tests scenarios lint; do $(MAKE) --no-print-directory $$t || status=1; done; exit $$status

lint: assets
	@echo '  LINT    $(SOURCES)'
	@out=$$(gofmt -l $(SOURCES)) && if [ -n "$$out" ]; then echo "not formatted (gofmt -w):"; echo "$$out"; exit 1; fi
	@go vet $(EVERYTHING)
	@go run $(STATICCHECK) $(EVERYTHING)

dependencies:
	@go test ./tests/policy -run '^TestDependencies$$' -args update

define RUN_TEXT
  In another terminal:
    bin/kedge status                    what runs, and what does not and why
    bin/kedge kubectl get pods -A       kubectl is inside
    bin/kedge check                     what this machine has and lacks
  Ctrl-C stops the server and leaves pods running; the next start takes them over.
endef
export RUN_TEXT
run: build
	@echo '  RUN     $(abspath bin/kedge) server $(FLAGS)'
	@echo "$$RUN_TEXT"
	@exec $(if $(filter 0,$(shell id -u)),,sudo) bin/kedge server $(FLAGS)

clean-tests:
	@tests/testbed/machines gc
	@rm -rf --one-file-system /var/lib/kedge-testbed/template-* /var/tmp/kedge-test-logs
