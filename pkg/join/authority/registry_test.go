// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/pkg/join"
)

func TestParseServer(t *testing.T) {
	for _, tt := range []struct {
		text string
		want Server
		err  string
	}{
		{`{"address":"192.0.2.1:6443","peerURL":"https://192.0.2.1:2380","etcd":true,"controlPlane":true,"version":"v1.37.2+kedge1"}`,
			Server{Address: "192.0.2.1:6443", PeerURL: "https://192.0.2.1:2380", Etcd: true, ControlPlane: true, Version: "v1.37.2+kedge1"}, ""},
		{`{"address":"[2001:db8::1]:6443","peerURL":"https://[2001:db8::1]:2380","node":true}`, Server{Address: "[2001:db8::1]:6443", PeerURL: "https://[2001:db8::1]:2380", Node: true}, ""},
		{`{"address":"n1.example.org:6443","of a newer version":[1]}`, Server{Address: "n1.example.org:6443"}, ""},
		{`{"address":""}`, Server{}, ""},
		{`{}`, Server{}, ""},
		{``, Server{}, "EOF"},
		{`null x`, Server{}, "more than one"},
		{`{} {}`, Server{}, "more than one"},
		{`[]`, Server{}, "cannot unmarshal"},
		{`{"address":6443}`, Server{}, "cannot unmarshal"},
		{`{"address":"192.0.2.1"}`, Server{}, "missing port"},
		{`{"address":":6443"}`, Server{}, "host:port"},
		{`{"address":"192.0.2.1:0"}`, Server{}, "host:port"},
		{`{"address":"192.0.2.1:65536"}`, Server{}, "host:port"},
		{`{"address":"0.0.0.0:6443"}`, Server{}, "host:port"},
		{`{"address":"[fe80::1%eth0]:6443"}`, Server{}, "host:port"},
		{`{"address":"a b:6443"}`, Server{}, "host:port"},
		{`{"peerURL":"http://192.0.2.1:2380"}`, Server{}, "https://HOST:PORT"},
		{`{"peerURL":"https://192.0.2.1:2380/"}`, Server{}, "https://HOST:PORT"},
		{`{"peerURL":"https://192.0.2.1"}`, Server{}, "https://HOST:PORT"},
		{`{"address":"` + strings.Repeat("a", maxServerEntry) + `"}`, Server{}, "bytes"},
	} {
		got, err := ParseServer(tt.text)
		if tt.err == "" && (err != nil || got != tt.want) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%.80s: got %+v, %v", tt.text, got, err)
		}
	}
}

func TestParseServers(t *testing.T) {
	servers, err := ParseServers(&corev1.ConfigMap{Data: map[string]string{
		"n1": `{"address":"192.0.2.1:6443"}`, "n2": `{`, "n3": `{"etcd":true}`, "Not_A_Name": `{}`,
	}})
	if !maps.Equal(servers, map[string]Server{"n1": {Address: "192.0.2.1:6443"}, "n3": {Etcd: true}}) {
		t.Errorf("got %v", servers)
	}
	for _, part := range []string{`entry "n2"`, `entry "Not_A_Name"`, join.ConfigMapServers} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("no %s in %v", part, err)
		}
	}
}

// FuzzParseServer: what is accepted is written and read back as the same, and can be dialled.
func FuzzParseServer(f *testing.F) {
	f.Add(`{"address":"192.0.2.1:6443","peerURL":"https://192.0.2.1:2380","etcd":true,"controlPlane":true,"version":"v1"}`)
	f.Add(`{"address":"[2001:db8::1]:6443","node":true}`)
	f.Add(`{"address":"n1:1"} `)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseServer(text)
		if err != nil {
			return
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseServer(string(b))
		if len(b) <= maxServerEntry && (err != nil || again != s) {
			t.Errorf("%+v became %+v, %v", s, again, err)
		}
		for _, h := range s.hosts() {
			if !isHost(h) {
				t.Errorf("host %q of %q", h, text)
			}
		}
	})
}

