// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An agent refuses what only servers have, wherever it stands, and says where.
func TestAgentRefuses(t *testing.T) {
	file := func(text string) input { return input{role: RoleAgent, files: map[string]string{"config.yaml": text}} }
	flags := func(args ...string) input { return input{role: RoleAgent, args: args} }
	const servers = "is for servers only; an agent takes what it needs from the cluster, leave it out"
	for _, test := range []struct {
		in   input
		want []string
	}{
		{flags("--cluster-cidr", "10.9.0.0/16"), []string{"--cluster-cidr " + servers}},
		{flags("--disable-etcd"), []string{"--disable-etcd " + servers}},
		{flags("--kube-apiserver-arg=v=2"), []string{"--kube-apiserver-arg " + servers}},
		{input{role: RoleAgent, env: []string{"KEDGE_CLUSTER_CIDR=10.9.0.0/16"}}, []string{"KEDGE_CLUSTER_CIDR: " + servers}},
		{input{role: RoleAgent, env: []string{"KEDGE_AGENT_TOKEN=abcdefghijklmnop"}}, []string{"KEDGE_AGENT_TOKEN: " + servers}},
		{input{role: RoleAgent, env: []string{"KEDGE_CLUSTER_RESET=true"}}, []string{"KEDGE_CLUSTER_RESET: " + servers}},
		{file("debug: true\ntls-san: [a, b]\n"), []string{"config.yaml:2: tls-san: " + servers}},
		{file("disable:\n- coredns\n"), []string{"config.yaml:2: disable: " + servers}},
		// Its value is not looked at: there is one thing to do about it.
		{file("cluster-cidr: nonsense\n"), []string{"config.yaml:1: cluster-cidr: " + servers}},
		{flags("--node-nmae", "x"), []string{`unknown flag "--node-nmae", did you mean "--node-name"?`}},
		{flags("--kine-tls", "x"), []string{`unknown flag "--kine-tls": Kedge keeps its data in etcd`}},
		{file("node-nmae: x\n"), []string{`config.yaml:1: unknown key "node-nmae", did you mean "node-name"?`}},
		{input{role: RoleAgent, env: []string{"KEDGE_NODENAME=x"}}, []string{`unknown environment variable "KEDGE_NODENAME"`}},
		{input{role: RoleAgent, files: map[string]string{"config.yaml": "etcd-arg: [a=b]\n"}, env: []string{"KEDGE_DISABLE_AGENT=true"}, args: []string{"--node-name=X"}},
			[]string{"config.yaml:1: etcd-arg: " + servers, "KEDGE_DISABLE_AGENT: " + servers, "--node-name: "}},
	} {
		t.Run(strings.Join(test.want, " "), func(t *testing.T) { test.in.refused(t, test.want...) })
	}
}

// refused checks that the configuration is, with a line for each problem and no other.
func (in input) refused(t *testing.T, want ...string) {
	t.Helper()
	s, err := in.run(t, testMachine)
	if err == nil {
		t.Fatalf("accepted: %+v", s)
	}
	for _, part := range want {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error does not say %q:\n%v", part, err)
		}
	}
	if lines := strings.Split(err.Error(), "\n"); len(lines) != len(want) {
		t.Errorf("%d lines for %d problems:\n%v", len(lines), len(want), err)
	}
}

func TestAgent(t *testing.T) {
	in := input{role: RoleAgent, files: map[string]string{"config.yaml": "server: 192.0.2.1\nnode-label: [room=cellar]\n"},
		env: []string{"KEDGE_TOKEN=abcdefghijklmnop"}, args: []string{"--join-timeout=5m", "--proxy-mode=ipvs", "--lb-server-port=6443"}}
	s, err := in.run(t, testMachine)
	if err != nil {
		t.Fatal(err)
	}
	if s.Role != RoleAgent || s.Server != "https://192.0.2.1:6443" || s.Token != "abcdefghijklmnop" || s.JoinTimeout.Minutes() != 5 || s.LBServerPort != 6443 {
		t.Errorf("got %+v", s)
	}
	if s.HasEtcd() || s.HasControlPlane() || !s.HasNode() {
		t.Errorf("etcd %v, control plane %v, node %v", s.HasEtcd(), s.HasControlPlane(), s.HasNode())
	}
	for name, want := range map[string]string{"server": "config.yaml:1: server", "token": "KEDGE_TOKEN", "proxy-mode": "--proxy-mode", "node-name": ""} {
		if got := s.Given[name]; !strings.HasSuffix(got, want) || want == "" && got != "" {
			t.Errorf("%s is given by %q, want %q", name, got, want)
		}
	}
}

