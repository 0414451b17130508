// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// startRotation starts a change of the CAs, or says that one is under way.
func (s *server) startRotation(ctx context.Context, overlap time.Duration, say func(string)) error {
	client, err := kubernetes.NewForConfig(s.serverConfig(nil))
	if err != nil {
		return err
	}
	known, err := authority.GetRotation(ctx, client)
	if err != nil {
		return err
	}
	if known != nil && known.Finished.IsZero() {
		say(fmt.Sprintf("change of the CAs %s is under way since %s, in the phase %s: it goes on", known.ID, known.Started.UTC().Format(time.RFC3339), known.Phase))
		return nil
	}
	id, err := s.keys.Load().StartRotation()
	if err != nil {
		return err
	}
	r := &authority.Rotation{ID: id, Phase: pki.PhaseTrust, Started: time.Now().UTC(), Overlap: overlap}
	r.NewServerCA, r.OldServerCA = s.keys.Load().RotationCAs(pki.ServerCA)
	r.NewClientCA, r.OldClientCA = s.keys.Load().RotationCAs(pki.ClientCA)
	err = authority.UpdateRotation(ctx, client, func(have *authority.Rotation) (*authority.Rotation, error) {
		if have != nil && have.Finished.IsZero() && have.ID != id {
			return nil, fmt.Errorf("another server has started a change of the CAs in this moment (%s)", have.ID)
		}
		return r, nil
	})
	if err != nil {
		return errors.Join(err, s.keys.Load().AbortRotation(id))
	}
	say("made new CAs: change of the CAs " + id)
	return nil
}

// followRotation goes along with a change of the CAs, when it is this server's turn, until ctx ends.
func (s *server) followRotation(b *apilb.Balancer) func(context.Context) error {
	return func(ctx context.Context) error {
		// What all processes of this server work with: they have just been started.
		inUse := s.keys.Load().RotationState()
		for {
			select {
			case <-ctx.Done():
				return nil
			case r := <-s.rotations:
				if r.Turn != s.cfg.NodeName || authority.Reached(inUse, r, r.Want()) {
					continue
				}
				if err := s.goAlong(ctx, b, r); err == nil {
					inUse = s.keys.Load().RotationState()
				} else if ctx.Err() == nil {
					s.log.Error("this server does not go along with the change of the CAs; it is tried again when it is its turn", "id", r.ID, "phase", r.Phase, "error", err)
				}
			}
		}
	}
}

// noteRotation is called with each change of a rotation; only the last one matters.
func (s *server) noteRotation(r *authority.Rotation) {
	for {
		select {
		case s.rotations <- r:
			return
		case <-s.rotations:
		}
	}
}

// goAlong takes this server to the rotation's phase. Datastore and control plane read their CAs at their start.
func (s *server) goAlong(ctx context.Context, b *apilb.Balancer, r *authority.Rotation) error {
	s.log.Info("going along with the change of the CAs", "id", r.ID, "phase", r.Phase)
	if s.keys.Load().RotationPhase(r.ID) == "" {
		if err := s.fetchRotation(ctx, b, r.ID); err != nil {
			return err
		}
	}
	for _, phase := range []pki.Phase{pki.PhaseIssue, pki.PhaseDone} {
		if !r.Want().Before(phase) {
			if err := s.keys.Load().SetRotationPhase(r.ID, phase); err != nil {
				return err
			}
		}
	}
	reason := "the CAs change: " + string(r.Phase)
	if s.cfg.HasEtcd() {
		if err := s.RestartAndWait(ctx, etcd, reason); err != nil {
			return err
		}
	}
	if s.cfg.HasControlPlane() {
		if err := s.RestartAndWait(ctx, controlPlane, reason); err != nil {
			return err
		}
	}
	client, err := kubernetes.NewForConfig(s.serverConfig(b))
	if err != nil {
		return err
	}
	return supervise.Poll(ctx, func() error { return s.putEntry(ctx, client) })
}

// fetchRotation gets the new CAs from another server that has them.
func (s *server) fetchRotation(ctx context.Context, b *apilb.Balancer, id string) error {
	client, err := kubernetes.NewForConfig(s.serverConfig(b))
	if err != nil {
		return err
	}
	servers, err := authority.ListServers(ctx, client)
	if err != nil {
		return err
	}
	errs := []error{fmt.Errorf("no server that answers has the new CAs of the change %s", id)}
	for _, name := range slices.Sorted(maps.Keys(servers)) {
		if name == s.cfg.NodeName || servers[name].Address == "" {
			continue
		}
		err := s.fetchRotationFrom(ctx, servers[name].Address, id)
		if err == nil {
			s.log.Info("got the new CAs", "from", name, "id", id)
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return errors.Join(errs...)
}

func (s *server) fetchRotationFrom(ctx context.Context, address, id string) error {
	config := s.serverConfig(nil)
	config.Host = "https://" + address
	api, err := join.NewAPI(config)
	if err != nil {
		return err
	}
	files, err := api.Keys(ctx)
	if err != nil {
		return err
	}
	data, ok := files[pki.RotationFile]
	if !ok {
		return errors.New("it has none")
	}
	if err := s.keys.Load().AdoptRotation(data); err != nil {
		return err
	}
	if s.keys.Load().RotationPhase(id) == "" {
		return errors.New("it has those of another change")
	}
	return nil
}
