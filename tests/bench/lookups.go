// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	_ "embed" // the objects below
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"

	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	corednsImage = "kedge.test/coredns:1"
	clusterDNS   = "10.43.0.10:53"
	clusterName  = "kubernetes.default.svc.cluster.local"
	outsideName  = "outside.example"
	dnsWorkers   = 16
)

// dnsKinds are the names that are looked up.
func dnsKinds() []struct{ kind, name, text string } {
	return []struct{ kind, name, text string }{
		{"cluster", clusterName, "name of the cluster"},
		{"outside", outsideName, "outside name, cached"},
	}
}

func dnsFigures() []figure {
	var list []figure
	for _, k := range dnsKinds() {
		name, text := "dns "+k.kind+" ", "dns, "+k.text+": "
		list = append(list,
			figure{name + "lookups", text + "lookups a second (more is better)", ""},
			figure{name + "p50", text + "median", "µs"},
			figure{name + "p99", text + "p99", "µs"},
			figure{name + "one", text + "median of one worker", "µs"},
			figure{name + "cpu", text + "CPU of the servers for 10,000", "s"},
			figure{name + "all cpu", text + "CPU of everything for 10,000", "s"})
	}
	return list
}

// lookups measures the cluster DNS from the client's pod.
func (n *netbed) lookups(ctx context.Context, o options, rec *recorder) (err error) {
	stop, err := resolver(net.JoinHostPort(n.node.Bed().Gateway(), "53"))
	if err != nil {
		return fmt.Errorf("the resolver of the machines: %w", err)
	}
	defer func() { err = errors.Join(err, stop()) }()
	if n.kedge == nil {
		if err := n.installCoreDNS(ctx); err != nil {
			return fmt.Errorf("CoreDNS: %w", err)
		}
	}
	if err := n.resolves(ctx); err != nil {
		return err
	}
	for range rounds {
		for _, k := range dnsKinds() {
			if err := n.askNames(ctx, o, rec, "dns "+k.kind+" ", k.name); err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
		}
	}
	return nil
}

// resolves waits until both names are known, for good: all replicas have to be.
func (n *netbed) resolves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	if n.kedge == nil {
		if err := testbed.Wait(ctx, "CoreDNS", func(ctx context.Context) error {
			d, err := n.api.AppsV1().Deployments(metav1.NamespaceSystem).Get(ctx, "coredns", metav1.GetOptions{})
			if err == nil && d.Status.ReadyReplicas < *d.Spec.Replicas {
				err = fmt.Errorf("%d replicas are ready", d.Status.ReadyReplicas)
			}
			return err
		}); err != nil {
			return err
		}
	}
	for _, k := range dnsKinds() {
		if err := testbed.Wait(ctx, "the name "+k.name, func(ctx context.Context) error {
			_, err := n.lookup(ctx, k.name, 1, 200*time.Millisecond)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (n *netbed) lookup(ctx context.Context, name string, workers int, d time.Duration) (answer, error) {
	l, err := n.client.ask(ctx, "lookups", clusterDNS, url.Values{"for": {d.String()}, "name": {name}, "workers": {strconv.Itoa(workers)}})
	if err == nil && l.Failed > 0 {
		err = fmt.Errorf("%d lookups failed, %d did not: %s", l.Failed, l.Done, l.Failure)
	}
	return l, err
}

// askNames records the figures of a name.
func (n *netbed) askNames(ctx context.Context, o options, rec *recorder, figure, name string) error {
	one, err := n.lookup(ctx, name, 1, o.span/2)
	if err != nil {
		return err
	}
	rec.add(figure+"one", float64(one.P50.Microseconds()))
	server, all, err := n.cpu()
	if err != nil {
		return err
	}
	l, err := n.lookup(ctx, name, dnsWorkers, o.span)
	if err != nil {
		return err
	}
	serverNow, allNow, err := n.cpu()
	if err != nil {
		return err
	}
	rec.add(figure+"lookups", float64(int(l.PerSecond)))
	rec.add(figure+"p50", float64(l.P50.Microseconds()))
	rec.add(figure+"p99", float64(l.P99.Microseconds()))
	each := 10000 / float64(l.Done)
	rec.add(figure+"cpu", (serverNow-server)*each)
	rec.add(figure+"all cpu", (allNow-all)*each)
	return nil
}

// cpu is the processor time of the processes that answer DNS queries, Kedge's on the client's machine, and of both machines as a whole.
func (n *netbed) cpu() (servers, all float64, err error) {
	name := "coredns"
	if n.kedge != nil {
		name = "kedge [node]"
	}
	hosts := []*host{n.agent}
	if n.kedge == nil {
		hosts = append(hosts, n.server)
	}
	for _, h := range hosts {
		cpu, err := h.cpuOf()
		if err != nil {
			return 0, 0, err
		}
		servers += increase(nil, cpu)[name]
	}
	for _, h := range []*host{n.agent, n.server} {
		cpu, err := h.cpuSeconds()
		if err != nil {
			return 0, 0, err
		}
		all += cpu
	}
	return servers, all, nil
}

//go:embed coredns.yaml
var corednsObjects []byte

// installCoreDNS creates what kubeadm does.
func (n *netbed) installCoreDNS(ctx context.Context) error {
	client, err := dynamic.NewForConfig(n.config)
	if err != nil {
		return err
	}
	objects := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(corednsObjects), 4096)
	for {
		var u unstructured.Unstructured
		if err := objects.Decode(&u); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		plural, _ := meta.UnsafeGuessKindToResource(u.GroupVersionKind())
		if _, err := client.Resource(plural).Namespace(u.GetNamespace()).Create(ctx, &u, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
}

// resolver is the machines' own name server, which knows one name. It ends when the function is called that it returns.
func resolver(addr string) (stop func() error, err error) {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return nil, err
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		if len(q.Question) == 1 && q.Question[0].Name == dns.Fqdn(outsideName) {
			m.Rcode = dns.RcodeSuccess
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(192, 0, 2, 7)}}
		}
		_ = w.WriteMsg(m) // who asked asks again
	})}
	var serving errgroup.Group
	serving.Go(s.ActivateAndServe)
	return func() error { return errors.Join(s.Shutdown(), serving.Wait()) }, nil
}
