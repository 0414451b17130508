// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

// envPrefix starts the name of every environment variable that belongs to Kedge.
const envPrefix = "KEDGE_"

// option is the one declaration of a setting. The flag, the key in the configuration file, the environment variable
// and the line in docs/reference.md are all derived from it.
type option struct {
	name     string // flag and file key
	alias    string // one-letter flag
	category string
	usage    string
	def      string // the default as an operator would write it; empty if it is computed or there is none
	defText  string // describes a default that is computed, for help and documentation
	kind     kind
	hidden   bool
	flagOnly bool // not allowed in the file
	servers  bool // an agent has no use for it
	set      setter
}

type kind int

const (
	scalar kind = iota
	boolean
	list     // --x a --x b or --x a,b
	argument // list of key=value whose values may hold commas: --x a --x b
)

func (o *option) isList() bool { return o.kind == list || o.kind == argument }

func (o *option) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// value is one given value with the place it came from: "--node-name", "KEDGE_NODE_NAME", "config.yaml:3: node-name".
type value struct{ text, source string }

// setter parses the values of an option (at least one) into the configuration.
type setter func(*Config, []value) error

// one makes a setter for an option with a single value.
func one[T any](field func(*Config) *T, parse func(string) (T, error)) setter {
	return func(s *Config, values []value) error {
		v := values[len(values)-1]
		t, err := parse(v.text)
		if err != nil {
			return fmt.Errorf("%s: %w", v.source, err)
		}
		*field(s) = t
		return nil
	}
}

// many makes a setter for a list.
func many[T any, L ~[]T](field func(*Config) *L, parse func(string) (T, error)) setter {
	return func(s *Config, values []value) error {
		result := make(L, 0, len(values))
		var errs []error
		for _, v := range values {
			t, err := parse(v.text)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", v.source, err))
				continue
			}
			result = append(result, t)
		}
		*field(s) = result
		return errors.Join(errs...)
	}
}

// Categories, in the order of help and documentation.
const (
	general    = "General"
	joining    = "Cluster"
	node       = "Node"
	apiServer  = "API server"
	networking = "Networking"
	images     = "Images"
	snapshots  = "Snapshots"
	components = "Components"
)

