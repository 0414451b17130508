// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"fmt"
	"maps"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// defaultLeaseDuration is the kubelet's.
const defaultLeaseDuration = 40 * time.Second

// silence decides whether the machine behind a Node is gone. A kubelet renews its Lease every ten seconds; one that has not for the
// Lease's own duration is silent. But its time stamps are those of its machine's clock, and at the edge clocks are wrong by years: so
// a machine that the node lifecycle controller has not given up (it goes by what it sees, not by time stamps) is watched for that
// long on our own clock before it counts as silent. That also covers the first minute after an outage of all servers, when every
// Lease is old and every machine alive.
//
// It is for one goroutine.
type silence struct {
	client  kubernetes.Interface
	watched map[string]watched // by node name
}

// watched is the last sign of life of a node, and since when it has been the last.
type watched struct {
	sign  string
	since time.Time
}

// pulse is what is known about a machine's life.
type pulse struct {
	seen    time.Time     // zero if never
	sign    string        // what was seen; empty if nothing
	overdue bool          // by the clocks, the last sign of life is too old
	silent  bool          // and nobody has heard of it in another way
	wait    time.Duration // if not silent: how long until it may be, without another sign
}

func newSilence(client kubernetes.Interface) *silence {
	return &silence{client: client, watched: map[string]watched{}}
}

func (s *silence) of(ctx context.Context, node *corev1.Node) (pulse, error) {
	lease, err := s.client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, node.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		lease = &coordinationv1.Lease{}
	} else if err != nil {
		return pulse{}, fmt.Errorf("lease of node %s: %w", node.Name, err)
	}
	duration := defaultLeaseDuration
	if d := lease.Spec.LeaseDurationSeconds; d != nil && *d > 0 {
		duration = time.Duration(*d) * time.Second
	}
	ready := readyCondition(node)
	var p pulse
	now := time.Now()
	if t := lease.Spec.RenewTime; t != nil {
		p.seen, p.sign = t.Time, lease.ResourceVersion
	}
	if !ready.LastHeartbeatTime.IsZero() {
		p.sign += " " + ready.LastHeartbeatTime.UTC().String()
	}
	if ready.LastHeartbeatTime.After(p.seen) {
		p.seen = ready.LastHeartbeatTime.Time
	}
	last := watched{p.sign, now}
	if w, ok := s.watched[node.Name]; ok && w.sign == last.sign {
		last = w
	}
	s.watched[node.Name] = last
	maps.DeleteFunc(s.watched, func(_ string, w watched) bool { return now.Sub(w.since) > time.Hour })
	givenUp := ready.Status == "" || ready.Status == corev1.ConditionUnknown
	age := now.Sub(p.seen)
	p.overdue = age.Abs() >= duration
	p.silent = p.overdue && (givenUp || now.Sub(last.since) >= duration)
	if p.overdue {
		p.wait = duration - now.Sub(last.since)
	} else {
		p.wait = min(duration-age, duration)
	}
	return p, nil
}

// byName looks the Node up first.
func (s *silence) byName(ctx context.Context, name string) (p pulse, exists bool, err error) {
	node, err := s.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return pulse{}, false, nil
	}
	if err != nil {
		return pulse{}, false, err
	}
	p, err = s.of(ctx, node)
	return p, true, err
}

// readyCondition is empty for a Node that no kubelet has reported on: somebody made it beforehand.
func readyCondition(node *corev1.Node) corev1.NodeCondition {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c
		}
	}
	return corev1.NodeCondition{}
}

// describe says in words when the machine was seen.
func (p pulse) describe() string {
	if p.seen.IsZero() {
		return "it has never been seen"
	}
	return "it was last seen " + ago(p.seen, time.Now())
}
