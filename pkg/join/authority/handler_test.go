// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	x509request "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
)

// testCA issues certificates as the controller manager's signer does.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t testing.TB, name string) testCA {
	t.Helper()
	key := newKey(t)
	cert, err := certutil.NewSelfSignedCACert(certutil.Config{CommonName: name}, key)
	if err != nil {
		t.Fatal(err)
	}
	return testCA{cert, key}
}

func (ca testCA) pem(t testing.TB) []byte {
	t.Helper()
	b, err := certutil.EncodeCertificates(ca.cert)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (ca testCA) issue(t testing.TB, cn string, orgs []string, usage x509.ExtKeyUsage, life time.Duration) (certPEM, keyPEM []byte) {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn, Organization: orgs},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, err = certutil.EncodeCertificates(cert)
	if err != nil {
		t.Fatal(err)
	}
	if keyPEM, err = keyutil.MarshalPrivateKeyToPEM(key); err != nil {
		t.Fatal(err)
	}
	return certPEM, keyPEM
}

// joinAPI is a server with the handlers behind upstream's authentication by certificate, on a real TLS port.
type joinAPI struct {
	*testing.T
	url             string
	serverCA, ownCA testCA
	members         *fakeMembers
	client          *fake.Clientset
	log             *logged
	prepared        []string
	prepareErr      error
	files           map[string]string
}

// An asserted user stands for those that are not authenticated by certificate: tokens, impersonation, a proxy's headers.
const asserted = "X-Test-Asserted-User"

