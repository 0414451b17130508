// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/kedge-io/kedge/pkg/datastore"
)

// Times of the lease. A datastore that stalls for less than renewDeadline costs nothing; the loops of a server that died are taken
// over after leaseDuration, until when nothing but new decisions waits: pods, services and the API do not need them.
const (
	leaseDuration = 40 * time.Second
	renewDeadline = 30 * time.Second
	retryPeriod   = 4 * time.Second
)

const leaseName = "kedge"

// LeaseKey is where the datastore has the leader's lease, below kube-apiserver's --etcd-prefix.
func LeaseKey(prefix string) string {
	return path.Join(prefix, "leases", metav1.NamespaceSystem, leaseName)
}

// dropFormerLeader removes the lease that a restored datastore has: its holder may be gone for good, and would be waited for. One that was
// taken since then has a later revision and stays. The holder's loops, should it still run, run in another cluster: this one has
// a datastore of its own.
func (p *plane) dropFormerLeader(ctx context.Context) {
	if p.cfg.RestoredRevision == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, retryPeriod)
	defer cancel()
	deleted, err := datastore.DeleteUpTo(ctx, p.store, LeaseKey(p.apiserver.Etcd.StorageConfig.Prefix), p.cfg.RestoredRevision)
	if err != nil {
		p.log.Warn("the lease of the leader of before the restore stays until it is over", "lease", leaseName, "error", err)
	} else if deleted {
		p.log.Info("the lease of the leader of before the restore was removed", "lease", leaseName)
	}
}

// leadership decides when the loops of the cluster (scheduler, controllers) run in this process: all the time while this is the only
// server, without any lease; otherwise as long as it holds the one lease that all of them share. Losing it stops the loops and
// nothing else; they start again with the lease.
type leadership struct {
	client kubernetes.Interface
	node   string
	log    *slog.Logger
	// loops run until ctx ends; an error before that ends the process.
	loops func(ctx context.Context) error
	// follows is called with the leader's name when it is another server.
	follows func(leader string)

	share func() // makes a lone server take the lease
	held  chan struct{}
}

func newLeadership(l leadership) (*leadership, <-chan struct{}) {
	wanted := make(chan struct{})
	l.share = sync.OnceFunc(func() { close(wanted) })
	l.held = make(chan struct{})
	return &l, wanted
}

// term is one run of the loops.
type term struct {
	cancel context.CancelFunc
	ended  chan error
}

func (l *leadership) begin(ctx context.Context) *term {
	ctx, cancel := context.WithCancel(ctx)
	t := &term{cancel, make(chan error, 1)}
	go func() { t.ended <- l.loops(ctx) }()
	return t
}

// stop ends the loops and waits for their end.
func (t *term) stop() error {
	t.cancel()
	return <-t.ended
}

// run leads, or waits to, until ctx ends. alone says that there is no other server; wanted that there is one from now on.
func (l *leadership) run(ctx context.Context, alone bool, wanted <-chan struct{}) error {
	var t *term
	if alone {
		t = l.begin(ctx)
		select {
		case <-wanted:
			l.log.Info("another server joins: leadership is by lease from now on")
		case <-ctx.Done():
			return t.stop()
		case err := <-t.ended:
			return err
		}
	}
	for ctx.Err() == nil {
		if err := l.elect(ctx, t); err != nil {
			return err
		}
		t = nil
	}
	return nil
}

// elect takes the lease and runs the loops, or goes on with those that run, until the lease is lost, ctx ends or the loops fail.
func (l *leadership) elect(ctx context.Context, t *term) error {
	// The lease is given back only when the loops have ended.
	electing, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	started, over := make(chan struct{}), make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: leaseName},
			Client:    l.client.CoordinationV1(),
			// The name alone: a process that comes after one that was killed goes on with its lease. There is one per server.
			LockConfig: resourcelock.ResourceLockConfig{Identity: l.node},
		},
		Name:            leaseName,
		LeaseDuration:   leaseDuration,
		RenewDeadline:   renewDeadline,
		RetryPeriod:     retryPeriod,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { close(started) },
			OnStoppedLeading: func() {},
			OnNewLeader: func(leader string) {
				if leader != l.node {
					l.follows(leader)
				}
			},
		},
	})
	if err != nil {
		return err
	}
	go func() {
		defer close(over)
		elector.Run(electing)
	}()
	select {
	case <-started:
	case <-ctx.Done():
		release()
		<-over
		if t != nil {
			return t.stop()
		}
		return nil
	}
	l.log.Info("leads the cluster")
	if t == nil {
		t = l.begin(ctx)
	}
	l.announceHeld()
	select {
	case <-over:
		l.log.Warn("lost the lease: the loops stop until it is taken again", "lease", leaseName)
		return l.lost(t.stop())
	case <-ctx.Done():
		err := t.stop()
		release()
		<-over
		return err
	case err := <-t.ended:
		release()
		<-over
		return err
	}
}

// lost judges how the loops ended: what they say after they were told to stop does not matter, unless some of them still run.
func (l *leadership) lost(err error) error {
	if err != nil && errors.Is(err, errStillRunning) {
		return err
	}
	return nil
}

func (l *leadership) announceHeld() {
	select {
	case <-l.held:
	default:
		close(l.held)
	}
}

// errStillRunning ends the process: loops that do not stop must not run beside another leader's.
var errStillRunning = errors.New("some loops do not stop")

// shared returns when no lone leadership without a lease exists any more. It is called before another server is let in.
func (l *leadership) shared(ctx context.Context, alone bool) error {
	l.share()
	if !alone {
		return nil
	}
	select {
	case <-l.held:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("this server could not take the lease %s, without which two servers would lead: %w", leaseName, ctx.Err())
	}
}
