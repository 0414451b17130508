// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/kedge-io/kedge/tests/testlog"
)

// limit is what the product promises from the moment in which a server falls silent.
const limit = 2 * time.Second

func TestPreference(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	x, y, z := newAPIServer(t, a, "x", "127.0.0.1:0"), newAPIServer(t, a, "y", "127.0.0.1:0"), newAPIServer(t, a, "z", "127.0.0.1:0")
	tests := []struct {
		name  string
		local string
		join  string
		list  []string
		want  []*apiServer // the order of preference
	}{
		{"agents go by the hash", "", "", []string{x.address, y.address, z.address}, []*apiServer{y, z, x}},
		{"the local server is first", z.address, "", []string{x.address, y.address, z.address}, []*apiServer{z, y, x}},
		{"the local server need not be in the list", z.address, "", []string{x.address, y.address}, []*apiServer{z, y, x}},
		{"the join address is last", "", y.address, []string{x.address, z.address}, []*apiServer{z, x, y}},
		{"the join address may be in the list", "", z.address, []string{x.address, z.address}, []*apiServer{z, x}},
		{"only the join address", "", x.address, nil, []*apiServer{x}},
	}
	node := nodeFor(y.address, z.address, x.address)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := start(t, a, Config{NodeName: node, Local: test.local, Join: test.join}, nil)
			h.use(test.list...)
			if len(test.list) > 0 { // the join address may have been the only one before the list came
				h.Balancer.mu.Lock()
				h.Balancer.active = h.Balancer.servers[0]
				h.Balancer.mu.Unlock()
			}
			h.settled(test.want[0].address)
			h.mustConnect().is(test.want[0].name)
			conn, err := h.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var order []string
			for i, s := range h.Servers() {
				order = append(order, s.Address)
				if want := (Server{Address: test.want[i].address, Healthy: s.Healthy, Reason: s.Reason, Local: test.want[i].address == test.local,
					Active: i == 0, Connections: 2 * (1 - min(i, 1))}); s != want {
					t.Errorf("got %+v, want %+v", s, want)
				}
			}
			if len(order) != len(test.want) {
				t.Errorf("got %v", order)
			}
		})
	}
}

// The order differs between nodes, evenly.
func TestPlaces(t *testing.T) {
	servers := []string{"10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"}
	first := map[string]int{}
	for i := range 300 {
		node := fmt.Sprint("node-", i)
		first[slices.MinFunc(servers, func(x, y string) int {
			if place(node, x) < place(node, y) {
				return -1
			}
			return 1
		})]++
	}
	for _, s := range servers {
		if first[s] < 70 || first[s] > 130 {
			t.Errorf("%d of 300 nodes prefer %s", first[s], s)
		}
	}
}

