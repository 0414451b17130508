// SPDX-License-Identifier: Apache-2.0

// Package controlplane runs the [controlplane] process: API server, scheduler and controller manager, and Kedge's own
// controllers. They are upstream's, started through their options and not through their commands, whose signal handlers,
// logging set-up and exits assume that the process is theirs (docs/decisions/processes.md).
package controlplane

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/pki"
)

// The components of the process, as `kedge status` names them.
const (
	ComponentAPIServer         = "apiserver"
	ComponentScheduler         = "scheduler"
	ComponentControllerManager = "controller-manager"
	ComponentManifests         = "manifests"
	ComponentAPIVIP            = "api-vip"
)

// Components of the process in the order of their start.
func (c Config) Components() []string {
	list := []string{ComponentAPIServer, ComponentScheduler, ComponentControllerManager, ComponentManifests}
	if len(c.Cluster.APIVIP) > 0 {
		list = append(list, ComponentAPIVIP)
	}
	return list
}

// Config of the [controlplane] process. Files are absolute paths.
type Config struct {
	Logging logging.Config `json:"logging"`

	NodeName         string         `json:"nodeName"`
	RunDir           string         `json:"runDir"`
	ManifestsDir     string         `json:"manifestsDir"` // the operator's
	ChartsDir        string         `json:"chartsDir"`    // where HelmCharts find charts by a file's name
	QuerySocket      string         `json:"querySocket"`  // of this machine: see tunnel.KedgePort
	Datastore        Datastore      `json:"datastore"`
	BindAddress      netip.Addr     `json:"bindAddress"`
	Port             int            `json:"port"`
	AdvertiseAddress netip.Addr     `json:"advertiseAddress"`
	BalancerPort     int            `json:"balancerPort"` // of the load balancer on every node
	Cluster          config.Cluster `json:"cluster"`
	// RestoredRevision is the last one that the datastore had in the snapshot that it was restored from, at the first start since; else 0.
	RestoredRevision int64 `json:"restoredRevision,omitempty"`
	// Egress says how kubelets and pods are reached.
	Egress config.EgressMode `json:"egress"`
	// Tokens are the operator's own, to be known to the cluster; secret.
	Tokens []OperatorToken `json:"tokens,omitempty"`

	Files     Files     `json:"files"`
	Hardening Hardening `json:"hardening"`

	// Certificates of this machine, for the API server's /metrics.
	Certificates pki.Places `json:"certificates"`

	APIServerArgs         []string `json:"apiserverArgs,omitempty"`
	ControllerManagerArgs []string `json:"controllerManagerArgs,omitempty"`
	SchedulerArgs         []string `json:"schedulerArgs,omitempty"`
}

// Datastore is the etcd that keeps the cluster's data. Files are empty where the transport needs none.
type Datastore struct {
	Endpoints []string `json:"endpoints"`
	CAFile    string   `json:"caFile,omitempty"`
	CertFile  string   `json:"certFile,omitempty"`
	KeyFile   string   `json:"keyFile,omitempty"`
	// Own says that it is Kedge's own, whose members come and go with the servers.
	Own bool `json:"own"`
	// Peer are the files with which a member's peer port can be asked.
	Peer datastore.TLSFiles `json:"peer"`
}

// OperatorToken is a token that an operator chose, so that it has to be made known.
type OperatorToken struct {
	ID     string    `json:"id"`
	Secret string    `json:"secret"`
	Role   join.Role `json:"role"`
}

// Files of the PKI that the control plane reads. Certificate files of leaves hold the key as well.
type Files struct {
	ServerCA, ServerCAKey string // that issue
	ClientCA, ClientCAKey string
	// TrustedServerCA and TrustedClientCA hold all that are trusted: during a change of the CAs two of each. RequestHeaderCA is alike.
	TrustedServerCA, TrustedClientCA string
	RequestHeaderCA                  string
	APIServer                        string
	KubeletClient                    string
	FrontProxyClient                 string
	FrontProxyName                   string
	ServiceAccountKey                string
	ServiceAccountTrusted            string // the keys that tokens are verified with
	EncryptionConfig                 string
	Keyring                          string
	// Kubeconfig of all clients in the process. They are one identity: who can read the memory of one has the others', too,
	// and nothing has to wait until the API server has made the default roles.
	Kubeconfig string
	// Shared are the files that a joining server gets, by name.
	Shared map[string]string
}