// options lists every setting, in the order of the documentation.
func options() []*option {
	return []*option{
		{name: "config", alias: "c", category: general, def: DefaultConfig, flagOnly: true,
			usage: "read the configuration from this file and then from `FILE`.d/*.yaml",
			set:   one(func(s *Config) *string { return &s.Config }, absolutePath)},
		{name: "data-dir", alias: "d", category: general, def: DefaultDataDir,
			usage: "keep all state in `DIR`",
			set:   one(func(s *Config) *string { return &s.DataDir }, absolutePath)},
		{name: "run-dir", category: general, def: DefaultRunDir, hidden: true,
			usage: "keep sockets and generated files in `DIR`",
			set:   one(func(s *Config) *string { return &s.RunDir }, socketDir)},
		{name: "kubelet-root-dir", category: general, def: "/var/lib/kubelet",
			usage: "keep the kubelet's state and the volumes of pods in `DIR`",
			set:   one(func(s *Config) *string { return &s.KubeletRootDir }, absolutePath)},
		{name: "debug", category: general, kind: boolean, def: "false",
			usage: "log more",
			set:   one(func(s *Config) *bool { return &s.Debug }, boolText)},
		{name: "log-format", category: general, def: string(LogText),
			usage: "write the log as text or json",
			set:   one(func(s *Config) *LogFormat { return &s.LogFormat }, oneOf(LogText, LogJSON))},

		{name: "server", alias: "s", category: joining,
			usage: "join the cluster of the server at `URL`; ignored by a server that has joined or made a cluster before",
			set:   one(func(s *Config) *string { return &s.Server }, serverURL)},
		{name: "token", alias: "t", category: joining,
			usage: "join with `TOKEN` (kedge token create); on the first server: let others join with this text of your own",
			set:   one(func(s *Config) *string { return &s.Token }, nonEmpty)},
		{name: "token-file", category: joining,
			usage: "read the token from `FILE`",
			set:   one(func(s *Config) *string { return &s.TokenFile }, absolutePath)},
		{name: "agent-token", category: joining, servers: true,
			usage: "let agents, but no servers, join with `TOKEN`, a text of your own",
			set:   one(func(s *Config) *string { return &s.AgentToken }, nonEmpty)},
		{name: "agent-token-file", category: joining, servers: true,
			usage: "read that token from `FILE`",
			set:   one(func(s *Config) *string { return &s.AgentTokenFile }, absolutePath)},
		{name: "join-timeout", category: joining, def: "0s",
			usage: "give up joining after `DURATION`; 0 is never",
			set:   one(func(s *Config) *time.Duration { return &s.JoinTimeout }, duration)},
		{name: "lb-server-port", category: joining, def: "6444",
			usage: "this node's components reach the API servers through a load balancer on loopback `PORT`",
			set:   one(func(s *Config) *int { return &s.LBServerPort }, port)},
		{name: "disable-agent", category: joining, kind: boolean, def: "false", servers: true,
			usage: "run no pods on this server: it is no node of the cluster",
			set:   one(func(s *Config) *bool { return &s.DisableAgent }, boolText)},
		{name: "disable-etcd", category: joining, kind: boolean, def: "false", servers: true,
			usage: "run no datastore member here: use those of the other servers",
			set:   one(func(s *Config) *bool { return &s.DisableEtcd }, boolText)},
		{name: "disable-control-plane", category: joining, kind: boolean, def: "false", servers: true,
			usage: "run a datastore member without API server, scheduler and controllers",
			set:   one(func(s *Config) *bool { return &s.DisableControl }, boolText)},
		{name: "cluster-reset", category: joining, kind: boolean, def: "false", servers: true, flagOnly: true,
			usage: "when most servers are lost: make this one the only datastore member, with all its data, and end",
			set:   one(func(s *Config) *bool { return &s.ClusterReset }, boolText)},
		{name: "etcd-data-dir", category: joining, servers: true, defText: "data-dir",
			usage: "keep the datastore in the directory etcd of `DIR`: a fast disk of its own, mounted there",
			set:   one(func(s *Config) *string { return &s.EtcdDataDir }, absolutePath)},
		{name: "datastore-endpoint", category: joining, kind: list, servers: true, defText: "Kedge's own etcd",
			usage: "keep the cluster's data in the etcd at `URL`",
			set:   many(func(s *Config) *[]string { return &s.Datastore.Endpoints }, endpointURL)},
		{name: "datastore-cafile", category: joining, servers: true,
			usage: "believe that etcd by the CA certificates in `FILE`",
			set:   one(func(s *Config) *string { return &s.Datastore.CAFile }, absolutePath)},
		{name: "datastore-certfile", category: joining, servers: true,
			usage: "show it the client certificate in `FILE`",
			set:   one(func(s *Config) *string { return &s.Datastore.CertFile }, absolutePath)},
		{name: "datastore-keyfile", category: joining, servers: true,
			usage: "whose key is in `FILE`",
			set:   one(func(s *Config) *string { return &s.Datastore.KeyFile }, absolutePath)},

		{name: "node-name", category: node, defText: "the host name, in lower case",
			usage: "register this node as `NAME`",
			set:   one(func(s *Config) *string { return &s.NodeName }, nodeName)},
		{name: "node-ip", category: node, kind: list,
			defText: "the address of the interface with the default route; without a default route the only usable address",
			usage:   "use `ADDRESS` of this machine for the node (one, or one IPv4 and one IPv6 address)",
			set:     many(func(s *Config) *addrList { return (*addrList)(&s.NodeIP) }, hostAddress)},
		{name: "node-external-ip", category: node, kind: list,
			usage: "other machines reach the node at `ADDRESS` (one, or one IPv4 and one IPv6 address), as behind a router with NAT",
			set:   many(func(s *Config) *addrList { return (*addrList)(&s.NodeExternalIP) }, hostAddress)},
		{name: "node-label", category: node, kind: list,
			usage: "register the node with label `KEY=VALUE`",
			set:   many(func(s *Config) *[]string { return &s.NodeLabels }, nodeLabel)},
		{name: "node-taint", category: node, kind: list,
			usage: "register the node with taint `KEY=VALUE:EFFECT`",
			set:   many(func(s *Config) *[]string { return &s.NodeTaints }, nodeTaint)},
		{name: "protect-kernel-defaults", category: node, kind: boolean, def: "false",
			usage: "refuse to start the kubelet where kernel settings differ from what it wants, instead of changing them",
			set:   one(func(s *Config) *bool { return &s.ProtectKernelDefaults }, boolText)},
		{name: "resolv-conf", category: node, defText: "the system's, without loopback resolvers",
			usage: "pods and the cluster DNS ask the resolvers in `FILE` for outside names",
			set:   one(func(s *Config) *string { return &s.ResolvConf }, absolutePath)},

		{name: "shutdown-grace-period", category: node, def: "30s",
			usage: "when the machine goes down, give pods `DURATION` to end, or less if they ask for less; 0 kills them",
			set:   one(func(s *Config) *time.Duration { return &s.ShutdownGracePeriod }, duration)},
		{name: "shutdown-grace-period-critical", category: node, def: "10s",
			usage: "then give critical pods `DURATION`",
			set:   one(func(s *Config) *time.Duration { return &s.ShutdownGraceCritical }, duration)},

		{name: "bind-address", category: apiServer, servers: true, defText: "0.0.0.0, or :: in a cluster with IPv6",
			usage: "the API server listens on `ADDRESS`",
			set:   one(func(s *Config) *addr { return &s.BindAddress }, bindAddress)},
		{name: "https-listen-port", category: apiServer, servers: true, def: "6443",
			usage: "the API server listens on `PORT`",
			set:   one(func(s *Config) *int { return &s.HTTPSListenPort }, port)},
		{name: "advertise-address", category: apiServer, servers: true, defText: "bind-address if it is a single address, else the first node-ip",
			usage: "pods and other nodes reach this API server at `ADDRESS`",
			set:   one(func(s *Config) *addr { return &s.AdvertiseAddress }, hostAddress)},
		{name: "tls-san", category: apiServer, servers: true, kind: list,
			usage: "put `NAME` (host name or address) into the API server's certificate too",
			set:   many(func(s *Config) *[]string { return &s.TLSSANs }, certName)},
		{name: "egress-selector-mode", category: apiServer, def: string(EgressAuto), servers: true,
			usage: "reach kubelets and pods directly, through the tunnel that each node opens (tunnel), or as it works (auto)",
			set:   one(func(s *Config) *EgressMode { return &s.EgressMode }, oneOf(EgressAuto, EgressDirect, EgressTunnel))},
		{name: "write-kubeconfig", category: apiServer, servers: true, def: DefaultKubeconfig,
			usage: "write the administrator's kubeconfig to `FILE`",
			set:   one(func(s *Config) *string { return &s.WriteKubeconfig }, absolutePath)},
		{name: "write-kubeconfig-mode", category: apiServer, servers: true, def: "0600",
			usage: "give that file the octal `MODE`",
			set:   one(func(s *Config) *fileMode { return &s.WriteKubeconfigMode }, parseFileMode)},

		{name: "audit-log", category: apiServer, servers: true, defText: "none",
			usage: "write who asked the API for what to `FILE` (ten of 100 MB at the most, 30 days)",
			set:   one(func(s *Config) *string { return &s.AuditLog }, absolutePath)},
		{name: "audit-policy-file", category: apiServer, servers: true, def: DefaultAuditPolicy,
			usage: "what is written by the audit policy in `FILE`, if it exists; else all changes and all access to Secrets, without their contents",
			set:   one(func(s *Config) *string { return &s.AuditPolicy }, absolutePath)},
		{name: "pod-security", category: apiServer, servers: true, def: string(PodSecurityPrivileged),
			usage: "namespaces without a label of their own allow pods of the Pod Security Standard privileged, baseline or restricted; the same on all servers",
			set:   one(func(s *Config) *PodSecurity { return &s.PodSecurity }, oneOf(PodSecurityPrivileged, PodSecurityBaseline, PodSecurityRestricted))},
		{name: "pod-security-exempt", category: apiServer, servers: true, kind: list, def: "kube-system",
			usage: "that standard does not hold in `NAMESPACE`",
			set:   many(func(s *Config) *[]string { return &s.PodSecurityExempt }, namespaceName)},

		{name: "cluster-cidr", category: networking, kind: list, servers: true, def: "10.42.0.0/16",
			usage: "pods get their addresses from `CIDR` (one, or one IPv4 and one IPv6 network)",
			set:   many(func(s *Config) *Prefixes { return &s.ClusterCIDR }, parsePrefix)},
		{name: "service-cidr", category: networking, kind: list, servers: true, def: "10.43.0.0/16",
			usage: "services get their addresses from `CIDR` (of the same families as cluster-cidr)",
			set:   many(func(s *Config) *Prefixes { return &s.ServiceCIDR }, parsePrefix)},
		{name: "service-node-port-range", category: networking, servers: true, def: "30000-32767",
			usage: "services of type NodePort get ports from `FIRST-LAST`",
			set:   one(func(s *Config) *PortRange { return &s.ServiceNodePortRange }, parsePortRange)},
		{name: "cluster-dns", category: networking, servers: true, defText: "the tenth address of the first service-cidr",
			usage: "the cluster DNS has `ADDRESS`",
			set:   one(func(s *Config) *addr { return &s.ClusterDNS }, parseAddr)},
		{name: "cluster-domain", category: networking, servers: true, def: "cluster.local",
			usage: "the names of services end in `DOMAIN`",
			set:   one(func(s *Config) *string { return &s.ClusterDomain }, clusterDomain)},
		{name: "proxy-mode", category: networking, def: string(ProxyAuto),
			usage: "program service addresses with ipvs, nftables or iptables; auto is ipvs where the kernel has it, else nftables",
			set:   one(func(s *Config) *ProxyMode { return &s.ProxyMode }, oneOf(ProxyAuto, ProxyIPVS, ProxyNFTables, ProxyIPTables))},
		{name: "flannel-backend", category: networking, servers: true, def: string(FlannelVXLAN),
			usage: "connect the pods of different nodes with vxlan, host-gw or wireguard-native; none if you install a CNI plugin yourself",
			set:   one(func(s *Config) *FlannelMode { return &s.FlannelBackend }, flannelBackend)},
		{name: "flannel-iface", category: networking, defText: "the one that has node-ip",
			usage: "send traffic between nodes through network `INTERFACE`; node-ip is taken from it too unless it is given",
			set:   one(func(s *Config) *string { return &s.FlannelIface }, nonEmpty)},
		{name: "flannel-external-ip", category: networking, kind: boolean, def: "false",
			usage: "let other nodes send the traffic of pods to node-external-ip",
			set:   one(func(s *Config) *bool { return &s.FlannelExternalIP }, boolText)},
		{name: "flannel-tx-offload", category: networking, kind: boolean, def: "false",
			usage: "with vxlan: leave checksums to the network card; several times faster where the card does that right",
			set:   one(func(s *Config) *bool { return &s.FlannelTxOffload }, boolText)},
		{name: "servicelb-pool", category: networking, kind: list, servers: true, defText: "the addresses of the nodes",
			usage: "services of type LoadBalancer get floating addresses from `FIRST-LAST`, a network or single addresses",
			set:   many(func(s *Config) *[]AddressRange { return &s.ServiceLBPool }, parseAddressRange)},
		{name: "api-vip", category: networking, kind: list, servers: true, defText: "none",
			usage: "the API answers on the floating `ADDRESS` too, which one of the servers has",
			set:   many(func(s *Config) *addrList { return (*addrList)(&s.APIVIP) }, hostAddress)},

		{name: "private-registry", category: images, def: DefaultRegistries,
			usage: "read mirrors and credentials of image registries from `FILE`, if it exists",
			set:   one(func(s *Config) *string { return &s.PrivateRegistry }, absolutePath)},
		{name: "pause-image", category: images, defText: "built in",
			usage: "use `IMAGE` for the pause container of pods",
			set:   one(func(s *Config) *string { return &s.PauseImage }, imageReference)},
		{name: "snapshotter", category: images, def: string(SnapshotterOverlayFS),
			usage: "put image layers together with overlayfs or native (slow, but works on any file system)",
			set:   one(func(s *Config) *Snapshotter { return &s.Snapshotter }, snapshotter)},

		{name: "snapshot-schedule", category: snapshots, servers: true, def: "12h",
			usage: "save the datastore every so often (12h), by `SCHEDULE` in five fields of cron (\"30 3 * * *\"), or never (off)",
			set:   one(func(s *Config) *Schedule { return &s.Snapshot.Schedule }, snapshotSchedule)},
		{name: "snapshot-retention", category: snapshots, servers: true, def: "5",
			usage: "keep the newest `N` of the scheduled snapshots",
			set:   one(func(s *Config) *int { return &s.Snapshot.Retention }, positive)},
		{name: "snapshot-dir", category: snapshots, servers: true, defText: "data-dir/snapshots",
			usage: "keep snapshots in `DIR`",
			set:   one(func(s *Config) *string { return &s.Snapshot.Dir }, absolutePath)},
		{name: "snapshot-compress", category: snapshots, kind: boolean, servers: true, def: "true",
			usage: "compress snapshots",
			set:   one(func(s *Config) *bool { return &s.Snapshot.Compress }, boolText)},
		{name: "snapshot-s3-endpoint", category: snapshots, servers: true,
			usage: "copy snapshots to the S3 service at `URL`, too",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.Endpoint }, s3Endpoint)},
		{name: "snapshot-s3-bucket", category: snapshots, servers: true,
			usage: "there, to `BUCKET`",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.Bucket }, nonEmpty)},
		{name: "snapshot-s3-folder", category: snapshots, servers: true,
			usage: "in that bucket, to `FOLDER`",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.Folder }, s3Folder)},
		{name: "snapshot-s3-region", category: snapshots, servers: true, defText: "us-east-1",
			usage: "the bucket is in `REGION`",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.Region }, nonEmpty)},
		{name: "snapshot-s3-credentials", category: snapshots, servers: true,
			usage: "read the access key from `FILE`, in the form of ~/.aws/credentials",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.CredentialsFile }, absolutePath)},
		{name: "snapshot-s3-cafile", category: snapshots, servers: true, defText: "the system's",
			usage: "believe the S3 service by the CA certificates in `FILE`",
			set:   one(func(s *Config) *string { return &s.Snapshot.S3.CAFile }, absolutePath)},
		{name: "snapshot-s3-path-style", category: snapshots, kind: boolean, servers: true, def: "false",
			usage: "name the bucket in the path and not in the host name, as services at home need it",
			set:   one(func(s *Config) *bool { return &s.Snapshot.S3.PathStyle }, boolText)},

		{name: "disable", category: components, servers: true, kind: list,
			usage: "leave out a packaged `COMPONENT`: " + strings.Join(packaged(), ", "),
			set:   many(func(s *Config) *[]string { return &s.Disable }, disable)},
		{name: "disable-kube-proxy", category: components, kind: boolean, def: "false",
			usage: "do not run kube-proxy on this node",
			set:   one(func(s *Config) *bool { return &s.DisableKubeProxy }, boolText)},
		serverArgs("etcd", func(s *Config) *Args { return &s.EtcdArgs }),
		serverArgs("kube-apiserver", func(s *Config) *Args { return &s.KubeAPIServerArgs }),
		serverArgs("kube-controller-manager", func(s *Config) *Args { return &s.KubeControllerManagerArgs }),
		serverArgs("kube-scheduler", func(s *Config) *Args { return &s.KubeSchedulerArgs }),
		componentArgs("kubelet", func(s *Config) *Args { return &s.KubeletArgs }),
		componentArgs("kube-proxy", func(s *Config) *Args { return &s.KubeProxyArgs }),
	}
}

