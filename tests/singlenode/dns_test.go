// SPDX-License-Identifier: Apache-2.0

package singlenode

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/kedge-io/kedge/tests/cluster"
)

// outside is the name server that the machines' resolv.conf names: it knows one name.
func outside(t *testing.T, addr string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		if len(q.Question) == 1 && q.Question[0].Name == "outside.example." {
			m.Rcode = dns.RcodeSuccess
			if q.Question[0].Qtype == dns.TypeA {
				m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: net.IPv4(192, 0, 2, 7)}}
			}
		}
		_ = w.WriteMsg(m) // the client asks again
	})}
	done := make(chan error, 1)
	go func() { done <- s.ActivateAndServe() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.ShutdownContext(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestDNS(t *testing.T) {
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ClientPod)
	n.Ready("client")
	lookup := func(name, want string) func() error {
		return func() error {
			got, err := n.Try("exec", "client", "--", "sh", "-c", "nslookup "+name+" 2>&1 || true")
			if err == nil && !strings.Contains(got, want) {
				err = fmt.Errorf("want %s: %s", want, got)
			}
			return err
		}
	}
	if got := n.Kubectl("-n", "kube-system", "get", "service", "kube-dns", "-o", "jsonpath={.spec.clusterIP}"); got != "10.43.0.10" {
		t.Errorf("kube-dns has the address %s", got)
	}
	if got := n.InPod("client", "cat /etc/resolv.conf"); !strings.Contains(got, "nameserver 10.43.0.10") || !strings.Contains(got, n.NS+".svc.cluster.local") {
		t.Errorf("resolv.conf of a pod: %q", got)
	}
	for _, name := range []string{"kubernetes.default", "kubernetes.default.svc.cluster.local", "kube-dns.kube-system.svc.cluster.local"} {
		want := "10.43.0.1"
		if strings.HasPrefix(name, "kube-dns") {
			want = "10.43.0.10"
		}
		// busybox's nslookup takes no search list into account: the C library does.
		if got := n.InPod("client", "ping -c1 -W1 "+name+" 2>&1 | head -1"); !strings.Contains(got, "("+want+")") {
			t.Errorf("%s: %s", name, got)
		}
	}
	outside(t, n.Bed().Gateway())
	n.Eventually("an outside name", lookup("outside.example", "192.0.2.7"))
	n.Eventually("NXDOMAIN for what does not exist", lookup("nothing.example", "NXDOMAIN"))
	out, err := n.Exec(n.Within(minute), "busybox", "nslookup", "kubernetes.default.svc.cluster.local", "10.43.0.10")
	if err != nil || !strings.Contains(out, "10.43.0.1") {
		t.Errorf("lookup by the node: %s, %v", out, err)
	}

	n.Kubectl("-n", "kube-system", "create", "configmap", "coredns-custom",
		"--from-literal=fixed.override=hosts {\n  192.0.2.50 fixed.example\n  fallthrough\n}",
		"--from-literal=zone.server=corp.example:53 {\n  hosts {\n    192.0.2.60 app.corp.example\n  }\n}")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), minute)
		defer cancel()
		if _, err := n.Server.Kubectl(ctx, "-n", "kube-system", "delete", "configmap", "coredns-custom"); err != nil {
			t.Error(err)
		}
	})
	n.Eventually("the name of an override", lookup("fixed.example", "192.0.2.50"))
	n.Eventually("the name of a server block", lookup("app.corp.example", "192.0.2.60"))
	n.Eventually("an outside name still", lookup("outside.example", "192.0.2.7"))
	// A mistake in it must not take DNS down.
	n.Kubectl("-n", "kube-system", "patch", "configmap", "coredns-custom", "-p", `{"data":{"fixed.override":"nonsense {"}}`)
	n.Eventually("an event that tells the mistake", func() error {
		got, err := n.Try("-n", "kube-system", "get", "events", "-o", "jsonpath={.items[*].message}")
		if log, logErr := n.Log(); err == nil && !strings.Contains(got+log, "nonsense") {
			err = fmt.Errorf("neither an event nor the log names it (%w): %s", logErr, got)
		}
		return err
	})
	n.Eventually("cluster names still", lookup("kubernetes.default.svc.cluster.local", "10.43.0.1"))
}
