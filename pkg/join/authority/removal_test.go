// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/pkg/join"
)

// fakeAPI is the join API as seen by a client.
type fakeAPI struct {
	members []join.Member
	err     error
	removed []string
}

func (f *fakeAPI) Members(context.Context) ([]join.Member, error) { return f.members, nil }

func (f *fakeAPI) RemoveMember(_ context.Context, name string, force bool) error {
	if f.err == nil || force {
		f.removed = append(f.removed, name+" "+strconv.FormatBool(force))
		return nil
	}
	return f.err
}

// threeServers n1 to n3, of which alive have just been seen and the others have not for a minute; agent a1 has.
func threeServers(t *testing.T, alive ...string) (*fake.Clientset, *fakeAPI) {
	t.Helper()
	client, api := fake.NewClientset(), &fakeAPI{}
	for _, name := range []string{"n1", "n2", "n3", "a1"} {
		ready, seen := corev1.ConditionTrue, time.Now()
		if name != "a1" && !slices.Contains(alive, name) {
			ready, seen = corev1.ConditionUnknown, seen.Add(-time.Minute)
		}
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastHeartbeatTime: metav1.NewTime(seen)}}
		if _, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		renewLease(t, client, name, seen)
		if name == "a1" {
			continue
		}
		api.members = append(api.members, join.Member{Name: name, ID: name})
		if err := PutServer(t.Context(), client, name, Server{Address: name + ":6443", Etcd: true}); err != nil {
			t.Fatal(err)
		}
	}
	for name, a := range map[string]ask{
		"of-n3": bootstrap("n3", serverGroups), "of-n3-too": asServer("n3", serverGroups), "of-n1": bootstrap("n1", serverGroups), "of-a1": serving("a1"),
	} {
		if _, err := client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), a.object(t, name), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return client, api
}

func TestPlan(t *testing.T) {
	for _, tt := range []struct {
		what, name string
		alive      []string
		learner    bool // n3 is one
		breaks     bool
		parts      []string
	}{
		{"all alive", "n3", []string{"n1", "n2", "n3"}, false, false, []string{"node n3, seen last 0s ago", "server n3", "2 stay (n1, n2), of which 2 have to be alive, and 2 have been seen lately"}},
		{"the dead one", "n3", []string{"n1", "n2"}, false, false, []string{"seen last 1m0s ago"}},
		{"a live one, another dead", "n3", []string{"n1", "n3"}, false, true, []string{"breaks the quorum, as n2 has not been seen", "--force"}},
		{"two dead", "n3", []string{"n3"}, false, true, []string{"n1, n2 have not been seen"}},
		{"a learner", "n3", []string{"n1", "n2", "n3"}, true, false, []string{"no vote yet"}},
		{"beside a learner", "n2", []string{"n1", "n2", "n3"}, true, false, []string{"1 stay (n1), of which 1 have to be alive"}},
		{"an agent", "a1", []string{"n1"}, false, false, []string{"node a1"}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			client, api := threeServers(t, tt.alive...)
			api.members[2].Learner = tt.learner
			p, err := (&Remover{Client: client, API: api}).Plan(t.Context(), tt.name)
			if err != nil {
				t.Fatal(err)
			}
			if p.BreaksQuorum() != tt.breaks {
				t.Errorf("breaks the quorum: %v\n%s", p.BreaksQuorum(), p)
			}
			for _, part := range tt.parts {
				if !strings.Contains(p.String(), part) {
					t.Errorf("no %q in\n%s", part, p)
				}
			}
			if len(api.removed) > 0 {
				t.Error("a plan changes nothing")
			}
		})
	}
	client, api := threeServers(t)
	api.members = api.members[:1]
	r := &Remover{Client: client, API: api}
	if p, err := r.Plan(t.Context(), "n1"); err != nil || !p.BreaksQuorum() || !strings.Contains(p.String(), "last server") {
		t.Errorf("%v, %v", p, err)
	}
	if _, err := r.Plan(t.Context(), "nobody"); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v", err)
	}
}

func TestRemove(t *testing.T) {
	ctx := t.Context()
	client, api := threeServers(t, "n1", "n2")
	r := &Remover{Client: client, API: api}
	api.err = apierrors.NewConflict(corev1.Resource("members"), "n3", errors.New("would break the quorum"))
	if err := r.Remove(ctx, "n3", false); !apierrors.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	if _, err := client.CoreV1().Nodes().Get(ctx, "n3", metav1.GetOptions{}); err != nil {
		t.Errorf("refused, but the node is gone: %v", err)
	}
	if err := r.Remove(ctx, "n3", true); err != nil {
		t.Fatal(err)
	}
	api.err = apierrors.NewNotFound(corev1.Resource("members"), "a1")
	for range 2 { // twice does no harm
		if err := r.Remove(ctx, "a1", false); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(api.removed, []string{"n3 true"}) {
		t.Errorf("datastore: %q", api.removed)
	}
	servers, err := ListServers(ctx, client)
	if _, ok := servers["n3"]; err != nil || ok || len(servers) != 2 {
		t.Errorf("registry: %v, %v", servers, err)
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil || len(nodes.Items) != 2 {
		t.Errorf("nodes: %v, %v", nodes.Items, err)
	}
	leases, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, metav1.ListOptions{})
	if err != nil || len(leases.Items) != 2 {
		t.Errorf("leases: %v, %v", leases.Items, err)
	}
	csrs, err := client.CertificatesV1().CertificateSigningRequests().List(ctx, metav1.ListOptions{})
	if err != nil || len(csrs.Items) != 1 || csrs.Items[0].Name != "of-n1" {
		t.Errorf("signing requests: %v, %v", csrs.Items, err)
	}
}
