// SPDX-License-Identifier: Apache-2.0

// Package controlplane runs the [controlplane] process: API server, scheduler and controller manager, and Kedge's own
// controllers. They are upstream's, started through their options and not through their commands, whose signal handlers,
// logging set-up and exits assume that the process is theirs (docs/decisions/processes.md).
package controlplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/logging"
)

// The components of the process, as `kedge status` names them.
const (
	ComponentAPIServer         = "apiserver"
	ComponentScheduler         = "scheduler"
	ComponentControllerManager = "controller-manager"
	ComponentManifests         = "manifests"
)

// Components of the process in the order of their start.
func Components() []string {
	return []string{ComponentAPIServer, ComponentScheduler, ComponentControllerManager, ComponentManifests}
}

// Config of the [controlplane] process. Files are absolute paths.
type Config struct {
	Logging logging.Config `json:"logging"`

	NodeName             string       `json:"nodeName"`
	EtcdSocket           string       `json:"etcdSocket"`
	BindAddress          netip.Addr   `json:"bindAddress"`
	Port                 int          `json:"port"`
	AdvertiseAddress     netip.Addr   `json:"advertiseAddress"`
	ClusterCIDR          netip.Prefix `json:"clusterCIDR"`
	ServiceCIDR          netip.Prefix `json:"serviceCIDR"`
	ServiceNodePortRange string       `json:"serviceNodePortRange"`
	ClusterDomain        string       `json:"clusterDomain"`
	ClusterDNS           netip.Addr   `json:"clusterDNS"`
	// Single says that no other server is in the cluster: nothing has to be announced to others, again and again, on the disk.
	Single bool `json:"single"`
	// Disable lists the manifests that are not applied.
	Disable []string `json:"disable,omitempty"`

	Files Files `json:"files"`

	APIServerArgs         []string `json:"apiserverArgs,omitempty"`
	ControllerManagerArgs []string `json:"controllerManagerArgs,omitempty"`
	SchedulerArgs         []string `json:"schedulerArgs,omitempty"`
}

// Files of the PKI that the control plane reads. Certificate files of leaves hold the key as well.
type Files struct {
	ServerCA, ServerCAKey string
	ClientCA, ClientCAKey string
	RequestHeaderCA       string
	APIServer             string
	KubeletClient         string
	FrontProxyClient      string
	FrontProxyName        string
	ServiceAccountKey     string
	EncryptionConfig      string
	// Kubeconfig of all clients in the process. They are one identity: who can read the memory of one has the others', too,
	// and nothing has to wait until the API server has made the default roles.
	Kubeconfig string
}

// apiserverFlags is the command line that a separate kube-apiserver would get.
func (c Config) apiserverFlags() []string {
	f := c.Files
	// The one server's address is written once. The lease reconciler writes it every ten seconds, so that others notice its end.
	reconciler := "lease"
	if c.Single {
		reconciler = "master-count"
	}
	return flags(c.featureGates(), c.APIServerArgs,
		"endpoint-reconciler-type", reconciler,
		"etcd-servers", datastore.Endpoint(c.EtcdSocket),
		"bind-address", c.BindAddress.String(),
		"secure-port", fmt.Sprint(c.Port),
		"advertise-address", c.AdvertiseAddress.String(),
		"service-cluster-ip-range", c.ServiceCIDR.String(),
		"service-node-port-range", c.ServiceNodePortRange,
		"allow-privileged", "true",
		"authorization-mode", "Node,RBAC",
		"enable-admission-plugins", "NodeRestriction",
		"enable-bootstrap-token-auth", "true",
		"tls-cert-file", f.APIServer,
		"tls-private-key-file", f.APIServer,
		"client-ca-file", f.ClientCA,
		"kubelet-certificate-authority", f.ServerCA,
		"kubelet-client-certificate", f.KubeletClient,
		"kubelet-client-key", f.KubeletClient,
		"kubelet-preferred-address-types", "InternalIP,ExternalIP,Hostname",
		"requestheader-client-ca-file", f.RequestHeaderCA,
		"requestheader-allowed-names", f.FrontProxyName,
		"requestheader-username-headers", "X-Remote-User",
		"requestheader-group-headers", "X-Remote-Group",
		"requestheader-extra-headers-prefix", "X-Remote-Extra-",
		"proxy-client-cert-file", f.FrontProxyClient,
		"proxy-client-key-file", f.FrontProxyClient,
		"service-account-issuer", "https://kubernetes.default.svc."+c.ClusterDomain,
		"service-account-key-file", f.ServiceAccountKey,
		"service-account-signing-key-file", f.ServiceAccountKey,
		"encryption-provider-config", f.EncryptionConfig,
		// Webhooks and aggregated APIs are reached at their pods: no need for service rules on this machine.
		"enable-aggregator-routing", "true",
		"profiling", "false",
	)
}

