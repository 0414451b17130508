// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	capi "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/pkg/join"
)

const (
	controlPlaneLabel = "node-role.kubernetes.io/control-plane"
	etcdLabel         = "node-role.kubernetes.io/etcd"
)

func inBubble(t *testing.T, f func(c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(newCluster(t)) })
}

func (c *cluster) expect(what, got, want string, parts ...string) {
	c.Helper()
	if got != want {
		c.Errorf("%s: %s (%s), want %s", what, got, c.message(), want)
	}
	for _, p := range parts {
		if !strings.Contains(c.message(), p) {
			c.Errorf("%s: the message is %q, without %q", what, c.message(), p)
		}
	}
}

func TestNewNames(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.expect("agent", c.ask(bootstrap("n1", agentGroups)), "approved")
		c.expect("server", c.ask(asServer("n2", serverGroups)), "approved")
		c.expect("its kubelet", c.ask(bootstrap("n2", serverGroups)), "approved")
		c.expect("rotation", c.ask(rotation("n3")), "approved")
		c.expect("agent as a server", c.ask(asServer("n4", agentGroups)), join.ReasonWrongRole, "for agents", "--role server")
		c.expect("bad request", c.ask(bootstrap("N5", agentGroups)), join.ReasonBadRequest)
		for _, name := range []string{"localhost", "kubernetes", "kubernetes.default.svc", "api.example.org"} {
			c.expect(name, c.ask(bootstrap(name, agentGroups)), join.ReasonNameInUse, "API server", "--node-name")
		}
		other := bootstrap("n6", []string{"system:masters"})
		other.user = "jane"
		c.expect("somebody else's", c.ask(other), "pending")
		if e := c.events(); len(e) > 0 {
			c.Errorf("events %v", e)
		}
	})
}

// TestNameOfLiveNode: a name is free again as soon as its machine is silent, and not before.
func TestNameOfLiveNode(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.node("n1", corev1.ConditionTrue, time.Now())
		c.renew("n1", time.Now())
		c.wait(10 * time.Second)
		c.expect("alive", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently,
			"node n1", "10s ago", "after 30s", "--node-name", "kedge node remove n1")
		c.expect("alive, as a server", c.ask(asServer("n1", serverGroups)), join.ReasonNameSeenRecently)
		c.wait(31 * time.Second)
		// By its time stamps it is silent, but the node controller has not given it up.
		c.expect("given up by nobody", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently, "41s ago")
		c.node("n1", corev1.ConditionUnknown, time.Now().Add(-41*time.Second))
		c.expect("given up", c.ask(bootstrap("n1", agentGroups)), "approved")
		if e := c.events(); !slices.Equal(e, []string{"Rejoined"}) {
			c.Errorf("events %v", e)
		}
	})
}

// TestWrongClock: the clock of a node may be wrong by years, in both directions.
func TestWrongClock(t *testing.T) {
	for _, skew := range []time.Duration{-20 * 365 * 24 * time.Hour, 20 * 365 * 24 * time.Hour} {
		inBubble(t, func(c *cluster) {
			theirs := func() time.Time { return time.Now().Add(skew) }
			c.node("n1", corev1.ConditionTrue, theirs())
			for range 12 {
				c.renew("n1", theirs())
				c.expect("alive", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently, "node n1")
				c.wait(10 * time.Second)
			}
			c.expect("silent for 10 s", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently, "after 30s")
			c.wait(29 * time.Second)
			c.expect("silent for 39 s", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently)
			c.wait(2 * time.Second)
			c.expect("silent for 41 s", c.ask(bootstrap("n1", agentGroups)), "approved")
		})
	}
}

// TestAfterOutage: when the servers come back, all Leases are old and all machines alive.
func TestAfterOutage(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.node("n1", corev1.ConditionTrue, time.Now())
		c.renew("n1", time.Now())
		c.wait(time.Hour)
		c.expect("first look", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently)
		c.wait(7 * time.Second)
		c.renew("n1", time.Now())
		c.wait(36 * time.Second)
		c.expect("it was alive", c.ask(bootstrap("n1", agentGroups)), join.ReasonNameSeenRecently, "36s ago")
	})
}

