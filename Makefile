# SPDX-License-Identifier: Apache-2.0

define HELP
make build [ARCH=amd64|arm64]   bin/kedge (bin/kedge-ARCH for another architecture than this machine's)
make assets [ARCH=…]            only what is embedded: runc, shim, CNI plugins, network tools, pause image
make clean                      removes bin/ and build/, with the downloaded packages

Needs Debian 12 or later, Go, git and make. C compiler and pkg-config are installed when they are missing and you are root.
endef

ARCH    ?= $(shell go env GOHOSTARCH)
HOST    := $(shell go env GOHOSTARCH)
TRIPLET := $(or $(patsubst amd64,x86_64-linux-gnu,$(filter amd64,$(ARCH))),$(patsubst arm64,aarch64-linux-gnu,$(filter arm64,$(ARCH))),\
	$(error ARCH=$(ARCH) is not supported: amd64 and arm64 are))
CC      := $(if $(filter $(HOST),$(ARCH)),gcc,$(TRIPLET)-gcc)
B       := build/$(ARCH)
BIN     := bin/kedge$(if $(filter $(HOST),$(ARCH)),,-$(ARCH))
ASSETS  := pkg/embed/assets/$(ARCH)

# go.mod is the one place that has the versions of everything inside.
version_of   = $(shell awk '$$1 == "$(1)" && $$2 ~ /^v/ { print $$2; exit }' go.mod)
K8S         := $(call version_of,k8s.io/kubernetes)
CONTAINERD  := $(call version_of,github.com/containerd/containerd/v2)
RUNC        := $(call version_of,github.com/opencontainers/runc)
CNI         := $(call version_of,github.com/containernetworking/plugins)
REVISION    := 1
VERSION     := $(K8S)+kedge$(REVISION)
PAUSE_IMAGE := $(shell sed -n 's/^const pauseImage = "\(.*\)"$$/\1/p' pkg/embed/embed.go)

# A build of the same commit is the same file: the date is the commit's.
COMMIT := $(shell git rev-parse --verify -q HEAD 2>/dev/null)
TREE   := $(if $(shell git status --porcelain 2>/dev/null),dirty,clean)
DATE   := $(or $(shell TZ=UTC0 git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null),1970-01-01T00:00:00Z)

# All Go code is built with the same settings, so that everything shares one build cache.
export GOFLAGS     := -trimpath -buildvcs=false
export CGO_ENABLED := 0
export GOWORK      := off
GO_BUILD           := GOOS=linux GOARCH=$(ARCH) go build

# What differs from commit to commit goes into the final link of cmd/kedge and nowhere else.
CONTAINERD_VERSION := github.com/containerd/containerd/v2/version
LDFLAGS := -s -w \
	$(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
		-X $p.gitVersion=$(VERSION) -X $p.gitMajor=$(patsubst v%,%,$(word 1,$(subst ., ,$(K8S)))) -X $p.gitMinor=$(word 2,$(subst ., ,$(K8S))) \
		-X $p.gitCommit=$(or $(COMMIT),unknown) -X $p.gitTreeState=$(TREE) -X $p.buildDate=$(DATE)) \
	-X $(CONTAINERD_VERSION).Version=$(CONTAINERD) -X $(CONTAINERD_VERSION).Revision= \
	-X github.com/kedge-io/kedge/pkg/version.Version=$(VERSION) -X github.com/kedge-io/kedge/pkg/version.Commit=$(COMMIT)

.DELETE_ON_ERROR:
.PHONY: help build assets clean FORCE
help:
	$(info $(HELP))
	$(info )
	$(info $(TEST_HELP))
	@:

include mk/*.mk

build: $(ASSETS)/manifest.json
	@echo '  GO      $(BIN) $(VERSION)'
	@$(GO_BUILD) -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/kedge

assets: $(ASSETS)/manifest.json

clean:
	rm -rf bin build $(foreach a,amd64 arm64,$(addprefix pkg/embed/assets/$a/,files.tar.zst manifest.json))

# --- Assets. Each step works in $(B) and runs again when its inputs changed in content: a *.key file is only rewritten then.

key = @mkdir -p $(@D) && printf '%s\n' $(1) | cmp -s - $@ || printf '%s\n' $(1) >$@

$(B)/go.key: FORCE
	$(call key,"$$(go env GOVERSION) $$(sha256sum <go.sum)")
$(B)/debs.key: FORCE
	$(call key,"$(DEBS) $$(sha256sum <scripts/debs) $(DEBIAN_SUITE) $(DEBIAN_MIRROR)")
$(B)/tools.key: FORCE
	$(call key,"$$(cat $(TOOL_SOURCES) | sha256sum) $(PAUSE_IMAGE)")

TOOL_SOURCES := $(filter-out %_test.go,$(wildcard $(addprefix scripts/,userland/*.go pack/*.go image/*.go mkimage/*.go native/*))) \
	pkg/embed/archive/archive.go pkg/embed/archive/pack.go

$(B)/deps: scripts/deps
	@mkdir -p $(@D)
	@scripts/deps $(ARCH)
	@touch $@

# libseccomp comes from there too: the same one for every build machine.
DEBS    := nftables iptables ipset conntrack libseccomp-dev
SYSROOT := $(abspath $(B)/debs/root)
$(B)/debs/packages: $(B)/debs.key | $(B)/deps
	@echo '  DEBS    $(ARCH) $(DEBS)'
	@scripts/debs $(ARCH) $(B)/debs $(DEBS)

$(B)/go/runc: $(B)/go.key $(B)/debs/packages
	@echo '  GO      $(ARCH) runc $(RUNC)'
	@CGO_ENABLED=1 CC=$(CC) PKG_CONFIG_LIBDIR=$(SYSROOT)/usr/lib/$(TRIPLET)/pkgconfig PKG_CONFIG_SYSROOT_DIR=$(SYSROOT) \
		PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 $(GO_BUILD) -tags 'seccomp netgo osusergo urfave_cli_no_docs' \
		-ldflags '-s -w -extldflags -static' -o $@ github.com/opencontainers/runc

# Tags as upstream builds it: without gRPC, of which there would be a copy in the memory of every pod's shim.
SHIM := containerd-shim-runc-v2
$(B)/go/$(SHIM): $(B)/go.key
	@echo '  GO      $(ARCH) $(SHIM) $(CONTAINERD)'
	@$(GO_BUILD) -tags 'osusergo netgo static_build urfave_cli_no_docs no_grpc' \
		-ldflags '-s -w -X $(CONTAINERD_VERSION).Version=$(CONTAINERD) -X $(CONTAINERD_VERSION).Revision=' \
		-o $@ github.com/containerd/containerd/v2/cmd/$(SHIM)

CNI_MODULE  := github.com/containernetworking/plugins
CNI_PLUGINS := main/ptp main/loopback main/bridge ipam/host-local meta/portmap meta/bandwidth
$(addprefix $(B)/go/cni/,$(notdir $(CNI_PLUGINS))): $(B)/go/cni/%: $(B)/go.key
	@echo '  GO      $(ARCH) cni/$* $(CNI)'
	@$(GO_BUILD) -ldflags '-s -w -X $(CNI_MODULE)/pkg/utils/buildversion.BuildVersion=$(CNI)' \
		-o $@ $(CNI_MODULE)/plugins/$(filter %/$*,$(CNI_PLUGINS))

# Programs without a C library.
CFLAGS := -Os -Wall -Wextra -Werror -static -nostdlib -ffreestanding -fno-builtin -fno-pie -no-pie -fno-stack-protector \
	-fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns $(if $(filter amd64,$(ARCH)),-fcf-protection=none) \
	-s -Wl,-z,noseparate-code,-z,norelro,--build-id=none
LOADER := $(if $(filter amd64,$(ARCH)),ld-linux-x86-64.so.2,ld-linux-aarch64.so.1)
PACKAGED := nft ipset conntrack xtables-nft-multi xtables-legacy-multi
LAUNCHERS := $(addprefix $(B)/native/,$(PACKAGED))
PROTOCOLS := $(B)/native/libprotocols.so

$(LAUNCHERS): $(B)/native/%: $(B)/tools.key | $(B)/deps
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) -DLOADER='"$(LOADER)"' -DPROGRAM='"$*"' -o $@ scripts/native/launcher.c

# The libc it needs is the one that the packaged programs have loaded.
$(PROTOCOLS): $(B)/tools.key | $(B)/deps
	@mkdir -p $(@D)
	@$(CC) -Os -Wall -Wextra -Werror -shared -fPIC -nostdlib -s -Wl,--build-id=none -o $@ scripts/native/protocols.c

$(B)/userland/lib/packages: $(B)/debs/packages $(LAUNCHERS) $(PROTOCOLS) $(B)/tools.key
	@echo '  PICK    $(ARCH) $(PACKAGED)'
	@rm -rf $(B)/userland
	@go run ./scripts/userland $(B)/debs/root $(B)/native $(B)/userland
	@install -m 644 $(PROTOCOLS) $(B)/userland/lib/
	@cp $(B)/debs/packages $@

$(B)/pause.tar: $(B)/tools.key | $(B)/deps
	@echo '  IMAGE   $(ARCH) $(PAUSE_IMAGE)'
	@rm -rf $(B)/pause && mkdir -p $(B)/pause
	@$(CC) $(CFLAGS) -o $(B)/pause/pause scripts/native/pause.c
	@go run ./scripts/mkimage -arch $(ARCH) -entrypoint /pause -user 65535:65535 $(PAUSE_IMAGE) $(B)/pause $@

$(ASSETS)/manifest.json: $(B)/go/runc $(B)/go/$(SHIM) $(addprefix $(B)/go/cni/,$(notdir $(CNI_PLUGINS))) $(B)/userland/lib/packages $(B)/pause.tar
	@rm -rf $(B)/stage && mkdir -p $(B)/stage $(@D)
	@cp -a $(B)/go/. $(B)/userland/. $(B)/pause.tar $(B)/stage/
	@go run ./scripts/pack $(B)/stage $(@D)
	@echo "  PACK    $(ARCH) $$(du -sb --apparent-size $(B)/stage | cut -f1) bytes in $$(find $(B)/stage -type f | wc -l) files -> $$(stat -c %s $(@D)/files.tar.zst)"
