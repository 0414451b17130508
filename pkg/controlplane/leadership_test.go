// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/utils/ptr"
)

// loops count how often they were started and whether they run.
type loops struct{ started, running int }

func (l *loops) run(ctx context.Context) error {
	l.started++
	l.running++
	<-ctx.Done()
	l.running--
	return nil
}

type candidate struct {
	*leadership
	loops  loops
	follow string
	client *fake.Clientset
	wanted <-chan struct{}
	ended  chan error
	cancel context.CancelFunc
}

func newCandidate(t *testing.T, node string, client *fake.Clientset) *candidate {
	c := &candidate{client: client, ended: make(chan error, 1)}
	c.leadership, c.wanted = newLeadership(leadership{client: client, node: node, log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		loops: c.loops.run, follows: func(leader string) { c.follow = leader }})
	return c
}

func (c *candidate) start(t *testing.T, alone bool) {
	ctx, cancel := context.WithCancel(t.Context())
	c.cancel = cancel
	go func() { c.ended <- c.run(ctx, alone, c.wanted) }()
}

func leaseHolder(t *testing.T, client *fake.Clientset) string {
	l, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(t.Context(), leaseName, metav1.GetOptions{})
	if err != nil {
		return ""
	}
	return ptr.Deref(l.Spec.HolderIdentity, "")
}

// A lone server needs no lease; when another one joins it takes it, before it lets that one in, and its loops run on.
func TestAloneThenShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		c := newCandidate(t, "m1", client)
		c.start(t, true)
		time.Sleep(time.Hour)
		synctest.Wait()
		if holder := leaseHolder(t, client); holder != "" || c.loops.running != 1 {
			t.Fatalf("alone: the lease is held by %q, %d loops run", holder, c.loops.running)
		}
		if err := c.shared(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		if holder := leaseHolder(t, client); holder != "m1" || c.loops.started != 1 || c.loops.running != 1 {
			t.Errorf("shared: the lease is held by %q, loops were started %d times, %d run", holder, c.loops.started, c.loops.running)
		}
		c.cancel()
		if err := <-c.ended; err != nil || c.loops.running != 0 {
			t.Errorf("stop: %v, %d loops run", err, c.loops.running)
		}
		if holder := leaseHolder(t, client); holder != "" {
			t.Errorf("the lease was not given back: held by %q", holder)
		}
	})
}

// Of two servers one leads; the other takes over when the first stops.
func TestTakeOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		a, b := newCandidate(t, "m1", client), newCandidate(t, "m2", client)
		a.start(t, false)
		synctest.Wait()
		b.start(t, false)
		time.Sleep(time.Minute)
		synctest.Wait()
		if a.loops.running != 1 || b.loops.running != 0 || b.follow != "m1" {
			t.Fatalf("m1 runs %d loops, m2 %d and follows %q", a.loops.running, b.loops.running, b.follow)
		}
		a.cancel()
		<-a.ended
		time.Sleep(leaseDuration)
		synctest.Wait()
		if b.loops.running != 1 {
			t.Errorf("m2 did not take over")
		}
		b.cancel()
		<-b.ended
	})
}

// A datastore that stalls for less than half a minute costs nothing; a longer stall stops the loops, and they come back with it.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		var until time.Time
		client.PrependReactor("*", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
			if time.Now().Before(until) {
				return true, nil, errors.New("etcdserver: request timed out")
			}
			return false, &coordinationv1.Lease{}, nil
		})
		c := newCandidate(t, "m1", client)
		c.start(t, false)
		time.Sleep(time.Minute)
		until = time.Now().Add(20 * time.Second)
		time.Sleep(time.Minute)
		synctest.Wait()
		if c.loops.started != 1 || c.loops.running != 1 {
			t.Errorf("after a short stall: started %d times, %d run", c.loops.started, c.loops.running)
		}
		until = time.Now().Add(50 * time.Second)
		time.Sleep(45 * time.Second)
		synctest.Wait()
		if c.loops.running != 0 {
			t.Errorf("during a long stall %d loops run", c.loops.running)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if c.loops.started != 2 || c.loops.running != 1 {
			t.Errorf("after a long stall: started %d times, %d run", c.loops.started, c.loops.running)
		}
		c.cancel()
		if err := <-c.ended; err != nil {
			t.Error(err)
		}
	})
}

// What fails by itself ends the process.
func TestLoopsFail(t *testing.T) {
	for _, alone := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c := newCandidate(t, "m1", fake.NewClientset())
			broken := errors.New("broken")
			c.leadership.loops = func(context.Context) error { return broken }
			c.start(t, alone)
			if err := <-c.ended; !errors.Is(err, broken) {
				t.Errorf("alone %v: got %v", alone, err)
			}
		})
	}
}
