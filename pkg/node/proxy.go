// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	proxyapp "k8s.io/kubernetes/cmd/kube-proxy/app"
	proxymetrics "k8s.io/kubernetes/pkg/proxy/metrics"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
)

const (
	proxyHealthz  = "127.0.0.1:10256"
	ipvsScheduler = "rr"
)

// proxy is kube-proxy: it can be run once in a process's life, upstream has no way to stop it.
type proxy struct {
	mode    config.ProxyMode
	reason  string // why auto chose the mode
	healthz string
	opts    *proxyapp.Options
}

// newProxy decides the mode and completes the options.
func newProxy(cfg Config, log *slog.Logger) (*proxy, error) {
	p := &proxy{mode: cfg.ProxyMode, healthz: proxyHealthz}
	if p.mode == config.ProxyAuto {
		p.mode, p.reason = chooseMode()
		log.Info("proxy mode chosen", "component", ComponentProxy, "mode", p.mode, "reason", strings.Trim(p.reason, " ()"))
	}
	opts, fs, err := proxyOptions(cfg, p.mode)
	if err != nil {
		return nil, err
	}
	if err := opts.Complete(fs); err != nil {
		return nil, fmt.Errorf("kube-proxy: %w", err)
	}
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("kube-proxy: %w", err)
	}
	p.opts = opts
	return p, nil
}

func checkProxyArgs(cfg Config) error {
	_, _, err := proxyOptions(cfg, config.ProxyNFTables)
	return err
}

func proxyOptions(cfg Config, mode config.ProxyMode) (*proxyapp.Options, *pflag.FlagSet, error) {
	opts := proxyapp.NewOptions()
	fs := pflag.NewFlagSet("kube-proxy-arg", pflag.ContinueOnError)
	opts.AddFlags(fs)
	if err := fs.Parse(proxyFlags(cfg, mode)); err != nil {
		return nil, nil, fmt.Errorf("kube-proxy-arg: %w", err)
	}
	return opts, fs, nil
}

// proxyFlags is the command line that a separate kube-proxy would get.
func proxyFlags(cfg Config, mode config.ProxyMode) []string {
	oomScore := "0"
	if canLowerOOMScore() {
		oomScore = "-999"
	}
	line := []string{
		"--kubeconfig=" + cfg.Kubeconfig,
		"--hostname-override=" + cfg.Name,
		"--proxy-mode=" + string(mode),
		"--cluster-cidr=" + cfg.ClusterCIDR.String(),
		"--healthz-bind-address=" + proxyHealthz,
		"--oom-score-adj=" + oomScore,
		"--ipvs-scheduler=" + ipvsScheduler,
		"--ipvs-strict-arp=true",
	}
	// The table's size is a property of the machine; in a container's network namespace it cannot even be written.
	if !writable("/proc/sys/net/netfilter/nf_conntrack_max") {
		line = append(line, "--conntrack-max-per-core=0", "--conntrack-min=0")
	}
	gates, others := joinedGates(cfg.KubeletArgs, cfg.ProxyArgs)
	for _, g := range gates {
		line = append(line, "--feature-gates="+g)
	}
	return append(line, dashed(others)...)
}

// usedMode is the mode, "none" without a proxy.
func (p *proxy) usedMode() config.ProxyMode {
	if p == nil {
		return "none"
	}
	return p.mode
}

func (p *proxy) run(ctx context.Context) error { return p.opts.Run(ctx) }

// chooseMode is --proxy-mode auto: ipvs where the kernel has all that it takes, else nftables.
func chooseMode() (config.ProxyMode, string) {
	if err := check.IPVS(ipvsScheduler); err != nil {
		return config.ProxyNFTables, fmt.Sprintf(" (chosen: no IPVS: %v)", err)
	}
	return config.ProxyIPVS, " (chosen: the kernel has IPVS)"
}

// watchProxy closes ready when kube-proxy has written its first rules.
func (n *node) watchProxy(ctx context.Context, p *proxy, ready chan struct{}) {
	first := true
	n.watch(ctx, ComponentProxy, "mode "+string(p.mode)+p.reason, func() error {
		err := httpOK(ctx, "http://"+p.healthz+"/livez")
		if err == nil && first {
			err = wroteRules(n.cfg.ClusterCIDR)
		}
		if err == nil && first {
			first = false
			close(ready)
		}
		return err
	})
}

// wroteRules is an error until kube-proxy has written its first rules for all families. Until then it calls itself healthy and up to date; its
// metrics know.
func wroteRules(clusterCIDR []netip.Prefix) error {
	for _, cidr := range clusterCIDR {
		family := corev1.IPv4Protocol
		if cidr.Addr().Is6() {
			family = corev1.IPv6Protocol
		}
		var written dto.Metric
		if err := proxymetrics.SyncProxyRulesLastTimestamp.WithLabelValues(string(family)).Write(&written); err != nil {
			return err
		}
		if written.GetGauge().GetValue() == 0 {
			return fmt.Errorf("its first rules for %s are not written yet", family)
		}
	}
	return nil
}