func TestNodeMadeBeforehand(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.node("n1", "", time.Time{})
		c.expect("no kubelet was there", c.ask(bootstrap("n1", agentGroups)), "approved")
	})
}

func TestNamesOfServers(t *testing.T) {
	inBubble(t, func(c *cluster) {
		for name, label := range map[string]string{"s1": controlPlaneLabel, "s2": etcdLabel} {
			c.node(name, corev1.ConditionUnknown, time.Now().Add(-time.Hour))
			c.label(name, label)
			c.expect(name, c.ask(bootstrap(name, agentGroups)), join.ReasonWrongRole, name+" is the name of a server", "--role server", "kedge node remove "+name)
			c.expect(name, c.ask(bootstrap(name, serverGroups)), "approved")
		}
		// One that has no Node, or not yet.
		if err := PutServer(c.Context(), c, "s3", Server{Address: "192.0.2.3:6443", Etcd: true}); err != nil {
			c.Fatal(err)
		}
		c.expect("s3", c.ask(bootstrap("s3", agentGroups)), join.ReasonWrongRole)
		c.expect("s3", c.ask(asServer("s3", serverGroups)), "approved")
		c.expect("s3", c.ask(bootstrap("s3", serverGroups)), "approved")
	})
}

// TestSameNameAtOnce: machines with one image have one name, and start at the same moment. There is no Node yet.
func TestSameNameAtOnce(t *testing.T) {
	inBubble(t, func(c *cluster) {
		first := bootstrap("box", agentGroups)
		first.key = newKey(t)
		c.expect("first", c.ask(first), "approved")
		c.expect("second", c.ask(bootstrap("box", agentGroups)), join.ReasonNameSeenRecently, "another machine was admitted", "--node-name")
		c.expect("first again", c.ask(first), "approved")
		c.expect("as a server", c.ask(asServer("box", serverGroups)), join.ReasonNameSeenRecently)
		c.lead()
		c.expect("second, with a new leader", c.ask(bootstrap("box", agentGroups)), join.ReasonNameSeenRecently)
		c.wait(hold + time.Second)
		c.expect("after the first gave up", c.ask(bootstrap("box", agentGroups)), "approved")
	})
	inBubble(t, func(c *cluster) {
		server, kubelet := asServer("box", serverGroups), bootstrap("box", serverGroups)
		server.key, kubelet.key = newKey(t), newKey(t)
		c.expect("server", c.ask(server), "approved")
		c.expect("agent", c.ask(bootstrap("box", agentGroups)), join.ReasonNameSeenRecently)
		c.expect("second server", c.ask(asServer("box", serverGroups)), join.ReasonNameSeenRecently)
		c.expect("first server's kubelet", c.ask(kubelet), "approved")
		c.expect("first server, once more", c.ask(server), "approved")
		c.expect("its kubelet, once more", c.ask(kubelet), "approved")
	})
	inBubble(t, func(c *cluster) { // all in one instant
		names := []string{}
		for i := range 5 {
			name := "at-once-" + string(rune('a'+i))
			names = append(names, name)
			if _, err := c.CertificatesV1().CertificateSigningRequests().Create(t.Context(), bootstrap("box", agentGroups).object(t, name), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		approved := 0
		for _, name := range names {
			if c.decision(name) == "approved" {
				approved++
			}
		}
		if approved != 1 {
			t.Errorf("%d machines were admitted under one name", approved)
		}
	})
	inBubble(t, func(c *cluster) { // when the first one has shown up, its signs of life decide
		c.node("box", corev1.ConditionUnknown, time.Now().Add(-time.Hour))
		c.expect("first", c.ask(bootstrap("box", agentGroups)), "approved")
		c.expect("second", c.ask(bootstrap("box", agentGroups)), join.ReasonNameSeenRecently, "another machine was admitted")
		c.node("box", corev1.ConditionTrue, time.Now())
		c.renew("box", time.Now())
		c.expect("second", c.ask(bootstrap("box", agentGroups)), join.ReasonNameSeenRecently, "a node box exists")
		c.wait(41 * time.Second)
		c.node("box", corev1.ConditionUnknown, time.Now().Add(-41*time.Second))
		c.expect("second", c.ask(bootstrap("box", agentGroups)), "approved")
	})
	inBubble(t, func(c *cluster) { // kedge node remove removes the first one's request
		name := c.create(bootstrap("box", agentGroups))
		if err := c.CertificatesV1().CertificateSigningRequests().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c.expect("after the removal", c.ask(bootstrap("box", agentGroups)), "approved")
	})
}

// TestServing is about addresses that are not there, not there yet, or somebody else's.
func TestServing(t *testing.T) {
	inBubble(t, func(c *cluster) {
		for _, bad := range []ask{
			serving("n1", "127.0.0.1"), serving("n1", "::1"), serving("n1", "0.0.0.0"), serving("n1", "224.0.0.1"), serving("n1", "10.43.0.1"), serving("n1", "10.42.1.1"),
			serving("n1", "::ffff:127.0.0.1"), serving("kubernetes", "192.0.2.1"), serving("127.0.0.1"), serving("10.43.0.1"),
			func() ask { a := serving("n1", "192.0.2.1"); a.dns = []string{"n1", "n2"}; return a }(),
			func() ask { a := serving("n1", "192.0.2.1"); a.dns = []string{"kubernetes.default.svc"}; return a }(),
		} {
			c.expect(strings.Join(append(bad.dns, bad.ips...), " "), c.ask(bad), join.ReasonBadRequest)
		}
		c.node("n0", corev1.ConditionTrue, time.Now(), "192.0.2.10", "2001:db8::10")
		c.expect("dual-stack", c.ask(serving("n0", "192.0.2.10", "2001:db8::10")), "approved")
		c.expect("name only", c.ask(serving("n0")), "approved")

		// The kubelet asks before its Node has the address.
		early := c.create(serving("n1", "192.0.2.1"))
		c.expect("no node", c.decision(early), "pending")
		c.wait(20 * time.Second)
		c.node("n1", corev1.ConditionFalse, time.Now())
		c.wait(20 * time.Second)
		c.expect("no address", c.decision(early), "pending")
		c.node("n1", corev1.ConditionFalse, time.Now(), "192.0.2.1")
		c.wait(10 * time.Second)
		c.expect("there now", c.decision(early), "approved")

		never := c.create(serving("n2", "192.0.2.2"))
		c.wait(110 * time.Second)
		c.expect("not yet", c.decision(never), "pending")
		c.wait(20 * time.Second)
		c.expect("never", c.decision(never), join.ReasonBadRequest, "there is no node n2")
	})
}

func TestServingOfOthers(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.node("n1", corev1.ConditionTrue, time.Now(), "192.0.2.1", "192.0.2.9")
		c.node("n2", corev1.ConditionTrue, time.Now(), "192.0.2.2", "192.0.2.9")
		if err := PutServer(c.Context(), c, "s1", Server{Address: "192.0.2.1:6443", PeerURL: "https://192.0.2.11:2380", Etcd: true}); err != nil {
			c.Fatal(err)
		}
		nodes, server := c.create(serving("n2", "192.0.2.9")), c.create(serving("n1", "192.0.2.1"))
		c.wait(hold + 10*time.Second)
		c.expect("server's address", c.decision(server), join.ReasonBadRequest, "address of server s1")
		if got := c.get(nodes).Status.Conditions; len(got) != 1 || !strings.Contains(got[0].Message, "address of node n1, too; if that node is gone: kedge node remove n1") {
			c.Errorf("node's address: %v", got)
		}

		// The other one tells a little later that it has moved.
		moved := c.create(serving("n2", "192.0.2.9"))
		c.wait(15 * time.Second)
		c.node("n1", corev1.ConditionTrue, time.Now(), "192.0.2.1")
		c.wait(15 * time.Second)
		c.expect("moved", c.decision(moved), "approved")
		if err := RemoveServer(c.Context(), c, "s1"); err != nil {
			c.Fatal(err)
		}
		if err := PutServer(c.Context(), c, "s2", Server{Address: "n1:6443"}); err != nil {
			c.Fatal(err)
		}
		c.expect("a server's name", c.ask(serving("n1", "192.0.2.1")), join.ReasonBadRequest, "server s2 is reached")
	})
}

