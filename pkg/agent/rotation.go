// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	certutil "k8s.io/client-go/util/cert"

	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// StartRotation has the server of this machine begin a change of the CAs, and writes what it says.
func StartRotation(ctx context.Context, runDir string, overlap time.Duration, out io.Writer) error {
	body, err := ask(ctx, runDir, http.MethodPost, "/certificates/rotate-ca?"+url.Values{"overlap": {overlap.String()}}.Encode(), nil)
	if err != nil {
		return err
	}
	defer body.Close()
	return follow(body, out, "kedge ended in the middle of it: see `kedge certificate rotate-ca --status`")
}

func (m *Machine) serveRotateCA(w http.ResponseWriter, r *http.Request) {
	m.progress(w, r, "changing the CAs", func(ctx context.Context, say func(string)) error {
		overlap, err := time.ParseDuration(r.URL.Query().Get("overlap"))
		if err != nil {
			return err
		}
		m.mu.Lock()
		running := m.supervisor != nil
		m.mu.Unlock()
		switch {
		case !running:
			return errors.New("this machine is not part of a cluster yet")
		case m.StartRotation == nil:
			return errors.New("an agent has no CAs: run this on a server")
		}
		return m.StartRotation(ctx, overlap, say)
	})
}

// restartTime is what a process may take to be ready again. A datastore member or an API server on a slow board needs a while.
const restartTime = 3 * time.Minute

// RestartAndWait restarts a process and waits until all of it is ready.
func (m *Machine) RestartAndWait(ctx context.Context, name, reason string) error {
	find := func() (p supervise.ProcessStatus) {
		for _, one := range m.supervisor.Status() {
			if one.Name == name {
				p = one
			}
		}
		return p
	}
	before := find().Restarts
	if err := m.Restart(name, reason); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, restartTime, fmt.Errorf("%s is not ready %s after its restart: see `kedge status`", name, restartTime))
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
		if p := find(); p.Restarts > before && notReady([]supervise.ProcessStatus{p}) == "" {
			return nil
		}
	}
}

// caFollower has an agent follow a change of the CAs: it trusts what the cluster trusts, and renews its certificates when the new CAs issue.
type caFollower struct {
	m       *Machine
	files   pki.Agent
	changed chan *authority.Rotation
}

// note is called with each change of a rotation; only the last one matters.
func (f *caFollower) note(r *authority.Rotation) {
	for {
		select {
		case f.changed <- r:
			return
		case <-f.changed:
		}
	}
}

// run follows until ctx ends. What fails is tried again.
func (f *caFollower) run(ctx context.Context) error {
	var r *authority.Rotation
	for {
		var again <-chan time.Time
		if r != nil {
			if err := f.follow(ctx, r); err != nil && ctx.Err() == nil {
				f.m.log.Warn("this node does not follow the change of the CAs yet, trying again", "id", r.ID, "phase", r.Phase, "error", err)
				again = time.After(15 * time.Second)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case r = <-f.changed:
		case <-again:
		}
	}
}

func (f *caFollower) follow(ctx context.Context, r *authority.Rotation) error {
	server, client := r.Trusted()
	changed, err := f.files.WriteCAs(server, client)
	if err != nil {
		return err
	}
	if changed {
		f.m.log.Info("trusts the CAs of the cluster's change", "id", r.ID, "phase", r.Phase)
	}
	if r.Phase == authority.PhaseRenew || r.Phase == pki.PhaseDone {
		if err := f.renew(ctx, r); err != nil {
			return err
		}
	}
	return f.confirm(ctx, r)
}

// renew gets certificates from the new CAs unless the kubelet has them.
func (f *caFollower) renew(ctx context.Context, r *authority.Rotation) error {
	root := f.m.cfg.KubeletRootDir
	stale := func() ([]pki.Name, error) {
		var names []pki.Name
		for name, at := range map[pki.Name]struct {
			file string
			ca   []byte
		}{pki.KubeletClient: {f.files.Credentials, r.NewClientCA}, pki.KubeletServing: {node.ServingCertFile(root), r.NewServerCA}} {
			ca, err := certutil.ParseCertsPEM(at.ca)
			if err != nil {
				return nil, err
			}
			pair, err := tls.LoadX509KeyPair(at.file, at.file)
			if err != nil || !bytes.Equal(pair.Leaf.RawIssuer, ca[0].RawSubject) {
				names = append(names, name)
			}
		}
		return names, nil
	}
	names, err := stale()
	if err != nil || len(names) == 0 {
		return err
	}
	if err := f.m.rotateKubelet(ctx, names, func(text string) { f.m.log.Info("change of the CAs", "step", text) }); err != nil {
		return err
	}
	if names, err = stale(); err == nil && len(names) > 0 {
		err = fmt.Errorf("the cluster still issues from the old CA: %v", names)
	}
	return err
}

// confirm notes in the node's object how far it is.
func (f *caFollower) confirm(ctx context.Context, r *authority.Rotation) error {
	client, err := f.m.Client()
	if err != nil {
		return err
	}
	api, state := client.CoreV1().Nodes(), r.ID+"/"+string(r.Phase)
	n, err := api.Get(ctx, f.m.cfg.NodeName, metav1.GetOptions{})
	if err != nil || n.Annotations[authority.AnnotationCAs] == state {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{authority.AnnotationCAs: state}}})
	if err != nil {
		return err
	}
	_, err = api.Patch(ctx, f.m.cfg.NodeName, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}
