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
func idle(ctx context.Context, o options, h *host, rec *recorder, what string) error {
	readings, err := observeIdle(ctx, o, h)
	if err != nil {
		return err
	}
	rec.reading(what, readings[0])
	rec.behind(what, readings[0])
	return nil
}

// reading is what a machine uses while it is idle; what is counted, by the minute.
type reading struct {
	memory []Memory // the sum is first
	use
	syncs map[string]float64 // calls by process and system call; nil when they cannot be counted
}

func (r *reading) fsyncs() float64 { return total(r.syncs) }

// share notes who used how much of the processor.
func (r *reading) share(cpu map[string]float64, minute float64) {
	for i := range r.memory {
		r.memory[i].CPU = cpu[r.memory[i].Name] * minute
	}
	r.memory[0].CPU = r.cpu
}

// observeIdle reads what machines use in the same window, after they have settled.
func observeIdle(ctx context.Context, o options, hosts ...*host) (readings []reading, err error) {
	if err := pause(ctx, o.settle); err != nil {
		return nil, err
	}
	readings = make([]reading, len(hosts))
	for i, h := range hosts {
		if readings[i].memory, err = h.memory(); err != nil {
			return nil, err
		}
	}
	meters := make([]*meter, len(hosts))
	for i, h := range hosts {
		if meters[i], err = newMeter(h); err != nil {
			return nil, fmt.Errorf("%s: %w", h.name, err)
		}
		defer func() { err = errors.Join(err, meters[i].close()) }()
	}
	if err := pause(ctx, o.window); err != nil {
		return nil, err
	}
	for i, m := range meters {
		if err := m.read(&readings[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", m.h.name, err)
		}
	}
	return readings, nil
}