func newJoinAPI(t *testing.T) *joinAPI {
	t.Helper()
	a := &joinAPI{T: t, serverCA: newCA(t, "server-ca"), ownCA: newCA(t, "client-ca"), members: &fakeMembers{}, client: fake.NewClientset(), log: &logged{}}
	dir := t.TempDir()
	a.files = map[string]string{"server-ca.key": filepath.Join(dir, "server-ca.key"), "client-ca.crt": filepath.Join(dir, "client-ca.crt")}
	for name, content := range map[string][]byte{"server-ca.key": []byte("secret\x00\xff"), "client-ca.crt": a.ownCA.pem(t)} {
		if err := os.WriteFile(a.files[name], content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	handler := NewHandler(Config{
		Files: a.files, ClientCA: a.files["client-ca.crt"], Members: a.members, Client: a.client, Logger: a.log.logger(),
		BeforeJoin: func(_ context.Context, name string) error { a.prepared = append(a.prepared, name); return a.prepareErr },
	})
	roots := x509.NewCertPool()
	roots.AddCert(a.ownCA.cert)
	options := x509request.DefaultVerifyOptions()
	options.Roots = roots
	authenticator := x509request.New(options, x509request.CommonNameUserConversion)
	certPEM, keyPEM := a.serverCA.issue(t, "kube-apiserver", nil, x509.ExtKeyUsageServerAuth, time.Hour)
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		who, ok := authenticated(authenticator, req)
		if ok {
			req = req.WithContext(apirequest.WithUser(req.Context(), who))
		}
		handler.ServeHTTP(w, req)
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert} // as the API server's
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.StartTLS()
	t.Cleanup(server.Close)
	a.url = server.URL
	return a
}

func authenticated(a *x509request.Authenticator, req *http.Request) (user.Info, bool) {
	if name := req.Header.Get(asserted); name != "" {
		u, groups, _ := strings.Cut(name, "|")
		return &user.DefaultInfo{Name: u, Groups: strings.Split(groups, ",")}, true
	}
	response, ok, err := a.AuthenticateRequest(req)
	if !ok || err != nil {
		return nil, false
	}
	return response.User, true
}

// as returns pkg/join's client with a certificate.
func (a *joinAPI) as(ca testCA, cn string, orgs ...string) *join.API {
	a.Helper()
	certPEM, keyPEM := ca.issue(a, cn, orgs, x509.ExtKeyUsageClientAuth, time.Hour)
	api, err := join.NewAPI(&rest.Config{Host: a.url, TLSClientConfig: rest.TLSClientConfig{CAData: a.serverCA.pem(a), CertData: certPEM, KeyData: keyPEM}})
	if err != nil {
		a.Fatal(err)
	}
	return api
}

func (a *joinAPI) server(name string) *join.API {
	return a.as(a.ownCA, join.UserServerPrefix+name, join.GroupServers)
}

func (a *joinAPI) admin() *join.API { return a.as(a.ownCA, "system:admin", "system:masters") }

func TestJoinAsServer(t *testing.T) {
	a, ctx := newJoinAPI(t), t.Context()
	a.members.members = []datastore.Member{{Name: "n1", ID: "1f", PeerURLs: []string{"https://192.0.2.1:2380"}}}
	n2 := a.server("n2")

	files, err := n2.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 2 || !bytes.Equal(files["server-ca.key"], []byte("secret\x00\xff")) || !bytes.Equal(files["client-ca.crt"], a.ownCA.pem(t)) {
		t.Errorf("got %q", files)
	}
	added, err := n2.AddMember(ctx, "n2", "https://192.0.2.2:2380")
	if err != nil {
		t.Fatal(err)
	}
	if added.ID != "c0ffee" || len(added.Members) != 2 || !added.Members[1].Learner || added.Members[0].Learner || added.Members[0].Name != "n1" {
		t.Errorf("got %+v", added)
	}
	if err := n2.Promote(ctx, "n2"); err != nil {
		t.Error(err)
	}
	if members, err := n2.Members(ctx); err != nil || len(members) != 2 || members[1].ID != "c0ffee" {
		t.Errorf("got %v, %v", members, err)
	}
	if calls := a.members.taken(); !slices.Equal(calls, []string{"add n2 https://192.0.2.2:2380", "promote n2"}) {
		t.Errorf("datastore: %q", calls)
	}
	if !slices.Equal(a.prepared, []string{"n2", "n2"}) {
		t.Errorf("prepared for %q", a.prepared)
	}
	servers, err := ListServers(ctx, a.client)
	if want := (Server{PeerURL: "https://192.0.2.2:2380", Etcd: true}); err != nil || len(servers) != 1 || servers["n2"] != want {
		t.Errorf("registry %v, %v", servers, err)
	}
	if err := n2.RemoveMember(ctx, "n2", false); err != nil {
		t.Error(err)
	}
	if servers, err := ListServers(ctx, a.client); err != nil || len(servers) != 0 {
		t.Errorf("registry after the removal: %v, %v", servers, err)
	}
	for _, line := range []string{`msg="handed out the cluster's keys" component=join to=n2 user=system:kedge:server:n2 address=127.0.0.1`,
		`msg="new member of the datastore" component=join name=n2`, `msg="member of the datastore has a vote now"`, `msg="server removed" component=join name=n2 forced=false`} {
		if !strings.Contains(a.log.String(), line) {
			t.Errorf("no line %s in\n%s", line, a.log)
		}
	}
	if strings.Contains(a.log.String(), "secret") {
		t.Error("the log has a key")
	}
}

// TestRejoinedServer: what was noted about an earlier server of the name does not hold for the new one, whose Node is still to come.
func TestRejoinedServer(t *testing.T) {
	a, ctx := newJoinAPI(t), t.Context()
	if err := applyServer(ctx, a.client, "n2", Server{Address: "192.0.2.2:6443", Etcd: true, ControlPlane: true, Node: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.server("n2").AddMember(ctx, "n2", "https://192.0.2.22:2380"); err != nil {
		t.Fatal(err)
	}
	servers, err := ListServers(ctx, a.client)
	if want := (Server{PeerURL: "https://192.0.2.22:2380", Etcd: true}); err != nil || servers["n2"] != want {
		t.Errorf("registry %v, %v", servers, err)
	}
}

func TestWhoMayWhat(t *testing.T) {
	a, ctx := newJoinAPI(t), t.Context()
	if err := PutServer(ctx, a.client, "n9", Server{Address: "192.0.2.9:6443"}); err != nil {
		t.Fatal(err)
	}
	callers := []struct {
		name string
		api  *join.API
		may  string
	}{
		{"server n2", a.server("n2"), "keys members add promote remove"},
		{"server n1", a.server("n1"), "keys members"},
		{"administrator", a.admin(), "members add promote remove"},
		{"agent", a.as(a.ownCA, "system:node:n2", join.GroupNodes), ""},
		{"user called like a server", a.as(a.ownCA, join.UserServerPrefix+"n2", "developers"), ""},
		{"server without a name", a.as(a.ownCA, join.UserServerPrefix, join.GroupServers), ""},
		{"server with a bad name", a.as(a.ownCA, join.UserServerPrefix+"../n2", join.GroupServers), ""},
		{"somebody in the servers' group", a.as(a.ownCA, "jane", join.GroupServers), ""},
		{"another CA's server", a.as(newCA(t, "client-ca"), join.UserServerPrefix+"n2", join.GroupServers), ""},
	}
	for _, c := range callers {
		t.Run(c.name, func(t *testing.T) {
			_, keysErr := c.api.Keys(ctx)
			_, membersErr := c.api.Members(ctx)
			_, addErr := c.api.AddMember(ctx, "n2", "https://192.0.2.2:2380")
			promoteErr, removeErr := c.api.Promote(ctx, "n2"), c.api.RemoveMember(ctx, "n2", false)
			var may []string
			for _, r := range []struct {
				what string
				err  error
			}{{"keys", keysErr}, {"members", membersErr}, {"add", addErr}, {"promote", promoteErr}, {"remove", removeErr}} {
				switch {
				case r.err == nil:
					may = append(may, r.what)
				case !apierrors.IsForbidden(r.err) && !apierrors.IsUnauthorized(r.err):
					t.Errorf("%s: %v", r.what, r.err)
				}
			}
			if got := strings.Join(may, " "); got != c.may {
				t.Errorf("may %q, want %q", got, c.may)
			}
			changes := a.members.taken()
			if !strings.Contains(c.may, "add") && len(changes) > 0 {
				t.Errorf("changed: %q", changes)
			}
		})
	}
	if servers, err := ListServers(ctx, a.client); err != nil || len(servers) != 1 {
		t.Errorf("registry: %v, %v", servers, err)
	}
}

// request makes one without pkg/join's client.
func (a *joinAPI) request(cert *tls.Certificate, method, path, body string, header ...string) (int, metav1.Status) {
	a.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.serverCA.cert)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	if cert != nil {
		transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	req, err := http.NewRequestWithContext(a.Context(), method, a.url+path, strings.NewReader(body))
	if err != nil {
		a.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		a.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		a.Fatal(err)
	}
	var status metav1.Status
	if err := json.Unmarshal(data, &status); err != nil {
		a.Errorf("%s %s: %d %q: %v", method, path, resp.StatusCode, data, err)
	}
	if resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != "application/json" {
		a.Errorf("headers %v", resp.Header)
	}
	return resp.StatusCode, status
}

// TestNoCertificateNoServer: a server is who shows its certificate on this very connection. The API server may have found out in
// other ways who is asking: a token, impersonation, the headers of a proxy.
func TestNoCertificateNoServer(t *testing.T) {
	a := newJoinAPI(t)
	pair := func(certPEM, keyPEM []byte) *tls.Certificate {
		cert, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		return &cert
	}
	name, groups := join.UserServerPrefix+"n2", []string{join.GroupServers}
	certs := map[string]*tls.Certificate{
		"none":            nil,
		"administrator's": pair(a.ownCA.issue(t, "system:admin", []string{"system:masters"}, x509.ExtKeyUsageClientAuth, time.Hour)),
		"another CA's":    pair(newCA(t, "client-ca").issue(t, name, groups, x509.ExtKeyUsageClientAuth, time.Hour)),
		"another server's": pair(a.ownCA.issue(t, join.UserServerPrefix+"n1", groups,
			x509.ExtKeyUsageClientAuth, time.Hour)),
		"without the group": pair(a.ownCA.issue(t, name, nil, x509.ExtKeyUsageClientAuth, time.Hour)),
		"a listener's":      pair(a.ownCA.issue(t, name, groups, x509.ExtKeyUsageServerAuth, time.Hour)),
		"expired":           pair(a.ownCA.issue(t, name, groups, x509.ExtKeyUsageClientAuth, -time.Minute)),
	}
	for what, cert := range certs {
		for _, r := range [][2]string{{"GET", join.PathKeys}, {"GET", join.PathMembers}, {"DELETE", join.PathMembers + "/n2"}} {
			code, status := a.request(cert, r[0], r[1], "", asserted, name+"|"+join.GroupServers)
			if code != http.StatusForbidden || !strings.Contains(status.Message, "its own client certificate") {
				t.Errorf("%s, %s: %d %s", what, r[1], code, status.Message)
			}
		}
	}
	code, status := a.request(certs["none"], "GET", join.PathKeys, "", asserted, "system:admin|system:masters,"+join.GroupServers)
	if code != http.StatusForbidden {
		t.Errorf("administrator: %d %s", code, status.Message)
	}
	if code, status := a.request(nil, "GET", join.PathKeys, ""); code != http.StatusUnauthorized {
		t.Errorf("nobody: %d %s", code, status.Message)
	}
	if len(a.prepared) > 0 || len(a.members.taken()) > 0 {
		t.Error("something was changed")
	}
}

func TestRefusals(t *testing.T) {
	a := newJoinAPI(t)
	admin := []string{asserted, "system:admin|system:masters"}
	members := join.PathMembers
	for _, tt := range []struct {
		method, path, body string
		code               int
		part               string
	}{
		{"POST", join.PathKeys, "", 405, "GET"},
		{"PUT", members, "", 405, "GET POST"},
		{"GET", members + "/n2", "", 405, "DELETE"},
		{"GET", members + "/n2/promote", "", 405, "POST"},
		{"GET", "/kedge/v1/nope", "", 404, "no such path"},
		{"GET", "/", "", 404, "no such path"},
		{"POST", members, "", 400, "not understood"},
		{"POST", members, "{", 400, "not understood"},
		{"POST", members, `{"name":"n2","peerURL":"https://192.0.2.2:2380"} {}`, 400, "behind the JSON"},
		{"POST", members, `{"name":"n2","peerURL":"https://192.0.2.2:2380","learner":false}`, 400, "learner"},
		{"POST", members, `{"name":"N2","peerURL":"https://192.0.2.2:2380"}`, 400, "cannot be a node name"},
		{"POST", members, `{"name":"n2","peerURL":"http://192.0.2.2:2380"}`, 400, "https://HOST:PORT"},
		{"POST", members, `{"name":"n2","peerURL":"https://0.0.0.0:2380"}`, 400, "https://HOST:PORT"},
		{"POST", members, `{"name":"n2","peerURL":"https://u@192.0.2.2:2380/x"}`, 400, "https://HOST:PORT"},
		{"POST", members, `{"name":"n2","peerURL":"` + strings.Repeat("x", maxBody) + `"}`, 413, "larger than"},
		{"POST", members + "/N2/promote", "", 400, "cannot be a node name"},
		{"DELETE", members + "/..%2Fn2", "", 400, "cannot be a node name"},
		{"DELETE", members + "/n2?force=maybe", "", 400, "neither true nor false"},
	} {
		code, status := a.request(nil, tt.method, tt.path, tt.body, admin...)
		if code != tt.code || int(status.Code) != tt.code || status.Kind != "Status" || !strings.Contains(status.Message, tt.part) {
			t.Errorf("%s %s %.60s: %d %+v", tt.method, tt.path, tt.body, code, status)
		}
	}
	if calls := a.members.taken(); len(calls) > 0 {
		t.Errorf("changed: %q", calls)
	}
}

func TestErrorsOfDatastore(t *testing.T) {
	a := newJoinAPI(t)
	admin := []string{asserted, "system:admin|system:masters"}
	add := `{"name":"n2","peerURL":"https://192.0.2.2:2380"}`
	for _, tt := range []struct {
		err    error
		code   int
		reason metav1.StatusReason
	}{
		{datastore.ErrBusy, 409, StatusReasonBusy},
		{datastore.ErrExists, 409, metav1.StatusReasonAlreadyExists},
		{datastore.ErrQuorum, 409, StatusReasonQuorum},
		{datastore.ErrNotReady, 409, StatusReasonNotCaughtUp},
		{datastore.ErrNotMember, 404, metav1.StatusReasonNotFound},
		{datastore.ErrNoLeader, 503, metav1.StatusReasonServiceUnavailable},
		{context.DeadlineExceeded, 504, metav1.StatusReasonTimeout},
		{errors.New("out of order"), 500, metav1.StatusReasonInternalError},
	} {
		a.members.fail(fmt.Errorf("what and why: %w", tt.err))
		for _, r := range [][3]string{{"POST", join.PathMembers, add}, {"POST", join.PathMembers + "/n2/promote", ""}, {"DELETE", join.PathMembers + "/n2", ""}} {
			code, status := a.request(nil, r[0], r[1], r[2], admin...)
			if code != tt.code || status.Reason != tt.reason || !strings.HasPrefix(status.Message, "what and why: ") {
				t.Errorf("%v: %s %s: %d %+v", tt.err, r[0], r[1], code, status)
			}
		}
	}
	if servers, err := ListServers(t.Context(), a.client); err != nil || len(servers) > 0 {
		t.Errorf("registry: %v, %v", servers, err)
	}

	// A server without a datastore is removed from the registry alone.
	if err := PutServer(t.Context(), a.client, "n2", Server{Address: "192.0.2.2:6443"}); err != nil {
		t.Fatal(err)
	}
	a.members.fail(datastore.ErrNotMember)
	if code, status := a.request(nil, "DELETE", join.PathMembers+"/n2", "", admin...); code != 200 {
		t.Errorf("%d %+v", code, status)
	}
	if servers, err := ListServers(t.Context(), a.client); err != nil || len(servers) > 0 {
		t.Errorf("registry: %v, %v", servers, err)
	}
	a.members.fail(nil)
	a.members.taken()
	if code, status := a.request(nil, "DELETE", join.PathMembers+"/n2?force=true", "", admin...); code != 200 || !slices.Equal(a.members.taken(), []string{"remove n2 true"}) {
		t.Errorf("%d %+v", code, status)
	}
}

// TestNotPrepared: nothing is handed out or changed when this server cannot count on others yet, or a file is missing.
func TestNotPrepared(t *testing.T) {
	a, ctx := newJoinAPI(t), t.Context()
	a.prepareErr = errors.New("the lease cannot be taken")
	n2 := a.server("n2")
	_, err := n2.Keys(ctx)
	if !apierrors.IsServiceUnavailable(err) || !strings.Contains(err.Error(), "the lease cannot be taken") {
		t.Errorf("keys: %v", err)
	}
	if _, err = n2.AddMember(ctx, "n2", "https://192.0.2.2:2380"); !apierrors.IsServiceUnavailable(err) || len(a.members.taken()) > 0 {
		t.Errorf("member: %v", err)
	}
	a.prepareErr = nil
	if err := os.Remove(a.files["server-ca.key"]); err != nil {
		t.Fatal(err)
	}
	if files, err := n2.Keys(ctx); !apierrors.IsInternalError(err) || len(files) > 0 {
		t.Errorf("keys: %q, %v", files, err)
	}
}

func TestForeignDatastore(t *testing.T) {
	h := NewHandler(Config{Client: fake.NewClientset(), Logger: slog.New(slog.DiscardHandler)})
	ctx := apirequest.WithUser(t.Context(), &user.DefaultInfo{Name: "system:admin", Groups: []string{"system:masters"}})
	for _, r := range [][2]string{{"GET", join.PathMembers}, {"POST", join.PathMembers + "/n2/promote"}} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, r[0], r[1], nil))
		if want := map[string]int{"GET": 200, "POST": 404}[r[0]]; w.Code != want {
			t.Errorf("%s: %d %s", r[1], w.Code, w.Body)
		}
	}
}

