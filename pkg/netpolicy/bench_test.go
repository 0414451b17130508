// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkEnforce has 500 pods on a node, all under some of 200 policies, and measures: from the moment when the policies are in the API
// until all are in the kernel, from the change of one until that is, the same for a new pod, and the CPU time of each, nft's with it.
func BenchmarkEnforce(b *testing.B) {
	for b.Loop() {
		bed := prepareBed(b)
		bed.pause, bed.every = maxPause, checkInterval
		for i := range 500 {
			addr4, addr6 := fmt.Sprintf("10.42.%d.%d", i/250, i%250+2), fmt.Sprintf("fd00:42::%x", i+2)
			ns := fmt.Sprint("ns-", i%10)
			if i < 10 {
				bed.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: tags{"group": fmt.Sprint(i % 3)}}})
			}
			bed.create(newPod(ns, fmt.Sprint("pod-", i), testNode, tags{"app": fmt.Sprint("app-", i/10%20), "tier": fmt.Sprint(i % 4)}, addr4, addr6))
		}
		bed.start()
		measure(b, "all", func() {
			for i := range 200 {
				p := policyOf(b, fmt.Sprint("ns-", i%10), fmt.Sprint("policy-", i), fmt.Sprintf(`
podSelector: {matchLabels: {app: app-%d}}
policyTypes: [Ingress, Egress]
ingress:
- from: [{podSelector: {matchLabels: {tier: "%d"}}}, {namespaceSelector: {matchLabels: {group: "%d"}}}]
  ports: [{port: web}, {port: 9000, endPort: 9100}]
egress:
- to: [{podSelector: {}}, {ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.%d/32]}}]`, i/10, i%4, i%3, i))
				must(b, bed.api.Tracker().Add(p))
				if i%50 == 49 { // the fake API has no room for more events that nobody has taken
					eventually(b, "watched", func() error {
						if n := len(bed.ctl.watch.policies.GetStore().ListKeys()); n <= i {
							return fmt.Errorf("%d policies", n)
						}
						return nil
					})
				}
			}
			bed.loaded(func(s *ruleset) bool { return len(s.sets["egress4"].elems) == 500 })
		})
		time.Sleep(maxPause) // one change at rest, not after many
		measure(b, "policy", func() {
			must(b, bed.api.Tracker().Add(policyOf(b, "ns-0", "one-more", denyIngress)))
			bed.loaded(func(s *ruleset) bool {
				return slices.Contains(s.isolating(s.sets["ingress4"].elems["10.42.0.2"]), "ns-0/one-more")
			})
		})
		measure(b, "pod", func() {
			bed.create(newPod("ns-1", "one-more", testNode, tags{"app": "app-1"}))
			must(b, bed.announce("ns-1", "one-more", "10.42.0.254"))
		})
		bed.stop()
	}
}

// loaded waits for what the kernel has to be as it is wanted.
func (b *bed) loaded(done func(*ruleset) bool) {
	b.t.Helper()
	eventually(b.t, "rules", func() error {
		b.ctl.mu.Lock()
		defer b.ctl.mu.Unlock()
		if b.ctl.rules == nil || !done(b.ctl.rules) {
			return errors.New("not loaded")
		}
		return nil
	})
}

func measure(b *testing.B, what string, do func()) {
	before := cpu(b)
	start := time.Now()
	do()
	took := time.Since(start)
	used := cpu(b) - before
	b.ReportMetric(float64(took.Milliseconds()), "ms/"+what)
	b.ReportMetric(float64(used.Milliseconds()), "cpu-ms/"+what)
}

// cpu is the time that this process and the programs that it ran have used.
func cpu(b *testing.B) (total time.Duration) {
	b.Helper()
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		must(b, unix.Getrusage(who, &u))
		total += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return total
}
