// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/tests/golden"
)

// testMachine has two interfaces and a default route through the first.
func testMachine() (machine, error) {
	return machine{
		hostname: "Box-1",
		links: []link{
			{index: 1, name: "lo", kind: "device", addresses: addresses("127.0.0.1", "::1")},
			{index: 2, name: "eth0", kind: "device", up: true, addresses: addresses("192.0.2.7", "2001:db8::7", "fe80::7")},
			{index: 3, name: "eth1", kind: "device", up: true, addresses: addresses("198.51.100.7")},
		},
		routes: []defaultRoute{{link: 2, metric: 100}, {link: 2, metric: 100, v6: true}},
	}, nil
}

func addresses(list ...string) []netip.Addr {
	var result []netip.Addr
	for _, a := range list {
		result = append(result, netip.MustParseAddr(a))
	}
	return result
}

type input struct {
	role  Role              // empty: server
	files map[string]string // relative to the test's directory; config.yaml is passed with --config
	env   []string
	args  []string
}

// run loads a configuration through a real command line. Paths in errors are shortened to be relative.
func (in input) run(t *testing.T, look func() (machine, error)) (*Config, error) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range in.files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := slices.Clone(in.env)
	if _, ok := in.files["config.yaml"]; ok {
		env = append(env, "KEDGE_CONFIG="+filepath.Join(dir, "config.yaml"))
	}
	var s *Config
	role := cmp.Or(in.role, RoleServer)
	app := &cli.App{Name: "kedge", Writer: t.Output(), ErrWriter: t.Output(), ExitErrHandler: func(*cli.Context, error) {},
		Commands: []*cli.Command{{Name: string(role), Flags: Flags(role), OnUsageError: UsageError, Action: func(c *cli.Context) error {
			var err error
			s, err = load(c, role, env, look)
			return err
		}}}}
	err := app.Run(append([]string{"kedge", string(role)}, in.args...))
	if err != nil {
		err = shortened{err, strings.ReplaceAll(err.Error(), dir+"/", "")}
	}
	return s, err
}

type shortened struct {
	error
	text string
}

func (s shortened) Error() string { return s.text }
func (s shortened) Unwrap() error { return s.error }

func TestDefaults(t *testing.T) {
	s, err := input{}.run(t, testMachine)
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/defaults.json", string(append(got, '\n')))

	var back Config
	if err := json.Unmarshal(got, &back); err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(s, &back, gocmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("changed by a round trip through JSON (-before +after):\n%s", diff)
	}
}

