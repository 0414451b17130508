// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/pkg/join"
)

func TestWindow(t *testing.T) {
	at := func(clock string) time.Time {
		c, err := time.Parse("15:04:05", clock)
		if err != nil {
			t.Fatal(err)
		}
		return time.Date(2026, 11, 28, c.Hour(), c.Minute(), c.Second(), 0, time.Local)
	}
	for _, c := range []struct {
		window, now string
		want        time.Duration
	}{
		{"", "12:00:00", 0},
		{"22:00-05:00", "21:59:30", 30 * time.Second}, {"22:00-05:00", "22:00:00", 0}, {"22:00-05:00", "00:00:00", 0}, {"22:00-05:00", "05:00:00", 17 * time.Hour},
		{"09:00-17:00", "08:00:00", time.Hour}, {"09:00-17:00", "16:59:59", 0}, {"09:00-17:00", "17:00:00", 16 * time.Hour},
	} {
		w, err := ParseWindow(c.window)
		if got := w.Wait(at(c.now)); err != nil || got != c.want {
			t.Errorf("%s at %s: %s, %v", c.window, c.now, got, err)
		}
	}
	for _, bad := range []string{"22:00", "22-5", "22:00-22:00", "25:00-01:00", "-", "22:00-05:00-06:00"} {
		if _, err := ParseWindow(bad); err == nil {
			t.Error(bad, "was taken")
		}
	}
}

func FuzzParseWindow(f *testing.F) {
	f.Add("22:00-05:00")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		w, err := ParseWindow(s)
		if wait := w.Wait(time.Unix(0, 0)); err == nil && (wait < 0 || wait > 24*time.Hour) {
			t.Errorf("%q: %s", s, wait)
		}
	})
}

func testNode(name, version string) runtime.Object {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KubeletVersion: version}}}
}

func testServers(t *testing.T, entries map[string]any) runtime.Object {
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: join.ConfigMapServers}, Data: map[string]string{}}
	for name, e := range entries {
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		cm.Data[name] = string(b)
	}
	return cm
}

// Servers come first, the machine at work the last of them.
func TestPlan(t *testing.T) {
	entry := map[string]any{"etcd": true, "controlPlane": true, "address": "192.0.2.1:6443", "version": "v1"}
	servers := testServers(t, map[string]any{"s1": entry, "s2": entry, "s3": entry})
	client := fake.NewClientset(servers, testNode("a1", "v1"), testNode("s1", "v1"), testNode("s2", "v1"), testNode("a2", "v1"), testNode("s3", "v1"))
	names := func(o Options) (string, error) {
		nodes, err := (&rollout{Options: o, client: client}).plan(t.Context())
		var list []string
		for _, n := range nodes {
			list = append(list, n.Name+"/"+n.Role)
		}
		return strings.Join(list, " "), err
	}
	for want, o := range map[string]Options{
		"s2/server s3/server s1/server a1/agent a2/agent": {Self: "s1", Version: "v2"},
		"s1/server s2/server s3/server a2/agent":          {Skip: []string{"a1"}, Version: "v2"},
		"a1/agent a2/agent s2/server s3/server s1/server": {Self: "s1", Back: true},
	} {
		if got, err := names(o); got != want || err != nil {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
	if _, err := names(Options{Skip: []string{"nobody"}}); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Error(err)
	}
	if err := client.CoreV1().Nodes().Delete(t.Context(), "s3", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := names(Options{Version: "v2"}); err == nil || !strings.Contains(err.Error(), "s3 is no node") {
		t.Error(err)
	}
	if _, err := names(Options{Version: "v1"}); err != nil {
		t.Error("a server without a node that has the version:", err)
	}
}

func TestGoal(t *testing.T) {
	const v1, v2, v3 = "v1.37.2+kedge1", "v1.37.2+kedge2", "v1.37.2+kedge3"
	none := previous{err: errors.New("there is no way back")}
	for name, c := range map[string]struct {
		has    []string
		before []previous
		last   *State
		want   string // version, or a part of the error
	}{
		"all":                     {[]string{v2, v2}, []previous{{version: v1}, {version: v1}}, nil, v1},
		"an upgrade that stopped": {[]string{v1, v2}, []previous{none, {version: v1}}, &State{Version: v2, Phase: Failed}, v1},
		"one way back is done":    {[]string{v1, v2}, []previous{{version: v2}, {version: v1}}, &State{Version: v1, Back: true, Phase: Failed}, v1},
		"all are back":            {[]string{v1, v1}, []previous{{version: v2}, {version: v2}}, &State{Version: v1, Back: true, Phase: Done}, v1},
		"an old way back":         {[]string{v3, v3}, []previous{{version: v2}, {version: v2}}, &State{Version: v1, Back: true, Phase: Done}, v2},
		"different":               {[]string{v3, v3}, []previous{{version: v2}, {version: v1}}, nil, "different versions before (" + v2 + ", " + v1 + ")"},
		"none":                    {[]string{v3, v3}, []previous{{version: v2}, none}, nil, "n1: there is no way back"},
	} {
		var nodes []Node
		for i, v := range c.has {
			nodes = append(nodes, Node{Name: fmt.Sprint("n", i), From: v})
		}
		got, err := goal(nodes, c.before, c.last)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, c.want) || (err == nil) != strings.HasPrefix(c.want, "v1") {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestRecord(t *testing.T) {
	client := fake.NewClientset()
	now := time.Now().UTC()
	r := &record{client: client, state: State{Version: "v2", Phase: Running, Began: now, By: "s1", Nodes: []Node{{Name: "s1"}, {Name: "a1"}}}}
	if err := r.node(t.Context(), "a1", func(n *Node) { n.Phase, n.Cordon = Failed, true }); err != nil {
		t.Fatal(err)
	}
	last, err := Load(t.Context(), client)
	if err != nil || last.Nodes[1].Phase != Failed || last.Nodes[0].Phase != "" {
		t.Fatalf("%+v, %v", last, err)
	}
	nodes := []Node{{Name: "a1"}, {Name: "a2"}}
	if inherit(nodes, last); !nodes[0].Cordon || nodes[1].Cordon {
		t.Errorf("%+v", nodes)
	}
	// Another one that begins later takes over, and the first one notices.
	other := &record{client: client, state: State{Version: "v3", Phase: Running, Began: now.Add(time.Second), By: "s2"}}
	if err := other.change(t.Context(), func(*State) {}); err != nil {
		t.Fatal(err)
	}
	if err := r.change(t.Context(), func(*State) {}); !errors.Is(err, errTakenOver) {
		t.Error(err)
	}
}

func TestFree(t *testing.T) {
	for name, c := range map[string]struct {
		last  *State
		force bool
		free  bool
	}{
		"none":        {nil, false, true},
		"under way":   {&State{Phase: Running, Renewed: time.Now()}, false, false},
		"by force":    {&State{Phase: Running, Renewed: time.Now()}, true, true},
		"abandoned":   {&State{Phase: Waiting, Renewed: time.Now().Add(-3 * time.Minute)}, false, true},
		"failed":      {&State{Phase: Failed, Renewed: time.Now()}, false, true},
		"in a window": {&State{Phase: Waiting, Renewed: time.Now()}, false, false},
	} {
		r := &rollout{Options: Options{Force: c.force, Say: func(_, _ string) {}}}
		if err := r.free(c.last); (err == nil) != c.free {
			t.Errorf("%s: %v", name, err)
		}
	}
}