// Each way for a server to fail takes the connections to it away within the promised time, and new ones get the other server.
func TestFailOver(t *testing.T) {
	a := newAuthority(t)
	for _, name := range []string{"silent", "frozen", "frozen with a full backlog"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var address, server string
			var fail func()
			if name == "silent" {
				s := newAPIServer(t, a, "one", "127.0.0.1:0")
				address, server, fail = s.address, s.name, s.hold
			} else {
				process, at := startChild(t, a)
				address, server = at, "child"
				fail = func() {
					freeze(t, process)
					if name != "frozen" {
						fillBacklog(t, address)
					}
				}
			}
			two := newAPIServer(t, a, "two", "127.0.0.1:0")
			h := start(t, a, Config{NodeName: nodeFor(address, two.address)}, nil)
			h.use(address, two.address)
			h.settled(address)
			s := h.mustConnect()
			s.is(server)
			inside, err := h.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer inside.Close()
			eventually(t, "both connections are counted", func() bool { return h.server(address).Connections == 2 })

			fail()
			failed := time.Now()
			if err := s.ended(30 * time.Second); err != nil {
				t.Fatal(err)
			}
			took := time.Since(failed)
			h.mustConnect().is("two")
			t.Logf("closed after %v, connected again after %v", took, time.Since(failed))
			if took > limit {
				t.Errorf("the connection was closed after %v", took)
			}
			inside.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := inside.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection of Dial is still open: %v", err)
			}
			if got := h.server(address); got.Healthy || got.Reason == "" || got.Active || got.Connections != 0 {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// fillBacklog connects until the kernel leaves connections unanswered.
func fillBacklog(t *testing.T, address string) {
	t.Helper()
	for range 100 {
		conn, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the backlog does not become full")
}

// A port that is closed costs a new connection nothing, one that swallows everything little: it does not wait for probes.
func TestConnectPassesOver(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	two := newAPIServer(t, a, "two", "127.0.0.1:0")
	swallowing, at := startChild(t, a)
	freeze(t, swallowing)
	fillBacklog(t, at)
	for name, address := range map[string]string{"closed": closedPort(t), "swallowing": at} {
		t.Run(name, func(t *testing.T) {
			// Nothing is known from probes: they never end.
			probe := func(ctx context.Context, _ string) error { <-ctx.Done(); return nil }
			h := start(t, a, Config{NodeName: nodeFor(address, two.address), Probe: probe}, func(b *Balancer) { b.timing.timeout = time.Hour })
			h.use(address, two.address)
			begin := time.Now()
			h.mustConnect().is("two")
			if took := time.Since(begin); took > time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// A server that dies ends its connections itself; the clients come back before any probe has noticed.
func TestDeath(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	h := start(t, a, Config{Local: one.address}, nil)
	h.use(two.address)
	h.settled(one.address)
	s := h.mustConnect()
	s.is("one")
	died := time.Now()
	one.die()
	if err := s.ended(limit); err != nil {
		t.Fatal(err)
	}
	h.mustConnect().is("two")
	if took := time.Since(died); took > time.Second {
		t.Errorf("took %v", took)
	}
	h.settled(two.address)
	if took := time.Since(died); took > limit {
		t.Errorf("noticed after %v", took)
	}
}

// A server whose datastore is away answers; it is left when that lasts.
func TestNotReady(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	h := start(t, a, Config{Local: one.address}, nil)
	h.use(two.address)
	h.settled(one.address)
	s := h.mustConnect()
	s.is("one")
	one.noEtcd.Store(true)
	if err := s.ended(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	h.mustConnect().is("two")
	if got := h.server(one.address); got.Healthy || !strings.Contains(got.Reason, "datastore") {
		t.Errorf("got %+v", got)
	}
}

// Without a server that is ready connections stay and new ones get what there is.
func TestNoneReady(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	log := &lines{}
	h := start(t, a, Config{Local: one.address, Logger: log.logger()}, nil)
	h.use(two.address)
	h.settled(one.address)
	s := h.mustConnect()
	s.is("one")
	one.status.Store(500)
	two.status.Store(500)
	eventually(t, "both are known not to be ready", func() bool { return !h.server(one.address).Healthy && !h.server(two.address).Healthy })
	probes := one.probes.Load()
	eventually(t, "some probes more", func() bool { return one.probes.Load() > probes+3 })
	s.is("one")
	h.mustConnect().is("one")
	if got := h.server(one.address).Reason; got != "not ready: etcd, shutdown" {
		t.Errorf("reason %q", got)
	}
	one.die()
	h.mustConnect().is("two")
	two.status.Store(200)
	h.settled(two.address)
	if got := log.count("no server is ready"); got != 1 {
		t.Errorf("told %d times that none is ready:\n%s", got, log)
	}
	two.die()
	if s, err := h.connect(5 * time.Second); err == nil {
		t.Errorf("connected to %v", s.conn.RemoteAddr())
	}
	if _, err := h.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), two.address) {
		t.Errorf("got error %v", err)
	}
}

// quick shortens what coming home takes.
func quick(b *Balancer) {
	b.timing.interval, b.timing.rare = 20*time.Millisecond, 40*time.Millisecond
	b.timing.home, b.timing.spread, b.timing.quiet = 300*time.Millisecond, 0, 500*time.Millisecond
}

func TestComingHome(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	h := start(t, a, Config{Local: one.address}, quick)
	h.use(two.address)
	h.settled(one.address)
	one.hold()
	h.settled(two.address)
	idle, busy := h.mustConnect(), h.mustConnect()
	idle.is("two")
	stop := make(chan struct{})
	var working sync.WaitGroup
	working.Go(func() { // a request every 10 ms
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				if got, err := busy.who(); err != nil || got != "two" {
					t.Errorf("the busy one got %q: %v", got, err)
					return
				}
			}
		}
	})
	one.release()
	back := time.Now()
	h.settled(one.address)
	if took := time.Since(back); took < 300*time.Millisecond {
		t.Errorf("came home after %v", took)
	}
	if err := idle.ended(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	h.mustConnect().is("one")
	// The busy one may work on.
	if got := h.server(two.address).Connections; got != 1 {
		t.Errorf("%d connections left", got)
	}
	close(stop)
	working.Wait()
	if err := busy.ended(10 * time.Second); err != nil {
		t.Fatal(err)
	}
}

func TestNeverQuiet(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	one.hold()
	h := start(t, a, Config{Local: one.address}, func(b *Balancer) { quick(b); b.timing.force = 300 * time.Millisecond })
	h.use(two.address)
	h.settled(two.address)
	busy := h.mustConnect()
	one.release()
	eventually(t, "the connection is closed although it is in use all the time", func() bool {
		_, err := busy.who()
		return err != nil
	})
	h.mustConnect().is("one")
}

func TestSetServers(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	file := filepath.Join(t.TempDir(), "new", "servers.json")
	var changes atomic.Int64
	h := start(t, a, Config{Join: one.address, File: file, NodeName: nodeFor(one.address, two.address), Changed: func() { changes.Add(1) }}, nil)
	h.settled(one.address)
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file without a list: %v", err)
	}
	h.use()
	h.settled(one.address)

	h.use(two.address, one.address)
	h.settled(one.address)
	s := h.mustConnect()
	s.is("one")
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("file: %v %v", info, err)
	}
	if got, err := ReadFile(file); err != nil || len(got) != 2 {
		t.Errorf("got %v %v", got, err)
	}
	before := changes.Load()
	h.use(one.address, two.address, two.address) // the same in other words
	h.use()
	if again, err := os.Stat(file); err != nil || !os.SameFile(info, again) {
		t.Errorf("written without a change: %v", err)
	}
	if got := changes.Load(); got != before {
		t.Errorf("%d changes told without one", got-before)
	}

	// What is not an address does not keep the rest from being used.
	err = h.SetServers([]string{two.address, "nonsense", h.cfg.Listen})
	if err == nil || !strings.Contains(err.Error(), `"nonsense"`) {
		t.Errorf("got error %v", err)
	}
	if got, err := ReadFile(file); err != nil || !slices.Equal(got, []string{two.address}) {
		t.Errorf("got %v %v", got, err)
	}
	// The join address stays, as the last resort: it is another one now.
	if got := h.Servers(); len(got) != 2 || got[0].Address != two.address {
		t.Errorf("got %+v", got)
	}
	s.is("one")
	if changes.Load() == before {
		t.Error("a change was not told")
	}

	// A file that cannot be written is written the next time.
	if err := os.RemoveAll(filepath.Dir(file)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Dir(file), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.SetServers([]string{one.address}); err == nil {
		t.Error("no error")
	}
	if err := os.Remove(filepath.Dir(file)); err != nil {
		t.Fatal(err)
	}
	h.use(one.address)
	if got, err := ReadFile(file); err != nil || !slices.Equal(got, []string{one.address}) {
		t.Errorf("got %v %v", got, err)
	}
}

// Connections to a server that is no longer in the list are closed, though it is well.
func TestRemoved(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	h := start(t, a, Config{NodeName: nodeFor(one.address, two.address)}, nil)
	if _, err := h.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "no server is known") {
		t.Errorf("got error %v", err)
	}
	h.use(one.address, two.address)
	h.settled(one.address)
	s := h.mustConnect()
	s.is("one")
	h.use(two.address)
	if err := s.ended(time.Second); err != nil {
		t.Fatal(err)
	}
	h.mustConnect().is("two")
	if got := h.Servers(); len(got) != 1 || got[0].Connections != 1 {
		t.Errorf("got %+v", got)
	}
}

// The list of the last run is used at once; a damaged one costs a line in the log.
func TestFile(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	tests := []struct {
		name, text string
		want       string
		damaged    bool
	}{
		{"good", `{"servers":["` + two.address + `"]}`, "two", false},
		{"from a later version", `{"servers":["` + two.address + `"],"more":1}`, "two", false},
		{"empty", ``, "one", true},
		{"cut off", `{"servers":["` + two.address, "one", true},
		{"zeros", strings.Repeat("\x00", 100), "one", true},
		{"one bad address", `{"servers":["` + two.address + `","10.0.0.1"]}`, "two", true},
		{"of another kind", `["` + two.address + `"]`, "one", true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "servers.json")
			if err := os.WriteFile(file, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			log := &lines{}
			h := start(t, a, Config{Join: one.address, File: file, Logger: log.logger()}, nil)
			h.mustConnect().is(test.want)
			if got := log.count("damaged"); got != map[bool]int{true: 1}[test.damaged] {
				t.Errorf("log:\n%s", log)
			}
			h.use(two.address)
			if got, err := ReadFile(file); err != nil || !slices.Equal(got, []string{two.address}) {
				t.Errorf("got %v %v", got, err)
			}
		})
	}
}

// An agent that was off while all servers changed finds the new ones by the name it joined with, wherever that leads by now.
func TestJoinName(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one := newAPIServer(t, a, "one", "127.0.0.2:0")
	_, port, err := net.SplitHostPort(one.address)
	if err != nil {
		t.Fatal(err)
	}
	two := newAPIServer(t, a, "two", net.JoinHostPort("127.0.0.3", port))
	names := nameserver(t)
	names.set("127.0.0.9", "127.0.0.2")
	file := filepath.Join(t.TempDir(), "servers.json")
	if err := writeList(file, []string{closedPort(t), closedPort(t)}); err != nil {
		t.Fatal(err)
	}
	resolver := names.resolver()
	join := net.JoinHostPort("api.example", port)
	probe := func(ctx context.Context, address string) error {
		conn, err := dialHost(ctx, &net.Dialer{}, resolver, time.Second, address)
		if err == nil {
			conn.Close()
		}
		return err
	}
	h := start(t, a, Config{Join: join, File: file, Probe: probe}, func(b *Balancer) { quick(b); b.resolver = resolver })
	begin := time.Now()
	h.mustConnect().is("one")
	if took := time.Since(begin); took > limit {
		t.Errorf("took %v", took)
	}
	h.settled(join)
	names.set("127.0.0.3")
	h.mustConnect().is("two")
	h.use(two.address)
	h.settled(two.address)
}

// names is a DNS server that knows one name.
type names struct {
	address string
	mu      sync.Mutex
	answer  []string
}

func nameserver(t *testing.T) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &names{address: conn.LocalAddr().String()}
	started := make(chan struct{})
	server := &dns.Server{PacketConn: conn, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, ip := range n.answer {
			if r.Question[0].Qtype == dns.TypeA {
				m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(ip)})
			}
		}
		w.WriteMsg(m)
	})}
	var running sync.WaitGroup
	running.Go(func() { server.ActivateAndServe() })
	<-started
	t.Cleanup(func() { server.Shutdown(); running.Wait() })
	return n
}

