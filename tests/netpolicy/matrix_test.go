// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
	"github.com/kedge-io/kedge/tests/testbed"
)

// prober is a test server that tries things.
type prober struct {
	name    string // a pod's, a node's or "outside"
	pod     *corev1.Pod
	node    string
	machine *testbed.Machine
	dir     string // of its socket
}

// target is something that all probers try, and who it is to policies.
type target struct {
	name     string // what is answered, too
	kind     string // as the test server calls it
	addr     netip.AddrPort
	protocol corev1.Protocol
	port     int32 // of the pod
	pod      *corev1.Pod
	node     string
	at       netip.Addr // of the pod, which addr is not if it is that of a Service
}

func (t target) service() bool { return t.addr.Addr() != t.at }

func (t target) String() string {
	via := ""
	if t.service() {
		via = " by its Service"
	}
	return fmt.Sprintf("%s %s %s%s", t.name, t.kind, t.addr, via)
}

func (s *site) allProbers() []prober {
	probers := []prober{{name: "outside", machine: s.outside, dir: path.Join(probeDir, "outside")}}
	for i := range s.base.Pods {
		p := &s.base.Pods[i]
		probers = append(probers, prober{name: p.Namespace + "/" + p.Name, pod: p, node: p.Spec.NodeName, machine: s.machine(p.Spec.NodeName), dir: socketDir(p)})
	}
	return probers
}

func (s *site) machine(node string) *testbed.Machine {
	for _, n := range s.c.Nodes() {
		if n.Name() == node {
			return n.Machine
		}
	}
	return nil
}