// FuzzHandler: whatever is asked, the answer is JSON; who has proved nothing gets nothing and changes nothing.
func FuzzHandler(f *testing.F) {
	for _, path := range []string{join.PathKeys, join.PathMembers, join.PathMembers + "/n2", join.PathMembers + "/n2/promote", join.PathMembers + "/n2?force=true", "/kedge/v1//", "/"} {
		for _, method := range []string{"GET", "POST", "DELETE", "CONNECT"} {
			f.Add(method, path, `{"name":"n2","peerURL":"https://192.0.2.2:2380"}`, "system:kedge:server:n2", "system:kedge:servers")
			f.Add(method, path, `{}`, "system:admin", "system:masters")
		}
	}
	f.Fuzz(func(t *testing.T, method, target, body, name, group string) {
		members := &fakeMembers{}
		h := NewHandler(Config{
			Files: map[string]string{"x": "/dev/null"}, ClientCA: "/dev/null", Members: members, Client: fake.NewClientset(), Logger: slog.New(slog.DiscardHandler),
		})
		ctx := apirequest.WithUser(t.Context(), &user.DefaultInfo{Name: name, Groups: []string{group}})
		req, err := http.NewRequestWithContext(ctx, method, "https://127.0.0.1"+target, strings.NewReader(body))
		if err != nil {
			t.Skip()
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		redirect := w.Code >= 300 && w.Code < 400 // of net/http, to a clean path
		if !redirect && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%d %q", w.Code, w.Body)
		}
		if group != "system:masters" && (w.Code < 300 || len(members.taken()) > 0) {
			t.Errorf("%q in %q: %d %q", name, group, w.Code, w.Body)
		}
		if strings.Contains(w.Body.String(), `"files"`) {
			t.Errorf("keys for %q in %q", name, group)
		}
	})
}
