# SPDX-License-Identifier: Apache-2.0

define BENCH_HELP
make bench [RUNS=3] [IDLE_RUNS=1] [SIDES='stock kedge'] [PARTS='start idle pods size cluster network services dns policy']
           [PROXY_MODES='nftables iptables'] [MAX_LOAD=4]
                                Kedge against the stock components, on machines of the test bed (needs root); see docs/benchmarks.md
make bench-stock                only build what it compares with
endef

RUNS      ?= 3
IDLE_RUNS ?= 1
SIDES     ?= stock kedge
PARTS     ?= start idle pods size cluster network services dns policy
MAX_LOAD  ?= 4
BENCH     := build/bench
STOCK     := build/stock
# Of kube-proxy. With ipvs on a kernel that has no IPVS, Services are measured in a virtual machine, which takes half an hour or more.
PROXY_MODES ?= nftables iptables

.PHONY: bench bench-stock

# The stock programs: the same sources, versions and flags as Kedge's, linked one by one.
STOCK_LDFLAGS := -s -w $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
	-X $p.gitVersion=$(K8S) -X $p.gitMajor=$(patsubst v%,%,$(word 1,$(subst ., ,$(K8S)))) -X $p.gitMinor=$(word 2,$(subst ., ,$(K8S)))) \
	-X $(CONTAINERD_VERSION).Version=$(CONTAINERD) -X $(CONTAINERD_VERSION).Revision=
# Without containerd's plugin for ZFS, whose module is not in go.mod because Kedge does not have that plugin either.
STOCK_TAGS := no_zfs
STOCK_GO := k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-scheduler \
	k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-proxy \
	github.com/containerd/containerd/v2/cmd/containerd github.com/containerd/containerd/v2/cmd/ctr
STOCK_PROGRAMS := $(addprefix $(STOCK)/,$(notdir $(STOCK_GO)) etcd flanneld coredns)

$(addprefix $(STOCK)/,$(notdir $(STOCK_GO))): $(STOCK)/%: $(B)/go.key
	@echo '  GO      stock $*'
	@nice env $(GO_BUILD) -tags $(STOCK_TAGS) -ldflags '$(STOCK_LDFLAGS)' -o $@ $(filter %/$*,$(STOCK_GO))
$(STOCK)/etcd: $(B)/go.key
	@echo '  GO      stock etcd'
	@nice env $(GO_BUILD) -ldflags '$(STOCK_LDFLAGS)' -o $@ go.etcd.io/etcd/server/v3
$(STOCK)/flanneld $(STOCK)/coredns: $(STOCK)/%: $(B)/go.key tests/bench/%/main.go
	@echo '  GO      stock $*'
	@nice env $(GO_BUILD) -ldflags '$(STOCK_LDFLAGS)' -o $@ ./tests/bench/$*

# runc, the shim, the CNI plugins and the network tools are the very files that Kedge carries.
STOCK_PLUGINS := bridge host-local loopback portmap
$(STOCK)/files: $(ASSETS)/manifest.json
	@rm -rf $(STOCK)/cni $(STOCK)/tools && mkdir -p $(STOCK)/cni
	@cp -a $(B)/userland $(STOCK)/tools
	@cp -a $(B)/go/runc $(B)/go/$(SHIM) $(STOCK)/
	@cp -a $(addprefix $(B)/go/cni/,$(STOCK_PLUGINS)) $(STOCK)/cni/
	@touch $@

bench-stock: $(STOCK_PROGRAMS) $(STOCK)/files

# The binary is copied, so that a build meanwhile does not change what is measured.
bench: $(if $(findstring stock,$(SIDES)),bench-stock) $(ASSETS)/manifest.json
	@[ -e $(BIN) ] || { echo 'no $(BIN): run make build first' >&2; exit 1; }
	@mkdir -p $(BENCH) && cp $(BIN) $(BENCH)/kedge.new && mv $(BENCH)/kedge.new $(BENCH)/kedge
	@go build -ldflags '-s -w' -o $(BENCH)/ ./tests/bench ./tests/bench/units ./tests/bench/netload ./tests/history/writer
	$(if $(filter policy,$(PARTS)),@go test -c -o $(BENCH)/netpolicy.test ./pkg/netpolicy)
	@$(BENCH)/bench -runs $(RUNS) -idle-runs $(IDLE_RUNS) -sides '$(SIDES)' -parts '$(PARTS)' -proxy-modes '$(PROXY_MODES)' -max-load $(MAX_LOAD) \
		-kedge $(BENCH)/kedge -stock $(STOCK) -units $(BENCH)/units -writer $(BENCH)/writer \
		-netload $(BENCH)/netload -netpolicy $(BENCH)/netpolicy.test -pause $(B)/pause -output $(BENCH)/result.json
