// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// cutWithin is how long an open connection may carry data that a new policy forbids.
const cutWithin = 10 * time.Second

// flows are connections that are open all the time, each with whether it should be.
type flows map[[2]string]bool // the prober and the target

// testEstablished opens connections and forbids some of them: these are cut, the others do not notice.
func testEstablished(t *testing.T, s *site) {
	s.peace(t)
	open := flows{}
	for _, from := range []string{"x/a", "x/b", "x/c", "hosts/s1", "hosts/a1"} {
		var targets []string
		for _, kind := range []string{"tcp", "udp"} {
			// y/a is on a1, y/b on s1.
			targets = append(targets, "held-"+kind+" "+s.find(t, "y/a", kind, false).addr.String(), "held-"+kind+" "+s.find(t, "y/b", kind, true).addr.String())
		}
		s.watch(t, s.prober(t, from), 100*time.Millisecond, 2*time.Second, targets...)
		for _, to := range targets {
			open[[2]string{from, to}] = true
		}
	}
	s.flow(t, open)

	// Ingress: x/b may go on, and every node with its own pods.
	forbid := func(from, pod string) {
		for _, kind := range []string{"tcp", "udp"} {
			to := s.find(t, pod, kind, pod == "y/b")
			open[[2]string{from, "held-" + kind + " " + to.addr.String()}] = false
		}
	}
	forbid("x/a", "y/a")
	forbid("x/a", "y/b")
	forbid("x/c", "y/a")
	forbid("x/c", "y/b")
	forbid("hosts/s1", "y/a")
	forbid("hosts/a1", "y/b")
	ingress := policy(t, "y", "ingress", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: b}}}]}]}`)
	if err := s.become(cluster.Within(t, minute), s.with(ingress)); err != nil {
		t.Fatal(err)
	}
	s.flow(t, open)

	// Egress: x/b may only go on with y/b.
	forbid("x/b", "y/a")
	egress := policy(t, "x", "egress", `{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress],
		egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}, podSelector: {matchLabels: {pod: b}}}]}]}`)
	if err := s.become(cluster.Within(t, minute), s.with(ingress, egress)); err != nil {
		t.Fatal(err)
	}
	s.flow(t, open)
}

// flow waits until the flows go as they should, and checks that those which may go on lost nothing.
func (s *site) flow(t *testing.T, open flows) {
	t.Helper()
	begin := time.Now()
	var last time.Time // of what got through and should not
	err := testbed.Wait(cluster.Within(t, cutWithin), "only what is allowed to flow", func(ctx context.Context) error {
		last = time.Time{}
		all := map[string]map[string]watched{}
		for flow, allowed := range open {
			from, to := flow[0], flow[1]
			if all[from] == nil {
				var err error
				if all[from], err = s.watches(ctx, s.prober(t, from)); err != nil {
					return err
				}
			}
			w := all[from][to]
			switch {
			case allowed && w.Worst > 0:
				return testbed.GiveUp(fmt.Errorf("%s: %s should flow: %+v", from, to, w))
			case allowed && w.LastOK.Before(begin.Add(time.Second)):
				return fmt.Errorf("%s: nothing flows yet: %+v", from, w)
			case !allowed && w.Streak == 0, !allowed && time.Since(w.LastOK) < 2*time.Second:
				return fmt.Errorf("%s: %s still flows: %+v", from, to, w)
			}
			if !allowed && w.LastOK.After(last) {
				last = w.LastOK
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if last.After(begin) {
		t.Logf("what is forbidden flowed for %s", last.Sub(begin).Round(time.Millisecond))
	}
}
