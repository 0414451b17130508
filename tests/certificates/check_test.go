// SPDX-License-Identifier: Apache-2.0

package certificates

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestCheck: all certificates of all machines are listed, running or not, in the status, and as a metric.
func TestCheck(t *testing.T) {
	c := shared.Cluster(t)
	for _, n := range c.Nodes() {
		list := well(t, n)
		out, err := n.Exec(cluster.Within(t, minute), cluster.Program, "status")
		if err != nil || !strings.Contains(out, "ends first, on "+list["kubelet-client"].NotAfter.Format("2006-")) {
			t.Errorf("%s: status: %v: %s", n.Name(), err, out)
		}
		metrics, err := c.Servers[0].Kubectl(cluster.Within(t, minute), "get", "--raw", "/api/v1/nodes/"+n.Name()+"/proxy/metrics")
		if err != nil {
			t.Error(err)
		}
		for name, e := range list {
			if want := fmt.Sprintf("kedge_certificate_expiration_seconds{name=%q} %s\n", name, strconv.FormatFloat(float64(e.NotAfter.Unix()), 'g', -1, 64)); !strings.Contains(metrics, want) {
				t.Errorf("%s: no metric %s", n.Name(), want)
			}
		}
	}
	metrics, err := c.Servers[0].Kubectl(cluster.Within(t, minute), "get", "--raw", "/metrics")
	if err != nil || strings.Count(metrics, "\nkedge_certificate_expiration_seconds{") != len(strings.Fields(serverNames)) {
		t.Errorf("the API server's metrics: %v, %d certificates", err, strings.Count(metrics, "\nkedge_certificate_expiration_seconds{"))
	}
	for _, n := range []*cluster.Node{c.Servers[2].Node, c.Agents[0]} {
		if err := n.Stop(cluster.Within(t, minute)); err != nil {
			t.Fatal(err)
		}
		well(t, n)
		if err := n.Restart(cluster.Within(t, minute)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
}

// TestRotate renews everything on all machines while clients are at work: none sees an error, no connection ends, no process of a server
// restarts.
func TestRotate(t *testing.T) {
	c := shared.Cluster(t)
	s1, a1 := c.Servers[0], c.Agents[0]
	before := map[string]map[string]entry{}
	pids := map[string]map[string]int{}
	for _, n := range c.Nodes() {
		before[n.Name()] = well(t, n)
		st, err := n.Status(cluster.Within(t, minute))
		if err != nil {
			t.Fatal(err)
		}
		pids[n.Name()] = st.PIDs()
	}
	loads := []*load{startLoad(t, s1, s1.Node), startLoad(t, s1, a1)}
	began := time.Now()
	for _, s := range c.Servers {
		out, err := s.Exec(cluster.Within(t, 2*minute), cluster.Program, "certificate", "rotate")
		if err != nil || !strings.Contains(out, "etcd-peer renewed") || !strings.Contains(out, "the API server serves the new certificate") {
			t.Fatalf("%s: %v: %s", s.Name(), err, out)
		}
		// Peers make new connections with new certificates: the datastore works on.
		if _, err := s.Kubectl(cluster.Within(t, minute), "annotate", "node", s.Name(), "test/rotated="+s.Name(), "--overwrite"); err != nil {
			t.Error(err)
		}
	}
	t.Logf("all servers took %s", time.Since(began).Round(time.Millisecond))
	if _, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate", "nobody"); err == nil || !strings.Contains(err.Error(), "no leaf certificate") {
		t.Errorf("an unknown name: %v", err)
	}
	for _, l := range loads {
		r := l.stop(t)
		if len(r.Errors) > 0 || r.Connections != 1 || r.Requests < 20 || r.Serials < 2 && l.n == s1.Node {
			t.Errorf("clients on %s: %+v", l.n.Name(), r)
		}
		t.Logf("clients on %s: %+v", l.n.Name(), r)
	}
	for _, s := range c.Servers {
		after := well(t, s.Node)
		for name, e := range after {
			if old := before[s.Name()][name]; !strings.HasSuffix(name, "-ca") && !e.NotAfter.After(old.NotAfter) {
				t.Errorf("%s: %s was not renewed: %s, %s", s.Name(), name, old.NotAfter, e.NotAfter)
			}
		}
		st, err := s.Status(cluster.Within(t, minute))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(st.PIDs()), fmt.Sprint(pids[s.Name()]); got != want {
			t.Errorf("%s: processes %s, were %s", s.Name(), got, want)
		}
	}
	// An agent's kubelet keeps its keys to itself: its process restarts.
	out, err := a1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate")
	if err != nil || !strings.Contains(out, "kubelet-serving renewed") {
		t.Fatalf("%s: %v: %s", a1.Name(), err, out)
	}
	for name, e := range well(t, a1) {
		if old := before[a1.Name()][name]; !strings.HasSuffix(name, "-ca") && !e.NotAfter.After(old.NotAfter) {
			t.Errorf("%s: %s was not renewed", a1.Name(), name)
		}
	}
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
	kubeletAnswers(t, s1, a1)
}