func (n *names) set(answer ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answer = answer
}

func (n *names) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", n.address)
	}}
}

func TestNew(t *testing.T) {
	good := Config{Listen: "127.0.0.1:6444", Local: "10.0.0.1:6443", Join: "api.example:6443", File: filepath.Join(t.TempDir(), "f"),
		Probe: func(context.Context, string) error { return nil }, Logger: testlog.New(t)}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"no probe":                           func(c *Config) { c.Probe = nil },
		`join address: "api.example" is not`: func(c *Config) { c.Join = "api.example" },
		`local server: "10.0.0.1:0": the po`: func(c *Config) { c.Local = "10.0.0.1:0" },
		`listen on: "" is not`:               func(c *Config) { c.Listen = "" },
		"127.0.0.1:6444 is its own address":  func(c *Config) { c.Join = "127.0.0.1:6444" },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got error %v", want, err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	good.Listen = listener.Addr().String()
	b, err := New(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("got error %v", err)
	}
}

func FuzzFile(f *testing.F) {
	for _, text := range []string{
		`{"servers":["10.0.0.1:6443","[2001:db8::1]:6443","api.example:6443"]}`, `{"servers":["a:1","a:1","A.:01"]}`, `{"servers":null}`,
		`{"servers":["[::ffff:10.0.0.1]:1","[fe80::1%eth0]:1","0.0.0.0:1",":1","a:0","a:65536"]}`, `[]`, `{`, "\x00",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		servers, err := decodeList(data)
		if err != nil && err.Error() == "" {
			t.Error("an error without a text")
		}
		file := filepath.Join(t.TempDir(), "f")
		if err := writeList(file, servers); err != nil {
			t.Fatal(err)
		}
		again, err := ReadFile(file)
		if err != nil || !slices.Equal(again, servers) {
			t.Errorf("wrote %q, read %q: %v", servers, again, err)
		}
		for _, s := range servers {
			host, _, err := net.SplitHostPort(s)
			if err != nil {
				t.Error(err)
			}
			if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
				t.Errorf("%q", s)
			}
		}
	})
}

// No goroutine and no connection outlives Run, whatever state they are in.
func TestNothingIsLeft(t *testing.T) {
	a := newAuthority(t)
	one, two := newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0")
	process, swallowing := startChild(t, a)
	freeze(t, process)
	fillBacklog(t, swallowing)
	h := start(t, a, Config{Local: swallowing, Join: "localhost:1"}, nil)
	h.use(one.address, two.address)
	h.mustConnect()
	h.mustConnect()
	one.hold()
	two.hold()
	for range 5 {
		conn, err := net.Dial("tcp", h.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if _, err := h.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.stop()
	noGoroutines(t)
	if _, err := h.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("got error %v", err)
	}
	noGoroutines(t)
}
