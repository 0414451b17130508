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

func similarity(a, b string) float64 {
	return smetrics.JaroWinkler(strings.ToLower(a), strings.ToLower(b), 0.7, 4)
}

// didYouMean suggests the known name that is most like an unknown one, or nothing.
func didYouMean(unknown string, known []string) string {
	best, bestLikeness := "", likeness
	for _, name := range known {
		if l := similarity(unknown, name); l > bestLikeness {
			best, bestLikeness = name, l
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean %q?", best)
}

// unknownName explains a name that is no option. given is how it was written, name how the option would be called,
// format gives what this kind of source calls an option.
func unknownName(what, given, name string, format func(*option) string) error {
	if hint := optionHint(name); hint != "" {
		return fmt.Errorf("unknown %s %q: %s", what, given, hint)
	}
	var best *option
	bestLikeness := likeness
	for _, o := range options() {
		if l := similarity(name, o.name); !o.hidden && l > bestLikeness {
			best, bestLikeness = o, l
		}
	}
	if best == nil {
		return fmt.Errorf("unknown %s %q", what, given)
	}
	return fmt.Errorf("unknown %s %q, did you mean %q?", what, given, format(best))
}

// UsageError explains a command line that could not be parsed. It is meant as the OnUsageError of `kedge server` and `kedge agent`.
func UsageError(_ *cli.Context, err error, _ bool) error {
	name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: ")
	if !ok {
		return err
	}
	name = strings.TrimLeft(name, "-")
	if slices.ContainsFunc(options(), func(o *option) bool { return o.name == name }) {
		return fmt.Errorf("--%s is for servers only; an agent takes what it needs from the cluster, leave it out", name)
	}
	return unknownName("flag", "--"+name, name, func(o *option) string { return "--" + o.name })
}

// optionHint answers those who bring an option from k3s that Kedge does not have. A name that ends in "*" is a prefix.
func optionHint(name string) string {
	for _, answer := range []struct{ names, hint string }{
		{"cluster-reset-restore-path", "use kedge snapshot restore"},
		{"etcd-snapshot-schedule-cron", "use snapshot-schedule"},
		{"etcd-disable-snapshots", "use snapshot-schedule off"},
		{"etcd-snapshot-retention etcd-snapshot-dir etcd-snapshot-compress", "use snapshot-retention, snapshot-dir, snapshot-compress"},
		{"etcd-snapshot-name", "use kedge snapshot save --name"},
		{"etcd-s3*", "use snapshot-s3-endpoint and the other snapshot-s3 options"},
		{"system-default-registry " +
			"embedded-registry servicelb-namespace default-local-storage-path disable-default-registry-endpoint selinux " +
			"flannel-ipv6-masq etcd-snapshot-reconcile* vpn-auth*",
			"not in this version of Kedge"},
		{"kine-*", "Kedge keeps its data in etcd, its own or another (datastore-endpoint)"},
		{"cluster-init", "Kedge always uses etcd; leave it out"},
		{"secrets-encryption prefer-bundled-bin tls-san-security", "Kedge always does this; leave it out"},
		{"docker container-runtime-endpoint image-service-endpoint", "Kedge runs pods with its own containerd only"},
		{"disable-network-policy", "use disable network-policy"},
		{"disable-cloud-controller kube-cloud-controller*", "Kedge has no cloud controller; leave it out"},
		{"disable-helm-controller helm-job-image", "Kedge has no Helm controller; leave it out"},
		{"disable-scheduler disable-apiserver disable-controller-manager",
			"API server, scheduler and controllers go together; for a server with the datastore only use disable-control-plane"},
		{"advertise-port", "the port is https-listen-port"},
		{"write-kubeconfig-group", "the kubeconfig belongs to root; see write-kubeconfig-mode"},
		{"kube-controller-arg", "use kube-controller-manager-arg"},
		{"pod-infra-container-image", "use pause-image"},
		{"image-credential-provider*", "use kubelet-arg"},
		{"etcd-expose-metrics", "use etcd-arg listen-metrics-urls=URL"},
		{"v vmodule", "use debug"},
		{"log alsologtostderr", "Kedge logs to standard error; leave it out"},
		{"rootless", "Kedge needs root"},
	} {
		for known := range strings.FieldsSeq(answer.names) {
			if prefix, ok := strings.CutSuffix(known, "*"); known == name || ok && strings.HasPrefix(name, prefix) {
				return answer.hint
			}
		}
	}
	return ""
}

func disableHints() map[string]string {
	const none = "this version of Kedge has no such component; leave it out (accepted: coredns, helm, network-policy, servicelb)"
	return map[string]string{
		"dns":             "this component is called " + ComponentCoreDNS,
		"kube-dns":        "this component is called " + ComponentCoreDNS,
		"helm-controller": "this component is called " + ComponentHelm,
		"join":            "these are the roles and records by which machines join: without them none can; they cannot be left out",
		"node":            "these are the roles of the nodes: without them no node works; they cannot be left out",
		"manifests":       "the manifests directory costs nothing while it is empty; leave it out",
		"kube-proxy":      "use disable-kube-proxy",
		"flannel":         "use flannel-backend none",
		"traefik":         none,
		"local-storage":   none,
		"metrics-server":  none,
		"runtimes":        none,
		"ccm":             none,
	}
}

func flannelHints() map[string]string {
	const accepted = "accepted: vxlan, host-gw, wireguard-native, none"
	return map[string]string{
		"wireguard": "the backend is called wireguard-native; " + accepted,
		"ipsec":     "flannel has no ipsec backend any more; " + accepted,
		"udp":       "flannel's udp backend is for debugging only; " + accepted,
	}
}

func snapshotterHints() map[string]string {
	const missing = "not in this version of Kedge; accepted: overlayfs, native"
	return map[string]string{
		"fuse-overlayfs": missing, "stargz": missing, "zfs": missing, "btrfs": missing, "devmapper": missing,
		"overlay": "this snapshotter is called overlayfs",
	}
}