// allTargets are the ports of all pods and nodes and of what is outside, Services, and the cluster's DNS.
func (s *site) allTargets(ctx context.Context) ([]target, error) {
	var targets []target
	both := func(t target, port int32) {
		for kind, protocol := range map[string]corev1.Protocol{"tcp": corev1.ProtocolTCP, "udp": corev1.ProtocolUDP} {
			t := t
			t.kind, t.protocol, t.addr = kind, protocol, netip.AddrPortFrom(t.addr.Addr(), uint16(port))
			targets = append(targets, t)
		}
	}
	for i := range s.base.Pods {
		p := &s.base.Pods[i]
		for _, ip := range p.Status.PodIPs {
			a := netip.MustParseAddr(ip.IP)
			if p.Spec.HostNetwork {
				s.base.Others = append(s.base.Others, a)
			}
			for _, port := range oracle.Ports {
				both(target{name: p.Namespace + "/" + p.Name, pod: p, node: p.Spec.NodeName, addr: netip.AddrPortFrom(a, 0), at: a, port: port}, port)
			}
		}
		if !slices.Contains(servicePods(), p.Namespace+"/"+p.Name) {
			continue
		}
		svc, err := s.client.CoreV1().Services(p.Namespace).Get(ctx, "to-"+p.Name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		for _, ip := range svc.Spec.ClusterIPs {
			a := netip.MustParseAddr(ip)
			pod := s.base.PodAt(p.Namespace, p.Name, a)
			both(target{name: p.Namespace + "/" + p.Name, pod: p, node: p.Spec.NodeName, addr: netip.AddrPortFrom(a, 0), at: pod.Addr, port: oracle.Ports[0]}, 80)
		}
	}
	for _, a := range s.outsideAddrs() {
		both(target{name: "outside", addr: netip.AddrPortFrom(a, 0), at: a, port: oracle.Ports[0]}, oracle.Ports[0])
	}
	for _, a := range s.base.ClusterDNS {
		dns := target{name: "dns", pod: s.base.DNS(a).Pod, addr: netip.AddrPortFrom(a, 53), at: a, port: 53}
		dns.kind, dns.protocol = "dns", corev1.ProtocolUDP
		targets = append(targets, dns)
		dns.kind, dns.protocol = "connect", corev1.ProtocolTCP
		targets = append(targets, dns)
	}
	return targets, nil
}

// probed is what the test server says about a target.
type probed struct {
	OK            bool
	Answer, Error string
}

// patience is how long a probe waits: longer than anything takes here that gets through, shorter than TCP's second attempt.
const patience = 800 * time.Millisecond

// probe lets all probers try all targets at once.
func (s *site) probe(ctx context.Context) (map[string][]probed, error) {
	var text strings.Builder
	for _, t := range s.targets {
		fmt.Fprintln(&text, t.kind, t.addr)
	}
	answers := make([][]probed, len(s.probers))
	byMachine := map[*testbed.Machine][]int{}
	for i, p := range s.probers {
		byMachine[p.machine] = append(byMachine[p.machine], i)
	}
	var all errgroup.Group
	for machine, probers := range byMachine {
		all.Go(func() error {
			var dirs []string
			for _, i := range probers {
				dirs = append(dirs, s.probers[i].dir)
			}
			out, err := machine.ExecInput(ctx, strings.NewReader(text.String()), "sh", "-c", fmt.Sprintf(
				`cat > %[1]s/targets; for d in %[2]s; do %[3]s --unix-socket $d/sock --data-binary @%[1]s/targets -o $d/out 'http://probe/probe?timeout=%[4]s' & done; wait
				for d in %[2]s; do cat $d/out || echo null; rm -f $d/out; done`, probeDir, strings.Join(dirs, " "), probeFlags, patience))
			if err != nil {
				return err
			}
			d := json.NewDecoder(strings.NewReader(out))
			for _, i := range probers {
				if err := d.Decode(&answers[i]); err != nil || len(answers[i]) != len(s.targets) {
					return fmt.Errorf("probes of %s: %d of %d, %w", s.probers[i].name, len(answers[i]), len(s.targets), err)
				}
			}
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	results := map[string][]probed{}
	for i, p := range s.probers {
		results[p.name] = answers[i]
	}
	return results, nil
}

// possible tells whether a prober can reach a target when no policies are there. Services and the cluster's DNS are for the cluster.
func (p prober) possible(t target) bool {
	return p.name != "outside" || t.name != "outside" && t.name != "dns" && !t.service()
}

// learn probes without policies: everything reaches everything, and pods appear as themselves.
func (s *site) learn(ctx context.Context) error {
	return testbed.Wait(ctx, "everything to reach everything", func(ctx context.Context) error {
		results, err := s.probe(ctx)
		if err != nil {
			return err
		}
		s.seen = map[[2]string]netip.Addr{}
		var errs []error
		for _, p := range s.probers {
			for i, t := range s.targets {
				got := results[p.name][i]
				if !p.possible(t) {
					continue
				}
				if err := s.learnFrom(p, t, got); err != nil {
					errs = append(errs, fmt.Errorf("%s to %s: %w", p.name, t, err))
				}
			}
		}
		if len(errs) > 20 {
			errs = append(errs[:20], fmt.Errorf("and %d more", len(errs)-20))
		}
		return errors.Join(errs...)
	})
}

func (s *site) learnFrom(p prober, t target, got probed) error {
	if !got.OK {
		return errors.New(got.Error)
	}
	if t.name == "dns" {
		return nil
	}
	name, client, _ := strings.Cut(got.Answer, " ")
	from, err := netip.ParseAddrPort(client)
	if err != nil || name != t.name {
		return fmt.Errorf("it answers %q", got.Answer)
	}
	a := from.Addr().Unmap()
	s.seen[[2]string{p.name, t.String()}] = a
	if !s.isPod(p) && !slices.Contains(s.base.Others, a) {
		s.base.Others = append(s.base.Others, a)
		s.now.Others = s.base.Others
	}
	if s.isPod(p) && t.pod != nil && !t.pod.Spec.HostNetwork && p.name != t.name {
		if want := s.base.PodAt(p.pod.Namespace, p.pod.Name, a).Addr; a != want {
			return fmt.Errorf("it appears as %s, not as %s", a, want)
		}
	}
	return nil
}

func (s *site) isPod(p prober) bool { return p.pod != nil && !p.pod.Spec.HostNetwork }

// expected asks the oracle about the world that the cluster is made to have.
func (s *site) expected(p prober, t target) (bool, oracle.Reason) {
	return s.now.Allowed(s.from(p, t), s.to(t), t.protocol, t.port)
}

func (s *site) from(p prober, t target) oracle.Endpoint {
	if s.isPod(p) {
		return s.now.PodAt(p.pod.Namespace, p.pod.Name, t.at)
	}
	return oracle.Endpoint{Node: p.node, Addr: s.seen[[2]string{p.name, t.String()}]}
}

func (s *site) to(t target) oracle.Endpoint {
	switch {
	case t.name == "dns":
		return s.now.DNS(t.at)
	case t.pod != nil && !t.pod.Spec.HostNetwork:
		return s.now.PodAt(t.pod.Namespace, t.pod.Name, t.at)
	}
	return oracle.Endpoint{Node: t.node, Addr: t.at}
}

// compare probes once and lists where the cluster and the oracle differ.
func (s *site) compare(ctx context.Context) ([]string, error) {
	results, err := s.probe(ctx)
	if err != nil {
		return nil, err
	}
	var differ []string
	for _, p := range s.probers {
		for i, t := range s.targets {
			if !p.possible(t) {
				continue
			}
			got := results[p.name][i]
			want, why := s.expected(p, t)
			if got.OK == want {
				continue
			}
			said := "it gets through"
			if !got.OK {
				said = got.Error
			}
			differ = append(differ, fmt.Sprintf("%s (%s) to %s: %s; the oracle: %s", p.name, s.from(p, t).Addr, t, said, why))
		}
	}
	return differ, nil
}

// enforced is how long the cluster may take until all packets go where they should.
const enforced = 15 * time.Second

// agrees waits until the cluster does what the oracle says.
func (s *site) agrees(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, enforced)
	defer cancel()
	return testbed.Wait(ctx, "the cluster to agree with the oracle", func(ctx context.Context) error {
		differ, err := s.compare(ctx)
		if err == nil && len(differ) > 0 {
			n := len(differ)
			err = fmt.Errorf("%d of %d probes differ:\n%s", n, len(s.probers)*len(s.targets), strings.Join(differ[:min(n, 20)], "\n"))
		}
		return err
	})
}
