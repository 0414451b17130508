// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"github.com/kedge-io/kedge/pkg/join"
)

// Remover takes a node or server out of a cluster, for `kedge node remove` and `kedge leave`.
type Remover struct {
	Client kubernetes.Interface
	API    MembersAPI
}

// MembersAPI is what of the join API a [Remover] uses.
type MembersAPI interface {
	Members(ctx context.Context) ([]join.Member, error)
	RemoveMember(ctx context.Context, name string, force bool) error
}

var _ MembersAPI = (*join.API)(nil)

// ErrUnknown says that a cluster has nothing of a name.
var ErrUnknown = errors.New("there is no such node or server")

// Plan is what the removal of a machine would do.
type Plan struct {
	Name       string
	Node       bool      // there is a Node object
	Seen       time.Time // when its machine was seen last, zero if never
	Registered bool      // it is in the registry of servers
	Member     bool      // it is a member of the datastore
	Voter      bool      // and votes
	// What stays: the datastore's voters, and which of them run on machines that have not been seen lately. Those whose machines
	// have no Node count as running; the datastore itself looks closer when it comes to it.
	Voters, Silent []string
}

// Quorum is how many voters have to be alive after the removal.
func (p *Plan) Quorum() int { return len(p.Voters)/2 + 1 }

// BreaksQuorum tells whether the datastore would refuse the removal: without force it keeps a majority that is alive, and it never
// removes the last voter.
func (p *Plan) BreaksQuorum() bool { return p.Voter && len(p.Voters)-len(p.Silent) < p.Quorum() }

// String says it to people, a line each.
func (p *Plan) String() string {
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	switch {
	case p.Node && p.Seen.IsZero():
		say("node %s: its Node object is deleted", p.Name)
	case p.Node:
		say("node %s, seen last %s: its Node object is deleted", p.Name, ago(p.Seen, time.Now()))
	}
	if p.Registered {
		say("server %s: other machines forget its address", p.Name)
	}
	switch {
	case p.Member && !p.Voter:
		say("datastore: the member %s, which has no vote yet, is removed", p.Name)
	case p.Member && len(p.Voters) > 0:
		say("datastore: the member %s is removed; %d stay (%s), of which %d have to be alive, and %d have been seen lately", p.Name, len(p.Voters),
			strings.Join(p.Voters, ", "), p.Quorum(), len(p.Voters)-len(p.Silent))
	}
	if p.BreaksQuorum() && len(p.Voters) == 0 {
		say("this is the last server: it cannot be removed; uninstall Kedge there to give up the cluster")
	} else if p.BreaksQuorum() {
		say("this breaks the quorum, as %s not been seen lately: the API stops taking changes until enough of them are back. It takes --force",
			strings.Join(p.Silent, ", ")+map[bool]string{true: " has", false: " have"}[len(p.Silent) == 1])
	}
	return strings.Join(lines, "\n")
}

// Plan finds out what the removal of name would do, and does nothing. Its error wraps ErrUnknown if there is nothing to remove.
func (r *Remover) Plan(ctx context.Context, name string) (*Plan, error) {
	p := &Plan{Name: name}
	servers, err := ListServers(ctx, r.Client)
	if err != nil {
		return nil, err
	}
	_, p.Registered = servers[name]
	members, err := r.API.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("members of the datastore: %w", err)
	}
	s := newSilence(r.Client)
	for _, m := range members {
		if m.Name == name {
			p.Member, p.Voter = true, !m.Learner
			continue
		}
		if m.Learner {
			continue
		}
		p.Voters = append(p.Voters, m.Name)
		pulse, exists, err := s.byName(ctx, m.Name)
		if err != nil {
			return nil, err
		}
		if exists && pulse.overdue {
			p.Silent = append(p.Silent, m.Name)
		}
	}
	slices.Sort(p.Voters)
	slices.Sort(p.Silent)
	pulse, exists, err := s.byName(ctx, name)
	if err != nil {
		return nil, err
	}
	p.Node, p.Seen = exists, pulse.seen
	if !p.Node && !p.Registered && !p.Member {
		return nil, fmt.Errorf("%w: %s", ErrUnknown, name)
	}
	return p, nil
}

// Remove takes a machine out: its datastore member, which is refused if that breaks the quorum (apierrors.IsConflict) and not forced,
// then its entry in the registry, its Node, its Lease, and its signing requests. What is not there is no error.
func (r *Remover) Remove(ctx context.Context, name string, force bool) error {
	if err := r.API.RemoveMember(ctx, name, force); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	// Before the Node, so that NodeController has nothing to do.
	return errors.Join(RemoveServer(ctx, r.Client, name), forgetNode(ctx, r.Client, name))
}

// forgetNode removes what the cluster knows of a node: its Node, its Lease, and the signing requests by which its name is held.
func forgetNode(ctx context.Context, client kubernetes.Interface, name string) error {
	var errs []error
	add := func(what string, err error) {
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("%s of %s: %w", what, name, err))
		}
	}
	add("Node object", client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}))
	add("lease", client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Delete(ctx, name, metav1.DeleteOptions{}))
	add("signing requests", removeRequests(ctx, client, name))
	return errors.Join(errs...)
}

// removeRequests deletes the certificate signing requests of a machine.
func removeRequests(ctx context.Context, client kubernetes.Interface, name string) error {
	requests := client.CertificatesV1().CertificateSigningRequests()
	list, err := requests.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	for i := range list.Items {
		csr := &list.Items[i]
		cert, err := certificates.ParseCSR(csr.Spec.Request)
		if err != nil || cert.Subject.CommonName != join.UserNodePrefix+name && cert.Subject.CommonName != join.UserServerPrefix+name {
			continue
		}
		if err := requests.Delete(ctx, csr.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
