// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/kedge-io/kedge/tests/testlog"
)

func TestOutsideNamesWithoutAPI(t *testing.T) {
	h := start(t, nil)
	h.upstreams.Store(netip.MustParseAddr("192.0.2.1"), nameserver(t, "198.51.100.1"))
	h.upstreams.Store(netip.MustParseAddr("192.0.2.2"), nameserver(t, "198.51.100.2"))
	h.writeResolv("nameserver 127.0.0.53\nnameserver 192.0.2.1\n")
	h.run()
	must(t, h.answers("udp", "outside.example", "198.51.100.1"))
	must(t, h.answers("tcp", "outside2.example", "198.51.100.1"))
	must(t, h.rcode("kubernetes.default.svc.cluster.local", miekg.RcodeServerFailure))

	err := h.Ready()
	if err == nil || !strings.Contains(err.Error(), "missing.kubeconfig") {
		t.Errorf("Ready() = %v, want the reason that the kubeconfig is missing", err)
	}

	t.Run("resolv.conf changes", func(t *testing.T) {
		h.writeResolv("nameserver 192.0.2.2\nsearch lan\n")
		eventually(t, "the new upstream answers", func() error { return h.answers("udp", "outside3.example", "198.51.100.2") })
		if got, err := os.ReadFile(h.cfg.KubeletResolvConf); err != nil || !strings.Contains(string(got), "nameserver 192.0.2.2\n") {
			t.Errorf("kubelet's resolv.conf: %q, %v", got, err)
		}
	})
	t.Run("the last upstream goes", func(t *testing.T) {
		h.writeResolv("nameserver 127.0.0.53\n")
		eventually(t, "SERVFAIL", func() error { return h.rcode("outside4.example", miekg.RcodeServerFailure) })
		if p := strings.Join(h.Status().Problems, "\n"); !strings.Contains(p, "skipped: 127.0.0.53") {
			t.Errorf("problems do not say why: %s", p)
		}
	})
	t.Run("and comes back", func(t *testing.T) {
		h.writeResolv("nameserver 192.0.2.1\n")
		eventually(t, "answer", func() error { return h.answers("udp", "outside4.example", "198.51.100.1") })
	})
	t.Run("stop frees the port", func(t *testing.T) {
		h.stop()
		if err := (listener{"dns", "127.0.0.1", fmt.Sprint(h.cfg.Port)}).bindAlone(); err != nil {
			t.Error(err)
		}
		if err := h.Ready(); err == nil {
			t.Error("Ready after Run has returned")
		}
	})
}

// bindAlone opens the sockets without SO_REUSEPORT, so that any other one is found.
func (l listener) bindAlone() error {
	addr := net.JoinHostPort(l.host, l.port)
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	return udp.Close()
}

func TestNoUpstreamAtAll(t *testing.T) {
	h := start(t, nil) // not even a file
	h.run()
	r, err := h.query("udp", "outside.example", miekg.TypeA)
	must(t, err)
	if r.Rcode != miekg.RcodeServerFailure {
		t.Errorf("got %s", miekg.RcodeToString[r.Rcode])
	}
	if st := h.Status(); len(st.Problems) == 0 || !strings.Contains(st.Problems[0], "resolv.conf") {
		t.Errorf("status: %+v", st)
	}
}

