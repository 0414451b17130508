// SPDX-License-Identifier: Apache-2.0

// Package rollout upgrades machines from outside: one of them by its own socket, or those of a cluster one after the other, through the
// API and the tunnels that nodes keep open to their servers. What a machine does then is package upgrade's; it trusts no sender.
package rollout

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/release"
	"github.com/kedge-io/kedge/pkg/tunnel"
	"github.com/kedge-io/kedge/pkg/upgrade"
)

const (
	statusTimeout = 15 * time.Second
	// startTimeout bounds what a machine does before it starts again: a snapshot of the datastore, most of all.
	startTimeout = 10 * time.Minute
	// afterTimeout is what a machine may take, beside the time of the new version, to start again and to go back.
	afterTimeout = 3 * time.Minute
)

// Target is a machine whose Kedge is asked.
type Target struct {
	Name   string // of the node; empty: this machine
	url    string
	client *http.Client
}

// Local is this machine.
func Local(runDir string) *Target {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", agent.SocketPath(runDir))
	}
	return &Target{url: "http://kedge/" + agent.PathUpgrade, client: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Remote is a node of the cluster.
func Remote(config *rest.Config, node string) (*Target, error) {
	config = rest.CopyConfig(config)
	config.Timeout = 0 // an upload lasts as long as it does
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, err
	}
	name := "http:" + node + ":" + strconv.Itoa(tunnel.KedgePort)
	return &Target{Name: node, url: base.JoinPath("api/v1/nodes", name, "proxy", agent.PathUpgrade).String(), client: client}, nil
}

// do sends a request. An answer that is an error is returned as one, in the words of the machine.
func (t *Target) do(ctx context.Context, method string, query url.Values, body io.Reader, size int64) (*http.Response, error) {
	address := t.url
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, err
	}
	if size > 0 {
		req.ContentLength = size
	}
	res, err := t.client.Do(req)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("only root may do this: %w", err)
	case t.Name == "" && (errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		return nil, agent.ErrNotRunning
	case err != nil:
		return nil, err
	case res.StatusCode == http.StatusOK:
		return res, nil
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err != nil {
		return nil, err
	}
	var status metav1.Status // of the API server
	if json.Unmarshal(text, &status) == nil && status.Message != "" {
		text = []byte(status.Message)
	}
	if res.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("its Kedge cannot upgrade itself, or there is no such node: %s", strings.TrimSpace(string(text)))
	}
	return nil, errors.New(strings.TrimSpace(string(text)))
}

// Status asks the machine.
func (t *Target) Status(ctx context.Context) (*agent.UpgradeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	res, err := t.do(ctx, http.MethodGet, nil, nil, 0)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var st agent.UpgradeStatus
	if err := json.NewDecoder(res.Body).Decode(&st); err != nil {
		return nil, fmt.Errorf("answer of kedge: %w", err)
	}
	return &st, nil
}

// Send hands a release to the machine, which verifies it.
func (t *Target) Send(ctx context.Context, src io.Reader, size int64, progress func(done, total int64)) (*release.Release, error) {
	body := io.TeeReader(src, &release.Progress{Total: size, Report: progress})
	res, err := t.do(ctx, http.MethodPut, nil, body, size)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var rel release.Release
	if err := json.NewDecoder(res.Body).Decode(&rel); err != nil {
		return nil, fmt.Errorf("answer of kedge: %w", err)
	}
	return &rel, nil
}

// Ask has the machine check or begin an upgrade, and passes on what it says. It returns the ID of an upgrade that has
// begun, or with Check the version that the machine would go to.
func (t *Target) Ask(ctx context.Context, r agent.UpgradeRequest, say func(string)) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	res, err := t.do(ctx, http.MethodPost, r.Values(), nil, 0)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		line := lines.Text()
		if id, ok := strings.CutPrefix(line, "ok"); ok {
			_, _ = io.Copy(io.Discard, res.Body) // to the end: until then the machine takes no other request
			return strings.TrimSpace(id), nil
		}
		if text, failed := strings.CutPrefix(line, "error: "); failed {
			for lines.Scan() {
				text += "\n" + lines.Text()
			}
			return "", errors.New(text)
		}
		say(line)
	}
	if st, err := t.Status(ctx); err == nil && st.Pending != nil { // the answer was cut off by what it was about
		return st.Pending.ID, nil
	}
	return "", errors.Join(errors.New("kedge ended in the middle of it: see its log, and kedge upgrade --status there"), lines.Err())
}

// Watch tells how an upgrade goes until it is over. The error says why the machine runs the old version, or that nobody knows.
func (t *Target) Watch(ctx context.Context, id string, timeout time.Duration, say func(string)) (*upgrade.Result, error) {
	if timeout <= 0 {
		timeout = upgrade.DefaultTimeout
	}
	deadline := time.Now().Add(timeout + afterTimeout)
	said := ""
	once := func(text string) {
		if text != said {
			said = text
			say(text)
		}
	}
	for {
		st, err := t.Status(ctx)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("nobody watches any more, and the upgrade goes on: see kedge upgrade --status: %w", context.Cause(ctx))
		case err != nil:
			once("it is starting again")
		case st.Pending != nil && st.Pending.ID == id:
			once(progress(st))
		default:
			for _, r := range st.History {
				if r.ID != id {
					continue
				}
				if r.Failed {
					return &r, fmt.Errorf("%s; %s runs again", r.Line(), st.Version)
				}
				return &r, nil
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("there was no result within %s, the last word was: %s; see kedge's log on that machine", timeout+afterTimeout, said)
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// progress says how far an upgrade is.
func progress(st *agent.UpgradeStatus) string {
	p := st.Pending
	switch {
	case st.Version != p.To && p.Tries == 0:
		return "stopping " + p.From + "; pods keep running"
	case st.Version != p.To:
		return fmt.Sprintf("%s did not come up, try %d", p.To, p.Tries)
	case st.Missing != "":
		first, rest, _ := strings.Cut(st.Missing, "; ")
		if rest != "" {
			first += fmt.Sprintf(" (and %d more)", strings.Count(rest, "; ")+1)
		}
		return p.To + " is starting: " + first
	}
	return p.To + " is ready, and has to stay so for a while"
}
