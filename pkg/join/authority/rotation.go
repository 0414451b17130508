// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"

	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// AnnotationRotation of the registry of servers holds a change of the CAs: every node follows that object already. No secret is in it:
// servers hand the keys to each other by the join API. AnnotationCAs of a Node says how far an agent has come: ID/PHASE.
const (
	AnnotationRotation = "kedge.io/ca-rotation"
	AnnotationCAs      = "kedge.io/certificate-authorities"
)

// PhaseRenew is the phase of the cluster between the servers' phases issue and done: all servers issue from the new CAs, and agents
// renew their certificates. Servers stay as they are.
const PhaseRenew pki.Phase = "renew"

// Rotation is a change of the CAs, as everybody in the cluster sees it.
type Rotation struct {
	ID      string    `json:"id"`
	Phase   pki.Phase `json:"phase"` // trust, issue, renew, done
	Started time.Time `json:"started"`
	// Overlap is how long the old CAs stay trusted after the new ones issue everywhere; DropAfter is when that ends, known from then on.
	Overlap   time.Duration `json:"overlap"`
	DropAfter time.Time     `json:"dropAfter,omitzero"`
	// Force drops the old CAs without those machines that have not followed.
	Force bool `json:"force,omitempty"`
	// Turn is the server that goes on to the phase, one after the other; Away are those that did not answer when it was their turn in the
	// phase trust. They catch up when they start.
	Turn      string    `json:"turn,omitempty"`
	TurnSince time.Time `json:"turnSince,omitzero"`
	Away      []string  `json:"away,omitempty"`
	Finished  time.Time `json:"finished,omitzero"`

	// The CAs that nodes know, PEM.
	NewServerCA, OldServerCA []byte
	NewClientCA, OldClientCA []byte
}

// Want is the phase that servers are to be in.
func (r *Rotation) Want() pki.Phase {
	if r.Phase == PhaseRenew {
		return pki.PhaseIssue
	}
	return r.Phase
}

// Trusted are the CAs that an agent trusts in the rotation's phase.
func (r *Rotation) Trusted() (serverCA, clientCA []byte) {
	if r.Phase == pki.PhaseDone {
		return r.NewServerCA, r.NewClientCA
	}
	return slices.Concat(r.NewServerCA, r.OldServerCA), slices.Concat(r.NewClientCA, r.OldClientCA)
}

// maxRotation is far above what four certificates take.
const maxRotation = 64 << 10

// ParseRotation reads the annotation; nil without one.
func ParseRotation(cm *corev1.ConfigMap) (*Rotation, error) {
	text := cm.Annotations[AnnotationRotation]
	if text == "" {
		return nil, nil
	}
	var r Rotation
	err := json.Unmarshal([]byte(text), &r)
	if err == nil && len(text) > maxRotation {
		err = fmt.Errorf("it has %d bytes", len(text))
	}
	if err == nil && !slices.Contains([]pki.Phase{pki.PhaseTrust, pki.PhaseIssue, PhaseRenew, pki.PhaseDone}, r.Phase) {
		err = fmt.Errorf("%q is no phase", r.Phase)
	}
	for _, ca := range [][]byte{r.NewServerCA, r.OldServerCA, r.NewClientCA, r.OldClientCA} {
		if err == nil {
			_, err = pki.HashOfCA(ca)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("annotation %s of ConfigMap %s: %w", AnnotationRotation, join.ConfigMapServers, err)
	}
	return &r, nil
}

// GetRotation reads the last change of the CAs; nil if there never was one.
func GetRotation(ctx context.Context, client kubernetes.Interface) (*Rotation, error) {
	cm, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapServers, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read the registry of servers: %w", err)
	}
	return ParseRotation(cm)
}

// errUnchanged is returned by what UpdateRotation calls, to leave the rotation as it is.
var errUnchanged = errors.New("unchanged")

// UpdateRotation changes the rotation; change gets what is there, nil if there is none, and returns what is to be there. Somebody else's
// change in between makes it start over.
func UpdateRotation(ctx context.Context, client kubernetes.Interface, change func(*Rotation) (*Rotation, error)) error {
	api := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		cm, err := api.Get(ctx, join.ConfigMapServers, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("read the registry of servers: %w", err)
		}
		r, err := ParseRotation(cm)
		if err != nil {
			return err
		}
		if r, err = change(r); errors.Is(err, errUnchanged) {
			return nil
		} else if err != nil {
			return err
		}
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		cm = cm.DeepCopy()
		metav1.SetMetaDataAnnotation(&cm.ObjectMeta, AnnotationRotation, string(text))
		_, err = api.Update(ctx, cm, metav1.UpdateOptions{FieldManager: "kedge-ca-rotation"})
		return err
	})
}

// Reached says whether a machine that gives its state as ID/PHASE has come as far as a phase of the rotation.
func Reached(state string, r *Rotation, want pki.Phase) bool {
	id, phase, _ := strings.Cut(state, "/")
	order := []pki.Phase{pki.PhaseTrust, pki.PhaseIssue, PhaseRenew, pki.PhaseDone}
	return id == r.ID && slices.Index(order, pki.Phase(phase)) >= slices.Index(order, want)
}

// Laggards are the machines that have not come as far as the rotation wants: servers by the registry, agents by their Nodes.
func Laggards(ctx context.Context, client kubernetes.Interface, r *Rotation) (servers, agents []string, err error) {
	all, err := ListServers(ctx, client)
	if err != nil {
		return nil, nil, err
	}
	for name, s := range all {
		if !Reached(s.CAs, r, r.Want()) {
			servers = append(servers, name)
		}
	}
	if r.Phase == PhaseRenew || r.Phase == pki.PhaseDone {
		nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		if err != nil {
			return nil, nil, err
		}
		for i := range nodes.Items {
			n := &nodes.Items[i]
			if _, server := all[n.Name]; !server && !isServer(n) && !Reached(n.Annotations[AnnotationCAs], r, r.Phase) {
				agents = append(agents, n.Name)
			}
		}
	}
	slices.Sort(servers)
	slices.Sort(agents)
	return servers, agents, nil
}

// FinishRotation ends the overlap now. force does not wait for machines that have not followed: they have to join again.
func FinishRotation(ctx context.Context, client kubernetes.Interface, force bool) error {
	return UpdateRotation(ctx, client, func(r *Rotation) (*Rotation, error) {
		switch {
		case r == nil || !r.Finished.IsZero() || r.Phase == pki.PhaseDone:
			return nil, errors.New("no change of the CAs is under way")
		case r.Phase != PhaseRenew:
			return nil, fmt.Errorf("the servers do not all issue from the new CAs yet (phase %s): wait, see `kedge certificate rotate-ca --status`", r.Phase)
		}
		r.DropAfter, r.Force = time.Now(), force
		return r, nil
	})
}

// IsNoRegistry says that there is no registry yet, so that nothing can be under way.
func IsNoRegistry(err error) bool { return apierrors.IsNotFound(err) }
