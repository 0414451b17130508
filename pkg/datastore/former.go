// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"time"
)

// formerPatience is what another member may take to say which cluster it is of. One that is switched off costs that much of a start, one that is
// being started nothing.
const formerPatience = time.Second

// checkFormer asks the other members, before this one starts, whether the cluster was made anew without it: by a restore or a reset on one of them.
// Two that are started at the same moment would otherwise be a majority of the former cluster before either has noticed (see diagnose).
func (m *member) checkFormer(ctx context.Context) error {
	who, err := ReadMember(m.cfg.Dir)
	if err != nil || who == nil {
		return nil // a start that does not know who it was finds out later
	}
	members, err := LocalMembers(m.cfg.Dir)
	if err != nil {
		return nil // etcd says it better
	}
	var urls []string
	for _, o := range members {
		if o.ID != who.ID {
			urls = append(urls, o.PeerURLs...)
		}
	}
	if len(urls) == 0 {
		return nil
	}
	m.id = *who
	ctx, cancel := context.WithTimeout(ctx, formerPatience)
	defer cancel()
	gone := make(chan error, len(urls))
	for _, u := range urls {
		go func() { gone <- m.askFormer(ctx, u) }()
	}
	for range urls {
		if err := <-gone; err != nil {
			return err
		}
	}
	return nil
}

// askFormer returns why this member is not one of the cluster that answers at u. What a peer knows may be old, so if it is of the same cluster and
// does not know this member, the cluster has to agree.
func (m *member) askFormer(ctx context.Context, u string) error {
	body, cluster, err := m.peers.get(ctx, u, "/members")
	if err != nil || cluster == "" {
		return nil
	}
	members, err := parseMembers(body)
	if err != nil {
		return nil
	}
	gone := m.goneFrom(cluster, members)
	if gone == nil || cluster != m.id.ClusterID {
		return gone
	}
	if cluster, members, err = m.peers.membership(ctx, u); err != nil {
		return nil
	}
	return m.goneFrom(cluster, members)
}
