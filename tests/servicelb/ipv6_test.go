// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestIPv6Only has LoadBalancer services without IPv4: first on the nodes' addresses, then, after the server was started with a pool, on
// floating ones, which move with their lease and stay while there is no API.
func TestIPv6Only(t *testing.T) {
	t.Parallel()
	c := start(t, cluster.Spec{Servers: 1, Agents: 2, AgentFlags: []string{"--proxy-mode", "iptables"}}, func(func(int) string) []string {
		return []string{"--cluster-cidr", "fd42::/56", "--service-cidr", "fd43::/112"}
	})
	s1, a1, a2 := c.Servers[0], c.Agents[0], c.Agents[1]
	gateway := "[" + testbed.IP6(c.Bed.Gateway()) + "]"
	s := s1.Session(t)
	s.Kubectl("label", "node", "a1", "a2", "kedge.io/servicelb=true")
	s.Apply(web)
	s.Apply(cluster.ServerPod, "one", "", "  nodeName: a1")
	s.Apply(cluster.ClientPod)
	s.Apply(balancer, "web", "web", "80", "")
	s.Apply(balancer, "local", "one", "81", "  externalTrafficPolicy: Local")
	s.Ready("one", "client")
	s.Kubectl("rollout", "status", "daemonset/web", "--timeout=55s")
	const ips = "jsonpath={.status.loadBalancer.ingress[*].ip}"

	t.Run("the nodes' addresses", func(t *testing.T) {
		s.Becomes(a1.IP6()+" "+a2.IP6(), "get", "service", "web", "-o", ips)
		s.Becomes(a1.IP6(), "get", "service", "local", "-o", ips)
		for _, n := range c.Agents {
			url := "http://[" + n.IP6() + "]/"
			answers(t, url)
			if got := s.InPod("client", "timeout 5 wget -q -O- "+url); !strings.HasPrefix(got, "web-") {
				t.Errorf("from a pod to %s: %q", n.Name(), got)
			}
		}
		kept := "http://[" + a1.IP6() + "]:81/"
		answers(t, kept)
		if pod, client, err := get(t.Context(), kept); err != nil || pod != "one" || client != gateway {
			t.Errorf("%q sees the client %q (%v), want one and %s", pod, client, err, gateway)
		}
		if pod, _, err := get(t.Context(), "http://["+a2.IP6()+"]:81/"); err == nil {
			t.Errorf("a node without an endpoint: answer of %s", pod)
		}
	})

	// The server asks for a pool now.
	agents := fmt.Sprint(processes(t, a1), processes(t, a2))
	cluster.Do(t, s1.Stop)
	address := func(n int) string {
		return fmt.Sprintf("%s%d", strings.TrimSuffix(testbed.IP6(c.Bed.Gateway()), "1"), n)
	}
	s1.Flags = append(s1.Flags, "--servicelb-pool", address(201)+"-"+address(209))
	cluster.Do(t, s1.Run, c.WaitReady)
	floating, kept := address(201), address(202)
	s.Eventually("addresses of the pool", func() error {
		var err error
		floating, err = s.Try("get", "service", "web", "-o", ips)
		kept, _ = s.Try("get", "service", "local", "-o", ips)
		if pool := address(20); err == nil && (!strings.HasPrefix(floating, pool) || !strings.HasPrefix(kept, pool)) {
			err = fmt.Errorf("%q, %q", floating, kept)
		}
		return err
	})
	url := "http://[" + floating + "]/"
	answers(t, url)
	answers(t, "http://["+kept+"]:81/")
	if pod, client, err := get(t.Context(), "http://["+kept+"]:81/"); err != nil || pod != "one" || client != gateway {
		t.Errorf("%q sees the client %q (%v), want one and %s", pod, client, err, gateway)
	}
	if got := s.InPod("client", "timeout 5 wget -q -O- "+url); !strings.HasPrefix(got, "web-") {
		t.Errorf("from a pod: %q", got)
	}
	if now := fmt.Sprint(processes(t, a1), processes(t, a2)); now != agents {
		t.Errorf("processes of the agents are %s, were %s", now, agents)
	}
	asks := func(ctx context.Context) error { _, _, err := get(ctx, url); return err }

	t.Run("it moves", func(t *testing.T) {
		n := holder(t, c, floating)
		cluster.Do(t, n.PowerCut)
		took := silence(t, "an answer of "+floating, asks)
		t.Logf("%s lost its power: %s is answered by %s after %s", n.Name(), floating, holder(t, c, floating).Name(), took.Round(10*time.Millisecond))
		cluster.Do(t, n.Restart, c.WaitReady)
	})
	t.Run("no API", func(t *testing.T) {
		n := holder(t, c, floating)
		cluster.Do(t, s1.PowerCut)
		for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if has, err := hasAddress(t.Context(), n, floating); err != nil || !has {
				t.Fatalf("%s does not keep %s: %v", n.Name(), floating, err)
			}
		}
		answers(t, url) // if it is not the turn of the server's pod
		cluster.Do(t, s1.Restart, c.WaitReady)
		if now := holder(t, c, floating); now != n {
			t.Errorf("%s has %s after the return of the API, it was %s", now.Name(), floating, n.Name())
		}
		answers(t, url)
	})
	t.Run("no way to the API", func(t *testing.T) {
		n := holder(t, c, floating)
		block := func(verb string) {
			if _, err := n.Shell(cluster.Within(t, time.Minute), "ip -6 route "+verb+" unreachable "+s1.IP6()); err != nil {
				t.Fatal(err)
			}
		}
		block("add")
		other := c.Agents[0]
		if other == n {
			other = c.Agents[1]
		}
		begin := time.Now()
		cluster.Eventually(t, "another node to have "+floating, func(ctx context.Context) error {
			// For a moment both have it: the first one gives it up when it hears of the other.
			was, err := hasAddress(ctx, n, floating)
			is, errOther := hasAddress(ctx, other, floating)
			if err = errors.Join(err, errOther); err == nil && (was || !is) {
				err = fmt.Errorf("%s has it: %v, %s: %v", n.Name(), was, other.Name(), is)
			}
			return err
		})
		t.Logf("%s had no way to the API: %s has %s after %s", n.Name(), other.Name(), floating, time.Since(begin).Round(100*time.Millisecond))
		answers(t, url)
		block("del")
		cluster.Do(t, c.WaitReady)
		holder(t, c, floating)
	})
	t.Run("without a pool again", func(t *testing.T) {
		cluster.Do(t, s1.Stop)
		s1.Flags = s1.Flags[:len(s1.Flags)-2]
		cluster.Do(t, s1.Run, c.WaitReady)
		s.Becomes(a1.IP6()+" "+a2.IP6(), "get", "service", "web", "-o", ips)
		answers(t, "http://["+a2.IP6()+"]/")
	})
}

// processes are the process IDs of a node's Kedge.
func processes(t *testing.T, n *cluster.Node) map[string]int {
	t.Helper()
	st, err := n.Status(cluster.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	return st.PIDs()
}
