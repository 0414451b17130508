// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	coordination "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	pollReady = 20 * time.Millisecond
	// A refused pod costs the API server some milliseconds of the two cores that everything shares.
	pollCreate   = 50 * time.Millisecond
	startTimeout = 3 * time.Minute
)

// starts measures a start with nothing on the disk, and one with everything there, pods running.
func starts(ctx context.Context, _ options, s side, h *host, rec *recorder) error {
	if _, err := startOnce(ctx, s, h, rec, "fresh"); err != nil {
		return fmt.Errorf("fresh start: %w", err)
	}
	if err := pause(ctx, 5*time.Second); err != nil { // what still has to be done after a start is done
		return err
	}
	stopping := time.Now()
	if err := s.stop(ctx); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	rec.add("stop", time.Since(stopping).Seconds())
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}
	if _, err := startOnce(ctx, s, h, rec, "again"); err != nil {
		return fmt.Errorf("start with data: %w", err)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// startOnce starts a side and records seconds under names that begin with what. It returns the client.
func startOnce(ctx context.Context, s side, h *host, rec *recorder, what string) (kubernetes.Interface, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not done after %s", startTimeout))
	defer cancel()
	before, err := h.cpuSeconds()
	if err != nil {
		return nil, err
	}
	p, err := s.start(ctx)
	if err != nil {
		return nil, err
	}
	st := &startup{node: s.machine().Name(), pod: "bench-" + what, fresh: what == "fresh"}
	if st.t0, err = h.started(p.PID); err != nil {
		return nil, fmt.Errorf("%w: see %s in the machine", err, p.Log)
	}
	c, err := st.connect(ctx, s, h)
	if err != nil {
		return nil, err
	}
	if err := st.observe(ctx, c); err != nil {
		return nil, fmt.Errorf("%w; so far: %s", err, st)
	}
	after, err := h.cpuSeconds()
	rec.add(what+" readyz", st.ready.Sub(st.t0).Seconds())
	rec.add(what+" node", st.nodeReady.Sub(st.t0).Seconds())
	rec.add(what+" accepted", st.accepted.Sub(st.t0).Seconds())
	rec.add(what+" pod", st.running.Sub(st.t0).Seconds())
	rec.add(what+" cpu", after-before)
	return c, err
}

// startup is what is seen of a start.
type startup struct {
	t0    time.Time
	node  string
	pod   string
	fresh bool

	ready, nodeReady, accepted, running, voter time.Time

	condition, alive bool  // of the node: its condition is Ready, and it has been heard of since the start
	refusal          error // of the pod, the last one
}

func (st *startup) String() string {
	return fmt.Sprintf("readyz %v, node Ready %v (condition %t, heard of %t), pod accepted %v (last refusal: %v)",
		!st.ready.IsZero(), !st.nodeReady.IsZero(), st.condition, st.alive, !st.accepted.IsZero(), st.refusal)
}

// connect waits for the credentials; the API need not be there yet.
func (st *startup) connect(ctx context.Context, s side, h *host) (kubernetes.Interface, error) {
	for {
		conf, err := s.config(h)
		if err == nil {
			conf.QPS = -1
			conf.ContentType = runtime.ContentTypeProtobuf
			return kubernetes.NewForConfig(rest.AddUserAgent(conf, "kedge-bench"))
		}
		if waited := pause(ctx, pollReady); waited != nil {
			return nil, errors.Join(waited, err)
		}
	}
}

// seen is something observed, at the time when it was.
type seen struct {
	at     time.Time
	object runtime.Object // from a watch
	ready  bool           // /readyz said ok
	voter  bool           // the datastore counts on the node
	asked  bool           // for the pod
	err    error          // why the pod was refused
}

// observe watches the node, its lease and a pod, and asks for /readyz and for the pod until both are granted.
func (st *startup) observe(ctx context.Context, c kubernetes.Interface) error {
	observers := append(st.nodeObservers(c),
		func(ctx context.Context, events chan<- seen) {
			follow(ctx, func() (watch.Interface, error) {
				return c.CoreV1().Pods(metav1.NamespaceDefault).Watch(ctx, named(st.pod))
			}, events)
		},
		func(ctx context.Context, events chan<- seen) {
			try(ctx, pollReady, events, func() (seen, bool) {
				ok := isReady(ctx, c)
				return seen{ready: ok}, ok
			})
		},
		func(ctx context.Context, events chan<- seen) {
			try(ctx, pollCreate, events, func() (seen, bool) {
				err := createPod(ctx, c, st.pod)
				return seen{asked: true, err: err}, err == nil
			})
		})
	return st.gather(ctx, func() bool { return !st.ready.IsZero() && !st.nodeReady.IsZero() && !st.running.IsZero() }, observers)
}

// observer hands on what it sees until ctx ends, or there is no more to see.
type observer func(ctx context.Context, events chan<- seen)

// nodeObservers watch the node and its lease.
func (st *startup) nodeObservers(c kubernetes.Interface) []observer {
	return []observer{
		func(ctx context.Context, events chan<- seen) {
			follow(ctx, func() (watch.Interface, error) { return c.CoreV1().Nodes().Watch(ctx, named(st.node)) }, events)
		},
		func(ctx context.Context, events chan<- seen) {
			follow(ctx, func() (watch.Interface, error) {
				return c.CoordinationV1().Leases(corev1.NamespaceNodeLease).Watch(ctx, named(st.node))
			}, events)
		},
	}
}

func named(name string) metav1.ListOptions {
	return metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
}

// gather takes in what the observers see until it is enough.
func (st *startup) gather(ctx context.Context, enough func() bool, observers []observer) error {
	ctx, cancel := context.WithCancel(ctx)
	events := make(chan seen)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for _, observe := range observers {
		running.Go(func() { observe(ctx, events) })
	}
	for !enough() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case ev := <-events:
			st.see(ev)
		}
	}
	return nil
}

