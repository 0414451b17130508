// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestUnenforceable: where the rules cannot be loaded the node is not Ready and says why, and it comes back when they can. The mode
// iptables leaves kube-proxy out of it.
func TestUnenforceable(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Options: cluster.Options{Flags: []string{"--proxy-mode", "iptables"}}})
	cluster.Do(t, c.Start)
	s := c.Servers[0]
	shell := func(line string) {
		t.Helper()
		if out, err := s.Shell(cluster.Within(t, time.Minute), "cd /var/lib/kedge/bin/*/ && "+line); err != nil {
			t.Fatal(out, err)
		}
	}
	condition := func(want string) func(context.Context) error {
		return func(ctx context.Context) error {
			got, err := s.Kubectl(ctx, "get", "node", s.Name(), "-o", `jsonpath={range .status.conditions[*]}{.type}={.status} {.message}{"\n"}{end}`)
			if err == nil && !strings.Contains(got, want) {
				err = fmt.Errorf("no %q in %s", want, got)
			}
			return err
		}
	}
	shell(`./nft delete table inet kedge-netpol && mv nft nft.away && printf '#!/bin/sh\necho the kernel says no >&2; exit 1\n' >nft && chmod +x nft`)
	cluster.Eventually(t, "the node to say that policies are not enforced", condition("NetworkUnavailable=True no new pods: load the rules of network policies: the kernel says no"))
	cluster.Eventually(t, "the node not to be Ready", condition("Ready=False"))
	if st, err := s.Status(cluster.Within(t, time.Minute)); err != nil || st.Problems() == nil || !strings.Contains(st.Problems().Error(), "the kernel says no") {
		t.Errorf("kedge status: %v, %v", st.Problems(), err)
	}
	shell(`mv nft.away nft`)
	cluster.Eventually(t, "the node to be Ready again", condition("Ready=True"))
	cluster.Eventually(t, "the condition to say so", condition("NetworkUnavailable=False"))
	shell(`./nft list table inet kedge-netpol`)
}
