// SPDX-License-Identifier: Apache-2.0

package check

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCgroups(t *testing.T) {
	const header = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n"
	for name, test := range map[string]struct {
		text    string
		want    map[string]bool
		wantErr bool
	}{
		"usual":     {header + "cpuset\t3\t1\t1\ncpu\t1\t1\t1\nmemory\t0\t24\t0\n", map[string]bool{"cpuset": true, "cpu": true, "memory": false}, false},
		"empty":     {header, map[string]bool{}, false},
		"truncated": {header + "cpuset\t3\n", nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseCgroups(strings.NewReader(test.text))
			if (err != nil) != test.wantErr {
				t.Fatalf("error %v", err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzParseCgroups(f *testing.F) {
	f.Add("#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t3\t1\t1\n")
	f.Add("a b c")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseCgroups(strings.NewReader(text))
		if err != nil && got != nil {
			t.Errorf("both a result %v and an error %v", got, err)
		}
		for name := range got {
			if name == "" || strings.ContainsAny(name, " \t\n#") && strings.HasPrefix(name, "#") {
				t.Errorf("controller %q", name)
			}
		}
	})
}

func TestParseResolvConf(t *testing.T) {
	dns := netip.MustParseAddr("10.43.0.10")
	for name, test := range map[string]struct {
		text          string
		usable, local string
	}{
		"usual":        {"# by dhcp\nnameserver 192.168.1.1\nsearch lan\noptions ndots:1\n", "192.168.1.1", ""},
		"stub":         {"nameserver 127.0.0.53\n", "", "127.0.0.53"},
		"mixed":        {"nameserver ::1\nnameserver 9.9.9.9\nnameserver 10.43.0.10\n", "9.9.9.9", "::1, 10.43.0.10"},
		"mapped":       {"nameserver ::ffff:127.0.0.1\n", "", "127.0.0.1"},
		"not a number": {"nameserver router\nnameserver\n", "", ""},
		"empty":        {"", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseResolvConf(strings.NewReader(test.text), dns)
			if err != nil {
				t.Fatal(err)
			}
			if addrList(got.usable) != test.usable || addrList(got.local) != test.local {
				t.Errorf("got usable %v, local %v; want %q, %q", got.usable, got.local, test.usable, test.local)
			}
		})
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan")
	f.Add("nameserver fe80::1%eth0\noptions ndots:99999999999")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseResolvConf(strings.NewReader(text), netip.MustParseAddr("10.43.0.10"))
		if err != nil {
			return
		}
		for _, a := range got.usable {
			if !a.IsValid() || a.IsLoopback() || a.IsUnspecified() {
				t.Errorf("%s counts as usable", a)
			}
		}
	})
}

const (
	tcpHeader = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	tcpLines  = "   0: 0100007F:094B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0\n" +
		"   1: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0\n" +
		"   2: 0200A8C0:192B 0300A8C0:C350 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0\n"
	tcp6Lines = "   0: 00000000000000000000000000000000:280A 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0 100 0 0 10 0\n" +
		"   1: 00000000000000000000000001000000:280A 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 445 1 0 100 0 0 10 0\n" +
		"   1: 0000000000000000FFFF00000200A8C0:280A 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 446 1 0 100 0 0 10 0\n"
	udpLines = "  100: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0 0\n" +
		"  101: 0200A8C0:0035 0300A8C0:0035 01 00000000:00000000 00:00000000 00000000     0        0 555 2 0 0\n"
)

func TestSockets(t *testing.T) {
	dir := t.TempDir() // without udp6, as if IPv6 were off
	for name, text := range map[string]string{"tcp": tcpHeader + tcpLines, "tcp6": tcpHeader + tcp6Lines, "udp": tcpHeader + udpLines} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for proto, want := range map[string]string{
		"tcp": "127.0.0.1 2379 111, 0.0.0.0 6443 222, :: 10250 444, ::1 10250 445, 192.168.0.2 10250 446", // connections are left out
		"udp": "0.0.0.0 8472 0",
	} {
		got, err := sockets(dir, proto)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, s := range got {
			list = append(list, fmt.Sprintf("%s %d %d", s.addr, s.port, s.inode))
		}
		if strings.Join(list, ", ") != want {
			t.Errorf("%s: got %s, want %s", proto, list, want)
		}
	}
	if _, err := sockets(t.TempDir(), "tcp"); err == nil {
		t.Error("no error without /proc/net/tcp")
	}
}

func TestParseSocketsErrors(t *testing.T) {
	for name, line := range map[string]string{
		"short":      "0: 0100007F:094B 00000000:0000 0A 00000000:00000000",
		"no hex":     strings.Replace(tcpLines, "0100007F", "xyz", 1),
		"odd length": strings.Replace(tcpLines, "0100007F", "0100", 1),
		"no port":    strings.Replace(tcpLines, "0100007F:094B", "0100007F", 1),
		"big port":   strings.Replace(tcpLines, ":094B", ":1094B", 1),
		"no inode":   strings.Replace(tcpLines, " 111 ", " x ", 1),
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := parseSockets(strings.NewReader(tcpHeader+line), "tcp"); err == nil {
				t.Errorf("no error, but %v", got)
			}
		})
	}
}

