// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestNodeAddresses: ports of the nodes' addresses, with kube-proxy in mode nftables on the server and iptables on the agents.
func TestNodeAddresses(t *testing.T) {
	t.Parallel()
	c := start(t, cluster.Spec{Servers: 1, Agents: 2, AgentFlags: []string{"--proxy-mode", "iptables"}},
		func(func(int) string) []string { return []string{"--proxy-mode", "nftables"} })
	s := c.Servers[0].Session(t)
	s.Apply(web)
	s.Apply(cluster.ServerPod, "one", "", "  nodeName: "+c.Agents[0].Name())
	s.Apply(cluster.ClientPod)
	s.Apply(balancer, "web", "web", "80", "")
	s.Apply(balancer, "local", "one", "81", "  externalTrafficPolicy: Local")
	s.Ready("one", "client")
	s.Kubectl("rollout", "status", "daemonset/web", "--timeout=55s")
	all := []string{c.Agents[0].IP(), c.Agents[1].IP(), c.Servers[0].IP()} // in the order of their names
	const ips = "jsonpath={.status.loadBalancer.ingress[*].ip}"
	s.Becomes(strings.Join(all, " "), "get", "service", "web", "-o", ips)
	s.Becomes(c.Agents[0].IP(), "get", "service", "local", "-o", ips)

	t.Run("Cluster", func(t *testing.T) {
		for _, n := range c.Nodes() {
			url := "http://" + n.IP() + "/"
			answers(t, url)
			pods := map[string]bool{}
			for range 30 {
				pod, _, err := get(t.Context(), url)
				if err != nil {
					t.Fatal(err)
				}
				pods[pod] = true
			}
			if len(pods) != 3 {
				t.Errorf("%s: answers of %v, want all three pods", n.Name(), pods)
			}
			if got := s.InPod("client", "timeout 5 wget -q -O- "+url); !strings.HasPrefix(got, "web-") {
				t.Errorf("from a pod to %s: %q", n.Name(), got)
			}
			if out, err := n.Exec(cluster.Within(t, time.Minute), "curl", "-sS", "-m", "5", url); err != nil || !strings.HasPrefix(out, "web-") {
				t.Errorf("from %s to itself: %q, %v", n.Name(), out, err)
			}
		}
	})
	t.Run("Local keeps the client's address", func(t *testing.T) {
		url := "http://" + c.Agents[0].IP() + ":81/"
		answers(t, url)
		if pod, client, err := get(t.Context(), url); err != nil || pod != "one" || client != c.Bed.Gateway() {
			t.Errorf("%q sees the client %q (%v), want one and %s", pod, client, err, c.Bed.Gateway())
		}
		if pod, _, err := get(t.Context(), "http://"+c.Agents[1].IP()+":81/"); err == nil {
			t.Errorf("a node without an endpoint: answer of %s", pod)
		}
		if got := s.InPod("client", "timeout 5 wget -q -O- "+url); !strings.HasPrefix(got, "one ") {
			t.Errorf("from a pod: %q", got)
		}
	})
	t.Run("conflict", func(t *testing.T) {
		s.Apply(balancer, "late", "web", "80", "")
		s.Eventually("an event that names the older Service", func() error {
			got, err := s.Try("get", "events", "--field-selector", "involvedObject.name=late,reason=PortConflict", "-o", "jsonpath={.items[*].message}")
			if err == nil && !strings.Contains(got, s.NS+"/web") {
				err = fmt.Errorf("%q", got)
			}
			return err
		})
		s.Becomes("", "get", "service", "late", "-o", ips)
		s.Kubectl("delete", "service", "web")
		s.Becomes(strings.Join(all, " "), "get", "service", "late", "-o", ips)
		answers(t, "http://"+c.Agents[1].IP()+"/")
		s.Kubectl("patch", "service", "late", "-p", `{"spec":{"type":"ClusterIP"}}`)
		s.Becomes("", "get", "service", "late", "-o", ips)
		s.Eventually("the port to be closed", func() error {
			if pod, _, err := get(context.Background(), "http://"+c.Agents[1].IP()+"/"); err == nil {
				return fmt.Errorf("answer of %s", pod)
			}
			return nil
		})
	})
}
