// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// Limits of what is normal.
const (
	skewWarning     = 500 * time.Millisecond // leases and tokens bear more, etcd complains from a second on
	skewProblem     = 5 * time.Second
	slowRead        = 500 * time.Millisecond // a linearizable read of an idle datastore takes some milliseconds
	fullWarning     = 0.8                    // of the datastore's quota
	fragmented      = 0.5                    // of the database file is free
	fragmentedBytes = 128 << 20
	farBehind       = 5000 // entries of the log
	cluster         = "cluster"
)

// Facts are all that is known of a cluster.
type Facts struct {
	Now time.Time
	// Reports by node; Silent are the nodes that did not answer, with the reason.
	Reports map[string]*NodeReport
	Silent  map[string]string
	// Skew is how much a node's clock is ahead of this machine's. What the answer took is taken into account.
	Skew map[string]time.Duration
	// APIError is why the API could not be asked; then Nodes, Pods and Events are empty.
	APIError string
	Nodes    []corev1.Node
	Pods     []corev1.Pod
	Events   []corev1.Event // warnings
}

// Judge finds what is wrong, the worst first.
func Judge(f Facts) []Finding {
	var all []Finding
	if f.APIError != "" {
		all = append(all, Finding{Problem, cluster, "API", "the API does not answer: " + f.APIError,
			"Only this machine was looked at. Its findings may say why; on the servers: `kedge status`."})
	}
	for _, name := range slices.Sorted(maps.Keys(f.Silent)) {
		all = append(all, Finding{Problem, name, "reachability", "its Kedge does not answer: " + f.Silent[name],
			"Is the machine on and connected? On it: `systemctl status kedge`, `kedge status`, `kedge doctor`."})
	}
	for _, name := range slices.Sorted(maps.Keys(f.Reports)) {
		all = append(all, judgeReport(f.Reports[name])...)
		all = append(all, judgeWays(f.Reports[name], f)...)
	}
	all = append(all, judgeOverlay(f)...)
	all = append(all, judgeClocks(f)...)
	all = append(all, judgeVersions(f)...)
	all = append(all, judgeDatastore(f)...)
	all = append(all, judgeNodes(f)...)
	all = append(all, judgePods(f)...)
	sortFindings(all)
	return all
}

func judgeReport(r *NodeReport) []Finding {
	var all []Finding
	add := func(level Level, check, text, remedy string) {
		all = append(all, Finding{level, r.Node, check, text, remedy})
	}
	for _, p := range r.Processes {
		for _, c := range p.Components {
			if c.State != supervise.Ready {
				add(Problem, "process", fmt.Sprintf("%s in [%s] is %s: %s", c.Name, p.Name, c.State, c.Reason), "On the machine: `kedge status`, `journalctl -u kedge`.")
			}
		}
	}
	for _, c := range r.Certificates {
		if c.DaysLeft < 0 {
			add(Problem, "certificates", fmt.Sprintf("%s has ended on %s", c.Name, c.NotAfter.Format(time.DateOnly)), "See docs/certificates.md. A wrong clock on the machine shows like this, too.")
		} else if c.Warning != "" {
			add(Warning, "certificates", fmt.Sprintf("%s: %s", c.Name, c.Warning), "See docs/certificates.md.")
		}
	}
	for _, g := range r.Preflight.Groups {
		for _, p := range g.Probes {
			parts := p.Items
			if len(parts) == 0 {
				parts = []check.Item{{Result: p.Result}}
			}
			for _, part := range parts {
				text := strings.TrimPrefix(part.Name+": "+part.Finding, ": ")
				switch part.Status {
				case check.Fail:
					add(Problem, p.Name, text, part.Remedy)
				case check.Warning:
					add(Warning, p.Name, text, part.Remedy)
				}
			}
		}
	}
	if r.DNSError != "" {
		add(Problem, "dns", "the cluster DNS does not answer on this node: "+r.DNSError, "On the machine: `kedge status` (component dns). See docs/dns.md.")
	}
	for _, address := range slices.Sorted(maps.Keys(r.Services)) {
		add(Problem, "services", fmt.Sprintf("the kubernetes Service at %s:443 is not reached from this node: %s", address, r.Services[address]),
			"On the machine: `kedge status` (component kube-proxy). A firewall that drops forwarded packets does this, too.")
	}
	return all
}

// judgeWays reports the ways that are closed, with what would open them. Those of which the direction is known are judgeOverlay's.
func judgeWays(r *NodeReport, f Facts) []Finding {
	var all []Finding
	for _, w := range r.Ways {
		if w.Error == "" || w.Protocol == Overlay && f.directed(r.Node, w.Peer) {
			continue
		}
		level := Problem
		remedy := fmt.Sprintf("Open TCP port %d from %s to %s, in the firewalls of both machines and of the network between them.", w.Address.Port(), r.Node, w.Peer)
		switch {
		case w.Protocol == Overlay && strings.HasPrefix(w.Error, mtuMark):
			remedy = remedyMTU
		case w.Protocol == Overlay:
			remedy = fmt.Sprintf("Open UDP port %s between %s and %s in both directions. Pods of the two nodes do not reach each other.", overlayPort(r, w.Address.Addr()), r.Node, w.Peer)
		case w.Optional:
			level = Warning
			remedy += " Until then the tunnel that the node keeps open is used."
		}
		address := w.Address.String()
		if w.Protocol == Overlay {
			address = w.Address.Addr().String()
		}
		all = append(all, Finding{level, r.Node, "ways", fmt.Sprintf("no way to %s of %s (%s): %s", w.Purpose, w.Peer, address, w.Error), remedy})
	}
	return all
}

