// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/config"
)

// What is remembered comes back, and is what the node goes by.
func TestRememberAndRecall(t *testing.T) {
	cfg := testConfig(t)
	if known, err := Recall(cfg); known != nil || err != nil {
		t.Fatalf("a machine that is not part of a cluster recalls %+v, %v", known, err)
	}
	settings := clusterSettings()
	settings.ClusterDomain, settings.ServiceNodePortRange, settings.Disable = "edge.example", config.PortRange{First: 1000, Last: 2000}, []string{config.ComponentCoreDNS}
	want := Membership{Cluster: settings, Joined: true, Registered: true}
	if err := Remember(cfg, want); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(membershipFile(cfg)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	known, err := Recall(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*known, want) {
		t.Errorf("recalled %+v, want %+v", *known, want)
	}
	if !reflect.DeepEqual(cfg.Cluster, settings) {
		t.Errorf("the node goes by %+v", cfg.Cluster)
	}
	want.Joined, want.Registered = false, false
	if err := Remember(cfg, want); err != nil {
		t.Fatal(err)
	}
	if known, err := Recall(cfg); err != nil || known.Joined || known.Registered {
		t.Errorf("after a change: %+v, %v", known, err)
	}
}

// The first thing that a machine writes may be this.
func TestRememberMakesDirectory(t *testing.T) {
	cfg := testConfig(t)
	cfg.DataDir = filepath.Join(cfg.DataDir, "a", "b")
	if err := Remember(cfg, Membership{Cluster: clusterSettings()}); err != nil {
		t.Fatal(err)
	}
	if known, err := Recall(cfg); known == nil || err != nil {
		t.Errorf("%+v, %v", known, err)
	}
}

func TestRecallRefuses(t *testing.T) {
	whole, err := json.Marshal(Membership{Cluster: clusterSettings()})
	if err != nil {
		t.Fatal(err)
	}
	const damaged = " is damaged: "
	for _, test := range []struct{ name, text, given, want string }{
		{name: "empty", want: damaged},
		{name: "cut off", text: string(whole[:len(whole)/2]), want: damaged},
		{name: "no JSON", text: "\x00\x00\x00", want: damaged},
		{name: "nothing in it", text: "{}", want: damaged},
		{name: "null", text: "null", want: damaged},
		{name: "no network", text: strings.Replace(string(whole), `"10.42.0.0/16"`, `""`, 1), want: damaged},
		{name: "a contradiction", text: string(whole), given: "10.9.0.0/16", want: "--cluster-cidr: 10.9.0.0/16 contradicts the cluster, which was made with 10.42.0.0/16"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := testConfig(t)
			if test.given != "" {
				cfg.ClusterCIDR, cfg.Given["cluster-cidr"] = config.Prefixes{netip.MustParsePrefix(test.given)}, "--cluster-cidr"
			}
			before := cfg.Cluster
			if err := os.WriteFile(membershipFile(cfg), []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			known, err := Recall(cfg)
			if known != nil || err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %+v, %v; want %q", known, err, test.want)
			}
			if test.want == damaged && !strings.HasPrefix(err.Error(), membershipFile(cfg)+damaged) {
				t.Errorf("error does not name the file: %v", err)
			}
			if !reflect.DeepEqual(cfg.Cluster, before) {
				t.Errorf("the node goes by %+v", cfg.Cluster)
			}
		})
	}
}
