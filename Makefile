# SPDX-License-Identifier: Apache-2.0

define HELP
make build [ARCH=amd64|arm64]   bin/kedge (bin/kedge-ARCH for another architecture than this machine's)
make assets [ARCH=…]            only what is embedded: runc, shim, CNI plugins, network tools, pause image
make clean                      removes bin/, build/ and dist/, with the downloaded packages; a release key stays

Needs Debian 12 or later, Go, git and make. The C compiler is installed when it is missing and you are root.
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
VERSION     := $(K8S)+kedge$(REVISION)$(VERSION_SUFFIX)
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
	$(info $(RELEASE_HELP))
	$(info )
	$(info $(TEST_HELP))
	@:

include mk/*.mk

build: assets
	@echo '  GO      $(BIN) $(VERSION)'
	@$(GO_BUILD) -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/kedge

# The lock is for two builds in one tree.
assets:
	@mkdir -p build && flock -o build/$(ARCH).lock $(MAKE) --no-print-directory $(ASSETS)/manifest.json

clean:
	rm -rf bin dist $(filter-out build/release.key build/release.pub,$(wildcard build/*)) $(foreach a,amd64 arm64,$(addprefix pkg/embed/assets/$a/,files.tar.zst manifest.json))
