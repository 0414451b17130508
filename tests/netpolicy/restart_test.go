// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/tests/cluster"
)

// testNodeRestarts kills the node process of each machine while all kinds of probes run: none that is forbidden gets through, and
// of those that are allowed none fails twice.
func testNodeRestarts(t *testing.T, s *site) {
	s.peace(t)
	w := s.with(
		policy(t, "y", "from-x", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}}]}]}`),
		policy(t, "z", "egress", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: 53, protocol: UDP}]}]}`))
	if err := s.become(cluster.Within(t, minute), w); err != nil {
		t.Fatal(err)
	}
	if err := s.agrees(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	var targets []target
	for _, kind := range []string{"tcp", "udp"} {
		targets = append(targets, s.find(t, "y/a", kind, false), s.find(t, "y/b", kind, false), s.find(t, "y/b", kind, true), s.find(t, "z/c", kind, false))
	}
	for _, p := range s.probers {
		// What is allowed gets the time that it needs; what is forbidden is tried more often.
		lines := map[bool][]string{}
		for _, to := range targets {
			if p.possible(to) {
				allowed, _ := s.expected(p, to)
				lines[allowed] = append(lines[allowed], to.kind+" "+to.addr.String())
			}
		}
		s.watch(t, p, 100*time.Millisecond, time.Second, lines[true]...)
		s.watch(t, p, 100*time.Millisecond, 200*time.Millisecond, lines[false]...)
	}
	for _, n := range s.c.Nodes() {
		before, err := n.Status(cluster.Within(t, minute))
		if err != nil {
			t.Fatal(err)
		}
		pid := before.PIDs()["node"]
		if _, err := n.Exec(cluster.Within(t, minute), "kill", "-9", fmt.Sprint(pid)); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		cluster.Eventually(t, "another node process on "+n.Name(), func(ctx context.Context) error {
			st, err := n.Status(ctx)
			if err == nil && (st.PIDs()["node"] == pid || !st.Ready) {
				err = errors.Join(errors.New("not yet"), st.Problems())
			}
			return err
		})
		t.Logf("%s is ready again after %s", n.Name(), time.Since(begin).Round(10*time.Millisecond))
	}
	if err := s.agrees(cluster.Within(t, minute)); err != nil {
		t.Error(err)
	}
	for _, p := range s.probers {
		got, err := s.watches(cluster.Within(t, minute), p)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, to := range targets {
			if p.possible(to) {
				s.wentRight(t, p, to, got[to.kind+" "+to.addr.String()])
			}
		}
	}
}

// wentRight checks all tries of a target.
func (s *site) wentRight(t *testing.T, p prober, to target, w watched) {
	t.Helper()
	allowed, why := s.expected(p, to)
	switch {
	case w.Tries < 10:
		t.Errorf("%s to %s: too few tries to say anything: %+v", p.name, to, w)
	case !allowed && w.OK > 0:
		t.Errorf("%s to %s got through, %s: %+v", p.name, to, why, w)
	case allowed && w.Worst > 1:
		t.Errorf("%s to %s failed %d times one after the other, %s: %+v", p.name, to, w.Worst, why, w)
	}
}

// testPower cuts the power of the agent. When it is back, its pods start with new addresses, and what they may not do gets through
// at no time.
func testPower(t *testing.T, s *site) {
	s.peace(t)
	s.newcomersNamespace(t, silent(t))
	agent := s.c.Agents[0]
	collectors := []prober{s.prober(t, "y/b"), s.prober(t, "x/c")} // they stay
	var targets []string
	for _, c := range collectors {
		targets = append(targets, s.addressesOf(c.name)...)
	}
	var denied []prober
	containers := map[string]string{}
	for i := range starts {
		p := s.newcomer(t, fmt.Sprintf("silent-%d", i), agent.Name(), "silent", append(targets, s.dnsTarget())...)
		s.waitReady(t, p)
		denied = append(denied, p)
		containers[p.name] = s.container(t, p)
	}
	s.attack(t, 2, "x/a", "x/c", "outside")
	for _, c := range collectors {
		s.forget(t, c)
	}
	cluster.Do(t, agent.PowerCut, agent.Restart)
	for _, p := range denied {
		cluster.Eventually(t, p.name+" to run in another container", func(context.Context) error {
			if s.container(t, p) == containers[p.name] {
				return errors.New("it has the one it had")
			}
			return nil
		})
		s.isSilent(t, p, collectors...)
	}
	cluster.Do(t, s.c.WaitReady)
}

func (s *site) container(t *testing.T, p prober) string {
	t.Helper()
	got, err := s.client.CoreV1().Pods(p.pod.Namespace).Get(cluster.Within(t, minute), p.pod.Name, metav1.GetOptions{})
	if err != nil || len(got.Status.ContainerStatuses) == 0 {
		t.Fatal(err, got)
	}
	return got.Status.ContainerStatuses[0].ContainerID
}