// What a server leaves to others has to leave something, and the first server of a cluster needs everything.
func TestRoles(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	external, joins := "--datastore-endpoint=https://e:2379", "--server=h"
	for _, test := range []struct {
		args []string
		want []string // of the error; nothing: accepted
	}{
		{args: []string{"--disable-agent"}},
		{args: []string{"--disable-etcd", joins}},
		{args: []string{"--disable-control-plane", joins}},
		{args: []string{external}},
		{args: []string{external, joins}},
		{args: []string{external, "--datastore-cafile=" + there, "--datastore-certfile=" + there, "--datastore-keyfile=" + there}},
		{args: []string{"--token-file=" + there, "--agent-token-file=" + there}},

		{[]string{"--disable-etcd", "--disable-control-plane", joins}, []string{
			"--disable-etcd: and no control plane (--disable-control-plane): nothing of a server is left; use kedge agent"}},
		{[]string{"--disable-control-plane", external}, []string{
			"--disable-control-plane: with an etcd of your own (--datastore-endpoint) nothing of a server is left"}},
		{[]string{"--disable-etcd", external}, []string{"--disable-etcd: with an etcd of your own (--datastore-endpoint) there is no member here anyway"}},
		{[]string{"--datastore-cafile=" + there}, []string{"belong to datastore-endpoint, which is not given"}},
		{[]string{external, "--datastore-certfile=" + there}, []string{"datastore-certfile and datastore-keyfile go together"}},
		{[]string{"--token=a", "--token-file=" + there}, []string{"--token-file: the token is also given by --token; leave one out"}},
		{[]string{"--agent-token=a", "--agent-token-file=" + there}, []string{"--agent-token-file: the token is also given by --agent-token"}},
		{[]string{"--token-file=/nonexistent/token", "--agent-token-file=/nonexistent/agent-token"}, []string{
			"--token-file: stat /nonexistent/token: no such file", "--agent-token-file: stat /nonexistent/agent-token: no such file"}},
		{[]string{external, "--datastore-cafile=/nonexistent/ca"}, []string{"--datastore-cafile: stat /nonexistent/ca: no such file"}},

		{[]string{"--server=http://h"}, []string{`--server: "http://h" is not the address of a server`}},
		{[]string{"--datastore-endpoint=http://e:2379"}, []string{`--datastore-endpoint: "http://e:2379" is not the address of a server; accepted: for example https://etcd.example:2379`}},
		{[]string{"--join-timeout=5"}, []string{`--join-timeout: "5" is not a duration`}},
		{[]string{"--token="}, []string{"--token: is empty"}},
		{[]string{"--lb-server-port=10250"}, []string{"--lb-server-port: port 10250 is used by the kubelet"}},
		{[]string{"--lb-server-port=2379"}, []string{"--lb-server-port: port 2379 is used by etcd"}},
		{[]string{"--lb-server-port=6443"}, []string{"--lb-server-port: port 6443 is that of the API server (default of https-listen-port)"}},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			in := input{args: test.args}
			if len(test.want) > 0 {
				in.refused(t, test.want...)
			} else if _, err := in.run(t, testMachine); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTokenText(t *testing.T) {
	dir := t.TempDir()
	path := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for _, test := range []struct{ name, text, file, want, wrong string }{
		{name: "none"},
		{name: "text", text: "secret", want: "secret"},
		{name: "file", file: path("good", "secret\n"), want: "secret"},
		{name: "file of another system", file: path("crlf", "\r\n secret \r\n"), want: "secret"},
		{name: "empty file", file: path("empty", " \n"), wrong: "token-file: " + filepath.Join(dir, "empty") + " is empty"},
		{name: "missing file", file: filepath.Join(dir, "missing"), wrong: "token-file: open "},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := (&Config{Token: test.text, TokenFile: test.file}).TokenText()
			gotAgent, errAgent := (&Config{AgentToken: test.text, AgentTokenFile: test.file}).AgentTokenText()
			if got != test.want || gotAgent != test.want {
				t.Errorf("got %q and %q", got, gotAgent)
			}
			if test.wrong == "" {
				if err != nil || errAgent != nil {
					t.Errorf("%v, %v", err, errAgent)
				}
				return
			}
			if err == nil || !strings.HasPrefix(err.Error(), test.wrong) || errAgent == nil || !strings.HasPrefix(errAgent.Error(), "agent-"+test.wrong) {
				t.Errorf("errors %v and %v", err, errAgent)
			}
		})
	}
}

