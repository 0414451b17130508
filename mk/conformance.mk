# SPDX-License-Identifier: Apache-2.0

# docs/conformance.md says what the variables mean.
PROCS     ?= 12
LABELS    ?= Conformance
SERVERS   ?= 1
TESTS     ?= $(if $(SMOKE),tests/conformance/smoke.txt)
CONF      := build/conformance

.PHONY: conformance conformance-kit

$(CONF)/go.key: FORCE
	$(call key,"$$(go env GOVERSION) $$(cat go.mod go.sum mk/conformance.mk | sha256sum)")
$(CONF)/debs.key: FORCE
	$(call key,"$$(sha256sum <scripts/debs) $$(sha256sum <tests/conformance/busybox) $(DEBIAN_SUITE) $(DEBIAN_MIRROR)")
$(CONF)/images.key: FORCE
	$(call key,"$$(cat tests/conformance/images scripts/image/*.go scripts/mkimage/*.go | sha256sum)")

# What is built from k8s.io/kubernetes needs modules that Kedge does not. So it is built in a module of its own, which is made
# from Kedge's: all that they have in common has the same version, and comes out of the same build cache.
CONF_GO       := k8s.io/kubernetes/test/images/agnhost k8s.io/kubernetes/test/images/nonewprivs k8s.io/sample-apiserver github.com/onsi/ginkgo/v2/ginkgo
CONF_PROGRAMS := $(addprefix $(CONF)/programs/,$(notdir $(CONF_GO)))
$(CONF)/upstream/go.mod: $(CONF)/go.key
	@rm -rf $(@D) && mkdir -p $(@D) && cp go.mod go.sum $(@D)/
	@printf '%s\n' '//go:build tools' 'package upstream' $(patsubst %,'import _ "%"',k8s.io/kubernetes/test/e2e $(CONF_GO)) >$(@D)/tools.go
	@go -C $(@D) mod edit -module=kedge.test/upstream
	@go -C $(@D) mod tidy 2>$(@D)/tidy.log || { cat $(@D)/tidy.log >&2; exit 1; }

# The suite says the version of Kubernetes that it is of, as the stock programs do.
$(CONF)/e2e.test: $(CONF)/upstream/go.mod
	@echo '  GO      e2e.test $(K8S)'
	@nice go -C $(CONF)/upstream test -c -vet=off -ldflags '$(STOCK_LDFLAGS)' -o $(abspath $@) k8s.io/kubernetes/test/e2e
$(CONF_PROGRAMS): $(CONF)/programs/%: $(CONF)/upstream/go.mod
	@echo '  GO      $*'
	@nice go -C $(CONF)/upstream build -ldflags '-s -w' -o $(abspath $@) $(filter %/$*,$(CONF_GO))
$(CONF)/programs/coredns: $(CONF)/go.key tests/conformance/coredns/main.go
	@echo '  GO      coredns'
	@nice go build -ldflags '-s -w' -o $@ ./tests/conformance/coredns
$(CONF)/programs/etcd: $(CONF)/go.key
	@echo '  GO      etcd'
	@nice go build -ldflags '-s -w' -o $@ go.etcd.io/etcd/server/v3
$(CONF)/programs/busybox: $(CONF)/debs.key | $(B)/deps
	@echo '  CC      busybox'
	@tests/conformance/busybox $(CONF)/busybox
	@mkdir -p $(@D) && cp $(CONF)/busybox/busybox $@

CONF_DEBS  := base-files libc-bin bash
CONF_TOOLS := bind9-dnsutils curl netcat-openbsd iproute2 iperf socat util-linux
$(CONF)/tools/packages: $(CONF)/debs.key
	@echo '  DEBS    $(CONF_DEBS) $(CONF_TOOLS)'
	@scripts/debs $(ARCH) $(@D) $(CONF_DEBS) $(CONF_TOOLS)
$(CONF)/nginx/packages: $(CONF)/debs.key
	@echo '  DEBS    $(CONF_DEBS) nginx'
	@scripts/debs $(ARCH) $(@D) $(CONF_DEBS) nginx

$(CONF)/images/made: $(CONF_PROGRAMS) $(addprefix $(CONF)/programs/,coredns etcd busybox) $(CONF)/tools/packages $(CONF)/nginx/packages \
		$(B)/pause.tar $(CONF)/images.key
	@echo '  IMAGES  conformance'
	@tests/conformance/images $(ARCH) $(CONF)/programs $(CONF)/tools/root $(CONF)/nginx/root $(B)/pause $(@D)
	@touch $@

conformance-kit: $(CONF)/e2e.test $(CONF)/images/made

# KUBECONFIG counts only on make's command line: the suite must not run on a cluster that somebody's shell happens to point at.
conformance: $(if $(KEDGE_BIN),,build) conformance-kit
	@go build -ldflags '-s -w' -o $(CONF)/conformance ./tests/conformance
	@$(CONF)/conformance -kit $(CONF) -procs $(PROCS) -servers $(SERVERS) -labels '$(LABELS)' \
		$(if $(FOCUS),-focus '$(FOCUS)') $(if $(SKIP),-skip '$(SKIP)') $(if $(TESTS),-tests '$(TESTS)') $(if $(FLAGS),-flags '$(FLAGS)') \
		$(if $(filter command,$(firstword $(origin KUBECONFIG))),-kubeconfig '$(KUBECONFIG)')
