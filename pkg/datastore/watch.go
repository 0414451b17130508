// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"

	"k8s.io/utils/ptr"

	"github.com/kedge-io/kedge/pkg/supervise"
)

const (
	// lookSoon and lookLate are how often the member's state is read (from memory): while something is to come, and when it is ready.
	lookSoon = 50 * time.Millisecond
	lookLate = time.Second
	// leaderPatience is how long a member stays ready without a leader: an election takes one or two seconds.
	leaderPatience = 3 * time.Second
	diagnoseEvery  = 2 * time.Second
)

// member is a running one, or one that is going to be.
type member struct {
	cfg     Config
	disk    Disk
	peers   *peerClient
	report  report
	log     *slog.Logger
	joining bool // the directory was empty
	etcd    *embed.Etcd
	id      Identity

	ready      sync.Once
	lostLeader time.Time              // zero while there is one; used by run alone
	why        atomic.Pointer[string] // what diagnose has found, in words
	remark     atomic.Pointer[string] // what tendSpace has to say while the member is ready
	alone      atomic.Bool            // no leader, or not ready: diagnose has something to do
}

// run blocks until ctx ends or the member does.
func (m *member) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel(nil)
	m.alone.Store(true)
	helpers.Go(func() { m.repairPeerURL(ctx) })
	helpers.Go(func() { m.diagnose(ctx, cancel) })
	helpers.Go(func() { m.tendSpace(ctx) })
	helpers.Go(func() { m.watchDisk(ctx) })
	look := time.NewTimer(0)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			look.Reset(m.look())
		case err := <-m.etcd.Err():
			return m.ended(err)
		case <-m.etcd.Server.StopNotify():
			return m.ended(nil)
		case <-ctx.Done():
			if cause := context.Cause(ctx); errors.Is(cause, ErrRemoved) {
				return m.removed(cause)
			}
			return nil
		}
	}
}

// ended explains an end that nobody here has asked for. In etcd 3.7 a server stops by itself for one reason only: it has applied
// its own removal, or a peer has told it of it (everything that sends to EtcdServer.errorc, and raft panics otherwise).
func (m *member) ended(err error) error {
	select {
	case <-m.etcd.Server.StoppingNotify():
		return m.removed(fmt.Errorf("%w: this server (member %s); its data is no longer part of the cluster; to take part again it "+
			"has to join afresh with a token, and its old data is moved aside", ErrRemoved, m.id.ID))
	default:
	}
	if err == nil {
		err = errors.New("stopped by itself")
	}
	return fmt.Errorf("etcd: %w", err)
}

// look reports the member's state and returns when to look again.
func (m *member) look() time.Duration {
	server := m.etcd.Server
	ready := false
	select {
	case <-server.ReadyNotify():
		ready = true
	default:
	}
	if server.Leader() != 0 {
		m.lostLeader = time.Time{}
	} else if m.lostLeader.IsZero() {
		m.lostLeader = time.Now()
	}
	self := server.Cluster().Member(server.MemberID()) // nil once it is removed: etcd stops within a second
	lost := !m.lostLeader.IsZero() && (!ready || time.Since(m.lostLeader) >= leaderPatience)
	m.alone.Store(!ready || !m.lostLeader.IsZero())
	switch {
	case self == nil:
	case !ready && m.joining && !lost:
		m.report(supervise.Running, reasonJoining)
	case !ready || lost:
		m.report(supervise.Running, m.waiting())
	case self.IsLearner && !m.lostLeader.IsZero():
	case self.IsLearner:
		m.report(supervise.Running, ReasonLearner)
	case m.lostLeader.IsZero():
		m.joining = false
		m.ready.Do(m.settled)
		m.report(supervise.Ready, ptr.Deref(m.remark.Load(), ""))
		return lookLate
	default: // it was ready a moment ago
	}
	return lookSoon
}

func (m *member) waiting() string {
	prefix := ""
	if m.joining {
		prefix = reasonJoining + ": "
	}
	if why := m.why.Load(); why != nil {
		return prefix + *why
	}
	return prefix + "waiting for a leader"
}

