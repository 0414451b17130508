# SPDX-License-Identifier: Apache-2.0

define RELEASE_HELP
make release [ARCH=…] [RELEASE_KEY=key.pem] [REVISION=2] [VERSION_SUFFIX=…]
                                the archives that users install from, in dist/; see docs/development.md
endef

# Who has the key makes releases that all nodes accept that know its public half. One is made here once if none is given.
RELEASE_KEY ?= build/release.key
RELEASE_PUB := build/release.pub
NAME        := kedge-$(VERSION)-linux-$(ARCH)
STAGE       := build/release/$(NAME)
RELEASE     := go run ./scripts/release

# The 32 bytes at the end of the public key, for pkg/release. Without a key the binary trusts what /etc/kedge/release.pub holds.
LDFLAGS += $(if $(wildcard $(RELEASE_PUB)),-X github.com/kedge-io/kedge/pkg/release.PublicKey=$(shell sed -n 2p $(RELEASE_PUB) | base64 -d | tail -c 32 | base64))

.PHONY: release release-stage

# Beside the binary stands what it embeds, and what it is made of.
LINKED := ./cmd/kedge ./pkg/netpolicy/plugin github.com/opencontainers/runc github.com/containerd/containerd/v2/cmd/$(SHIM) \
	$(addprefix $(CNI_MODULE)/plugins/,$(CNI_PLUGINS))

# The key comes first: make has to read it anew.
release:
	@$(RELEASE) key $(RELEASE_KEY) $(RELEASE_PUB)
	@$(MAKE) --no-print-directory release-stage

# The old binary stays where it is: if it is up to date, go does not link it again.
release-stage: BIN := $(STAGE)/kedge
release-stage: build
	@find $(STAGE) -mindepth 1 ! -path $(BIN) -delete
	@echo '  PACK    dist/$(NAME)'
	@install -m 755 scripts/install.sh $(STAGE)/
	@install -m 644 scripts/kedge.service scripts/kedge.openrc README.md $(STAGE)/
	@install -m 644 $(RELEASE_PUB) $(STAGE)/release.pub
	@$(RELEASE) licenses $(STAGE)/LICENSES $(ARCH) $(SYSROOT) $(B)/userland/lib/packages $(LINKED)
	@install -D -m 644 LICENSE $(STAGE)/LICENSES/kedge/LICENSE
	@cd docs && find . -type f -name '*.md' -exec install -D -m 644 {} ../$(STAGE)/docs/{} \;
	@mkdir -p dist && install -m 755 scripts/install.sh dist/
	@$(RELEASE) pack $(STAGE) dist $(RELEASE_KEY) "$$(git log -1 --format=%ct 2>/dev/null || echo 0)"
	@cd dist && stat -c '%n %s' $(NAME).tar.*
