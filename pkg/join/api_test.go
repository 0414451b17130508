// SPDX-License-Identifier: Apache-2.0

package join

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/pki"
)

// joinAPI answers requests by "METHOD PATH?QUERY BODY", and only for those who present a client certificate.
func joinAPI(t *testing.T, answers map[string]any) (*testCluster, *API) {
	t.Helper()
	c := newCluster(t)
	c.override = func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName != pki.UserController {
			sendStatus(w, 401, "Unauthorized")
			return
		}
		var body json.RawMessage
		_ = json.NewDecoder(r.Body).Decode(&body)
		switch a := answers[strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body))].(type) {
		case nil:
			http.NotFound(w, r)
		case int:
			http.Error(w, http.StatusText(a), a)
		case metav1.Status:
			sendJSON(w, int(a.Code), a)
		case string:
			fmt.Fprint(w, a)
		default:
			sendJSON(w, 200, a)
		}
	}
	pair, err := os.ReadFile(c.pki.CertFile(pki.KedgeController))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(c.pki.CertFile(pki.ServerCA))
	if err != nil {
		t.Fatal(err)
	}
	api, err := (&Cluster{URL: c.URL, CA: ca}).API(pair, pair, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, api
}

func TestAPI(t *testing.T) {
	members := []Member{{Name: "n1", ID: "8e9e05c52164694d", PeerURLs: []string{"https://192.0.2.1:2380"}}, {ID: "1", PeerURLs: []string{"https://192.0.2.2:2380"}, Learner: true}}
	_, api := joinAPI(t, map[string]any{
		"GET /kedge/v1/keys":    `{"files":{"server-ca.crt":"aGVsbG8="}}`,
		"GET /kedge/v1/members": `{"members":[{"name":"n1","id":"8e9e05c52164694d","peerURLs":["https://192.0.2.1:2380"],"learner":false},{"name":"","id":"1","peerURLs":["https://192.0.2.2:2380"],"learner":true}]}`,
		`POST /kedge/v1/members {"name":"n2","peerURL":"https://192.0.2.2:2380"}`: AddMemberResponse{ID: "1", Members: members},
		"POST /kedge/v1/members/n2/promote":                                       struct{}{},
		"DELETE /kedge/v1/members/n2":                                             struct{}{},
		"DELETE /kedge/v1/members/n3?force=true":                                  "",
	})
	keys, err := api.Keys(t.Context())
	if err != nil || string(keys["server-ca.crt"]) != "hello" {
		t.Errorf("%s %v", keys, err)
	}
	got, err := api.Members(t.Context())
	if diff := cmp.Diff(members, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	added, err := api.AddMember(t.Context(), "n2", "https://192.0.2.2:2380")
	if err != nil || added.ID != "1" || cmp.Diff(members, added.Members) != "" {
		t.Errorf("%+v %v", added, err)
	}
	for name, err := range map[string]error{
		"promote": api.Promote(t.Context(), "n2"), "remove": api.RemoveMember(t.Context(), "n2", false), "force": api.RemoveMember(t.Context(), "n3", true),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAPIErrors(t *testing.T) {
	status := func(code int32, reason metav1.StatusReason, message string) metav1.Status {
		return metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: code, Reason: reason, Message: message}
	}
	whatever := func(error) bool { return true }
	for _, tt := range []struct {
		answer any
		kind   Kind
		retry  bool
		is     func(error) bool
		want   string
	}{
		{status(409, metav1.StatusReasonConflict, "not caught up yet: 80 %"), KindBusy, true, apierrors.IsConflict, "not caught up yet: 80 %"},
		{status(404, metav1.StatusReasonNotFound, "n2 is no member"), KindRefused, false, apierrors.IsNotFound, "n2 is no member"},
		{status(403, metav1.StatusReasonForbidden, "only n2 itself"), KindRole, false, apierrors.IsForbidden, "ADDRESS does not allow this machine POST /kedge/v1/members/n2/promote: only n2 itself"},
		{status(401, metav1.StatusReasonUnauthorized, "Unauthorized"), KindToken, false, apierrors.IsUnauthorized,
			"ADDRESS does not accept this machine's certificate any more: it has expired, or the cluster's CA is another one; join again"},
		{status(500, metav1.StatusReasonInternalError, "etcd is away"), KindNotReady, true, apierrors.IsInternalError, "the API on ADDRESS is not ready for /kedge/v1/members/n2/promote: HTTP 500: etcd is away"},
		{503, KindNotReady, true, apierrors.IsServiceUnavailable, "the API on ADDRESS is not ready for /kedge/v1/members/n2/promote: HTTP 503: Service Unavailable"},
		{429, KindNotReady, true, apierrors.IsTooManyRequests, "the API on ADDRESS is not ready for /kedge/v1/members/n2/promote: HTTP 429: Too Many Requests"},
		{status(400, metav1.StatusReasonBadRequest, "no such name"), KindRefused, false, apierrors.IsBadRequest, "no such name"},
		{nil, KindNotKedge, false, whatever, "ADDRESS does not know /kedge/v1/members/n2/promote: it is not Kedge's API, or its version is older"},
	} {
		c, api := joinAPI(t, map[string]any{"POST /kedge/v1/members/n2/promote": tt.answer, "GET /readyz": "ok"})
		err := api.Promote(t.Context(), "n2")
		if err == nil {
			t.Errorf("no error, want %s", tt.want)
			continue
		}
		if text := strings.ReplaceAll(err.Error(), c.address, "ADDRESS"); text != tt.want || KindOf(err) != tt.kind || Retryable(err) != tt.retry || !tt.is(err) {
			t.Errorf("kind %q, retry %v, %#v\n%s\nwant %q, %v\n%s", KindOf(err), Retryable(err), err, text, tt.kind, tt.retry, tt.want)
		}
	}
	c, api := joinAPI(t, map[string]any{"GET /kedge/v1/keys": "<html>"})
	if _, err := api.Keys(t.Context()); KindOf(err) != KindNotKedge {
		t.Error(err)
	}
	c.Close()
	if _, err := api.Keys(t.Context()); KindOf(err) != KindUnreachable || !Retryable(err) {
		t.Error(err)
	}
}

// TestNewAPI is the way of an administrator: by kubeconfig.
func TestNewAPI(t *testing.T) {
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	c := newClusterFor(t, pki.Config{NodeName: "n1", AdminKubeconfigPath: kubeconfig}, pki.APIServer)
	c.override = func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName != pki.UserAdmin {
			sendStatus(w, 401, "Unauthorized")
			return
		}
		sendJSON(w, 200, MembersResponse{Members: []Member{{Name: "n1"}}})
	}
	data, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(data)
	if err != nil {
		t.Fatal(err)
	}
	config.Host = c.URL
	api, err := NewAPI(config)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := api.Members(t.Context()); err != nil || len(m) != 1 {
		t.Error(m, err)
	}
}

// An API server that starts forbids everything, since it knows no roles yet: that passes. What is forbidden when it is ready stays so.
func TestForbiddenWhileStarting(t *testing.T) {
	c, api := joinAPI(t, nil)
	forbidden := func(w http.ResponseWriter) { sendStatus(w, http.StatusForbidden, "forbidden: User cannot post path") }
	ready := false
	c.override = func(w http.ResponseWriter, r *http.Request) {
		if !ready {
			forbidden(w)
		} else {
			sendJSON(w, http.StatusOK, struct{}{})
		}
	}
	if err := api.Promote(t.Context(), "n2"); KindOf(err) != KindNotReady || !Retryable(err) {
		t.Errorf("while it starts: kind %q, %v", KindOf(err), err)
	}
	c.override = func(w http.ResponseWriter, r *http.Request) {
		if ready = ready || r.URL.Path == "/readyz"; !ready {
			forbidden(w)
		} else {
			sendJSON(w, http.StatusOK, struct{}{})
		}
	}
	if err := api.Promote(t.Context(), "n2"); err != nil {
		t.Errorf("ready in between: %v", err)
	}
	c.override = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			forbidden(w)
		}
	}
	if err := api.Promote(t.Context(), "n2"); KindOf(err) != KindRole || Retryable(err) {
		t.Errorf("ready and forbidden: kind %q, %v", KindOf(err), err)
	}
}