func TestCustom(t *testing.T) {
	h := start(t, nil)
	h.upstreams.Store(netip.MustParseAddr("192.0.2.1"), nameserver(t, "198.51.100.1"))
	h.writeResolv("nameserver 192.0.2.1\n")
	h.upstreams.Store(netip.MustParseAddr("192.0.2.3"), nameserver(t, "198.51.100.3"))
	corp := nameserver(t, "203.0.113.7")
	port := fmt.Sprint(h.cfg.Port)
	h.run()
	give := func(data map[string]string) {
		h.giveCustom(context.Background(), newCustomConfig(data, nil))
	}
	custom := func(want string) func() error {
		return func() error {
			if st := h.Status(); st.Custom != want {
				return fmt.Errorf("custom is %q, want %q: %v", st.Custom, want, st.Problems)
			}
			return nil
		}
	}

	good := map[string]string{
		"rewrite.override": "rewrite name alias.example outside.example\n",
		"names.override":   "hosts names {\n  fallthrough\n}\n",
		"names":            "203.0.113.50 printer.lan\n",
		"corp.server":      "corp.example:" + port + " {\n  errors\n  forward . " + corp.String() + "\n}\n",
		"zone.server":      "zone.example:" + port + " {\n  file zone.db\n}\n",
		"zone.db": "$ORIGIN zone.example.\n@ 60 IN SOA ns.zone.example. admin.zone.example. 1 7200 3600 1209600 60\n" +
			"@ 60 IN NS ns.zone.example.\nwww 60 IN A 203.0.113.60\n",
		"template.server": "template.example:" + port + " {\n  template IN A {\n    answer \"{{ .Name }} 60 IN A 203.0.113.70\"\n  }\n}\n",
		"README":          "not for CoreDNS",
	}
	checkGood := func(t *testing.T) {
		t.Helper()
		must(t, h.answers("udp", "printer.lan", "203.0.113.50"))
		must(t, h.answers("udp", "x.corp.example", "203.0.113.7"))
		must(t, h.answers("tcp", "www.zone.example", "203.0.113.60"))
		must(t, h.answers("udp", "a.template.example", "203.0.113.70"))
		must(t, h.answers("udp", "alias.example", "198.51.100.1"))
		must(t, h.answers("udp", "outside.example", "198.51.100.1"))
		must(t, h.rcode("kubernetes.default.svc.cluster.local", miekg.RcodeServerFailure))
	}
	give(good)
	eventually(t, "in use", custom("in use"))
	checkGood(t)

	for name, tt := range map[string]struct {
		key, text, want string
	}{
		"unknown plugin":          {"bad.override", "log\nnosuchplugin on\n", "bad.override:2 - Error during parsing: Unknown directive 'nosuchplugin'"},
		"unknown plugin, server":  {"bad.server", "x.example:" + port + " {\n  kubernetes cluster.local\n}\n", "bad.server:2 - Error during parsing: Unknown directive 'kubernetes'"},
		"brace missing":           {"bad.server", "x.example:" + port + " {\n  forward . 9.9.9.9\n", "bad.server"},
		"brace too many":          {"bad.override", "log\n}\nx.example {\n whoami\n", "server blocks"},
		"bad argument":            {"bad.override", "rewrite name\n", "rewrite"},
		"zone served twice":       {"bad.server", ".:" + port + " {\n  whoami\n}\n", "already defined"},
		"no such address":         {"bad.server", "x.example:" + port + " {\n  bind 192.0.2.77\n  whoami\n}\n", "192.0.2.77"},
		"broken zone file":        {"bad.server", "x.example:" + port + " {\n  file broken.db\n}\n", "broken.db"},
		"own directive":           {"bad.server", "x.example:" + port + " {\n  kedge 1.2.3.4:53\n}\n", "belongs to Kedge"},
		"import of nothing":       {"bad.override", "import nothing\n", "nothing"},
		"a port that is taken":    {"bad.server", "x.example:" + fmt.Sprint(corp.Port()) + " {\n  whoami\n}\n", "address already in use"},
		"rubbish":                 {"bad.override", "\x00\xff{{{\n", "bad.override"},
		"regular expression":      {"bad.override", "rewrite name regex ( a.example\n", "rewrite"},
		"template that is broken": {"bad.override", "template IN A x.example {\n  answer \"{{ .Nope \"\n}\n", "template"},
	} {
		t.Run(name, func(t *testing.T) {
			give(map[string]string{tt.key: tt.text, "broken.db": "$ORIGIN x.example.\nrubbish\n"})
			eventually(t, "refused", custom("refused"))
			if p := strings.Join(h.Status().Problems, "\n"); !strings.Contains(p, tt.want) {
				t.Errorf("the reason lacks %q: %s", tt.want, p)
			}
			select {
			case <-h.refusals:
			default:
				t.Error("nothing to report in an Event")
			}
			checkGood(t)
			give(good)
			eventually(t, "good again", custom("in use"))
		})
	}

	t.Run("changed zone file", func(t *testing.T) {
		changed := map[string]string{"zone.server": good["zone.server"], "zone.db": strings.ReplaceAll(good["zone.db"], "203.0.113.60", "203.0.113.61")}
		give(changed)
		eventually(t, "new address", func() error { return h.answers("udp", "www.zone.example", "203.0.113.61") })
		give(good)
		eventually(t, "old address", func() error { return h.answers("udp", "www.zone.example", "203.0.113.60") })
	})
	t.Run("upstream changes beside it", func(t *testing.T) {
		h.writeResolv("nameserver 192.0.2.3\n")
		eventually(t, "the new upstream answers", func() error { return h.answers("udp", "outside9.example", "198.51.100.3") })
		must(t, h.answers("udp", "x.corp.example", "203.0.113.7"))
	})
	t.Run("forward of all names replaces the host's", func(t *testing.T) {
		give(map[string]string{"all.override": "forward . " + corp.String() + "\ncache 10\n"})
		eventually(t, "answer", func() error { return h.answers("udp", "outside10.example", "203.0.113.7") })
	})
	t.Run("it does so without any upstream", func(t *testing.T) {
		h.writeResolv("")
		eventually(t, "no upstream", func() error {
			if st := h.Status(); len(st.Upstreams) > 0 {
				return fmt.Errorf("%+v", st)
			}
			return nil
		})
		must(t, h.answers("udp", "outside11.example", "203.0.113.7"))
		if p := strings.Join(h.Status().Problems, "\n"); strings.Contains(p, "nameserver") {
			t.Errorf("problems: %s", p)
		}
		h.writeResolv("nameserver 192.0.2.3\n")
	})
	t.Run("ConfigMap deleted", func(t *testing.T) {
		give(nil)
		eventually(t, "none", custom("none"))
		must(t, h.answers("udp", "x.corp.example", "198.51.100.3"))
		left, err := filepath.Glob(filepath.Join(h.cfg.Dir, "custom*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left on disk: %v, %v", left, err)
		}
	})
}