// TestErrorsNeverApprove: what cannot be checked waits.
func TestErrorsNeverApprove(t *testing.T) {
	for _, what := range []struct {
		verb, resource string
		asks           []ask
	}{
		{"get", "nodes", []ask{bootstrap("n1", agentGroups), asServer("n2", serverGroups)}},
		{"list", "nodes", []ask{serving("n3", "192.0.2.3")}},
		{"get", "configmaps", []ask{bootstrap("n1", agentGroups), asServer("n2", serverGroups), serving("n3", "192.0.2.3")}},
		{"get", "leases", []ask{bootstrap("n4", agentGroups)}},
		{"update", "certificatesigningrequests", []ask{bootstrap("n5", agentGroups), rotation("n6")}},
	} {
		t.Run(what.verb+" "+what.resource, func(t *testing.T) {
			inBubble(t, func(c *cluster) {
				c.node("n3", corev1.ConditionTrue, time.Now(), "192.0.2.3")
				c.node("n4", corev1.ConditionUnknown, time.Now().Add(-time.Hour))
				broken := true
				c.PrependReactor(what.verb, what.resource, func(clienttesting.Action) (bool, runtime.Object, error) {
					return broken, nil, errors.New("out of order")
				})
				var names []string
				for _, a := range what.asks {
					names = append(names, c.create(a))
				}
				c.wait(10 * time.Minute)
				for _, name := range names {
					if got := c.decision(name); got != "pending" {
						t.Errorf("%s: %s", name, got)
					}
				}
				if !strings.Contains(c.log.String(), "out of order") {
					t.Errorf("the log does not tell:\n%s", c.log)
				}
				broken = false
				c.wait(15 * time.Second)
				for _, name := range names {
					if got := c.decision(name); got != "approved" {
						t.Errorf("%s, when all is well again: %s", name, got)
					}
				}
			})
		})
	}
}

