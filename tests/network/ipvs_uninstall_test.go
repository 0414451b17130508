// SPDX-License-Identifier: Apache-2.0

package network

import (
	"strings"
	"testing"
)

// checkUninstall takes an agent in mode ipvs out of its cluster and off its machine: this kernel has what no other of the test bed has.
func (g *guest) checkUninstall(t *testing.T) {
	t.Helper()
	found := g.do(t, "kedge uninstall --dry-run")
	for _, want := range []string{"virtual servers of kube-proxy", "kube-ipvs0"} {
		if !strings.Contains(found, want) {
			t.Errorf("--dry-run does not find %q in\n%s", want, found)
		}
	}
	t.Log(g.do(t, "/opt/kedge/kedge uninstall --yes"))
	left := g.do(t, "grep -hv 0 /proc/sys/net/ipv4/conf/all/arp_ignore /proc/sys/net/ipv4/conf/all/arp_announce; /opt/kedge/kedge uninstall --check; tail -n +4 /proc/net/ip_vs; ip -o link show kube-ipvs0 2>/dev/null; ls /var/lib/kedge 2>/dev/null; true")
	if !strings.Contains(left, "nothing of Kedge") || strings.Count(left, "\n") != 1 {
		t.Errorf("left: %s", left)
	}
}