func TestCustomAtStart(t *testing.T) {
	corp := nameserver(t, "203.0.113.7")
	dir := t.TempDir()
	inDir := func(c *Config) { c.Dir = dir }
	port := freePort(t)
	samePort := func(c *Config) { c.Dir, c.Port = dir, port }
	good := map[string]string{"corp.server": fmt.Sprintf("corp.example:%d {\n  forward . %s\n}\n", port, corp)}

	first := start(t, samePort)
	first.run()
	first.giveCustom(context.Background(), newCustomConfig(good, nil))
	eventually(t, "in use", func() error { return first.answers("udp", "x.corp.example", "203.0.113.7") })
	first.stop()

	t.Run("the last good one is used without the API", func(t *testing.T) {
		h := start(t, samePort)
		h.run()
		eventually(t, "in use", func() error { return h.answers("udp", "x.corp.example", "203.0.113.7") })
	})
	t.Run("and nothing else", func(t *testing.T) { // a server of the first instance must not go on beside it
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // goroutines start late
		for range 10 {
			h := start(t, samePort)
			h.run()
			eventually(t, "in use", func() error {
				if st := h.Status(); st.Custom != "in use" {
					return fmt.Errorf("status: %+v", st)
				}
				return nil
			})
			for range 20 {
				must(t, h.answers("udp", "x.corp.example", "203.0.113.7"))
				must(t, h.answers("tcp", "x.corp.example", "203.0.113.7"))
			}
			h.stop()
		}
	})
	t.Run("a broken one is survived", func(t *testing.T) {
		custom := filepath.Join(dir, customLink)
		must(t, os.WriteFile(filepath.Join(custom, "corp.server"), []byte("corp.example {\n nosuchplugin\n"), 0o600))
		h := start(t, inDir)
		h.upstreams.Store(netip.MustParseAddr("192.0.2.1"), nameserver(t, "198.51.100.1"))
		h.writeResolv("nameserver 192.0.2.1\n")
		h.run()
		eventually(t, "refused", func() error {
			if st := h.Status(); st.Custom != "refused" {
				return fmt.Errorf("status: %+v", st)
			}
			return nil
		})
		must(t, h.answers("udp", "outside.example", "198.51.100.1"))
	})
}

func TestAddressInUse(t *testing.T) {
	h := start(t, nil)
	l, err := net.Listen("tcp", h.cfg.listen()) // without SO_REUSEPORT, like most DNS servers
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	eventually(t, "the reason", func() error {
		if err := h.Ready(); err == nil || !strings.Contains(err.Error(), "another DNS server") {
			return fmt.Errorf("Ready() = %v", err)
		}
		return nil
	})
	l.Close()
	eventually(t, "listening", func() error { return h.rcode("outside.example", miekg.RcodeServerFailure) })
	cancel()
	must(t, <-done)
}