func judgeClocks(f Facts) []Finding {
	var all []Finding
	for _, name := range slices.Sorted(maps.Keys(f.Skew)) {
		skew := f.Skew[name]
		level := Warning
		switch {
		case skew.Abs() < skewWarning:
			continue
		case skew.Abs() >= skewProblem:
			level = Problem
		}
		direction := "ahead of"
		if skew < 0 {
			direction = "behind"
		}
		all = append(all, Finding{level, name, "clock", fmt.Sprintf("its clock is %s %s this machine's", skew.Abs().Round(time.Millisecond), direction),
			"Let all machines get their time from the same place (chrony, systemd-timesyncd); without a network let one be the time server of the others."})
	}
	return all
}

func judgeVersions(f Facts) []Finding {
	nodes := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(f.Reports)) {
		v := f.Reports[name].Version
		nodes[v] = append(nodes[v], name)
	}
	if len(nodes) < 2 {
		return nil
	}
	var parts []string
	for _, v := range slices.Sorted(maps.Keys(nodes)) {
		parts = append(parts, v+" on "+strings.Join(nodes[v], ", "))
	}
	return []Finding{{Warning, cluster, "versions", "the nodes have different versions: " + strings.Join(parts, "; "), "Finish the upgrade: see docs/upgrade.md."}}
}

func judgeDatastore(f Facts) []Finding {
	var all []Finding
	add := func(level Level, about, text, remedy string) {
		all = append(all, Finding{level, about, "datastore", text, remedy})
	}
	var newest *datastore.Health
	for _, name := range slices.Sorted(maps.Keys(f.Reports)) {
		r := f.Reports[name]
		if r.DatastoreError != "" {
			add(Problem, name, "its member does not answer: "+r.DatastoreError, "On the machine: `kedge status`, `journalctl -u kedge`. See docs/ha.md.")
		}
		h := r.Datastore
		if h == nil {
			continue
		}
		if newest == nil || h.Revision > newest.Revision {
			newest = h
		}
		switch {
		case !h.HasLeader:
			add(Problem, name, "its member has no leader: most members are down, or it is cut off from them", "Start the others, or see docs/ha.md, \"Most servers are lost\".")
		case h.Learner:
			add(Warning, name, "its member is still a learner: it does not count for the majority yet", "It becomes a voter when it has all data. If it stays so: `journalctl -u kedge` on it.")
		case h.Behind > farBehind:
			add(Warning, name, fmt.Sprintf("its member is %d entries behind", h.Behind), "Its disk or processor is too slow for the others: see the findings about its disk.")
		}
		if h.Took > slowRead {
			add(Warning, name, fmt.Sprintf("a read that needs the majority took %s", h.Took.Round(time.Millisecond)), "The network between the servers or a disk is slow: see the other findings.")
		}
		if h.Quota > 0 && float64(h.Size) > fullWarning*float64(h.Quota) {
			add(Warning, name, fmt.Sprintf("its database has %s of at most %s; %s are in use", size(h.Size), size(h.Quota), size(h.InUse)),
				"Find out what fills it (many Events, Secrets of Helm releases, custom resources) and delete that; see docs/disks.md.")
		} else if h.Size > fragmentedBytes && float64(h.Size-h.InUse) > fragmented*float64(h.Size) {
			add(Warning, name, fmt.Sprintf("its database file has %s, of which %s are in use", size(h.Size), size(h.InUse)), "See docs/disks.md, defragmentation.")
		}
	}
	if newest == nil {
		return all
	}
	for _, alarm := range newest.Alarms {
		add(Problem, cluster, "alarm: "+alarm, "NOSPACE: the datastore takes no more writes until space was made, see docs/disks.md. CORRUPT: replace that member, see docs/ha.md.")
	}
	voters := 0
	for _, m := range newest.Members {
		if !m.Learner {
			voters++
		}
	}
	if voters == 2 {
		add(Warning, cluster, "the datastore has two members: the loss of either one stops all changes", "Add a third server, or take one away with `kedge leave`.")
	}
	return all
}

func size(n int64) string { return resource.NewQuantity(n>>20<<20, resource.BinarySI).String() }

func judgeNodes(f Facts) []Finding {
	var all []Finding
	for _, n := range f.Nodes {
		for _, c := range n.Status.Conditions {
			switch {
			case c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue:
				all = append(all, Finding{Problem, n.Name, "node", "it is not Ready: " + c.Message, "On the machine: `kedge status`."})
			case c.Type != corev1.NodeReady && c.Status == corev1.ConditionTrue:
				all = append(all, Finding{Problem, n.Name, "node", fmt.Sprintf("%s: %s", c.Type, c.Message), "$ kedge kubectl describe node " + n.Name})
			}
		}
		if n.Spec.Unschedulable {
			all = append(all, Finding{Warning, n.Name, "node", "it is cordoned: no new pods are placed there", "$ kedge kubectl uncordon " + n.Name})
		}
	}
	return all
}
