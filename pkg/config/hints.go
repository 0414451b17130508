// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"github.com/xrash/smetrics"
)

// likeness is the Jaro-Winkler similarity from which on a name is taken for a misspelling of another.
const likeness = 0.85

// didYouMean suggests the known name that is most like an unknown one, or nothing.
func didYouMean(unknown string, known []string) string {
	best, bestLikeness := "", likeness
	for _, name := range known {
		if l := smetrics.JaroWinkler(strings.ToLower(unknown), strings.ToLower(name), 0.7, 4); l > bestLikeness {
			best, bestLikeness = name, l
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean %q?", best)
}

// unknownName explains a name that is no option. format turns an option into what this kind of source calls it.
func unknownName(what, name, optionName string, format func(*option) string) error {
	if hint := optionHint(optionName); hint != "" {
		return fmt.Errorf("unknown %s %q: %s", what, name, hint)
	}
	var known []string
	for _, o := range options() {
		if !o.hidden {
			known = append(known, format(o))
		}
	}
	return fmt.Errorf("unknown %s %q%s", what, name, didYouMean(name, known))
}

// UsageError explains a command line that could not be parsed. It is meant as the OnUsageError of `kedge server`.
func UsageError(_ *cli.Context, err error, _ bool) error {
	name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: ")
	if !ok {
		return err
	}
	name = strings.TrimLeft(name, "-")
	return unknownName("flag", "--"+name, name, func(o *option) string { return "--" + o.name })
}

// optionHint answers those who bring an option from k3s that Kedge does not have.
func optionHint(name string) string {
	const (
		notYet  = "not in this version of Kedge"
		builtIn = "Kedge always does this; leave it out"
		etcd    = "Kedge keeps its data in its own etcd; other datastores are not supported"
	)
	exact := map[string]string{
		"token": notYet, "token-file": notYet, "agent-token": notYet, "agent-token-file": notYet, "server": notYet,
		"cluster-reset": notYet, "cluster-reset-restore-path": notYet, "node-external-ip": notYet,
		"system-default-registry": notYet, "embedded-registry": notYet, "servicelb-namespace": notYet,
		"default-local-storage-path": notYet, "disable-default-registry-endpoint": notYet,
		"disable-network-policy":    "this version of Kedge has no NetworkPolicy controller; leave it out",
		"disable-cloud-controller":  "Kedge has no cloud controller; leave it out",
		"disable-helm-controller":   "Kedge has no Helm controller; leave it out",
		"secrets-encryption":        builtIn,
		"cluster-init":              "Kedge always uses etcd; leave it out",
		"prefer-bundled-bin":        builtIn,
		"flannel-ipv6-masq":         notYet,
		"flannel-external-ip":       notYet,
		"docker":                    "Kedge runs pods with its own containerd only",
		"rootless":                  "Kedge needs root",
		"selinux":                   notYet,
		"write-kubeconfig-group":    "Kedge's kubeconfig belongs to root; see write-kubeconfig-mode",
		"kube-controller-arg":       "use kube-controller-manager-arg",
		"kube-cloud-controller-arg": "Kedge has no cloud controller; leave it out",
		"advertise-port":            "the port is https-listen-port",
		"lb-server-port":            "Kedge needs no such port; leave it out",
		"v":                         "use debug", "vmodule": "use debug", "verbosity": "use debug",
		"log":                           "Kedge logs to standard error; redirect it, or read journalctl -u kedge",
		"alsologtostderr":               "Kedge logs to standard error; leave it out",
		"container-runtime-endpoint":    "Kedge runs pods with its own containerd only",
		"image-service-endpoint":        "Kedge runs pods with its own containerd only",
		"tls-san-security":              builtIn,
		"protect-kernel-defaults":       "use kubelet-arg protect-kernel-defaults=true",
		"kube-proxy-mode":               "use proxy-mode",
		"cidr":                          "use cluster-cidr",
		"hostname-override":             "use node-name",
		"kubeconfig-mode":               "use write-kubeconfig-mode",
		"kubeconfig-output":             "use write-kubeconfig",
		"registries":                    "use private-registry",
		"pod-infra-container-image":     "use pause-image",
		"image-credential-provider":     "use kubelet-arg",
		"disable-scheduler":             "Kedge always runs the scheduler; leave it out",
		"disable-apiserver":             "Kedge servers run the whole control plane; leave it out",
		"disable-controller-manager":    "Kedge servers run the whole control plane; leave it out",
		"disable-etcd":                  "Kedge servers run the whole control plane; leave it out",
		"disable-agent":                 "a Kedge server is a node too; keep pods away with node-taint node-role.kubernetes.io/control-plane:NoSchedule",
		"helm-job-image":                "Kedge has no Helm controller; leave it out",
		"kube-cloud-controller-manager": "Kedge has no cloud controller; leave it out",
		"egress-selector-mode":          "Kedge needs no egress selector; leave it out",
	}
	if hint := exact[name]; hint != "" {
		return hint
	}
	prefixes := []struct{ prefix, hint string }{
		{"datastore-", etcd},
		{"kine-", etcd},
		{"etcd-s3", notYet},
		{"etcd-snapshot", notYet},
		{"etcd-disable-snapshots", notYet},
		{"etcd-expose-metrics", "use etcd-arg listen-metrics-urls=URL"},
		{"image-credential-provider", "use kubelet-arg"},
		{"kube-cloud-controller-manager", "Kedge has no cloud controller; leave it out"},
		{"vpn-auth", notYet},
	}
	if i := slices.IndexFunc(prefixes, func(p struct{ prefix, hint string }) bool {
		return strings.HasPrefix(name, p.prefix)
	}); i >= 0 {
		return prefixes[i].hint
	}
	return ""
}

func disableHints() map[string]string {
	const none = "this version of Kedge has no such component; leave it out (accepted: " + ComponentCoreDNS + ")"
	return map[string]string{
		"dns":            "this component is called " + ComponentCoreDNS,
		"kube-dns":       "this component is called " + ComponentCoreDNS,
		"kube-proxy":     "use disable-kube-proxy",
		"flannel":        "use flannel-backend none",
		"traefik":        none,
		"servicelb":      none,
		"local-storage":  none,
		"metrics-server": none,
		"network-policy": none,
		"runtimes":       none,
		"ccm":            none,
	}
}

func flannelHints() map[string]string {
	const wireguard = "WireGuard between nodes is not in this version of Kedge; accepted: vxlan, host-gw, none"
	return map[string]string{
		"wireguard-native": wireguard,
		"wireguard":        wireguard,
		"ipsec":            "flannel has no ipsec backend any more; accepted: vxlan, host-gw, none",
		"udp":              "flannel's udp backend is for debugging only; accepted: vxlan, host-gw, none",
	}
}

func snapshotterHints() map[string]string {
	const missing = "not in this version of Kedge; accepted: overlayfs, native"
	return map[string]string{
		"fuse-overlayfs": missing, "stargz": missing, "zfs": missing, "btrfs": missing, "devmapper": missing,
		"overlay": "this snapshotter is called overlayfs",
	}
}