// TestDenialsInLog: a machine that is not let in tries again every few seconds.
func TestDenialsInLog(t *testing.T) {
	inBubble(t, func(c *cluster) {
		for range 30 {
			c.ask(asServer("n1", agentGroups))
			c.ask(asServer("n2", agentGroups))
			c.wait(20 * time.Second)
		}
		if n := strings.Count(c.log.String(), "certificate denied"); n != 2 {
			c.Errorf("%d lines in ten minutes", n)
		}
		c.wait(time.Second)
		c.ask(asServer("n1", agentGroups))
		if n := strings.Count(c.log.String(), "certificate denied"); n != 3 {
			c.Errorf("%d lines after ten minutes", n)
		}
	})
}

// TestOncePerRequest: a request that somebody has decided on is left alone, also when the watch breaks and all come again.
func TestOncePerRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{T: t, log: &logged{}}
		c.Clientset = newCluster(t).Clientset
		for name, condition := range map[string]capi.RequestConditionType{"a": capi.CertificateApproved, "b": capi.CertificateDenied, "c": capi.CertificateFailed} {
			csr := bootstrap("n"+name, agentGroups).object(t, name)
			csr.Status.Conditions = []capi.CertificateSigningRequestCondition{{Type: condition, Status: corev1.ConditionTrue}}
			if _, err := c.CertificatesV1().CertificateSigningRequests().Create(t.Context(), csr, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		c.lead()
		c.lead()
		for _, name := range []string{"a", "b", "c"} {
			if n := len(c.get(name).Status.Conditions); n != 1 {
				t.Errorf("%s has %d conditions", name, n)
			}
		}
	})
}

// TestRunEnds: the loops of a leader end with its lease, also while the API is away.
func TestRunEnds(t *testing.T) {
	inBubble(t, func(c *cluster) {
		c.stop()
		c.PrependWatchReactor("*", func(clienttesting.Action) (bool, watch.Interface, error) { return true, nil, errors.New("away") })
		c.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("away") })
		c.lead()
		c.stop()
	})
}
