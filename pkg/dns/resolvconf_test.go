// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var testDNSAddr = netip.MustParseAddr("10.43.0.10")

func TestParseResolvConf(t *testing.T) {
	tests := []struct {
		name, text      string
		servers         []string
		skipped, search []string
	}{
		{name: "empty"},
		{name: "comments and unknown words", text: "# made by something\n; other comment\nlookup file bind\n\n"},
		{
			name: "ordinary", text: "nameserver 192.168.1.1\nnameserver 2001:db8::1\nsearch lan example.org\noptions edns0 trust-ad\n",
			servers: []string{"192.168.1.1", "2001:db8::1"}, search: []string{"lan", "example.org"},
		},
		{
			name: "loopback, cluster DNS, rubbish", text: "nameserver 127.0.0.53\nnameserver ::1\nnameserver ::ffff:127.0.0.1\n" +
				"nameserver 10.43.0.10\nnameserver 0.0.0.0\nnameserver router.lan\nnameserver 1.1.1.1\n",
			servers: []string{"1.1.1.1"},
			skipped: []string{"127.0.0.53", "::1", "::ffff:127.0.0.1", "10.43.0.10", "0.0.0.0", "router.lan"},
		},
		{name: "link-local with a zone", text: "nameserver fe80::1%eth0\n", servers: []string{"fe80::1%eth0"}},
		{name: "zone that would break out of a Corefile", text: "nameserver fe80::1%a{b\n", skipped: []string{"fe80::1%a{b"}},
		{name: "twice the same", text: "nameserver 9.9.9.9\nnameserver 9.9.9.9\n", servers: []string{"9.9.9.9"}},
		{name: "the last of domain and search wins", text: "search a b\ndomain c\n", search: []string{"c"}},
		{name: "comment behind search", text: "search lan # home\n", search: []string{"lan", "home"}},
		{name: "carriage returns", text: "nameserver 9.9.9.9\r\nsearch lan\r\n", servers: []string{"9.9.9.9"}, search: []string{"lan"}},
		{name: "root as search domain", text: "search .\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := parseResolvConf([]byte(tt.text), []netip.Addr{testDNSAddr})
			if err != nil {
				t.Fatal(err)
			}
			var servers []string
			for _, a := range r.Nameservers {
				servers = append(servers, a.String())
			}
			if d := cmp.Diff(tt.servers, servers); d != "" {
				t.Errorf("nameservers (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.skipped, r.Skipped); d != "" {
				t.Errorf("skipped (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.search, r.Search); d != "" {
				t.Errorf("search (-want +got):\n%s", d)
			}
		})
	}
}

// FuzzParseResolvConf: whatever the host's file has, what comes out can be written into a Corefile and a resolv.conf.
func FuzzParseResolvConf(f *testing.F) {
	for _, seed := range []string{"", "nameserver 1.1.1.1\nsearch lan\n", "nameserver fe80::1%eth0", "nameserver fe80::1%\"x\" {\n", "search {$HOME} a}b\n"} {
		f.Add(seed)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseResolvConf([]byte(text), []netip.Addr{testDNSAddr})
		if err != nil {
			return
		}
		r.Path = "fuzz"
		for _, a := range r.Nameservers {
			if a.IsLoopback() || a == testDNSAddr {
				t.Errorf("%q let %s through", text, a)
			}
		}
		path := filepath.Join(dir, "resolv.conf")
		if err := r.WriteKubelet(path, true); err != nil {
			t.Fatal(err)
		}
		again, err := readResolvConf(path, []netip.Addr{testDNSAddr})
		if err != nil {
			t.Fatal(err)
		}
		if want := r.Nameservers[:min(3, len(r.Nameservers))]; !slices.Equal(again.Nameservers, want) {
			t.Errorf("kubelet's file has %v, want %v", again.Nameservers, want)
		}
		if !slices.Equal(again.Search, r.Search) {
			t.Errorf("kubelet's file searches %q, want %q", again.Search, r.Search)
		}
		checkCorefile(t, testConfig(t.TempDir()), r.upstreams(dnsPort), customConfig{})
	})
}

func TestChooseResolvConf(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	missing := filepath.Join(dir, "missing")
	real1 := file("real", "nameserver 192.168.1.1\n")
	stub := file("stub", "nameserver 127.0.0.53\n")
	own := file("own", "nameserver 10.43.0.10\n")
	none := file("none", "# nothing\n")
	full := file("full", "nameserver 192.168.1.2\n")
	tests := []struct {
		name, first string
		others      []string
		want        string
		err         error
	}{
		{"an ordinary file", real1, []string{full}, real1, nil},
		{"the stub leads to the full file", stub, []string{missing, none, full}, full, nil},
		{"the cluster DNS itself", own, []string{full}, full, nil},
		{"no full file", stub, []string{missing}, stub, nil},
		{"nothing in it is no reason to look elsewhere", none, []string{full}, none, nil},
		{"missing, with a full file", missing, []string{full}, full, nil},
		{"missing altogether", missing, []string{missing}, missing, fs.ErrNotExist},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := chooseResolvConf(tt.first, tt.others, []netip.Addr{testDNSAddr})
			if !errors.Is(err, tt.err) || r.Path != tt.want {
				t.Errorf("got %s, %v; want %s, %v", r.Path, err, tt.want, tt.err)
			}
		})
	}
}

func TestWriteKubelet(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	r, err := parseResolvConf([]byte("nameserver 127.0.0.1\nnameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4\nsearch lan corp.example\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Path = "/etc/resolv.conf"
	const servers = "# Written by Kedge for pods, from /etc/resolv.conf.\nnameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\n"
	for _, tt := range []struct {
		search bool
		want   string
	}{{false, servers}, {true, servers + "search lan corp.example\n"}} {
		if err := r.WriteKubelet(path, tt.search); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(tt.want, string(got)); d != "" {
			t.Errorf("search=%v (-want +got):\n%s", tt.search, d)
		}
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.WriteKubelet(path, true); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("an unchanged file was replaced (%v)", err)
	}
	if err := (HostResolv{Path: "x"}).WriteKubelet(filepath.Join(filepath.Dir(path), "none", "resolv.conf"), false); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("missing directory: got %v", err)
	}
}