// try calls f until it succeeds, and hands on what it saw each time.
func try(ctx context.Context, every time.Duration, events chan<- seen, f func() (seen, bool)) {
	for pause(ctx, every) == nil {
		ev, done := f()
		ev.at = time.Now()
		select {
		case events <- ev:
		case <-ctx.Done():
			return
		}
		if done {
			return
		}
	}
}

func isReady(ctx context.Context, c kubernetes.Interface) bool {
	body, err := c.Discovery().RESTClient().Get().AbsPath("/readyz").MaxRetries(0).Timeout(time.Second).DoRaw(ctx)
	return err == nil && string(body) == "ok"
}

// follow keeps a watch open from the moment on that the API grants one.
func follow(ctx context.Context, open func() (watch.Interface, error), events chan<- seen) {
	for pause(ctx, pollReady) == nil {
		w, err := open()
		if err != nil {
			continue
		}
		for ev := range w.ResultChan() {
			select {
			case events <- seen{at: time.Now(), object: ev.Object}:
			case <-ctx.Done():
				w.Stop()
				return
			}
		}
	}
}

func (st *startup) see(ev seen) {
	switch o := ev.object.(type) {
	case *corev1.Node:
		for _, c := range o.Status.Conditions {
			if c.Type == corev1.NodeReady {
				st.condition = c.Status == corev1.ConditionTrue
				st.alive = st.alive || st.condition && st.since(c.LastHeartbeatTime.Time)
			}
		}
		st.judge(ev.at)
	case *coordination.Lease:
		st.alive = st.alive || o.Spec.RenewTime != nil && st.since(o.Spec.RenewTime.Time)
		st.judge(ev.at)
	case *corev1.Pod:
		if o.Status.Phase == corev1.PodRunning && st.running.IsZero() {
			st.running = ev.at
		}
	}
	if ev.ready {
		st.ready = ev.at
	}
	if ev.voter {
		st.voter = ev.at
	}
	if ev.asked {
		st.refusal = ev.err
		if ev.err == nil {
			st.accepted = ev.at
		}
	}
}

// since tells whether a time stored by the kubelet belongs to this start: after a restart, the old condition says nothing
// until the node has been heard of again.
func (st *startup) since(t time.Time) bool { return st.fresh || !t.Before(st.t0.Truncate(time.Second)) }

func (st *startup) judge(now time.Time) {
	switch {
	case !st.condition || !st.alive:
		if st.running.IsZero() {
			st.nodeReady = time.Time{} // it was ready for a moment only
		}
	case st.nodeReady.IsZero():
		st.nodeReady = now
	}
}

func createPod(ctx context.Context, c kubernetes.Interface, name string) error {
	_, err := c.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "bench"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64),
			Containers:                    []corev1.Container{{Name: "pod", Image: podImage, ImagePullPolicy: corev1.PullNever}},
		},
	}, metav1.CreateOptions{})
	return err
}
