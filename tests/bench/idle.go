// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const podCount = 20

// idles measures what a cluster uses that has nothing to do, with no pods and with 20 of them.
func idles(ctx context.Context, o options, s side, h *host, rec *recorder) error {
	c, err := startOnce(ctx, s, h, &recorder{results: &results{}}, "fresh") // its times are those of another disk
	if err != nil {
		return err
	}
	if err := deletePods(ctx, c); err != nil {
		return err
	}
	if o.has("idle") {
		if err := idle(ctx, o, h, rec, "idle"); err != nil {
			return err
		}
	}
	if !o.has("pods") {
		return nil
	}
	seconds, err := runPods(ctx, c)
	if err != nil {
		return err
	}
	rec.add("pods running", seconds)
	return idle(ctx, o, h, rec, "pods")
}

func deletePods(ctx context.Context, c kubernetes.Interface) error {
	pods := c.CoreV1().Pods(metav1.NamespaceDefault)
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}, metav1.ListOptions{}); err != nil {
		return fmt.Errorf("delete the first pod: %w", err)
	}
	return nil
}

// runPods creates the pods one after the other and returns the seconds until all run.
func runPods(ctx context.Context, c kubernetes.Interface) (float64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("the pods do not run after %s", startTimeout))
	defer cancel()
	w, err := c.CoreV1().Pods(metav1.NamespaceDefault).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, fmt.Errorf("watch the pods: %w", err)
	}
	defer w.Stop()
	begin := time.Now()
	for i := range podCount {
		if err := createPod(ctx, c, fmt.Sprintf("bench-%d", i)); err != nil {
			return 0, fmt.Errorf("create pod %d: %w", i, err)
		}
	}
	running := map[string]bool{}
	for len(running) < podCount {
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case ev, open := <-w.ResultChan():
			if !open {
				return 0, errors.New("the watch of the pods ended")
			}
			if p, ok := ev.Object.(*corev1.Pod); ok && p.Status.Phase == corev1.PodRunning {
				running[p.Name] = true
			}
		}
	}
	return time.Since(begin).Seconds(), nil
}

// idle waits until the cluster has settled and measures it over the window. Nobody asks the cluster anything meanwhile.
func idle(ctx context.Context, o options, h *host, rec *recorder, what string) (err error) {
	if err := pause(ctx, o.settle); err != nil {
		return err
	}
	memory, err := h.memory()
	if err != nil {
		return err
	}
	rec.memory(what, memory)
	t, err := newTracer(h)
	if errors.Is(err, errNoTrace) {
		fmt.Println("fsyncs are not counted:", err)
	} else if err != nil {
		return fmt.Errorf("trace system calls: %w", err)
	} else {
		defer func() { err = errors.Join(err, t.close()) }()
	}
	use, err := h.use(func() error { return pause(ctx, o.window) })
	if err != nil {
		return err
	}
	minute := 60 / o.window.Seconds()
	rec.add(what+" cpu", use.cpu*minute)
	rec.add(what+" written", use.written*minute)
	rec.add(what+" device", use.device*minute)
	rec.add(what+" flushes", use.flushes*minute)
	if t == nil {
		return nil
	}
	calls, err := t.count()
	if err != nil {
		return err
	}
	total := 0
	for _, n := range calls {
		total += n
	}
	rec.add(what+" fsyncs", float64(total)*minute)
	rec.calls(what, calls)
	return nil
}

// use is what a machine used during a time.
type use struct {
	cpu             float64 // seconds
	written, device float64 // MB, as counted by process and by the disk
	flushes         float64
}

func (h *host) use(wait func() error) (use, error) {
	var u use
	d, err := h.device()
	if err != nil {
		return u, err
	}
	device, flushes, err := d.counters()
	if err != nil {
		return u, err
	}
	before, err := h.written()
	if err != nil {
		return u, err
	}
	cpu, err := h.cpuSeconds()
	if err != nil {
		return u, err
	}
	if err := wait(); err != nil {
		return u, err
	}
	if u.cpu, err = h.cpuSeconds(); err != nil {
		return u, err
	}
	u.cpu -= cpu
	after, err := h.written()
	if err != nil {
		return u, err
	}
	for p, n := range after {
		u.written += (n - before[p]) / 1e6
	}
	if u.device, u.flushes, err = d.counters(); err != nil {
		return u, err
	}
	u.device, u.flushes = (u.device-device)/1e6, u.flushes-flushes
	return u, nil
}
