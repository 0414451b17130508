// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/tests/cluster"
)

const (
	starts = 4 // of pods on each node that may not send or get anything
	ahead  = 8 // how many addresses that pods will have soon are attacked

	// soon is how long a pod may wait for what it is allowed.
	soon = time.Second
)

// ipam are the addresses that pods of a machine have.
const ipam = "/run/kedge/cni/ipam/kedge/"

// testFirstMoments starts pods that send from their first moment on, while others send to the addresses they get. Where nothing is
// allowed, not one packet gets through; what is allowed does at once.
func testFirstMoments(t *testing.T, s *site) {
	s.peace(t)
	s.newcomersNamespace(t, silent(t), policy(t, newcomers, "some", `{podSelector: {matchLabels: {role: some}}, policyTypes: [Ingress, Egress],
		egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`))
	collectors := []prober{s.prober(t, "y/a"), s.prober(t, "y/b"), s.prober(t, "x/c")}
	var targets []string
	for _, c := range collectors {
		targets = append(targets, s.addressesOf(c.name)...)
		s.forget(t, c)
	}
	s.attack(t, 0, "x/a", "x/b", "outside")

	var denied, some []prober
	for i := range starts {
		for _, n := range s.c.Nodes() {
			denied = append(denied, s.newcomer(t, fmt.Sprintf("silent-%s-%d", n.Name(), i), n.Name(), "silent", append(targets, s.dnsTarget())...))
		}
	}
	for _, n := range s.c.Nodes() {
		some = append(some, s.newcomer(t, "some-"+n.Name(), n.Name(), "some", append(s.addressesOf("y/a"), s.addressesOf("y/b")...)...))
	}
	for _, p := range denied {
		s.isSilent(t, p, collectors...)
	}
	for _, p := range some {
		s.waitReady(t, p)
		for _, w := range s.tried(t, p, 20) {
			begin := w.FirstOK
			if !w.FirstBad.IsZero() && w.FirstBad.Before(begin) {
				begin = w.FirstBad
			}
			wait := w.FirstOK.Sub(begin)
			if w.OK == 0 || wait > soon {
				t.Errorf("%s waits %s for what it may do: %+v", p.name, wait, w)
			} else {
				t.Logf("%s: %s answered after %s", p.name, w.Target, wait.Round(time.Millisecond))
			}
		}
	}
}

// silent isolates newcomers from everything.
func silent(t *testing.T) networkingv1.NetworkPolicy {
	return policy(t, newcomers, "silent", `{podSelector: {matchLabels: {role: silent}}, policyTypes: [Ingress, Egress]}`)
}

func (s *site) dnsTarget() string {
	return "dns " + netip.AddrPortFrom(s.base.ClusterDNS[0], 53).String()
}

// isSilent: the pod got nothing through, and nothing came, not even to others.
func (s *site) isSilent(t *testing.T, p prober, collectors ...prober) {
	t.Helper()
	addrs := s.waitReady(t, p)
	const clock = "15:04:05.000"
	var leaks []string
	for _, w := range s.tried(t, p, 10) {
		if w.OK > 0 {
			leaks = append(leaks, fmt.Sprintf("%s answered %d of %d times, first at %s", w.Target, w.OK, w.Tries, w.FirstOK.Format(clock)))
		}
	}
	for from, v := range s.visitors(t, p) {
		leaks = append(leaks, fmt.Sprintf("%s came %d times, first at %s", from, v.Count, v.First.Format(clock)))
	}
	for _, c := range collectors {
		for from, v := range s.visitors(t, c) {
			for _, a := range addrs {
				if strings.HasSuffix(from, " "+a.String()) {
					leaks = append(leaks, fmt.Sprintf("%s saw %s %d times, first at %s", c.name, from, v.Count, v.First.Format(clock)))
				}
			}
		}
	}
	if len(leaks) > 0 {
		t.Errorf("%s %v may not send or get anything, but %s", p.name, addrs, strings.Join(leaks, "; "))
	}
}

// attack lets probers send to the addresses that the next pods on all nodes will have, or those from the first one on.
func (s *site) attack(t *testing.T, first byte, from ...string) {
	t.Helper()
	var targets []string
	for _, n := range s.c.Nodes() {
		last, err := n.Shell(cluster.Within(t, minute), "for f in "+ipam+"last_reserved_ip.*; do cat $f; echo; done")
		if err != nil {
			t.Fatal(err)
		}
		for text := range strings.FieldsSeq(last) {
			b := netip.MustParseAddr(text).AsSlice()
			if first != 0 {
				b[len(b)-1] = first - 1
			}
			for range ahead {
				b[len(b)-1]++
				a, _ := netip.AddrFromSlice(b)
				targets = append(targets, "tcp "+netip.AddrPortFrom(a, 7080).String(), "udp "+netip.AddrPortFrom(a, 7081).String())
			}
		}
	}
	for _, name := range from {
		s.watch(t, s.prober(t, name), 10*time.Millisecond, 50*time.Millisecond, targets...)
	}
}

// testAddressAgain gives the address of a pod that was allowed something to one that is not.
func testAddressAgain(t *testing.T, s *site) {
	s.peace(t)
	s.newcomersNamespace(t,
		policy(t, "y", "guests", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: newcomers}}, podSelector: {matchLabels: {role: guest}}}]}]}`),
		policy(t, newcomers, "talkers", `{podSelector: {matchLabels: {role: stranger}}, policyTypes: [Ingress, Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`))
	to := []string{"tcp " + s.find(t, "y/a", "tcp", false).addr.String(), "udp " + s.find(t, "y/b", "udp", false).addr.String()}
	for _, n := range s.c.Nodes() {
		guest := s.newcomer(t, "guest-"+n.Name(), n.Name(), "guest", to...)
		addr := s.waitReady(t, guest)[0]
		for _, w := range s.tried(t, guest, 10) {
			if w.OK == 0 {
				t.Errorf("the guest gets nothing: %+v", w)
			}
		}
		s.remove(t, guest)
		cluster.Eventually(t, "the address to be free", func(ctx context.Context) error {
			_, err := n.Shell(ctx, fmt.Sprintf("! test -e %s%s", ipam, addr))
			return err
		})
		// The next address to be given is the one after the last.
		if _, err := n.Shell(cluster.Within(t, minute), fmt.Sprintf("printf %s > %slast_reserved_ip.0", addr.Prev(), ipam)); err != nil {
			t.Fatal(err)
		}
		stranger := s.newcomer(t, "stranger-"+n.Name(), n.Name(), "stranger", to...)
		if got := s.waitReady(t, stranger)[0]; got != addr {
			t.Errorf("the stranger has %s, not the guest's address %s: this tests nothing", got, addr)
		}
		for _, w := range s.tried(t, stranger, 10) {
			if w.OK > 0 {
				t.Errorf("the stranger at the guest's address gets through: %+v", w)
			}
		}
	}
}

func (s *site) remove(t *testing.T, p prober) {
	t.Helper()
	if err := s.client.CoreV1().Pods(p.pod.Namespace).Delete(cluster.Within(t, minute), p.pod.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, p.name+" to be gone", func(ctx context.Context) error {
		if _, err := s.client.CoreV1().Pods(p.pod.Namespace).Get(ctx, p.pod.Name, metav1.GetOptions{}); err == nil {
			return fmt.Errorf("it is there")
		}
		return nil
	})
}
