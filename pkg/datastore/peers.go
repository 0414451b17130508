// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
)

const (
	// probeTimeout is what a member has to answer in; a frozen one accepts connections and says nothing.
	probeTimeout = 2 * time.Second
	// askTimeout covers an election that a peer waits for.
	askTimeout = 5 * time.Second
	// maxAnswer bounds a list of members.
	maxAnswer = 1 << 20
)

// TLSFiles are what etcd's peers and clients show and trust: one certificate of etcd's CA, in both directions.
type TLSFiles struct {
	Cert, Key, CA string
}

// ClientConfig reads the CA; the certificate is read at each handshake, so that a renewed one is used at once.
func (f TLSFiles) ClientConfig() (*tls.Config, error) {
	info := transport.TLSInfo{CertFile: f.Cert, KeyFile: f.Key, TrustedCAFile: f.CA}
	c, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("etcd's client certificate: %w", err)
	}
	return c, nil
}

// life is what can be seen of a member through its peer port.
type life int

const (
	dead    life = iota // nothing there
	open                // a connection is accepted, but nothing of this cluster answers: frozen, starting, or somebody else
	serving             // etcd answers
)

// peerClient asks members on their peer port, for which a certificate of etcd's CA is enough.
type peerClient struct {
	http *http.Client
}

func newPeerClient(c *tls.Config) *peerClient {
	return &peerClient{http: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: c, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// probe looks at a member.
func (c *peerClient) probe(ctx context.Context, urls []string) life {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	best := make([]life, len(urls))
	var wg sync.WaitGroup
	for i, u := range urls {
		wg.Go(func() { best[i] = c.probeURL(ctx, u) })
	}
	wg.Wait()
	if len(best) == 0 {
		return dead
	}
	return slices.Max(best)
}

func (c *peerClient) probeURL(ctx context.Context, base string) life {
	var connected atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{ConnectDone: func(_, _ string, err error) {
		if err == nil {
			connected.Store(true)
		}
	}})
	_, _, err := c.get(ctx, base, "/version")
	switch {
	case err == nil:
		return serving
	case connected.Load():
		return open
	}
	return dead
}

// probeAll looks at several members at once and returns what it sees by their ID.
func (c *peerClient) probeAll(ctx context.Context, members []Member) map[string]life {
	seen := make([]life, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() { seen[i] = c.probe(ctx, m.PeerURLs) })
	}
	wg.Wait()
	all := map[string]life{}
	for i, m := range members {
		all[m.ID] = seen[i]
	}
	return all
}

// get returns the body and the cluster's ID of a successful answer.
func (c *peerClient) get(ctx context.Context, base, path string) (body []byte, cluster string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
	if err != nil {
		return nil, "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, "", unwrapURL(err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, "", err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(body)))
	}
	return body, resp.Header.Get("X-Etcd-Cluster-ID"), nil
}

// unwrapURL drops the request from an error, as the messages here name it themselves.
func unwrapURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// membership is the list of members that a peer knows, at least as new as what the cluster had agreed on when it was asked.
func (c *peerClient) membership(ctx context.Context, base string) (cluster string, members []Member, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	// A peer tells the list that it has, which in one that was away is an old one. This question makes it catch up first; it
	// fails without a leader. etcd itself asks it before it joins (etcdserver.getDowngradeEnabledFromRemotePeers).
	if _, _, err := c.get(ctx, base, etcdserver.DowngradeEnabledPath); err != nil {
		return "", nil, err
	}
	body, cluster, err := c.get(ctx, base, "/members")
	if err != nil {
		return "", nil, err
	}
	members, err = parseMembers(body)
	if err == nil {
		_, err = types.IDFromString(cluster)
	}
	return cluster, members, err
}

func parseMembers(body []byte) ([]Member, error) {
	var list []*membership.Member
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	var members []Member
	for _, m := range list {
		if m == nil {
			return nil, errors.New("a member is null")
		}
		members = append(members, fromEtcd(m))
	}
	if len(members) == 0 {
		return nil, errors.New("the list of members is empty")
	}
	return members, nil
}

// first asks several peers at once and returns the first good answer.
func (c *peerClient) first(ctx context.Context, urls []string) (cluster string, members []Member, err error) {
	type answer struct {
		url, cluster string
		members      []Member
		err          error
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	answers := make(chan answer, len(urls))
	for _, u := range urls {
		wg.Go(func() {
			a := answer{url: u}
			a.cluster, a.members, a.err = c.membership(ctx, u)
			answers <- a
		})
	}
	var failed []string
	for range urls {
		a := <-answers
		if a.err == nil {
			return a.cluster, a.members, nil
		}
		failed = append(failed, fmt.Sprintf("%s: %v", a.url, a.err))
	}
	slices.Sort(failed)
	if len(failed) == 0 {
		failed = []string{"no address to ask"}
	}
	return "", nil, fmt.Errorf("%w: %s", ErrNoLeader, strings.Join(failed, "; "))
}
