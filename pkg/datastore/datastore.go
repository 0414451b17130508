// SPDX-License-Identifier: Apache-2.0

// Package datastore runs the [etcd] process: one embedded etcd member. Its clients reach it over a unix socket that only
// root can open, so neither TLS nor a TCP port is between it and the API server; peers use TLS.
//
// Members changes who belongs to the cluster, Reset makes a single member out of what is left of one. Rules and reasons are in
// docs/decisions/membership.md.
package datastore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// Component is the name in `kedge status`.
const Component = "etcd"

// ReasonLearner is what Run reports, with supervise.Running, while the member has its data but does not vote yet: now it can be
// promoted. Its clients are refused until then.
const ReasonLearner = "learner, catching up"

// reasonJoining begins every reason before that.
const reasonJoining = "joining as learner"

// handOverTimeout is what a member may take to become the leader when it is told to; it needs milliseconds.
const handOverTimeout = 2 * time.Second

// joinTries bounds how often etcd is started on one list of members: the list may have changed.
const joinTries = 5

// report tells the supervisor how the member is.
type report func(supervise.State, string)

// Run starts the member and blocks until ctx ends or etcd fails.
//
// It reports supervise.Ready while the member votes and knows a leader. Who the member is it notes in MemberFile. When the member
// is no longer part of its cluster, it notes that in RemovedFile and returns an error that wraps ErrRemoved: starting it
// again is then of no use.
func Run(ctx context.Context, cfg Config, child *supervise.Child, log *slog.Logger) error {
	return run(ctx, cfg, func(s supervise.State, reason string) { child.Report(Component, s, reason) }, log)
}

func run(ctx context.Context, cfg Config, report report, log *slog.Logger) error {
	disk, err := knowDisk(ctx, cfg.Dir)
	if err != nil {
		return err
	}
	ec, err := etcdConfig(cfg, disk, log)
	if err != nil {
		return err
	}
	if err := checkUnfinishedReset(cfg.Dir); err != nil {
		return err
	}
	tls, err := cfg.peerFiles().ClientConfig()
	if err != nil {
		return err
	}
	m := &member{cfg: cfg, disk: disk, peers: newPeerClient(tls), report: report, log: log}
	m.joining = !cfg.Bootstrap && !initialized(ec)
	if gone := m.checkFormer(ctx); gone != nil {
		return m.removed(gone)
	}
	if err := m.start(ctx, ec); err != nil || m.etcd == nil {
		return err
	}
	defer m.stop()
	if err := m.identify(); err != nil {
		return err
	}
	return m.run(ctx)
}

// initialized tells whether there is data; the write-ahead log is what etcd itself goes by.
func initialized(ec *embed.Config) bool {
	if ec.WalDir != "" {
		return wal.Exist(ec.WalDir)
	}
	return HasMember(ec.Dir)
}