// A joining machine takes the address by which it reaches the server, if it is one that others can use.
func TestSourceToServer(t *testing.T) {
	for _, test := range []struct {
		name   string
		args   []string
		source string // what the kernel says; empty: it knows no way
		host   string // that the kernel is asked about; empty: it must not be
		want   string
		reason string
	}{
		{"the way to the server", []string{"--server=https://192.0.2.1:6443"}, "198.51.100.7", "192.0.2.1", "198.51.100.7", "by which this machine reaches https://192.0.2.1:6443"},
		{"by name", []string{"--server=a.example"}, "198.51.100.7", "a.example", "198.51.100.7", "reaches https://a.example:6443"},
		{"IPv6", []string{"--server=[2001:db8::1]:443"}, "2001:db8::7", "2001:db8::1", "2001:db8::7", "reaches https://[2001:db8::1]:443"},
		{"no way", []string{"--server=192.0.2.1"}, "", "192.0.2.1", "192.0.2.7", "which has the default route"},
		{"the server is this machine", []string{"--server=127.0.0.1"}, "127.0.0.1", "127.0.0.1", "192.0.2.7", "which has the default route"},
		{"link-local", []string{"--server=192.0.2.1"}, "169.254.7.7", "192.0.2.1", "192.0.2.7", "which has the default route"},
		{"not an address of an interface", []string{"--server=192.0.2.1"}, "203.0.113.5", "192.0.2.1", "192.0.2.7", "which has the default route"},
		{"an interface was chosen", []string{"--server=192.0.2.1", "--flannel-iface=eth1"}, "192.0.2.7", "", "198.51.100.7", "which flannel-iface names"},
		{"an address was given", []string{"--server=192.0.2.1", "--node-ip=192.0.2.7"}, "198.51.100.7", "192.0.2.1", "192.0.2.7", "given by --node-ip"},
		{"no server", nil, "198.51.100.7", "", "192.0.2.7", "which has the default route"},
	} {
		t.Run(test.name, func(t *testing.T) {
			look := func() (machine, error) {
				m, err := testMachine()
				m.sourceTo = func(host string) (netip.Addr, error) {
					if host != test.host {
						t.Errorf("the kernel was asked for the way to %q", host)
					}
					if test.source == "" {
						return netip.Addr{}, errors.New("network is unreachable")
					}
					return netip.MustParseAddr(test.source), nil
				}
				return m, err
			}
			s, err := input{role: RoleAgent, args: test.args}.run(t, look)
			if err != nil {
				t.Fatal(err)
			}
			if len(s.NodeIP) != 1 || s.NodeIP[0].String() != test.want || !strings.Contains(s.NodeIPReason, test.reason) {
				t.Errorf("got %v: %s", s.NodeIP, s.NodeIPReason)
			}
		})
	}
}