// diagnose finds out why there is no leader, and whether this member is still one.
func (m *member) diagnose(ctx context.Context, cancel context.CancelCauseFunc) {
	ticker := time.NewTicker(diagnoseEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if !m.alone.Load() {
			m.why.Store(nil)
			continue
		}
		members := m.others()
		if len(members) == 0 {
			continue
		}
		seen := m.peers.probeAll(ctx, members)
		why := whoAnswers(members, seen)
		m.why.Store(&why)
		var urls []string
		for _, o := range members {
			if seen[o.ID] == serving {
				urls = append(urls, o.PeerURLs...)
			}
		}
		if len(urls) == 0 {
			continue
		}
		cluster, now, err := m.peers.first(ctx, urls)
		if err != nil {
			continue
		}
		if gone := m.goneFrom(cluster, now); gone != nil {
			cancel(gone)
			return
		}
	}
}

// others are the other members as this one knows them.
func (m *member) others() []Member {
	var others []Member
	for _, o := range m.etcd.Server.Cluster().Members() {
		if o.ID != m.etcd.Server.MemberID() {
			others = append(others, fromEtcd(o))
		}
	}
	return others
}

// whoAnswers says how many of the members are there; this one is.
func whoAnswers(others []Member, seen map[string]life) string {
	var silent []string
	for _, o := range others {
		if seen[o.ID] != serving {
			name := o.Name
			if name == "" && len(o.PeerURLs) > 0 {
				name = host(o.PeerURLs[0])
			}
			silent = append(silent, name)
		}
	}
	all := len(others) + 1
	if len(silent) == 0 {
		return fmt.Sprintf("waiting for a leader: all %d members answer", all)
	}
	slices.Sort(silent)
	return fmt.Sprintf("waiting for a leader: %d of %d members answer (%s not)", all-len(silent), all, doesNot(silent))
}

// goneFrom says why this member is not one of the cluster that the others form; nil if it is.
func (m *member) goneFrom(cluster string, members []Member) error {
	const next = "its data is out of date; to take part again it has to join afresh with a token, and its old data is moved aside"
	switch {
	case cluster != m.id.ClusterID:
		return fmt.Errorf("%w: the other servers form cluster %s now, this server's data is of cluster %s: %s", ErrRemoved, cluster, m.id.ClusterID, next)
	case !slices.ContainsFunc(members, func(o Member) bool { return o.ID == m.id.ID }):
		return fmt.Errorf("%w: this server (member %s) is unknown to the others: %s", ErrRemoved, m.id.ID, next)
	}
	return nil
}

// repairPeerURL tells the cluster where this member is, if it has moved. That works before the others can reach it: a member
// dials both for what it sends (rafthttp.pipeline) and for what it receives (rafthttp.streamReader). Only a snapshot, which a
// member that was away for long needs, is sent by dialling it, so this must not wait until the member has caught up.
func (m *member) repairPeerURL(ctx context.Context) {
	server, want := m.etcd.Server, []string{m.cfg.peerURL()}
	delay := 250 * time.Millisecond
	warned := false
	for {
		self := server.Cluster().Member(server.MemberID())
		ready := false
		select {
		case <-server.ReadyNotify():
			ready = true
		default:
		}
		switch {
		case self == nil:
			return
		case slices.Equal(self.PeerURLs, want):
			if ready { // otherwise an older address may still come out of the log
				return
			}
		default:
			err := m.updatePeerURL(ctx, server.MemberID(), want)
			if err == nil {
				m.log.Info("told the cluster the new address of this server", "from", self.PeerURLs, "to", want)
				continue
			}
			if errors.Is(err, membership.ErrPeerURLexists) && !warned {
				warned = true
				m.log.Warn("another member has the address of this server; if its server is gone, remove it: kedge node remove NAME", "address", want)
			}
			delay = min(2*delay, 5*time.Second)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

func (m *member) updatePeerURL(ctx context.Context, id types.ID, urls []string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := m.etcd.Server.UpdateMember(ctx, membership.Member{ID: id, RaftAttributes: membership.RaftAttributes{PeerURLs: urls}})
	return err
}
