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

func (r *rival) holds() bool { return r.remaining() > 0 }

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