// controllerManagerFlags is the command line that a separate kube-controller-manager would get.
func (c Config) controllerManagerFlags() []string {
	f := c.Files
	return flags(c.featureGates(), c.ControllerManagerArgs,
		"kubeconfig", f.Kubeconfig,
		// The defaults (20 requests a second) are for a server far away: with them the controllers wait for themselves for
		// six of the first twelve seconds.
		"kube-api-qps", "500",
		"kube-api-burst", "1000",
		"leader-elect", "false",
		// Metrics of this process are the API server's /metrics; a second TLS listener has no reader.
		"secure-port", "0",
		"profiling", "false",
		"controllers", "*,tokencleaner",
		"use-service-account-credentials", "false",
		"allocate-node-cidrs", "true",
		"configure-cloud-routes", "false",
		"cluster-cidr", c.ClusterCIDR.String(),
		"service-cluster-ip-range", c.ServiceCIDR.String(),
		"root-ca-file", f.ServerCA,
		"service-account-private-key-file", f.ServiceAccountKey,
		"cluster-signing-kubelet-serving-cert-file", f.ServerCA,
		"cluster-signing-kubelet-serving-key-file", f.ServerCAKey,
		"cluster-signing-kubelet-client-cert-file", f.ClientCA,
		"cluster-signing-kubelet-client-key-file", f.ClientCAKey,
		"cluster-signing-kube-apiserver-client-cert-file", f.ClientCA,
		"cluster-signing-kube-apiserver-client-key-file", f.ClientCAKey,
		"cluster-signing-legacy-unknown-cert-file", f.ServerCA,
		"cluster-signing-legacy-unknown-key-file", f.ServerCAKey,
	)
}

// schedulerFlags is the command line that a separate kube-scheduler would get.
func (c Config) schedulerFlags() []string {
	return flags(c.featureGates(), c.SchedulerArgs,
		"kubeconfig", c.Files.Kubeconfig,
		"kube-api-qps", "500",
		"kube-api-burst", "1000",
		"leader-elect", "false",
		"secure-port", "0",
		"profiling", "false",
	)
}

const featureGates = "feature-gates"

// featureGates collects the gates that were set for any component: the process has one set, so all get the same.
func (c Config) featureGates() []string {
	var gates []string
	if c.Single {
		// Two more records that an API server renews every ten seconds for its peers.
		gates = append(gates, "APIServerIdentity=false,UnknownVersionInteroperabilityProxy=false")
	}
	for _, arg := range slices.Concat(c.APIServerArgs, c.ControllerManagerArgs, c.SchedulerArgs) {
		if key, value, _ := strings.Cut(strings.TrimLeft(arg, "-"), "="); key == featureGates && !slices.Contains(gates, value) {
			gates = append(gates, value)
		}
	}
	return gates
}

// flags builds a command line from name-value pairs, the operator's own arguments last so that they win.
func flags(gates, extra []string, pairs ...string) []string {
	var line []string
	for i := 0; i < len(pairs); i += 2 {
		line = append(line, "--"+pairs[i]+"="+pairs[i+1])
	}
	for _, gate := range gates {
		line = append(line, "--"+featureGates+"="+gate)
	}
	for _, arg := range extra {
		if arg = strings.TrimLeft(arg, "-"); !strings.HasPrefix(arg, featureGates+"=") {
			line = append(line, "--"+arg)
		}
	}
	return line
}

// parse sets a component's options from a command line. The error names the option by which an operator can set it.
func parse(option string, sets cliflag.NamedFlagSets, line []string) error {
	all := pflag.NewFlagSet(option, pflag.ContinueOnError)
	all.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	for _, fs := range sets.FlagSets {
		all.AddFlagSet(fs)
	}
	if err := all.Parse(line); err != nil {
		return fmt.Errorf("%s: %w", option, err)
	}
	return nil
}
