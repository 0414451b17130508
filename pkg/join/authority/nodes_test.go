// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/pkg/datastore"
)

// controlled is a fake API with a NodeController, inside a synctest bubble.
type controlled struct {
	*testing.T
	*fake.Clientset
	members *fakeMembers
	log     *logged
	stop    func()
}

func newControlled(t *testing.T) *controlled {
	t.Helper()
	c := &controlled{T: t, Clientset: fake.NewClientset(), members: &fakeMembers{}, log: &logged{}}
	c.lead()
	return c
}

func (c *controlled) lead() {
	if c.stop != nil {
		c.stop()
	}
	ctx, cancel := context.WithCancel(c.Context())
	var wg sync.WaitGroup
	controller := NewNodeController(c, c.members, c.log.logger())
	wg.Go(func() {
		if err := controller.Run(ctx); err != nil {
			c.Error(err)
		}
	})
	c.stop = func() { cancel(); wg.Wait() }
	c.Cleanup(c.stop)
	c.wait(time.Second)
}

func (c *controlled) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (c *controlled) do(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
	c.wait(time.Second)
}

func (c *controlled) put(name string) {
	c.Helper()
	c.do(PutServer(c.Context(), c, name, Server{Address: "192.0.2.1:6443", Etcd: true, ControlPlane: true}))
}

func (c *controlled) addNode(name string) {
	c.Helper()
	_, err := c.CoreV1().Nodes().Create(c.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	c.do(err)
}

func (c *controlled) deleteNode(name string) {
	c.Helper()
	c.do(c.CoreV1().Nodes().Delete(c.Context(), name, metav1.DeleteOptions{}))
}

// expect compares the registered servers, "+" for those whose Node was seen, and the removals since the last time.
func (c *controlled) expect(what, registered string, removals ...string) {
	c.Helper()
	servers, err := ListServers(c.Context(), c)
	if err != nil {
		c.Fatal(err)
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(servers)) {
		list = append(list, name+map[bool]string{true: "+"}[servers[name].Node])
	}
	if got := strings.Join(list, " "); got != registered {
		c.Errorf("%s: registered %q, want %q", what, got, registered)
	}
	if got := c.members.taken(); !slices.Equal(got, removals) {
		c.Errorf("%s: datastore %q, want %q", what, got, removals)
	}
}

func controlledBubble(t *testing.T, f func(c *controlled)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(newControlled(t)) })
}

func TestDeletedNode(t *testing.T) {
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.put("n2")
		c.put("headless")
		c.addNode("n1")
		c.addNode("agent")
		c.wait(time.Hour)
		c.expect("one has joined, one is joining, one has no kubelet", "headless n1+ n2")
		c.addNode("n2")
		c.expect("both have joined", "headless n1+ n2+")
		c.put("n2")
		c.expect("it starts again", "headless n1+ n2+")
		c.deleteNode("agent")
		c.expect("an agent is deleted", "headless n1+ n2+")
		c.deleteNode("n2")
		c.expect("a server is deleted", "headless n1+", "remove n2 false")
		if e := eventReasons(c, c.Clientset); !slices.Equal(e, []string{"ServerRemoved"}) {
			c.Errorf("events %v", e)
		}
		c.put("n2")
		c.wait(time.Hour)
		c.expect("it joins again", "headless n1+ n2")
		c.addNode("n2")
		c.expect("it has joined again", "headless n1+ n2+")
	})
}

func TestDeletedWhileNobodyLed(t *testing.T) {
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.put("n2")
		c.addNode("n1")
		c.stop()
		c.deleteNode("n1")
		c.expect("nobody leads", "n1+ n2")
		c.lead()
		c.expect("somebody leads", "n2", "remove n1 false")
	})
}

func TestRemovalRefused(t *testing.T) {
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		c.members.fail(fmt.Errorf("%w: 1 of 2 needed", datastore.ErrQuorum))
		c.deleteNode("n1")
		c.expect("refused", "n1+", "remove n1 false")
		c.wait(5 * time.Minute)
		if n := len(c.members.taken()); n != 10 {
			c.Errorf("tried %d times in five minutes", n)
		}
		if e := eventReasons(c, c.Clientset); !slices.Equal(e, []string{"ServerNotRemoved"}) {
			c.Errorf("events %v", e)
		}
		if n := strings.Count(c.log.String(), "server not removed"); n != 1 || !strings.Contains(c.log.String(), "1 of 2 needed") {
			c.Errorf("%d lines in\n%s", n, c.log)
		}
		c.members.fail(nil)
		c.wait(time.Minute)
		c.expect("allowed", "", "remove n1 false")
	})
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		c.members.fail(datastore.ErrQuorum)
		c.deleteNode("n1")
		c.expect("refused", "n1+", "remove n1 false")
		c.members.fail(nil)
		c.addNode("n1")
		c.wait(5 * time.Minute)
		c.expect("its Node came back", "n1+")
	})
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		c.members.fail(datastore.ErrQuorum)
		c.deleteNode("n1")
		c.expect("refused", "n1+", "remove n1 false")
		c.members.fail(nil)
		c.do(applyServer(c.Context(), c, "n1", Server{Etcd: true})) // as the join API does
		c.wait(5 * time.Minute)
		c.expect("it joined afresh, its Node is still to come", "n1")
	})
}

func TestServerWithoutMember(t *testing.T) {
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		c.members.fail(datastore.ErrNotMember)
		c.deleteNode("n1")
		c.expect("removed from the registry", "", "remove n1 false")
	})
}

// TestLooksAgain: informers may be late, a member that is removed by mistake does not come back.
func TestLooksAgain(t *testing.T) {
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		c.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, nil
		})
		c.deleteNode("n1")
		c.expect("it exists", "n1+")
	})
	controlledBubble(t, func(c *controlled) {
		c.put("n1")
		c.addNode("n1")
		away := true
		c.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) { return away, nil, errors.New("away") })
		c.deleteNode("n1")
		c.expect("nobody knows", "n1+")
		away = false
		c.wait(retryRemoval)
		c.expect("it does not", "", "remove n1 false")
	})
}