// Fields of the manifests' templates.

// ClusterDNS is the address of the cluster DNS.
func (c Config) ClusterDNS() netip.Addr { return c.Cluster.ClusterDNS }

// ServerCAData are the CAs by which API servers are known, in base64.
func (c Config) ServerCAData() (string, error) {
	b, err := os.ReadFile(c.Files.TrustedServerCA)
	return base64.StdEncoding.EncodeToString(b), err
}

// apiserverFlags is the command line that a separate kube-apiserver would get.
func (c Config) apiserverFlags() []string {
	f := c.Files
	var own []string
	if d := c.Datastore; d.CAFile != "" {
		own = append(own, "etcd-cafile", d.CAFile)
	}
	if d := c.Datastore; d.CertFile != "" {
		own = append(own, "etcd-certfile", d.CertFile, "etcd-keyfile", d.KeyFile)
	}
	if c.Egress != config.EgressDirect {
		own = append(own, "egress-selector-config-file", c.egressFile())
	}
	own = append(own, c.hardeningFlags()...)
	return flags(c.featureGates(), c.APIServerArgs, append(own,
		"endpoint-reconciler-type", "none", // see endpointReconciler
		"etcd-servers", strings.Join(c.Datastore.Endpoints, ","),
		"bind-address", c.BindAddress.String(),
		"secure-port", fmt.Sprint(c.Port),
		"advertise-address", c.AdvertiseAddress.String(),
		"service-cluster-ip-range", c.Cluster.ServiceCIDR.String(),
		"service-node-port-range", c.Cluster.ServiceNodePortRange.String(),
		"allow-privileged", "true",
		"authorization-mode", "Node,RBAC",
		"enable-bootstrap-token-auth", "true",
		"tls-cert-file", f.APIServer,
		"tls-private-key-file", f.APIServer,
		"client-ca-file", f.TrustedClientCA,
		"kubelet-certificate-authority", f.TrustedServerCA,
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
		"service-account-issuer", "https://kubernetes.default.svc."+c.Cluster.ClusterDomain,
		"service-account-key-file", f.ServiceAccountTrusted,
		"service-account-signing-key-file", f.ServiceAccountKey,
		"encryption-provider-config", f.EncryptionConfig,
		"encryption-provider-config-automatic-reload", "true", // see followEncryption
		// Webhooks and aggregated APIs are reached at their pods: no need for service rules on this machine.
		"enable-aggregator-routing", "true",
		"profiling", "false",
	)...)
}

func (c Config) egressFile() string   { return filepath.Join(c.RunDir, "egress.yaml") }
func (c Config) egressSocket() string { return filepath.Join(c.RunDir, "egress.sock") }

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
		"controllers", "*,tokencleaner,bootstrapsigner",
		// Pods that have ended are kept for those who want to look; upstream's 12500 fill a small datastore.
		"terminated-pod-gc-threshold", "1000",
		"use-service-account-credentials", "false",
		"allocate-node-cidrs", "true",
		"configure-cloud-routes", "false",
		"cluster-cidr", c.Cluster.ClusterCIDR.String(),
		"service-cluster-ip-range", c.Cluster.ServiceCIDR.String(),
		"root-ca-file", f.TrustedServerCA,
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
	// Two records that an API server renews every ten seconds, and that nobody here reads.
	gates := []string{"APIServerIdentity=false,UnknownVersionInteroperabilityProxy=false"}
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

// valuesOf reads flag sets whose options have been set.
func valuesOf(sets cliflag.NamedFlagSets) Flags {
	values := Flags{}
	for _, fs := range sets.FlagSets {
		fs.VisitAll(func(f *pflag.Flag) { values[f.Name] = f.Value.String() })
	}
	return values
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
