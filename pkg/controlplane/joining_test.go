// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
)

// testPlane is a control plane process on server n1 without its components.
func testPlane(t *testing.T, objects ...runtime.Object) (*plane, *fake.Clientset) {
	t.Helper()
	client := fake.NewClientset(objects...)
	p := &plane{cfg: testConfig(t), client: client, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	p.cfg.Files.TrustedClientCA = filepath.Join(t.TempDir(), "client-ca.crt")
	if err := os.WriteFile(p.cfg.Files.TrustedClientCA, []byte("the client CA"), 0o600); err != nil {
		t.Fatal(err)
	}
	return p, client
}

// The settings are those of the first server, whatever a later one has.
func TestPublishCluster(t *testing.T) {
	p, client := testPlane(t)
	if err := p.publishCluster(t.Context()); err != nil {
		t.Fatal(err)
	}
	get := func() *corev1.ConfigMap {
		m, err := client.CoreV1().ConfigMaps("kube-system").Get(t.Context(), join.ConfigMapCluster, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	first := get()
	var settings config.Cluster
	if err := json.Unmarshal([]byte(first.Data[join.KeyCluster]), &settings); err != nil || !reflect.DeepEqual(settings, p.cfg.Cluster) {
		t.Errorf("settings %+v, %v", settings, err)
	}
	if first.Data[join.KeyClientCA] != "the client CA" || len(first.Data) != 2 {
		t.Errorf("data %v", first.Data)
	}
	client.ClearActions()
	p.cfg.Cluster.ClusterDomain = "another.example"
	if err := p.publishCluster(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if again := get(); !maps.Equal(again.Data, first.Data) {
		t.Errorf("a second time: %v", again.Data)
	}
	if err := os.WriteFile(p.cfg.Files.TrustedClientCA, []byte("the old CA and the new one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.publishCluster(t.Context()); err != nil {
		t.Error(err)
	}
	if again := get(); again.Data[join.KeyClientCA] != "the old CA and the new one" || again.Data[join.KeyCluster] != first.Data[join.KeyCluster] {
		t.Errorf("another CA: %v", again.Data)
	}
	p.cfg.Files.TrustedClientCA += ".missing"
	if err := p.publishCluster(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
	p, client = testPlane(t)
	broken := errors.New("etcdserver: no leader")
	client.PrependReactor("create", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, broken })
	if err := p.publishCluster(t.Context()); !errors.Is(err, broken) {
		t.Errorf("an API that fails: %v", err)
	}
}

func TestPutToken(t *testing.T) {
	own := OperatorToken{ID: "abcdef", Secret: "0123456789abcdef", Role: join.Agent}
	other := func(change func(*OperatorToken)) *corev1.Secret {
		o := own
		change(&o)
		return join.Token{ID: o.ID, Secret: o.Secret, Derived: true}.Object(o.Role, 0, "another server's")
	}
	foreign := other(func(*OperatorToken) {})
	foreign.Type = corev1.SecretTypeOpaque
	for _, test := range []struct {
		name  string
		have  *corev1.Secret
		wrote []string
	}{
		{"new", nil, []string{"create secrets"}},
		{"it is there", other(func(*OperatorToken) {}), []string{"create secrets"}}, // which is refused
		{"servers may become agents", other(func(o *OperatorToken) { o.Role = join.Server }), []string{"create secrets", "update secrets"}},
		{"another secret of this ID", other(func(o *OperatorToken) { o.Secret = "fedcba9876543210" }), []string{"create secrets", "update secrets"}},
		{"something else of this name", foreign, []string{"create secrets", "update secrets"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var objects []runtime.Object
			if test.have != nil {
				test.have.ResourceVersion = "7"
				objects = append(objects, test.have)
			}
			p, client := testPlane(t, objects...)
			if err := p.putToken(t.Context(), own); err != nil {
				t.Fatal(err)
			}
			if got := writes(client); !slices.Equal(got, test.wrote) {
				t.Errorf("it wrote %v", got)
			}
			if update, ok := client.Actions()[len(client.Actions())-1].(clienttesting.UpdateAction); ok && len(test.wrote) == 2 {
				if v := update.GetObject().(*corev1.Secret).ResourceVersion; v != "7" {
					t.Errorf("it would overwrite a change that came in between: version %q", v)
				}
			}
			secret, err := client.CoreV1().Secrets("kube-system").Get(t.Context(), "bootstrap-token-abcdef", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			info, err := join.FromSecret(secret)
			if err != nil || info.Token.Secret != own.Secret || info.Role != join.Agent || !info.Token.Derived || !info.Expires.IsZero() {
				t.Errorf("the cluster knows %+v, %v", info, err)
			}
			if keeps := len(test.wrote) == 1 && test.have != nil; strings.Contains(info.Description, "server n1") == keeps {
				t.Errorf("described as %q", info.Description)
			}
		})
	}
}

// What could not be written is tried until it could; then nothing is done any more.
func TestKeepTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, client := testPlane(t)
		p.cfg.Tokens = []OperatorToken{{ID: "abcdef", Secret: "0123456789abcdef", Role: join.Server}, {ID: "ghijkl", Secret: "0123456789abcdef", Role: join.Agent}}
		start := time.Now()
		fails := func(resource string, until time.Duration) {
			client.PrependReactor("create", resource, func(clienttesting.Action) (bool, runtime.Object, error) {
				return time.Since(start) < until, nil, errors.New("not yet")
			})
		}
		fails("configmaps", 10*time.Second)
		fails("secrets", 20*time.Second)
		p.keepTokens(t.Context())
		if took := time.Since(start); took < 20*time.Second || took > 22*time.Second {
			t.Errorf("it took %v", took)
		}
		secrets, err := client.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(secrets.Items) != 2 {
			t.Errorf("%d secrets, %v", len(secrets.Items), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		fails("configmaps", time.Hour)
		p.keepTokens(ctx) // ends with ctx
	})
}

func TestIsAlone(t *testing.T) {
	registry := func(entries map[string]string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: join.ConfigMapServers, Namespace: "kube-system"}, Data: entries}
	}
	for _, test := range []struct {
		name     string
		registry *corev1.ConfigMap
		external bool
		want     bool
	}{
		{"no list", nil, false, true},
		{"an empty list", registry(nil), false, true},
		{"itself", registry(map[string]string{"n1": "{}"}), false, true},
		{"another", registry(map[string]string{"n2": "{}"}), false, false},
		{"both", registry(map[string]string{"n1": "{}", "n2": "{}"}), false, false},
		{"an etcd that others may use", registry(map[string]string{"n1": "{}"}), true, false},
	} {
		var objects []runtime.Object
		if test.registry != nil {
			objects = append(objects, test.registry)
		}
		p, _ := testPlane(t, objects...)
		p.cfg.Datastore.Own = !test.external
		if alone, err := p.isAlone(t.Context()); err != nil || alone != test.want {
			t.Errorf("%s: %v, %v", test.name, alone, err)
		}
	}
	synctest.Test(t, func(t *testing.T) { // without an answer there is no decision
		p, client := testPlane(t)
		start := time.Now()
		client.PrependReactor("get", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
			return time.Since(start) < time.Minute, nil, errors.New("not yet")
		})
		if alone, err := p.isAlone(t.Context()); err != nil || !alone || time.Since(start) < time.Minute {
			t.Errorf("%v, %v after %v", alone, err, time.Since(start))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start = time.Now()
		if _, err := p.isAlone(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("stopped: %v", err)
		}
	})
}

func roleLabels(roles ...string) map[string]string {
	labels := map[string]string{"kubernetes.io/os": "linux"}
	for _, r := range roles {
		labels["node-role.kubernetes.io/"+r] = ""
	}
	return labels
}

func nodeWith(name string, roles ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: roleLabels(roles...)}}
}

func rolesIn(t *testing.T, client *fake.Clientset, name string) string {
	t.Helper()
	n, err := client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var roles []string
	for label := range n.Labels {
		if role, ok := strings.CutPrefix(label, "node-role.kubernetes.io/"); ok {
			roles = append(roles, role)
		}
	}
	if n.Labels["kubernetes.io/os"] != "linux" {
		roles = append(roles, "and lost another label")
	}
	slices.Sort(roles)
	return strings.Join(roles, " ")
}

func TestLabelNode(t *testing.T) {
	servers := map[string]authority.Server{"n1": {ControlPlane: true, Etcd: true}, "n2": {ControlPlane: true}}
	for _, test := range []struct {
		name   string
		node   *corev1.Node
		want   string
		silent bool
	}{
		{"a new server", nodeWith("n1"), "control-plane etcd", false},
		{"as it is", nodeWith("n1", "control-plane", "etcd"), "control-plane etcd", true},
		{"without its member", nodeWith("n2", "control-plane", "etcd"), "control-plane", false},
		{"a worker that became a server", nodeWith("n1", "worker"), "control-plane etcd", false},
		{"a server that became a worker", nodeWith("n3", "control-plane", "etcd"), "worker", false},
		{"with a role of the operator's", nodeWith("n3", "worker", "gpu"), "gpu worker", true},
		{"with labels gone", nodeWith("n3", "gpu"), "gpu worker", false},
	} {
		p, client := testPlane(t, test.node)
		p.labelNode(t.Context(), test.node, servers)
		if wrote := len(writes(client)) > 0; wrote == test.silent {
			t.Errorf("%s: it wrote %v", test.name, writes(client))
		}
		if got := rolesIn(t, client, test.node.Name); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
	p, _ := testPlane(t)
	var said strings.Builder
	p.log = slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))
	p.labelNode(t.Context(), nodeWith("gone", "worker"), map[string]authority.Server{"gone": {Etcd: true}})
	if !strings.Contains(said.String(), `labels="[node-role.kubernetes.io/etcd node-role.kubernetes.io/worker]"`) {
		t.Errorf("it said %s", said.String())
	}
}

