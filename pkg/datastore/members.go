// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// changeTimeout bounds every method of Members; an election and a few tries are within it.
const changeTimeout = 20 * time.Second

// Members changes who belongs to the cluster, through the client endpoint of one voting member.
//
// The rules are Kedge's, not etcd's: one server joins at a time, as a learner; a member is taken out only while a majority of
// those that stay is alive. Whether a member is alive is found out by asking its peer port.
type Members struct {
	client *clientv3.Client
	peers  *peerClient
}

// NewMembers prepares changes through endpoint (see Endpoint). tls is a certificate of etcd's CA (see TLSFiles): it is shown to
// the peers, and to the endpoint if that is not a socket. No connection is made yet.
func NewMembers(endpoint string, tls *tls.Config) (*Members, error) {
	if tls == nil {
		return nil, errors.New("etcd's peers cannot be asked without a certificate")
	}
	cfg := clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: probeTimeout, Logger: zap.NewNop()}
	if strings.HasPrefix(endpoint, "https://") {
		cfg.TLS = tls
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	return &Members{client: client, peers: newPeerClient(tls)}, nil
}

// Close ends the connection.
func (m *Members) Close() error { return m.client.Close() }

// List returns the members that the cluster has agreed on.
func (m *Members) List(ctx context.Context) ([]Member, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	members, _, err := m.list(ctx)
	return members, err
}

// list also returns the ID of the member that has answered: it is alive.
func (m *Members) list(ctx context.Context, opts ...clientv3.OpOption) (members []Member, self string, err error) {
	resp, err := m.client.MemberList(ctx, opts...)
	if err != nil {
		return nil, "", explain("list the members", err)
	}
	return fromResponse(resp.Members), types.ID(resp.Header.MemberId).String(), nil
}

func fromResponse(list []*etcdserverpb.Member) []Member {
	members := make([]Member, 0, len(list))
	for _, m := range list {
		members = append(members, Member{Name: m.Name, ID: types.ID(m.ID).String(), PeerURLs: m.PeerURLs, Learner: m.IsLearner})
	}
	return members
}

// Add makes a server that is going to join a member, as a learner, and returns its ID and all members; in that list it has its
// name already, which etcd learns from the member itself. What an earlier try of the same server has left is replaced, and so is
// a dead voter of its name when the others are a majority without it. Errors: ErrBusy, ErrExists, ErrQuorum.
func (m *Members) Add(ctx context.Context, name, peerURL string) (id string, all []Member, err error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	if u, err := url.Parse(peerURL); err != nil || u.Scheme != "https" || u.Port() == "" || name == "" {
		return "", nil, fmt.Errorf("a member is a name and a peer URL like https://192.0.2.1:2380, not %q and %q", name, peerURL)
	}
	members, self, err := m.list(ctx)
	if err != nil {
		return "", nil, err
	}
	replace, err := m.replaceable(ctx, members, self, name, peerURL)
	if err != nil {
		return "", nil, err
	}
	for _, old := range replace {
		if err := m.remove(ctx, old); err != nil && !errors.Is(err, ErrNotMember) {
			return "", nil, err
		}
	}
	resp, err := m.add(ctx, peerURL)
	switch {
	case errors.Is(err, rpctypes.ErrTooManyLearners):
		return "", nil, busy(m.someLearner(ctx)) // it was faster
	case errors.Is(err, rpctypes.ErrPeerURLExist):
		return "", nil, fmt.Errorf("%w: one at %s; if its server is gone, remove it: kedge node remove NAME", ErrExists, peerURL)
	case err != nil:
		return "", nil, explain("add "+name, err)
	}
	id = types.ID(resp.Member.ID).String()
	all = fromResponse(resp.Members)
	for i := range all {
		if all[i].ID == id {
			all[i].Name = name
		}
	}
	return id, all, nil
}

func busy(learner Member) error {
	return fmt.Errorf("%w: %s; servers join one after the other, try again in a few seconds", ErrBusy, learner.label())
}

func (m *Members) someLearner(ctx context.Context) Member {
	members, _, err := m.list(ctx)
	if learners := onlyLearners(members); err == nil && len(learners) > 0 {
		return learners[0]
	}
	return Member{ID: "one of unknown name"}
}