func FuzzParseSockets(f *testing.F) {
	f.Add(tcpHeader + tcpLines)
	f.Add(tcpHeader + tcp6Lines)
	f.Add(tcpHeader + udpLines)
	f.Fuzz(func(t *testing.T, text string) {
		for _, proto := range []string{"tcp", "udp"} {
			got, err := parseSockets(strings.NewReader(text), proto)
			for _, s := range got {
				if err == nil && (!s.addr.IsValid() || s.addr.Is4In6() || s.port < 0 || s.port > 65535) {
					t.Errorf("socket %+v", s)
				}
			}
		}
	})
}

func TestSocketInode(t *testing.T) {
	for target, want := range map[string]uint64{"socket:[123]": 123, "pipe:[123]": 0, "socket:[]": 0, "/dev/null": 0} {
		if got, ok := socketInode(target); got != want || ok != (want != 0) {
			t.Errorf("%s: got %d, %t", target, got, ok)
		}
	}
}

// TestPortsProbe looks at real sockets: one of this process, one of another, and a free one.
func TestPortsProbe(t *testing.T) {
	listen := func() *net.TCPListener {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	port := func(l *net.TCPListener, addr string) Port {
		return Port{Port: l.Addr().(*net.TCPAddr).Port, Proto: "tcp", Addr: netip.MustParseAddr(addr), Purpose: "test"}
	}
	mine, theirs, freed := listen(), listen(), listen()
	defer mine.Close()
	freed.Close()

	// Another program takes over the second listener: it inherits the socket and this process closes its own.
	inherited, err := theirs.File()
	if err != nil {
		t.Fatal(err)
	}
	other := exec.CommandContext(t.Context(), "sleep", "60")
	other.ExtraFiles = []*os.File{inherited}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := other.Process.Kill(); err == nil {
			other.Wait() // killed, and nothing else
		}
	})
	theirs.Close()
	inherited.Close()

	o := Options{Ports: []Port{port(mine, "0.0.0.0"), port(theirs, "127.0.0.1"), port(freed, "127.0.0.1"), port(mine, "127.0.0.2")}, ExpectRunning: true}
	got := probePorts(t.Context(), o.withDefaults())
	if got.Status != Fail {
		t.Errorf("status %s", got.Status)
	}
	checkWorst(t, got)
	for i, w := range []want{
		{Pass, fmt.Sprintf("in use by a running kedge (check.test, pid %d)", os.Getpid()), ""},
		{Fail, fmt.Sprintf("wanted for test, in use by sleep (pid %d) on 127.0.0.1", other.Process.Pid), "ss -lntp"},
		{Pass, "free", ""},
		{Pass, "free", ""}, // the same port on another address
	} {
		w.check(t, got.Items[i].Result)
	}

	o.ExpectRunning = false
	want{Warning, "in use by a running kedge", "kedge status"}.check(t, probePorts(t.Context(), o.withDefaults()).Items[0].Result)
}

func TestReportRoundTrip(t *testing.T) {
	report := newReport(Probes(), nil)
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report, back); diff != "" {
		t.Error(diff)
	}
}