func TestSourceCheck(t *testing.T) {
	l := localAddrs{prefixes: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/56")}, own: []netip.Addr{testDNSAddr}}
	ifaces, err := net.InterfaceAddrs()
	must(t, err)
	for _, a := range ifaces {
		if p := netip.MustParsePrefix(a.String()); !l.contains(p.Addr()) {
			t.Errorf("the node's own address %s is refused", p.Addr())
		}
	}
	for addr, want := range map[string]bool{
		"10.42.3.4": true, "fd00:42::7": true, "10.43.0.10": true, "127.0.0.1": true, "127.3.2.1": true, "::1": true,
		"10.43.0.1": false, "192.0.2.1": false, "2001:db8::1": false, "10.41.255.255": false,
	} {
		if got := l.contains(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: got %v, want %v", addr, got, want)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no address":          func(c *Config) { c.Addr = netip.Addr{} },
		"no directory":        func(c *Config) { c.Dir = "" },
		"no domain":           func(c *Config) { c.ClusterDomain = "" },
		"bad domain":          func(c *Config) { c.ClusterDomain = "a..b" },
		"bad metrics address": func(c *Config) { c.MetricsAddr = "9153" },
	} {
		cfg := Config{ClusterDomain: "cluster.local", Addr: testDNSAddr, Dir: "/d"}
		change(&cfg)
		if _, err := New(cfg, testlog.New(t)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestReloadLeaksNothing: good and refused configurations, again and again, leave no goroutine, no file and no socket behind.
func TestReloadLeaksNothing(t *testing.T) {
	h := start(t, func(c *Config) { c.MetricsAddr = fmt.Sprintf("127.0.0.1:%d", freePort(t)) })
	h.upstreams.Store(netip.MustParseAddr("192.0.2.1"), nameserver(t, "198.51.100.1"))
	h.writeResolv("nameserver 192.0.2.1\n")
	before := runtime.NumGoroutine()
	h.run()
	give := func(i int) {
		for state, text := range map[string]string{
			"in use":  fmt.Sprintf("hosts {\n  203.0.113.%d n.example\n  fallthrough\n}\nforward a.example 127.0.0.1:5\n", i+1),
			"refused": fmt.Sprintf("forward a.example 127.0.0.1:%d\nrewrite name\n", i+1),
		} {
			h.giveCustom(context.Background(), newCustomConfig(map[string]string{"x.override": text}, nil))
			eventually(t, state, func() error {
				if st := h.Status(); st.Custom != state {
					return fmt.Errorf("%+v", st)
				}
				return nil
			})
		}
		must(t, h.answers("udp", "outside.example", "198.51.100.1"))
	}
	count := func() (goroutines, files int) {
		runtime.GC() // upstream objects of discarded instances have finalizers
		entries, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return runtime.NumGoroutine(), len(entries)
	}
	for i := range 3 {
		give(i)
	}
	goroutines, files := count()
	for i := range 20 {
		give(i + 3)
	}
	eventually(t, "no growth", func() error {
		if g, f := count(); g > goroutines+5 || f > files+5 {
			return fmt.Errorf("%d → %d goroutines, %d → %d files\n%s", goroutines, g, files, f, stacks())
		}
		return nil
	})
	h.stop()
	eventually(t, "all goroutines end", func() error {
		if n := runtime.NumGoroutine(); n > before+1 {
			return fmt.Errorf("%d goroutines before, %d after Run:\n%s", before, n, stacks())
		}
		return nil
	})
}

func stacks() []byte {
	buf := make([]byte, 1<<16)
	return buf[:runtime.Stack(buf, true)]
}

func TestMetricsFollowReload(t *testing.T) {
	h := start(t, func(c *Config) { c.MetricsAddr = fmt.Sprintf("127.0.0.1:%d", freePort(t)) })
	h.run()
	reachable := func() error {
		c, err := net.DialTimeout("tcp", h.cfg.MetricsAddr, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	}
	must(t, reachable())
	h.giveCustom(context.Background(), newCustomConfig(map[string]string{"x.override": "log"}, nil))
	eventually(t, "in use", func() error {
		if h.Status().Custom != "in use" {
			return errors.New(h.Status().Custom)
		}
		return nil
	})
	eventually(t, "metrics after a reload", reachable)
}

func TestStdLog(t *testing.T) {
	var others, ours strings.Builder
	before, flags := log.Writer(), log.Flags()
	log.SetOutput(&others)
	defer func() { log.SetOutput(before); log.SetFlags(flags) }()
	restore := captureStdLog(slog.New(slog.NewTextHandler(&ours, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})))
	log.Print("[ERROR] plugin/errors: 2 x. A: timeout")
	log.Print("[INFO] Reloading")
	log.Print("[else] said\nsomebody")
	restore()
	log.SetFlags(0)
	log.Print("[INFO] not ours any more")
	const wantOurs = "level=ERROR msg=\"2 x. A: timeout\" plugin=errors\nlevel=INFO msg=Reloading\n"
	if ours.String() != wantOurs {
		t.Errorf("ours:\n%s", ours.String())
	}
	if want := "[else] said\nsomebody\n[INFO] not ours any more\n"; others.String() != want {
		t.Errorf("others:\n%s", others.String())
	}
}
