// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// rival competes for a Lease of a cluster that it can be cut off from.
type rival struct {
	*election
	cutOff atomic.Bool
	stop   func()
}

func newRival(t *testing.T, cluster *fake.Clientset, name string) *rival {
	t.Helper()
	r := &rival{election: &election{log: testLog(t), identity: name, changed: func() {}}}
	// A client of its own, which shares the cluster's objects and can be cut off from them.
	client := &fake.Clientset{}
	client.AddReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if r.cutOff.Load() {
			time.Sleep(leaseRequest) // as a request that gets no answer
			return true, nil, errors.New("no answer")
		}
		obj, err := cluster.Invokes(a, &corev1.ConfigMap{})
		return true, obj, err
	})
	client.AddWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		w, err := cluster.InvokesWatch(a)
		return true, w, err
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.run(ctx, client, leaseName) }()
	r.stop = func() { cancel(); <-done }
	return r
}

func (r *rival) holds() bool { left, _ := r.remaining(); return left > 0 }

// versioned is a cluster with the Lease that refuses changes of what was changed meanwhile.
func versioned(t *testing.T) *fake.Clientset {
	t.Helper()
	lease := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: leaseName, ResourceVersion: "1"}}
	cluster := fake.NewClientset(lease)
	version := 1
	cluster.PrependReactor("update", "configmaps", func(a clienttesting.Action) (bool, runtime.Object, error) {
		l := a.(clienttesting.UpdateAction).GetObject().(*corev1.ConfigMap)
		if l.ResourceVersion != strconv.Itoa(version) {
			return true, nil, apierrors.NewConflict(corev1.Resource("configmaps"), l.Name, errors.New("it was changed"))
		}
		version++
		l.ResourceVersion = strconv.Itoa(version)
		return false, nil, nil // the store behind does it
	})
	return cluster
}

func TestElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := versioned(t)
		a := newRival(t, cluster, "a")
		for !a.holds() {
			time.Sleep(10 * time.Millisecond)
		}
		b := newRival(t, cluster, "b")
		time.Sleep(time.Minute)
		if !a.holds() || b.holds() {
			t.Fatalf("a holds the lease: %v, b: %v", a.holds(), b.holds())
		}
		// The holder is cut off: it stops before the other one starts.
		a.cutOff.Store(true)
		cut, stopped := time.Now(), time.Duration(0)
		for !b.holds() {
			time.Sleep(10 * time.Millisecond)
			if stopped == 0 && !a.holds() {
				stopped = time.Since(cut)
			}
			if a.holds() && b.holds() {
				t.Fatal("both hold it")
			}
		}
		took := time.Since(cut)
		t.Logf("the holder stopped after %s, the other one took over after %s", stopped, took)
		if stopped == 0 || took-stopped < 500*time.Millisecond || took > leaseDuration+500*time.Millisecond {
			t.Errorf("stopped after %s, taken over after %s", stopped, took)
		}
		a.cutOff.Store(false)
		time.Sleep(20 * time.Second)
		if a.holds() || !b.holds() {
			t.Error("who was cut off takes it back")
		}
		// One that ends gives it back, and the other need not wait.
		begin := time.Now()
		b.stop()
		for !a.holds() {
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("taken over %s after it was given back", took)
		}
		a.stop()
	})
}

// TestElectionOutage: who keeps holds on while nobody can renew a lease, is given the time to renew it when that is possible again, and
// yields to somebody who is seen with it.
func TestElectionOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := versioned(t)
		a := newRival(t, cluster, "a")
		for !a.holds() {
			time.Sleep(10 * time.Millisecond)
		}
		b := newRival(t, cluster, "b")
		for _, r := range []*rival{a, b} {
			r.mu.Lock()
			r.keep = true
			r.mu.Unlock()
		}
		defer a.stop()
		defer b.stop()
		time.Sleep(time.Second) // until it watches: client-go waits for years of a bubble's time when that fails
		// From when the other one has asked in vain: after a shorter one it may be faster.
		for outage := leaseDuration + 2*time.Second; outage < 3*time.Minute; outage = outage*3/2 + 100*time.Millisecond {
			a.cutOff.Store(true)
			b.cutOff.Store(true)
			time.Sleep(outage)
			if _, overdue := a.remaining(); !a.holds() || b.holds() || !overdue {
				t.Fatalf("after an outage of %s: a holds the lease: %v, overdue: %v, b: %v", outage, a.holds(), overdue, b.holds())
			}
			a.cutOff.Store(false)
			b.cutOff.Store(false)
			for range 100 {
				time.Sleep(100 * time.Millisecond)
				if !a.holds() || b.holds() {
					t.Fatalf("after the end of an outage of %s: a holds the lease: %v, b: %v", outage, a.holds(), b.holds())
				}
			}
			if _, overdue := a.remaining(); overdue {
				t.Fatal("the lease is not renewed")
			}
		}
		// Only the holder's requests get no answer. Its watch goes on, so it sees the other one at once.
		a.cutOff.Store(true)
		begin := time.Now()
		for !b.holds() {
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(begin); took > leaseDuration+500*time.Millisecond {
			t.Errorf("taken over after %s", took)
		}
		time.Sleep(20 * time.Second)
		if a.holds() || !b.holds() {
			t.Errorf("a holds the lease: %v, b: %v", a.holds(), b.holds())
		}
	})
}