// add tries again what another try may mend. etcd makes an ID from the address and the second, so that a member that is
// replaced within the second of its birth gets the ID that has just been removed ("member not found").
func (m *Members) add(ctx context.Context, peerURL string) (*clientv3.MemberAddResponse, error) {
	for {
		resp, err := m.client.MemberAddAsLearner(ctx, []string{peerURL})
		if !errors.Is(err, rpctypes.ErrMemberNotFound) && !errors.Is(err, rpctypes.ErrMemberExist) && !errors.Is(err, rpctypes.ErrUnhealthy) {
			return resp, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// replaceable returns the members that a server of this name and address takes the place of, or why it cannot be added.
func (m *Members) replaceable(ctx context.Context, members []Member, self, name, peerURL string) ([]Member, error) {
	var replace []Member
	for _, old := range members {
		sameURL := slices.Contains(old.PeerURLs, peerURL)
		switch {
		case old.Learner && old.Name != name && !sameURL:
			return nil, busy(old)
		case old.Name != name && !old.Learner && sameURL:
			return nil, fmt.Errorf("%w: %s is the address of server %s; if that server is gone, remove it: kedge node remove %s",
				ErrExists, peerURL, old.label(), old.label())
		case old.Name != name && !sameURL:
			continue
		}
		// Something that only accepts connections is alive, too: it may be frozen, or starting.
		if old.ID == self || m.peers.probe(ctx, old.PeerURLs) != dead {
			return nil, fmt.Errorf("%w: server %s answers on %s; two servers cannot have one name: stop that one or choose another --node-name",
				ErrExists, old.label(), strings.Join(old.PeerURLs, ", "))
		}
		if !old.Learner {
			if err := m.mayRemove(ctx, members, self, old); err != nil {
				return nil, err
			}
		}
		replace = append(replace, old)
	}
	return replace, nil
}

// Promote makes a learner a voter. Promoting a voter is no error. Errors: ErrNotReady, try again; ErrNotMember.
func (m *Members) Promote(ctx context.Context, nameOrID string) error {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	members, self, err := m.list(ctx)
	if err != nil {
		return err
	}
	t, err := find(members, nameOrID)
	if err != nil {
		if slices.ContainsFunc(members, func(m Member) bool { return m.Learner && m.Name == "" }) {
			return fmt.Errorf("%w: the server that is joining has not told its name yet", ErrNotReady)
		}
		return err
	}
	if !t.Learner {
		return nil
	}
	// etcd goes by how far the learner has come, not by whether it is there: a dead second member would end a cluster of one.
	if t.ID != self && m.peers.probe(ctx, t.PeerURLs) != serving {
		return fmt.Errorf("%w: server %s does not answer on %s from here; is its port open for the other servers?",
			ErrNotReady, t.label(), strings.Join(t.PeerURLs, ", "))
	}
	id, err := types.IDFromString(t.ID)
	if err != nil {
		return err
	}
	_, err = m.client.MemberPromote(ctx, uint64(id))
	switch {
	case errors.Is(err, rpctypes.ErrMemberNotLearner):
		return nil
	case errors.Is(err, rpctypes.ErrMemberLearnerNotReady):
		return fmt.Errorf("%w: server %s: %w", ErrNotReady, t.label(), err)
	case err != nil:
		return explain("promote "+t.label(), err)
	}
	return nil
}

// Remove takes a member out of the cluster; its server notices by itself. It refuses with ErrQuorum when fewer than a majority of
// the voters that would stay are alive, unless forced, and it always refuses to remove the last voter.
func (m *Members) Remove(ctx context.Context, nameOrID string, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	members, self, err := m.list(ctx)
	if err != nil {
		return err
	}
	t, err := find(members, nameOrID)
	if err != nil {
		return err
	}
	if !t.Learner {
		rest := votersWithout(members, t)
		if len(rest) == 0 {
			return fmt.Errorf("%w: %s is the last server; to give up the cluster, uninstall Kedge there", ErrQuorum, t.label())
		}
		if !force {
			if err := m.mayRemove(ctx, members, self, t); err != nil {
				return err
			}
		}
		if t.ID == self {
			return m.removeSelf(ctx, t, rest)
		}
	}
	return m.remove(ctx, t)
}

// removeSelf removes the member that it talks to. That one may have stopped, told by its peers, before it can answer.
func (m *Members) removeSelf(ctx context.Context, t Member, rest []Member) error {
	m.yieldLeadership(ctx, rest)
	err := m.remove(ctx, t)
	if err == nil || errors.Is(err, ErrNotMember) {
		return err
	}
	var urls []string
	for _, v := range rest {
		urls = append(urls, v.PeerURLs...)
	}
	if _, now, peersErr := m.peers.first(ctx, urls); peersErr == nil && !slices.ContainsFunc(now, func(o Member) bool { return o.ID == t.ID }) {
		return nil
	}
	return err
}

// mayRemove tells whether a majority of the voters that would stay is alive.
func (m *Members) mayRemove(ctx context.Context, members []Member, self string, t Member) error {
	rest := votersWithout(members, t)
	seen := m.peers.probeAll(ctx, rest)
	var gone, all []string
	for _, v := range rest {
		all = append(all, v.label())
		if v.ID != self && seen[v.ID] != serving {
			gone = append(gone, v.label())
		}
	}
	slices.Sort(all)
	slices.Sort(gone)
	alive, quorum := len(rest)-len(gone), len(rest)/2+1
	if alive >= quorum {
		return nil
	}
	return fmt.Errorf("%w: without %s the voters are %s, of which %s not answer: %d of %d needed, and the API would no longer accept changes; "+
		"start %s again, or remove first what will not come back",
		ErrQuorum, t.label(), strings.Join(all, ", "), doesNot(gone), alive, quorum, strings.Join(gone, ", "))
}

// doesNot is "m2 does" or "m2, m3 do", for what they do not.
func doesNot(names []string) string {
	if len(names) == 1 {
		return names[0] + " does"
	}
	return strings.Join(names, ", ") + " do"
}

func votersWithout(members []Member, t Member) []Member {
	return slices.DeleteFunc(slices.Clone(members), func(v Member) bool { return v.Learner || v.ID == t.ID })
}

// yieldLeadership spares the cluster an election when the leader is removed. It is a courtesy: what goes wrong is ignored.
func (m *Members) yieldLeadership(ctx context.Context, rest []Member) {
	status, err := m.client.Status(ctx, m.client.Endpoints()[0])
	if err != nil || status.Leader != status.Header.MemberId {
		return
	}
	for _, v := range rest {
		if id, err := types.IDFromString(v.ID); err == nil && m.peers.probe(ctx, v.PeerURLs) == serving {
			if _, err := m.client.MoveLeader(ctx, uint64(id)); err == nil {
				return
			}
		}
	}
}

func (m *Members) remove(ctx context.Context, t Member) error {
	id, err := types.IDFromString(t.ID)
	if err != nil {
		return err
	}
	if _, err = m.client.MemberRemove(ctx, uint64(id)); err != nil {
		return explain("remove "+t.label(), err)
	}
	return nil
}

// UpdatePeerURL tells the cluster where a member is reached now. A running member does this by itself.
func (m *Members) UpdatePeerURL(ctx context.Context, id, peerURL string) error {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	n, err := types.IDFromString(id)
	if err != nil {
		return fmt.Errorf("%w: %q is not an ID", ErrNotMember, id)
	}
	_, err = m.client.MemberUpdate(ctx, uint64(n), []string{peerURL})
	switch {
	case errors.Is(err, rpctypes.ErrPeerURLExist):
		return fmt.Errorf("%w: another one at %s; if its server is gone, remove it: kedge node remove NAME", ErrExists, peerURL)
	case err != nil:
		return explain("tell the address of "+id, err)
	}
	return nil
}

func find(members []Member, nameOrID string) (Member, error) {
	var found []Member
	for _, m := range members {
		if m.is(nameOrID) {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 0:
		return Member{}, fmt.Errorf("%w: %s", ErrNotMember, nameOrID)
	case 1:
		return found[0], nil
	}
	return Member{}, fmt.Errorf("%d members are called %s: say which by its ID (%s, %s, …)", len(found), nameOrID, found[0].ID, found[1].ID)
}

// explain gives etcd's errors a meaning.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrMemberNotFound):
		return fmt.Errorf("%s: %w", what, ErrNotMember)
	case errors.Is(err, rpctypes.ErrUnhealthy), errors.Is(err, rpctypes.ErrMemberNotEnoughStarted):
		return fmt.Errorf("%s: %w: %w", what, ErrQuorum, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, rpctypes.ErrTimeout), errors.Is(err, rpctypes.ErrNoLeader),
		errors.Is(err, rpctypes.ErrTimeoutDueToLeaderFail), errors.Is(err, rpctypes.ErrTimeoutDueToConnectionLost):
		return fmt.Errorf("%s: %w: %w; start the other servers; if most of them are lost for good: kedge server --cluster-reset", what, ErrNoLeader, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
