// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/kedge-io/kedge/pkg/pki"
)

// smallAPI is an API server with two objects, a namespace and a pod, that never change. asked gets what was asked.
type smallAPI struct {
	kinds   map[string]string // of objects, by group, version and resource
	objects map[string]any    // as kinds
	asked   chan string
}

func newSmallAPI() *smallAPI {
	object := func(kind, name, namespace string) map[string]any {
		return map[string]any{"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"name": name, "namespace": namespace, "uid": name, "resourceVersion": "1"}}
	}
	namespace, pod := object("Namespace", "default", ""), object("Pod", "p", "default")
	namespace["status"] = map[string]any{"phase": "Active"}
	pod["spec"] = map[string]any{"schedulerName": "default-scheduler", "containers": []map[string]any{{"name": "c", "image": "i"}}}
	a := &smallAPI{kinds: map[string]string{}, objects: map[string]any{"v1/namespaces": namespace, "v1/pods": pod}, asked: make(chan string, 1000)}
	for gvk := range scheme.Scheme.AllKnownTypes() {
		plural, _ := meta.UnsafeGuessKindToResource(gvk)
		a.kinds[plural.GroupVersion().String()+"/"+plural.Resource] = gvk.Kind
	}
	return a
}

func (a *smallAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case a.asked <- r.Method + " " + r.URL.Path:
	default:
	}
	w.Header().Set("Content-Type", "application/json")
	send := func(code int, object any) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(object)
	}
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/apis/"), "/api/")
	kind, known := a.kinds[path]
	version := path[:max(strings.LastIndex(path, "/"), 0)]
	if strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata") {
		kind, version = "PartialObjectMetadata", "meta.k8s.io/v1"
	}
	items := []any{}
	if o := a.objects[path]; o != nil {
		items = append(items, o)
	}
	switch {
	case r.URL.Path == "/livez/ping" || r.URL.Path == "/healthz":
		send(200, nil)
	case r.URL.Path == "/version":
		send(200, map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.2"})
	case r.URL.Path == "/api":
		send(200, metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}})
	case r.URL.Path == "/apis":
		send(200, metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}})
	case r.URL.Path == "/api/v1":
		// One that can be deleted: without any the namespace controller ends the process.
		send(200, metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: "v1",
			APIResources: []metav1.APIResource{{Name: "pods", SingularName: "pod", Namespaced: true, Kind: "Pod", Verbs: metav1.Verbs{"get", "list", "watch", "delete", "deletecollection"}}}})
	case r.Method != http.MethodGet || !known:
		send(404, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: 404, Reason: metav1.StatusReasonNotFound, Message: "not in this test"})
	case r.URL.Query().Get("watch") != "":
		w.WriteHeader(200)
		if r.URL.Query().Get("sendInitialEvents") != "" {
			for _, o := range items {
				_ = json.NewEncoder(w).Encode(map[string]any{"type": "ADDED", "object": o})
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"type": "BOOKMARK", "object": map[string]any{"kind": kind, "apiVersion": version,
				"metadata": map[string]any{"resourceVersion": "1", "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"}}}})
		}
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	default:
		send(200, map[string]any{"kind": kind + "List", "apiVersion": version, "metadata": map[string]string{"resourceVersion": "1"}, "items": items})
	}
}

// Scheduler and controller manager come and go with the lease, in one process: they can be stopped, and started again.
func TestLoopsStartAgain(t *testing.T) {
	api := newSmallAPI()
	server := httptest.NewServer(api)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	dir := t.TempDir()
	keys, err := pki.Ensure(t.Context(), pki.Config{Dir: dir, NodeName: "n1", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t)
	cfg.Files.ServerCA, cfg.Files.ServerCAKey = keys.CertFile(pki.ServerCA), keys.KeyFile(pki.ServerCA)
	cfg.Files.TrustedServerCA, cfg.Files.TrustedClientCA = keys.TrustFile(pki.ServerCA), keys.TrustFile(pki.ClientCA)
	cfg.Files.ClientCA, cfg.Files.ClientCAKey = keys.CertFile(pki.ClientCA), keys.KeyFile(pki.ClientCA)
	cfg.Files.ServiceAccountKey, cfg.Files.Kubeconfig = keys.KeyFile(pki.ServiceAccount), filepath.Join(dir, "kubeconfig")
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters["c"], kubeconfig.Contexts["c"], kubeconfig.CurrentContext = &clientcmdapi.Cluster{Server: server.URL}, &clientcmdapi.Context{Cluster: "c"}, "c"
	text, err := clientcmd.Write(*kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.Files.Kubeconfig, text, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := newPlane(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.log = slog.New(slog.NewTextHandler(t.Output(), nil))
	for _, loop := range []struct {
		name string
		run  func(context.Context) error
		asks string // when it works
	}{
		{"controller manager", p.runControllerManager, "POST /api/v1/namespaces/default/serviceaccounts"},
		{"scheduler", p.runScheduler, "PATCH /api/v1/namespaces/default/pods/p/status"},
	} {
		for i := range 3 {
			for len(api.asked) > 0 {
				<-api.asked
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- loop.run(component(ctx, loop.name)) }()
			for waits := true; waits; {
				select {
				case path := <-api.asked:
					waits = path != loop.asks
				case err := <-ended:
					t.Fatalf("%s, start %d: ended by itself: %v", loop.name, i+1, err)
				case <-time.After(30 * time.Second):
					t.Fatalf("%s, start %d: has not asked for %s", loop.name, i+1, loop.asks)
				}
			}
			cancel()
			select {
			case err := <-ended:
				if errors.Is(err, errStillRunning) {
					t.Errorf("%s, start %d: %v", loop.name, i+1, err)
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("%s, start %d: does not stop", loop.name, i+1)
			}
		}
	}
}