func componentArgs(component string, field func(*Config) *Args) *option {
	return &option{name: component + "-arg", category: components, kind: argument,
		usage: "start " + component + " with the further flag `KEY=VALUE`",
		set:   many(field, argText)}
}

func serverArgs(component string, field func(*Config) *Args) *option {
	o := componentArgs(component, field)
	o.servers = true
	return o
}

// optionsFor gives the options of one role.
func optionsFor(role Role) []*option {
	return slices.DeleteFunc(options(), func(o *option) bool { return o.servers && role == RoleAgent })
}

// Flags gives the flags of `kedge server` or `kedge agent`. They only collect text: Load does the rest.
func Flags(role Role) []cli.Flag {
	var flags []cli.Flag
	for _, o := range optionsFor(role) {
		var aliases []string
		if o.alias != "" {
			aliases = []string{o.alias}
		}
		defText := cmp.Or(o.def, o.defText)
		switch {
		case o.kind == boolean:
			flags = append(flags, &cli.BoolFlag{Name: o.name, Aliases: aliases, Category: o.category, Usage: o.usage,
				DefaultText: defText, Hidden: o.hidden})
		case o.isList():
			// Not cli.StringSliceFlag: whether that one splits at commas is a global setting.
			flags = append(flags, &cli.GenericFlag{Name: o.name, Aliases: aliases, Category: o.category, Usage: o.usage,
				DefaultText: defText, Hidden: o.hidden, Value: new(texts)})
		default:
			flags = append(flags, &cli.StringFlag{Name: o.name, Aliases: aliases, Category: o.category, Usage: o.usage,
				DefaultText: defText, Hidden: o.hidden})
		}
	}
	return flags
}

