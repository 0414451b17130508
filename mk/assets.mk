# SPDX-License-Identifier: Apache-2.0

# What is embedded. Each step works in $(B) and runs again when its inputs changed in content: a *.key file is only
# rewritten then. This file is an input of everything.

key = @mkdir -p $(@D) && printf '%s\n' $(1) | cmp -s - $@ || printf '%s\n' $(1) >$@

$(B)/go.key: FORCE
	$(call key,"$$(go env GOVERSION) $$(cat go.sum mk/assets.mk | sha256sum)")
$(B)/debs.key: FORCE
	$(call key,"$(DEBS) $$(sha256sum <scripts/debs) $(DEBIAN_SUITE) $(DEBIAN_MIRROR)")
$(B)/tools.key: FORCE
	$(call key,"$$(cat $(TOOL_SOURCES) mk/assets.mk | sha256sum) $(PAUSE_IMAGE)")

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

# Flags in place of pkg-config's answers: those are not part of the key of Go's build cache. No build ID, since it would
# depend on the path of this tree.
$(B)/go/runc: $(B)/go.key $(B)/debs/packages
	@echo '  GO      $(ARCH) runc $(RUNC)'
	@CGO_ENABLED=1 CC=$(CC) PKG_CONFIG=true CGO_CFLAGS='-O2 -I$(SYSROOT)/usr/include' \
		CGO_LDFLAGS='-L$(SYSROOT)/usr/lib/$(TRIPLET) -lseccomp' $(GO_BUILD) -tags 'seccomp netgo osusergo urfave_cli_no_docs' \
		-ldflags '-s -w -buildid= -extldflags -static' -o $@ github.com/opencontainers/runc

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

# Kedge's own, which waits for a pod's network policies. Its package list is its sources: it has to be small.
POLICY_PLUGIN := kedge-policy
$(B)/go/cni/$(POLICY_PLUGIN): $(B)/go.key $(wildcard pkg/netpolicy/plugin/*.go pkg/netpolicy/announce/*.go)
	@echo '  GO      $(ARCH) cni/$(POLICY_PLUGIN)'
	@$(GO_BUILD) -ldflags '-s -w' -o $@ ./pkg/netpolicy/plugin

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

$(ASSETS)/manifest.json: $(B)/go/runc $(B)/go/$(SHIM) $(addprefix $(B)/go/cni/,$(notdir $(CNI_PLUGINS)) $(POLICY_PLUGIN)) \
		$(B)/userland/lib/packages $(B)/pause.tar
	@rm -rf $(B)/stage && mkdir -p $(B)/stage $(@D)
	@cp -a $(B)/go/. $(B)/userland/. $(B)/pause.tar $(B)/stage/
	@go run ./scripts/pack $(B)/stage $(@D)
	@echo "  PACK    $(ARCH) $$(du -sb --apparent-size $(B)/stage | cut -f1) bytes in $$(find $(B)/stage -type f | wc -l) files -> $$(stat -c %s $(@D)/files.tar.zst)"