// Nodes get their roles when they come, when the list of servers changes, and again when somebody took them away.
func TestKeepRoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, client := testPlane(t, nodeWith("n1"), nodeWith("n2"))
		ctx, cancel := context.WithCancel(t.Context())
		factory := informers.NewSharedInformerFactory(client, 0)
		p.nodes = factory.Core().V1().Nodes()
		p.nodes.Informer()
		factory.Start(ctx.Done())
		done := make(chan struct{})
		go func() { defer close(done); p.keepRoles(ctx) }()
		expect := func(when string, want map[string]string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			for name, roles := range want {
				if got := rolesIn(t, client, name); got != roles {
					t.Errorf("%s: %s is %q, want %q", when, name, got, roles)
				}
			}
		}
		register := func(entries map[string]string) {
			t.Helper()
			m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: join.ConfigMapServers, Namespace: "kube-system"}, Data: entries}
			_, err := client.CoreV1().ConfigMaps("kube-system").Update(ctx, m, metav1.UpdateOptions{})
			if err != nil {
				_, err = client.CoreV1().ConfigMaps("kube-system").Create(ctx, m, metav1.CreateOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		const whole = `{"etcd":true,"controlPlane":true}`
		expect("nobody has entered itself: no server shall be called a worker", map[string]string{"n1": "", "n2": ""})
		register(map[string]string{"n1": whole})
		expect("one server", map[string]string{"n1": "control-plane etcd", "n2": "worker"})
		register(map[string]string{"n1": whole, "n2": `{"controlPlane":true}`})
		expect("a second one", map[string]string{"n1": "control-plane etcd", "n2": "control-plane"})
		if _, err := client.CoreV1().Nodes().Create(ctx, nodeWith("n3"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		expect("an agent", map[string]string{"n3": "worker"})
		if _, err := client.CoreV1().Nodes().Update(ctx, nodeWith("n1", "worker"), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		expect("somebody changed them", map[string]string{"n1": "control-plane etcd"})
		register(nil)
		expect("an empty list says nothing", map[string]string{"n1": "control-plane etcd", "n2": "control-plane", "n3": "worker"})
		cancel()
		<-done
		factory.Shutdown()
	})
}