func TestRegistry(t *testing.T) {
	client, ctx := fake.NewClientset(), t.Context()
	if servers, err := ListServers(ctx, client); err != nil || len(servers) != 0 {
		t.Fatalf("got %v, %v", servers, err)
	}
	if err := RemoveServer(ctx, client, "n1"); err != nil {
		t.Errorf("without a registry: %v", err)
	}
	one, two := Server{Address: "192.0.2.1:6443", Etcd: true, ControlPlane: true}, Server{Etcd: true, PeerURL: "https://192.0.2.2:2380"}
	put := func(name string, s Server) {
		t.Helper()
		if err := PutServer(ctx, client, name, s); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want map[string]Server) {
		t.Helper()
		if got, err := ListServers(ctx, client); err != nil || !maps.Equal(got, want) {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
	}
	put("n1", one)
	put("n2", two)
	want(map[string]Server{"n1": one, "n2": two})

	// What NodeController notes stays when a server starts again, until it joins afresh.
	noted := one
	noted.Node = true
	c := NewNodeController(client, &fakeMembers{}, (&logged{}).logger())
	if err := c.note(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	want(map[string]Server{"n1": noted, "n2": two})
	noted.Version = "v2"
	put("n1", Server{Address: one.Address, Etcd: true, ControlPlane: true, Version: "v2"})
	want(map[string]Server{"n1": noted, "n2": two})

	if err := PutServer(ctx, client, "n3", Server{Address: "nonsense"}); err == nil || !strings.Contains(err.Error(), "register server n3") {
		t.Errorf("got %v", err)
	}
	if err := RemoveServer(ctx, client, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := RemoveServer(ctx, client, "n1"); err != nil {
		t.Errorf("once more: %v", err)
	}
	want(map[string]Server{"n2": two})
	put("n1", one)
	want(map[string]Server{"n1": one, "n2": two})
	cm, err := client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kedge-servers", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var managers []string
	for _, m := range cm.ManagedFields {
		managers = append(managers, m.Manager)
	}
	for _, m := range []string{"kedge-server-n1", "kedge-server-n2"} {
		if !slices.Contains(managers, m) {
			t.Errorf("%s is not among the field managers %v", m, managers)
		}
	}
}

// TestNoteKeepsOtherFields: a leader of an older version does not take away what a newer server wrote.
func TestNoteKeepsOtherFields(t *testing.T) {
	client := fake.NewClientset(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "kedge-servers"},
		Data: map[string]string{"n1": `{"address":"192.0.2.1:6443","zone":"attic"}`, "n2": "damaged"}})
	c := NewNodeController(client, &fakeMembers{}, (&logged{}).logger())
	for _, name := range []string{"n1", "n2", "n3"} {
		if err := c.note(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	cm, err := client.CoreV1().ConfigMaps("kube-system").Get(t.Context(), "kedge-servers", metav1.GetOptions{})
	if err != nil || !maps.Equal(cm.Data, map[string]string{"n1": `{"address":"192.0.2.1:6443","node":true,"zone":"attic"}`, "n2": "damaged"}) {
		t.Errorf("got %v, %v", cm.Data, err)
	}
}

func TestWatchServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		var selectors []string
		client.PrependReactor("list", "configmaps", func(a clienttesting.Action) (bool, runtime.Object, error) {
			selectors = append(selectors, a.(clienttesting.ListAction).GetListRestrictions().Fields.String())
			return false, nil, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		var calls []map[string]Server
		var errs []error
		var wg sync.WaitGroup
		wg.Go(func() {
			WatchServers(ctx, client, func(s map[string]Server, err error) { calls, errs = append(calls, s), append(errs, err) })
		})
		step := func(what string, n int, want map[string]Server, damaged bool) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			if len(calls) != n || !maps.Equal(calls[n-1], want) || (errs[n-1] != nil) != damaged {
				t.Fatalf("%s: got %v, %v", what, calls, errs)
			}
		}
		step("no registry", 1, map[string]Server{}, false)
		one := Server{Address: "192.0.2.1:6443"}
		if err := PutServer(ctx, client, "n1", one); err != nil {
			t.Fatal(err)
		}
		step("put", 2, map[string]Server{"n1": one}, false)
		cm, err := client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kedge-servers", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cm.Annotations = map[string]string{"a": "b"}
		if cm, err = client.CoreV1().ConfigMaps("kube-system").Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		step("only metadata", 2, map[string]Server{"n1": one}, false)
		cm.Data["n2"] = "damaged"
		if _, err = client.CoreV1().ConfigMaps("kube-system").Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		step("damaged", 3, map[string]Server{"n1": one}, true)
		if err := client.CoreV1().ConfigMaps("kube-system").Delete(ctx, "kedge-servers", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		step("deleted", 4, map[string]Server{}, false)
		cancel()
		wg.Wait()
		if len(selectors) == 0 || slices.ContainsFunc(selectors, func(s string) bool { return s != "metadata.name=kedge-servers" }) {
			t.Errorf("field selectors %q: a node may read this ConfigMap alone", selectors)
		}
	})
}

func TestListServersError(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("get", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("away") })
	if _, err := ListServers(t.Context(), client); err == nil {
		t.Error("no error")
	}
	if err := PutServer(t.Context(), client, "n1", Server{}); err == nil {
		t.Error("no error")
	}
}