func TestSources(t *testing.T) {
	for _, test := range []struct {
		name string
		in   input
		get  func(*Config) any
		want any
	}{
		{"file beats default", input{files: map[string]string{"config.yaml": "cluster-domain: from.file"}},
			func(s *Config) any { return s.ClusterDomain }, "from.file"},
		{"later file beats earlier", input{files: map[string]string{"config.yaml": "cluster-domain: a",
			"config.yaml.d/20.yaml": "cluster-domain: c", "config.yaml.d/10.yml": "cluster-domain: b"}},
			func(s *Config) any { return s.ClusterDomain }, "c"},
		{"other files are left alone", input{files: map[string]string{"config.yaml": "cluster-domain: a",
			"config.yaml.d/20.yaml~": "cluster-domain: c", "config.yaml.d/README": "}{"}},
			func(s *Config) any { return s.ClusterDomain }, "a"},
		{"variable beats file", input{files: map[string]string{"config.yaml": "cluster-domain: a"}, env: []string{"KEDGE_CLUSTER_DOMAIN=b"}},
			func(s *Config) any { return s.ClusterDomain }, "b"},
		{"flag beats variable", input{env: []string{"KEDGE_CLUSTER_DOMAIN=b"}, args: []string{"--cluster-domain", "c"}},
			func(s *Config) any { return s.ClusterDomain }, "c"},
		{"last flag wins", input{args: []string{"--cluster-domain", "c", "--cluster-domain=d"}},
			func(s *Config) any { return s.ClusterDomain }, "d"},
		{"short flag", input{args: []string{"-d", "/srv/kedge/"}},
			func(s *Config) any { return s.DataDir }, "/srv/kedge"},
		{"empty variable counts as not set", input{env: []string{"KEDGE_CLUSTER_DOMAIN="}},
			func(s *Config) any { return s.ClusterDomain }, "cluster.local"},
		{"switch off by flag", input{env: []string{"KEDGE_DEBUG=1"}, args: []string{"--debug=false"}},
			func(s *Config) any { return s.Debug }, false},
		{"switch on in file", input{files: map[string]string{"config.yaml": "debug: true"}},
			func(s *Config) any { return s.Debug }, true},
		{"lists are replaced", input{files: map[string]string{"config.yaml": "tls-san: [a, b]", "config.yaml.d/1.yaml": "tls-san: c"}},
			func(s *Config) any { return s.TLSSANs }, []string{"c"}},
		{"lists are added to", input{files: map[string]string{"config.yaml": "tls-san: [a, b]", "config.yaml.d/1.yaml": "tls-san+: [c]"}},
			func(s *Config) any { return s.TLSSANs }, []string{"a", "b", "c"}},
		{"empty list replaces", input{files: map[string]string{"config.yaml": "tls-san: [a, b]", "config.yaml.d/1.yaml": "tls-san: []"}},
			func(s *Config) any { return len(s.TLSSANs) }, 0},
		{"flags replace lists", input{files: map[string]string{"config.yaml": "tls-san: [a, b]"}, args: []string{"--tls-san", "c,d", "--tls-san=e"}},
			func(s *Config) any { return s.TLSSANs }, []string{"c", "d", "e"}},
		{"commas in arguments", input{args: []string{"--kubelet-arg", "--feature-gates=A=true,B=false", "--kubelet-arg=v=2"}},
			func(s *Config) any { return s.KubeletArgs.Flags() }, []string{"--feature-gates=A=true,B=false", "--v=2"}},
		{"commas in arguments from the environment", input{env: []string{`KEDGE_KUBELET_ARG=feature-gates=A=true\,B=false,v=2`}},
			func(s *Config) any { return s.KubeletArgs }, Args{"feature-gates=A=true,B=false", "v=2"}},
		{"anchors", input{files: map[string]string{"config.yaml": "tls-san: &x [a]\nnode-name: &y n\ncluster-domain: *y\n"}},
			func(s *Config) any { return s.ClusterDomain }, "n"},
		{"number as text", input{files: map[string]string{"config.yaml": "node-name: 007"}},
			func(s *Config) any { return s.NodeName }, "007"},
		{"octal mode", input{files: map[string]string{"config.yaml": "write-kubeconfig-mode: 0640"}},
			func(s *Config) any { return s.WriteKubeconfigMode.String() }, "-rw-r-----"},
		{"octal mode in quotes", input{files: map[string]string{"config.yaml": "write-kubeconfig-mode: \"644\""}},
			func(s *Config) any { return s.WriteKubeconfigMode.String() }, "-rw-r--r--"},
		{"empty file", input{files: map[string]string{"config.yaml": "# nothing\n---\n"}},
			func(s *Config) any { return s.NodeName }, "box-1"},
		{"DNS follows the services", input{args: []string{"--service-cidr", "172.30.0.0/20"}},
			func(s *Config) any { return s.ClusterDNS.String() }, "172.30.0.10"},
		{"IPv6 cluster", input{args: []string{"--cluster-cidr", "fd00:42::/56", "--service-cidr=fd00:43::/112"}},
			func(s *Config) any { return []any{s.NodeIP[0].String(), s.BindAddress.String(), s.ClusterDNS.String()} }, []any{"2001:db8::7", "::", "fd00:43::a"}},
		{"advertise the bind address", input{args: []string{"--bind-address", "198.51.100.7"}},
			func(s *Config) any { return s.AdvertiseAddress.String() }, "198.51.100.7"},
		{"address of the flannel interface", input{args: []string{"--flannel-iface", "eth1"}},
			func(s *Config) any { return []any{s.NodeIP[0].String(), s.AdvertiseAddress.String()} }, []any{"198.51.100.7", "198.51.100.7"}},
		{"small networks with a small mask", input{args: []string{"--cluster-cidr=10.9.0.0/25", "--kube-controller-manager-arg=node-cidr-mask-size=26"}},
			func(s *Config) any { return s.ClusterCIDR.String() }, "10.9.0.0/25"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := test.in.run(t, testMachine)
			if err != nil {
				t.Fatal(err)
			}
			if diff := gocmp.Diff(test.want, test.get(s)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	file := func(text string) input { return input{files: map[string]string{"config.yaml": text}} }
	flags := func(args ...string) input { return input{args: args} }
	for _, test := range []struct {
		in   input
		want []string // parts of the error
	}{
		// Names that do not exist.
		{flags("--node-nmae", "x"), []string{`unknown flag "--node-nmae", did you mean "--node-name"?`}},
		{flags("--kine-tls", "x"), []string{`unknown flag "--kine-tls": Kedge keeps its data in etcd`}},
		{file("# c\nnode-nme: x\n"), []string{`config.yaml:2: unknown key "node-nme", did you mean "node-name"?`}},
		{file("node_name: x\n"), []string{`did you mean "node-name"?`}},
		{file("cluster-init: true\n"), []string{"config.yaml:1", "always uses etcd"}},
		{file("zzz: 1\n"), []string{`unknown key "zzz"`}},
		{input{env: []string{"KEDGE_NODENAME=x", "KEDGEX=1"}}, []string{`unknown environment variable "KEDGE_NODENAME", did you mean "KEDGE_NODE_NAME"?`}},
		{input{env: []string{"KEDGE_SELINUX=x"}}, []string{`unknown environment variable "KEDGE_SELINUX": not in this version`}},
		{flags("--debug", "true"), []string{`unexpected argument "true"`, "--debug=true"}},
		// The form of the file.
		{file("node-name: a\ndebug: true\nnode-name: b\n"), []string{"config.yaml:3: node-name: already given in line 1"}},
		{file("- a\n"), []string{"config.yaml:1: the file must consist of lines of the form key: value"}},
		{file("node-name: a\n---\nnode-name: b\n"), []string{"second YAML document"}},
		{file("node-name: [a\n"), []string{"config.yaml: yaml: line"}},
		{file("node-name: [a]\n"), []string{"config.yaml:1: node-name: is a list; accepted: a single value"}},
		{file("node-name: {a: b}\n"), []string{"config.yaml:1: node-name: is a map"}},
		{file("tls-san:\n  a: b\n"), []string{"config.yaml:2: tls-san: is a map; accepted: a list of values"}},
		{file("tls-san:\n- a\n- [b]\n- {c: d}\n"), []string{"config.yaml:3: tls-san: is a list", "config.yaml:4: tls-san: is a map"}},
		{file("node-name:\n"), []string{"config.yaml:1: node-name: has no value"}},
		{file("node-name: true\n"), []string{"config.yaml:1: node-name: true is a truth value"}},
		{file("debug: yes\n"), []string{`config.yaml:1: debug: "yes" is not a truth value`}},
		{file("node-name+: x\n"), []string{"config.yaml:1: node-name+: only lists can be added to"}},
		{file("config: /x\n"), []string{"config.yaml:1: config: cannot be given in a file; use --config or KEDGE_CONFIG"}},
		{flags("--config", "/nonexistent/config.yaml"), []string{"configuration file: open /nonexistent/config.yaml: no such file"}},
		{flags("--config", "x.yaml"), []string{`--config: "x.yaml" is a relative path`}},
		// Single values, with their source.
		{flags("--node-name", "Box_1"), []string{`--node-name: "Box_1" cannot be a node name`, "lower case"}},
		{flags("--node-name", ""), []string{`--node-name: "" cannot be a node name`}},
		{input{env: []string{"KEDGE_DATA_DIR=state"}}, []string{`KEDGE_DATA_DIR: "state" is a relative path`}},
		{file("\nhttps-listen-port: 70000\n"), []string{`config.yaml:2: https-listen-port: "70000" is not a port; accepted: 1 to 65535`}},
		{flags("--data-dir", "/"), []string{"root of the file system"}},
		{flags("--run-dir", "/run/"+strings.Repeat("x", 100)), []string{"paths of the sockets"}},
		{flags("--write-kubeconfig-mode", "rw"), []string{`--write-kubeconfig-mode: "rw" is not a file mode; accepted: three octal digits`}},
		{flags("--write-kubeconfig-mode", "4755"), []string{"is not a file mode"}},
		{flags("--node-label", "a=b,c"), []string{`--node-label: "c" is not of the form key=value`}},
		{flags("--node-label", "-a=b"), []string{`"-a=b" is not a valid label`}},
		{flags("--node-label", "node-role.kubernetes.io/worker="), []string{"may not give itself this label", "kedge kubectl label node NAME node-role.kubernetes.io/worker="}},
		{flags("--node-taint", "a=b"), []string{`--node-taint: "a=b" is not a taint`, "key=value:effect"}},
		{flags("--node-taint", "a=b:Never"), []string{"unsupported taint effect"}},
		{flags("--node-taint", "a:NoSchedule-"), []string{"it has no effect"}},
		{flags("--proxy-mode", "iptable"), []string{`--proxy-mode: "iptable" is unknown, did you mean "iptables"?; accepted: auto, ipvs, nftables, iptables`}},
		{flags("--flannel-backend", "wireguard"), []string{"called wireguard-native", "accepted: vxlan, host-gw, wireguard-native, none"}},
		{flags("--snapshotter", "overlay"), []string{"this snapshotter is called overlayfs"}},
		{flags("--disable", "traefik"), []string{`--disable: "traefik": this version of Kedge has no such component`, "accepted: coredns"}},
		{flags("--disable", "corends"), []string{`did you mean "coredns"?`}},
		{flags("--tls-san", "a b"), []string{`--tls-san: "a b" is neither an IP address nor a host name`}},
		{flags("--cluster-domain", "cluster.local."), []string{`ends in a dot; write "cluster.local"`}},
		{flags("--pause-image", "A B"), []string{`--pause-image: "A B" is not an image name`}},
		{flags("--kubelet-arg", "max-pods"), []string{`--kubelet-arg: "max-pods" is not of the form key=value`}},
		{flags("--etcd-arg", "--=x"), []string{`--etcd-arg: "--=x" is not of the form key=value`}},
		{flags("--service-node-port-range", "32767-30000"), []string{"is not a range of ports; accepted: first-last"}},
		{flags("--bind-address", "127.0.0.1"), []string{"reachable from this machine only"}},
		{flags("--advertise-address", "169.254.1.1"), []string{"other machines and pods could not reach it"}},
		// Networks and addresses against each other and the machine.
		{flags("--cluster-cidr", "10.42.0.0/16,fd00::/56"), []string{"give both one network of each family"}},
		{flags("--cluster-cidr", "10.42.0.0/16,fd00::/56", "--service-cidr", "fd01::/112,10.43.0.0/16"), []string{"in the same order"}},
		{flags("--cluster-cidr", "10.42.0.0/16,10.44.0.0/16"), []string{"one IPv4 and one IPv6 network"}},
		{flags("--service-cidr", "10.43.0.0/16,10.44.0.0/16,10.45.0.0/16"), []string{"one IPv4 and one IPv6 network"}},
		{flags("--cluster-cidr", "10.42.0.0/16,fd00::/56", "--service-cidr", "10.43.0.0/16,fd00::/112"), []string{"fd00::/56 overlaps"}},
		{flags("--cluster-cidr", "10.42.0.0/16,fd00::/56", "--service-cidr", "10.43.0.0/16,fd01::/112", "--node-ip", "192.0.2.7"),
			[]string{"--node-ip: a node of a cluster with two address families"}},
		{flags("--servicelb-pool", "192.0.2.9-192.0.2.1"), []string{"the last address comes before the first"}},
		{flags("--servicelb-pool", "192.0.2.9-fd00::1"), []string{"is not a range of addresses"}},
		{flags("--servicelb-pool", "10.42.0.5"), []string{"addresses of the cluster's own network"}},
		{flags("--api-vip", "10.43.0.5"), []string{"addresses of the cluster's own network"}},
		{flags("--api-vip", "192.0.2.9,192.0.2.10"), []string{"one IPv4 and one IPv6 address"}},
		{flags("--servicelb-pool", "192.0.2.0/28", "--api-vip", "192.0.2.9"), []string{"192.0.2.9 is in servicelb-pool 192.0.2.0-192.0.2.15"}},
		{flags("--flannel-external-ip"), []string{"there is no node-external-ip"}},
		{flags("--cluster-cidr", "10.42.1.0/16"), []string{"is an address inside of a network; the network is 10.42.0.0/16"}},
		{flags("--cluster-cidr", "10.43.128.0/17"), []string{"--cluster-cidr: 10.43.128.0/17 overlaps with the services' 10.43.0.0/16 (default of service-cidr)"}},
		{flags("--cluster-cidr", "fd00::/56"), []string{"different address families"}},
		{flags("--cluster-cidr", "10.9.0.0/25"), []string{"every node needs a /24"}},
		{flags("--cluster-cidr", "16.0.0.0/4"), []string{"is too large"}},
		{flags("--cluster-cidr", "192.0.2.0/24"), []string{"192.0.2.7 lies inside of cluster-cidr 192.0.2.0/24 (--cluster-cidr)"} /* see below */},
		{flags("--service-cidr", "10.43.0.0/29"), []string{"at least 16 addresses"}},
		{flags("--cluster-dns", "10.44.0.10"), []string{"--cluster-dns: 10.44.0.10 must be an address of service-cidr 10.43.0.0/16"}},
		{flags("--cluster-dns", "10.43.0.1"), []string{"not its first"}},
		{flags("--node-ip", "203.0.113.1"), []string{"--node-ip: no interface of this machine has the address 203.0.113.1 (it has 192.0.2.7 on eth0, 2001:db8::7 on eth0, 198.51.100.7 on eth1)"}},
		{flags("--node-ip", "192.0.2.7,198.51.100.7"), []string{"--node-ip: 2 addresses; accepted: one, or one IPv4 and one IPv6"}},
		{flags("--node-ip", "2001:db8::7"), []string{"not of the first address family of cluster-cidr"}},
		{flags("--advertise-address", "10.42.3.4"), []string{"--advertise-address: 10.42.3.4 lies inside of cluster-cidr"}},
		{flags("--https-listen-port", "10250"), []string{"port 10250 is used by the kubelet"}},
		{flags("--flannel-iface", "wg9"), []string{`no network interface "wg9"; it has lo, eth0, eth1`}},
		{flags("--flannel-iface", "eth1", "--flannel-backend=none"), []string{"no flannel with flannel-backend none (--flannel-backend)"}},
		{flags("--resolv-conf", "/nonexistent/resolv.conf"), []string{"--resolv-conf: open /nonexistent/resolv.conf"}},
		{flags("--write-kubeconfig", "/"), []string{"root of the file system"}},
		{flags("--write-kubeconfig", "/tmp"), []string{"/tmp is a directory"}},
		{flags("--data-dir", "/dev/null"), []string{"/dev/null is not a directory"}},
		// Everything at once.
		{input{files: map[string]string{"config.yaml": "node-name: X\nfoo: 1\n", "config.yaml.d/a.yaml": "https-listen-port: x\n"},
			env: []string{"KEDGE_BAR=1"}, args: []string{"--proxy-mode", "x", "--tls-san", "?,!"}},
			[]string{"config.yaml:1: node-name:", "config.yaml:2: unknown key", "config.yaml.d/a.yaml:1: https-listen-port:", "KEDGE_BAR", "--proxy-mode", `"?"`, `"!"`}},
	} {
		t.Run(strings.Join(test.want, " "), func(t *testing.T) {
			s, err := test.in.run(t, testMachine)
			if err == nil {
				t.Fatalf("accepted: %+v", s)
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error does not say %q:\n%v", part, err)
				}
			}
			// One cause gives one line.
			if lines := strings.Split(err.Error(), "\n"); len(lines) > len(test.want) {
				t.Errorf("more lines than problems:\n%v", err)
			}
		})
	}
}

func TestMissingAddressCanBeWaitedFor(t *testing.T) {
	look := func() (machine, error) { return machine{hostname: "a"}, nil }
	for _, in := range []input{{}, {args: []string{"--node-ip", "192.0.2.7"}}, {args: []string{"--bind-address=192.0.2.7", "--node-ip=192.0.2.7"}}} {
		if _, err := in.run(t, look); !errors.Is(err, ErrNoNodeAddress) {
			t.Errorf("%v: got %v, want ErrNoNodeAddress", in.args, err)
		}
	}
}

func TestHostName(t *testing.T) {
	look := func() (machine, error) {
		m, err := testMachine()
		m.hostname = "my_box"
		return m, err
	}
	if _, err := (input{}).run(t, look); err == nil || !strings.Contains(err.Error(), "rename the machine or set node-name") {
		t.Errorf("got %v", err)
	}
	if s, err := (input{args: []string{"--node-name=a"}}).run(t, look); err != nil || s.NodeName != "a" {
		t.Errorf("got %v, %v", s, err)
	}
}
