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

.PHONY: release release-tree

# Beside the binary stands what it embeds, and what it is made of.
LINKED := ./cmd/kedge ./pkg/netpolicy/plugin github.com/opencontainers/runc github.com/containerd/containerd/v2/cmd/$(SHIM) \
	$(addprefix $(CNI_MODULE)/plugins/,$(CNI_PLUGINS))

# The key comes first: make has to read it anew.
release:
	@$(RELEASE) key $(RELEASE_KEY) $(RELEASE_PUB)
	@$(MAKE) --no-print-directory release-tree
	@echo '  PACK    dist/$(NAME)'
	@$(RELEASE) pack $(STAGE) dist $(RELEASE_KEY) "$$(git log -1 --format=%ct 2>/dev/null || echo 0)"
	@install -m 755 scripts/install.sh dist/
	@cd dist && stat -c '%n %s' $(NAME).tar.*

# What an archive holds, as a directory. RELEASE_BIN takes a binary that exists, for tests. The old binary stays where it is: if
# it is up to date, go does not link it again.
release-tree: BIN := $(STAGE)/kedge
release-tree: $(if $(RELEASE_BIN),assets,build)
	@mkdir -p $(STAGE) && find $(STAGE) -mindepth 1 ! -path $(BIN) -delete
	$(if $(RELEASE_BIN),@install -m 755 $(RELEASE_BIN) $(BIN))
	@$(RELEASE) key $(RELEASE_KEY) $(RELEASE_PUB)
	@install -m 755 scripts/install.sh $(STAGE)/
	@install -m 644 scripts/kedge.service scripts/kedge.openrc README.md $(STAGE)/
	@install -m 644 $(RELEASE_PUB) $(STAGE)/release.pub
	@$(RELEASE) licenses $(STAGE)/LICENSES $(ARCH) $(SYSROOT) $(B)/userland/lib/packages $(LINKED)
	@install -D -m 644 LICENSE $(STAGE)/LICENSES/kedge/LICENSE
	@(cd docs && find . -type f -name '*.md' | tar -cf - -T -) | (mkdir $(STAGE)/docs && tar -C $(STAGE)/docs -xf -)
	@$(RELEASE) sign $(STAGE) $(RELEASE_KEY)