// start makes data if there is none and starts etcd. When ctx ends before, there is neither a member nor an error.
func (m *member) start(ctx context.Context, ec *embed.Config) error {
	if !initialized(ec) {
		if err := m.prepare(ctx, ec); err != nil {
			if errors.Is(err, ErrRemoved) {
				return m.removed(err)
			}
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
	if !m.joining {
		m.report(supervise.Running, "opening "+m.cfg.Dir)
	}
	var err error
	for range joinTries {
		if m.etcd, err = start(ec); err == nil || !m.joining {
			break
		}
		// etcd asks a member of its own choice, and that one may not know of the joining one yet.
		m.log.Info("the cluster does not take this server yet, trying again", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
	return err
}

// start opens the data and begins to serve.
func start(ec *embed.Config) (*embed.Etcd, error) {
	socket := ec.ListenClientUrls[0].Path
	// A socket that a killed member left behind would be in the way.
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	e, err := embed.StartEtcd(ec)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	// The socket is made with the process's umask; the directory above it is root's alone, this is the second lock.
	if err := os.Chmod(socket, 0o600); err != nil {
		shut(e)
		return nil, err
	}
	return e, nil
}

// stop ends etcd, after it has handed the leadership on. etcd's own Close does that after the clients have gone, and watches take
// seconds to end; and it waits seven seconds for a member that has ended a moment before, as when all are switched off at once.
func (m *member) stop() {
	s := m.etcd.Server
	select {
	case <-s.StopNotify(): // it has stopped by itself
	default:
		if s.Leader() == s.MemberID() && !m.handOver() {
			s.HardStop() // there is nobody to wait for
		}
	}
	shut(m.etcd)
}

// shut closes etcd. Close alone never returns while etcd is not ready: it waits for servers of clients that are only made then.
func shut(e *embed.Etcd) {
	select {
	case <-e.Server.ReadyNotify():
	default:
		e.Server.HardStop()
	}
	e.Close()
}

// handOver moves the leadership to a member that is there, and tells whether it did. Without
// other voters there is nothing to do.
func (m *member) handOver() bool {
	var voters []Member
	for _, o := range m.others() {
		if !o.Learner {
			voters = append(voters, o)
		}
	}
	if len(voters) == 0 {
		return true
	}
	seen := m.peers.probeAll(context.Background(), voters)
	for _, v := range voters {
		id, err := types.IDFromString(v.ID)
		if err != nil || seen[v.ID] != serving {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), handOverTimeout)
		err = m.etcd.Server.MoveLeader(ctx, uint64(m.etcd.Server.MemberID()), uint64(id))
		cancel()
		if err == nil {
			return true
		}
		m.log.Warn("cannot hand the leadership on", "to", v.label(), "error", err)
	}
	return false
}

// prepare says how an empty directory is to be filled. It waits for the cluster to join, and never makes one instead.
func (m *member) prepare(ctx context.Context, ec *embed.Config) error {
	dir, members := m.cfg.Dir, m.cfg.InitialCluster
	switch {
	case m.cfg.Bootstrap && len(members) > 0:
		return errors.New("a member either starts a cluster or joins one")
	case m.cfg.Bootstrap:
		// A lost disk must not turn into an empty cluster of the same name.
		if _, err := os.Stat(MemberFile(dir)); err == nil {
			return fmt.Errorf("%w in %s, although there was a member: restore it, or mount its disk; to start with an empty cluster, remove %s",
				ErrNoData, dir, MemberFile(dir))
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// IDs are made from the address and this token: a cluster that is started anew must not be taken for the former one.
		if ec.InitialClusterToken == embed.NewConfig().InitialClusterToken {
			ec.InitialClusterToken = "kedge-" + rand.Text()
		}
		return nil
	case len(members) == 0:
		return fmt.Errorf("%w in %s, and no members to join: this server has to be added to the cluster first (kedge server --server …)",
			ErrNoData, dir)
	}
	ec.ClusterState = embed.ClusterStateFlagExisting
	urls := m.otherURLs(members)
	m.report(supervise.Running, reasonJoining)
	for {
		_, now, err := m.peers.first(ctx, urls)
		if err == nil {
			ec.InitialCluster, err = m.initialCluster(now)
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		m.report(supervise.Running, reasonJoining+": "+err.Error())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// otherURLs are the peer URLs of all members but this one.
func (m *member) otherURLs(members []Member) []string {
	var urls []string
	for _, other := range members {
		urls = append(urls, other.PeerURLs...)
	}
	return slices.DeleteFunc(urls, func(u string) bool { return u == m.cfg.peerURL() })
}

// initialCluster makes etcd's --initial-cluster of the members that the cluster has now: etcd compares the two, and since this
// server was added one may have left or moved.
func (m *member) initialCluster(members []Member) (string, error) {
	self := slices.IndexFunc(members, func(o Member) bool { return slices.Contains(o.PeerURLs, m.cfg.peerURL()) })
	if self < 0 {
		m.id.ID = ownID(m.cfg)
		return "", fmt.Errorf("%w: %s at %s is not among the members (any more); it has to be added again", ErrRemoved, m.cfg.Name, m.cfg.peerURL())
	}
	if members[self].Name != "" {
		return "", fmt.Errorf("%w in %s, but member %s (%s) had some: the server has to be added to the cluster again",
			ErrNoData, m.cfg.Dir, members[self].Name, members[self].ID)
	}
	used := map[string]bool{m.cfg.Name: true}
	var parts []string
	for i, o := range members {
		name := o.Name
		switch {
		case i == self:
			name = m.cfg.Name
		case name == "" || used[name]: // names only tell the entries apart; etcd takes two of one name for one
			name = o.ID
		}
		used[name] = true
		for _, u := range o.PeerURLs {
			parts = append(parts, name+"="+u)
		}
	}
	return strings.Join(parts, ","), nil
}

// ownID is the ID under which a joining member has been added.
func ownID(cfg Config) string {
	for _, o := range cfg.InitialCluster {
		if slices.Contains(o.PeerURLs, cfg.peerURL()) {
			return o.ID
		}
	}
	return ""
}

// identify notes whose data is in the directory.
func (m *member) identify() error {
	s := m.etcd.Server
	m.id = Identity{ID: s.MemberID().String(), ClusterID: s.Cluster().ID().String(), Name: m.cfg.Name}
	if old, err := ReadMember(m.cfg.Dir); err != nil || old == nil || *old != m.id {
		if err := writeFile(MemberFile(m.cfg.Dir), m.id); err != nil {
			return err
		}
	}
	// A note about an earlier member is of no more use; one about this member stays until its data is moved aside.
	if old, err := ReadRemoved(m.cfg.Dir); err != nil || old != nil && old.ID != m.id.ID {
		if err := os.Remove(RemovedFile(m.cfg.Dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(filepath.Dir(m.cfg.Dir))
	}
	return nil
}

// settled is called when the member votes and knows a leader: a note that it has been removed is wrong then.
func (m *member) settled() {
	if err := os.Remove(RemovedFile(m.cfg.Dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("cannot remove a note that does not hold", "error", err)
	}
}

// removed notes that this member is not one any more.
func (m *member) removed(cause error) error {
	m.report(supervise.Failed, cause.Error())
	if err := writeFile(RemovedFile(m.cfg.Dir), Removal{ID: m.id.ID, Time: time.Now().UTC()}); err != nil {
		return errors.Join(cause, err)
	}
	return cause
}

// host is what a message says of a member that has no name.
func host(peerURL string) string {
	if u, err := url.Parse(peerURL); err == nil {
		return u.Host
	}
	return peerURL
}
