// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// turns plays a change of the CAs: each round names who has not followed, and what the rotation is to be like afterwards.
type turns []struct {
	after           time.Duration
	servers, agents string // who has not followed
	want            string // PHASE TURN away=…
}

func (steps turns) play(t *testing.T, r *Rotation) {
	t.Helper()
	now := time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC)
	for i, s := range steps {
		now = now.Add(s.after)
		r.next(strings.Fields(s.servers), strings.Fields(s.agents), now)
		got := strings.TrimSpace(string(r.Phase) + " " + r.Turn)
		if len(r.Away) > 0 {
			got += " away=" + strings.Join(r.Away, ",")
		}
		if got != s.want {
			t.Errorf("step %d: %q, want %q", i, got, s.want)
		}
	}
}

func TestTurns(t *testing.T) {
	r := &Rotation{ID: "x", Phase: pki.PhaseTrust, Overlap: time.Hour}
	turns{
		{0, "s1 s2 s3", "", "trust s1"},
		{time.Minute, "s1 s2 s3", "", "trust s1"}, // it restarts
		{time.Second, "s2 s3", "", "trust s2"},
		{time.Second, "s3", "", "trust s3"},
		{time.Second, "", "", "issue"},
		{time.Second, "s1 s2 s3", "", "issue s1"},
		{time.Second, "s2 s3", "", "issue s2"},
		{time.Second, "s3", "", "issue s3"},
		{time.Second, "", "", "renew"},
		{time.Minute, "", "a1", "renew"},
		{time.Minute, "", "", "renew"}, // the overlap is not over
		{time.Hour, "", "a1", "renew"}, // somebody is missing
		{time.Minute, "", "", "done"},  //
		{time.Second, "s1", "", "done s1"},
		{time.Second, "", "", "done"},
	}.play(t, r)
	if r.Finished.IsZero() {
		t.Error("not finished")
	}
}

// A server that is off does not keep the others from trusting the new CAs, and nothing goes on without it afterwards, unless it is forced.
func TestTurnsWithOneAway(t *testing.T) {
	r := &Rotation{ID: "x", Phase: pki.PhaseTrust}
	turns{
		{0, "s1 s2", "", "trust s1"},
		{turnTime, "s1 s2", "", "trust s2 away=s1"},
		{time.Second, "s1", "", "issue"},
		{time.Second, "s1 s2", "", "issue s1"},
		{turnTime, "s1 s2", "", "issue s2 away=s1"},
		{time.Second, "s1", "", "issue s1 away=s1"},
		{turnTime, "s1", "", "issue s1 away=s1"},
		{time.Second, "", "", "renew"},
		{time.Second, "", "", "done"},
		{0, "s1 s2", "", "done s1"},
		{turnTime, "s1 s2", "", "done s2 away=s1"},
		{time.Second, "s1", "", "done s1 away=s1"},
	}.play(t, r)
	if !r.Finished.IsZero() {
		t.Error("finished without a server")
	}
	r.Force = true
	turns{{time.Second, "s1", "", "done away=s1"}}.play(t, r)
	if r.Finished.IsZero() {
		t.Error("not finished by force")
	}
}

func TestRotatorMovesOn(t *testing.T) {
	ca := newClientCA(t)
	pem := ca.pem(t)
	registry := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: join.ConfigMapServers, Namespace: metav1.NamespaceSystem},
		Data: map[string]string{"s1": `{"address":"192.0.2.1:6443","etcd":true,"controlPlane":true,"cas":"abc/trust"}`}}
	agent := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1", Annotations: map[string]string{AnnotationCAs: "abc/trust"}}}
	client := fake.NewClientset(registry, agent)
	c := &Rotator{Client: client, Logger: slog.New(slog.DiscardHandler)}
	if busy, err := c.step(t.Context(), time.Now()); busy || err != nil {
		t.Errorf("without a change: %t, %v", busy, err)
	}
	start := &Rotation{ID: "abc", Phase: pki.PhaseTrust, Started: time.Now(), NewServerCA: pem, OldServerCA: pem, NewClientCA: pem, OldClientCA: pem}
	if err := UpdateRotation(t.Context(), client, func(*Rotation) (*Rotation, error) { return start, nil }); err != nil {
		t.Fatal(err)
	}
	if err := FinishRotation(t.Context(), client, false); err == nil || !strings.Contains(err.Error(), "phase trust") {
		t.Errorf("finished too early: %v", err)
	}
	phase := func() pki.Phase {
		t.Helper()
		if busy, err := c.step(t.Context(), time.Now()); !busy || err != nil {
			t.Fatalf("%t, %v", busy, err)
		}
		r, err := GetRotation(t.Context(), client)
		if err != nil {
			t.Fatal(err)
		}
		return r.Phase
	}
	if got := phase(); got != pki.PhaseIssue {
		t.Errorf("phase %s", got)
	}
	put := func(state string) {
		t.Helper()
		cm, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(t.Context(), join.ConfigMapServers, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cm.Data["s1"] = strings.Replace(registry.Data["s1"], "abc/trust", state, 1)
		if _, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Update(t.Context(), cm, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	put("abc/issue")
	if got := phase(); got != PhaseRenew {
		t.Errorf("phase %s", got)
	}
	if got := phase(); got != PhaseRenew { // a1 has not followed
		t.Errorf("phase %s", got)
	}
	r, err := GetRotation(t.Context(), client)
	if err != nil {
		t.Fatal(err)
	}
	if servers, agents, err := Laggards(t.Context(), client, r); err != nil || len(servers) > 0 || !slices.Equal(agents, []string{"a1"}) {
		t.Errorf("laggards %v %v %v", servers, agents, err)
	}
	if err := FinishRotation(t.Context(), client, true); err != nil {
		t.Fatal(err)
	}
	if got := phase(); got != pki.PhaseDone {
		t.Errorf("phase %s", got)
	}
}

func FuzzParseRotation(f *testing.F) {
	f.Add(`{"id":"a","phase":"trust"}`)
	f.Add(`null`)
	f.Add(`{"phase":"done","NewServerCA":"QUFB"}`)
	f.Fuzz(func(t *testing.T, text string) {
		cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationRotation: text}}}
		r, err := ParseRotation(cm)
		if err == nil && r != nil {
			if server, client := r.Trusted(); len(server) == 0 || len(client) == 0 {
				t.Errorf("accepted %q", text)
			}
		}
	})
}