// texts is a flag that may be repeated; it collects what was given.
type texts []string

// Set adds one occurrence.
func (t *texts) Set(s string) error { *t = append(*t, s); return nil }

// String gives what was collected, for help.
func (t *texts) String() string { return strings.Join(*t, ",") }

// flagValues reads an option from the command line.
func (o *option) flagValues(c *cli.Context) []value {
	if !c.IsSet(o.name) {
		return nil
	}
	source := "--" + o.name
	switch {
	case o.kind == boolean:
		return []value{{strconv.FormatBool(c.Bool(o.name)), source}}
	case o.isList():
		var values []value
		if given, ok := c.Generic(o.name).(*texts); ok {
			for _, text := range *given {
				values = append(values, o.split(text, source)...)
			}
		}
		return values
	default:
		return []value{{c.String(o.name), source}}
	}
}

// split takes a list given as one text apart at its commas, except arguments: there a comma belongs to the value.
func (o *option) split(text, source string) []value {
	if o.kind != list {
		return []value{{text, source}}
	}
	var values []value
	for part := range strings.SplitSeq(text, ",") {
		values = append(values, value{strings.TrimSpace(part), source})
	}
	return values
}

// envValues reads an option from its environment variable. All lists are separated by commas there; `\,` is a comma
// that belongs to a value.
func (o *option) envValues(text string) []value {
	source := o.env()
	if !o.isList() {
		return []value{{text, source}}
	}
	var values []value
	var part strings.Builder
	flush := func() {
		values = append(values, value{strings.TrimSpace(part.String()), source})
		part.Reset()
	}
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] == '\\' && i+1 < len(text) && text[i+1] == ',':
			part.WriteByte(',')
			i++
		case text[i] == ',':
			flush()
		default:
			part.WriteByte(text[i])
		}
	}
	flush()
	return values
}
