// SPDX-License-Identifier: Apache-2.0

package token

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

var caHash = strings.Repeat("fedcba9876543210", 4)

// newCluster has the objects, and this machine has 192.0.2.2.
func newCluster(objects ...runtime.Object) (*cluster, *fake.Clientset) {
	api := fake.NewClientset(objects...)
	return &cluster{api: api, url: "https://127.0.0.1:6443", caHash: caHash, local: func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(192, 0, 2, 2), Mask: net.CIDRMask(24, 32)}}, nil
	}}, api
}

func servers(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: join.ConfigMapServers}, Data: data}
}

// object of a token that was made an hour ago.
func object(id string, role join.Role, ttl time.Duration, description string) *corev1.Secret {
	s := join.Token{ID: id, Secret: "0123456789abcdef"}.Object(role, ttl, description)
	s.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
	return s
}

func tokensIn(t *testing.T, api *fake.Clientset) map[string]join.Info {
	t.Helper()
	list, err := api.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]join.Info{}
	for _, s := range list.Items {
		i, err := join.FromSecret(&s)
		if err != nil {
			t.Fatal(err)
		}
		all[i.Token.ID] = i
	}
	return all
}

func TestCreate(t *testing.T) {
	want := func(what, until, hint, role, url string) string {
		argument := map[string]string{"agent": "", "server": " server"}[role]
		return "# To join " + what + ", type one of these on the new machine, in a shell of root. The token is valid " + until + ".\n" + hint +
			"# With install.sh, as a service; the token goes into /etc/kedge/token, which only root reads:\n" +
			"KEDGE_URL=" + url + " KEDGE_TOKEN=TOKEN sh install.sh" + argument + "\n" +
			"# The program alone, for as long as it runs:\nkedge " + role + " --server " + url + " --token TOKEN\n"
	}
	three := servers(map[string]string{"n1": `{"address":"192.0.2.1:6443"}`, "n2": `{"address":"192.0.2.2:6443","etcd":true}`, "n3": `{"address":"192.0.2.3:6443"}`})
	for name, tt := range map[string]struct {
		servers runtime.Object
		role    join.Role
		ttl     time.Duration
		bare    bool
		want    string // with TOKEN, ID, TIME
	}{
		"agent": {three, join.Agent, 24 * time.Hour, false,
			want("an agent", "until TIME (24h)", "", "agent", "https://192.0.2.2:6443")},
		"server for ever": {three, join.Server, 0, false,
			want("a server", "for ever (--ttl 0), until somebody runs `kedge token delete ID`", "", "server", "https://192.0.2.2:6443")},
		"another machine's address": {servers(map[string]string{"a": "broken", "b": `{}`, "n3": `{"address":"192.0.2.3:6443"}`, "n4": `{"address":"192.0.2.4:6443"}`}), join.Agent, time.Hour, false,
			want("an agent", "until TIME (60m)", "", "agent", "https://192.0.2.3:6443")},
		"floating address": {&corev1.List{Items: []runtime.RawExtension{{Object: three}, {Object: &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: join.ConfigMapCluster}, Data: map[string]string{join.KeyCluster: `{"api-vip":["192.0.2.100"]}`},
		}}}}, join.Agent, time.Hour, false,
			want("an agent", "until TIME (60m)", "", "agent", "https://192.0.2.100:6443")},
		"no address": {nil, join.Agent, time.Hour, false,
			want("an agent", "until TIME (60m)", "# No server has registered its address yet: put in that of this one.\n", "agent", "https://ADDRESS:6443")},
		"not registered yet": {&discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes"},
			Endpoints:  []discoveryv1.Endpoint{{Addresses: []string{"192.0.2.1"}}, {Addresses: []string{"192.0.2.2"}}}, Ports: []discoveryv1.EndpointPort{{Port: new(int32(7000))}},
		}, join.Agent, time.Hour, false,
			want("an agent", "until TIME (60m)", "", "agent", "https://192.0.2.2:7000")},
		"bare": {nil, join.Agent, time.Hour, true, "TOKEN\n"},
	} {
		t.Run(name, func(t *testing.T) {
			cl, api := newCluster()
			if tt.servers != nil {
				cl, api = newCluster(tt.servers)
			}
			var out bytes.Buffer
			if err := cl.create(t.Context(), &out, join.Info{Role: tt.role, Description: "shed"}, tt.ttl, tt.bare); err != nil {
				t.Fatal(err)
			}
			text := regexp.MustCompile(`[a-z0-9]{6}\.[a-z0-9]{16}\.[0-9a-f]{64}`).FindString(out.String())
			tok, err := join.Parse(text)
			if err != nil {
				t.Fatalf("%v in %s", err, out.String())
			}
			if tok.CAHash != caHash {
				t.Error("another CA hash")
			}
			got := strings.ReplaceAll(strings.ReplaceAll(out.String(), text, "TOKEN"), tok.ID, "ID")
			got = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d UTC`).ReplaceAllString(got, "TIME")
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			i := tokensIn(t, api)[tok.ID]
			if i.Role != tt.role || i.Description != "shed" || i.Token.Bearer() != tok.Bearer() || i.Expires.IsZero() != (tt.ttl == 0) {
				t.Errorf("%+v", i)
			}
		})
	}
}

// TestCreateFails: no token is made that nobody gets to see.
func TestCreateFails(t *testing.T) {
	cl, api := newCluster()
	api.PrependReactor("get", "configmaps", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	err := cl.create(t.Context(), io.Discard, join.Info{Role: join.Agent}, time.Hour, false)
	want := "find the servers' addresses: the API does not answer at https://127.0.0.1:6443; `kedge status` on a server says why: connection refused"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if n := len(tokensIn(t, api)); n != 0 {
		t.Errorf("%d tokens", n)
	}
	cl, api = newCluster()
	api.PrependReactor("create", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "x", errors.New("no"))
	})
	if err := cl.create(t.Context(), io.Discard, join.Info{Role: join.Agent}, time.Hour, true); !apierrors.IsForbidden(err) || !strings.HasPrefix(err.Error(), "create a token: ") {
		t.Error(err)
	}
}

func TestWriteList(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	soon, past := now.Add(5*time.Hour), now.Add(-time.Second)
	entries := []entry{
		{ID: "aaaaaa", Role: "agent", Expires: &soon, Description: "shed"}, {ID: "bbbbbb", Role: "server", FromOption: true},
		{ID: "cccccc", Role: "other", Expires: &past, Description: "kubeadm"},
	}
	for format, want := range map[string]string{
		"text": `ID       ROLE     EXPIRES IN   DESCRIPTION
aaaaaa   agent    5h           shed
bbbbbb   server   never        (from an option of the servers)
cccccc   other    expired      kubeadm
`,
		"json": `[
  {
    "id": "aaaaaa",
    "role": "agent",
    "expires": "2026-11-22T17:00:00Z",
    "description": "shed"
  },
  {
    "id": "bbbbbb",
    "role": "server",
    "fromOption": true
  },
  {
    "id": "cccccc",
    "role": "other",
    "expires": "2026-11-22T11:59:59Z",
    "description": "kubeadm"
  }
]
`,
	} {
		var out bytes.Buffer
		if err := output.Write(&out, format, entries, func(w io.Writer) error { return writeList(w, entries, now) }); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
}

func TestList(t *testing.T) {
	foreign := object("cccccc", join.Agent, 0, "kubeadm")
	foreign.Data["auth-extra-groups"] = []byte("system:bootstrappers:kubeadm:default-node-token")
	broken := object("dddddd", join.Agent, 0, "")
	broken.Data["token-secret"] = []byte("x")
	cl, _ := newCluster(object("bbbbbb", join.Agent, time.Hour, "shed"), object("aaaaaa", join.Server, 0, ""), foreign, broken)
	var out, problems bytes.Buffer
	if err := cl.list(t.Context(), &out, &problems, "json"); err != nil {
		t.Fatal(err)
	}
	var got []entry
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	var short []string
	for _, e := range got {
		short = append(short, e.Role+" "+e.ID)
	}
	if diff := cmp.Diff([]string{"agent bbbbbb", "other cccccc", "server aaaaaa"}, short); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if strings.Contains(out.String(), "0123456789abcdef") {
		t.Error("the list shows a secret")
	}
	if want := "kedge: the Secret kube-system/bootstrap-token-dddddd is no bootstrap token: its token-secret is not 16 characters of 0-9 and a-z\n"; problems.String() != want {
		t.Error(problems.String())
	}
	cl, _ = newCluster()
	out.Reset()
	if err := cl.list(t.Context(), &out, &problems, "json"); err != nil || out.String() != "[]\n" {
		t.Error(out.String(), err)
	}
	out.Reset()
	if err := cl.list(t.Context(), &out, &problems, "text"); err != nil || out.String() != "There are no tokens: no machine can join. `kedge token create` makes one.\n" {
		t.Error(out.String(), err)
	}
}

func TestDelete(t *testing.T) {
	own, err := join.Parse("a-text-of-my-own")
	if err != nil {
		t.Fatal(err)
	}
	broken := object("dddddd", join.Agent, 0, "")
	broken.Data["expiration"] = []byte("x")
	cl, api := newCluster(object("aaaaaa", join.Agent, 0, ""), object("bbbbbb", join.Agent, 0, ""), object("cccccc", join.Agent, 0, ""), own.Object(join.Server, 0, ""), broken)
	var out bytes.Buffer
	err = cl.delete(t.Context(), &out, []string{"aaaaaa", "zzzzzz", "bbbbbb.0123456789abcdef." + caHash, "A", "a-text-of-my-own", "dddddd"})
	wantErr := "there is no token zzzzzz in the cluster: it has expired or was deleted, or is another cluster's (`kedge token list` shows all)\n" +
		"neither the ID of a token (`kedge token list` shows them) nor a token: the token cannot be used: it has 1 characters; one of your own has 12 to 512 and no dot, one from `kedge token create` has dots"
	if err == nil || err.Error() != wantErr {
		t.Errorf("got  %v\nwant %s", err, wantErr)
	}
	want := "token aaaaaa deleted\ntoken bbbbbb deleted\ntoken " + own.ID + " deleted; it comes from an option of the servers, and the next start of one brings it back unless the option is changed on all of them\ntoken dddddd deleted\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if left := tokensIn(t, api); len(left) != 1 || left["cccccc"].Role == "" {
		t.Errorf("%v", left)
	}
}

func TestRotate(t *testing.T) {
	for name, tt := range map[string]struct {
		old, ttl, want time.Duration
	}{
		"same time":         {47 * time.Hour, -1, 48 * time.Hour}, // from its creation, an hour ago
		"never expires":     {0, -1, 0},
		"another time":      {0, time.Hour, time.Hour},
		"never from now on": {time.Hour, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			cl, api := newCluster(object("aaaaaa", join.Server, tt.old, "shed"), object("bbbbbb", join.Agent, 0, ""))
			var out bytes.Buffer
			if err := cl.rotate(t.Context(), &out, "aaaaaa", tt.ttl, true); err != nil {
				t.Fatal(err)
			}
			tok, err := join.Parse(out.String())
			if err != nil {
				t.Fatal(err)
			}
			left := tokensIn(t, api)
			i, ok := left[tok.ID]
			if !ok || len(left) != 2 || i.Role != join.Server || i.Description != "shed" || left["bbbbbb"].Role == "" {
				t.Errorf("%+v", left)
			}
			got := time.Duration(0)
			if !i.Expires.IsZero() {
				got = time.Until(i.Expires)
			}
			if (got - tt.want).Abs() > time.Minute {
				t.Errorf("for %s", got)
			}
		})
	}
}

func TestRotateFails(t *testing.T) {
	own := join.Token{ID: "cccccc", Secret: "0123456789abcdef", Derived: true}.Object(join.Agent, 0, "")
	foreign := object("dddddd", join.Agent, 0, "")
	delete(foreign.Data, "auth-extra-groups")
	cl, api := newCluster(object("aaaaaa", join.Agent, 0, ""), own, foreign)
	for arg, want := range map[string]string{
		"cccccc": "token cccccc comes from an option of the servers (token or token-file): change it there on all servers and restart them",
		"dddddd": "token dddddd is not for joining machines to Kedge, something else made it: it can be deleted, not rotated",
		"zzzzzz": "there is no token zzzzzz in the cluster: it has expired or was deleted, or is another cluster's (`kedge token list` shows all)",
	} {
		if err := cl.rotate(t.Context(), io.Discard, arg, -1, true); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	api.PrependReactor("delete", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	var out bytes.Buffer
	err := cl.rotate(t.Context(), &out, "aaaaaa", -1, true)
	want := "the new token is valid, and so is the old one still; run `kedge token delete aaaaaa`: delete the old token: "
	if err == nil || !strings.HasPrefix(err.Error(), want) || out.Len() == 0 {
		t.Error(err)
	}
}

func TestInspect(t *testing.T) {
	foreign := object("dddddd", join.Agent, 0, "")
	delete(foreign.Data, "auth-extra-groups")
	objects := []runtime.Object{object("aaaaaa", join.Server, 25*time.Hour, "shed"), object("bbbbbb", join.Agent, -time.Second, ""), foreign}
	const secret = "0123456789abcdef"
	down := "read token aaaaaa: the API does not answer at https://127.0.0.1:6443; `kedge status` on a server says why: connection refused"
	for name, tt := range map[string]struct {
		token join.Token
		down  bool
		out   string
		err   string
	}{
		"valid": {join.Token{ID: "aaaaaa", Secret: secret, CAHash: caHash}, false,
			"ID            aaaaaa\nkind          made by `kedge token create`\nCA hash       sha256:" + caHash + "\ncluster       this one (https://127.0.0.1:6443)\nrole          server\nexpires in    24h\ndescription   shed\n", ""},
		"API down": {join.Token{ID: "aaaaaa", Secret: secret, CAHash: caHash}, true,
			"ID         aaaaaa\nkind       made by `kedge token create`\nCA hash    sha256:" + caHash + "\ncluster    this one (https://127.0.0.1:6443)\nvalidity   unknown: " + down + "\n", ""},
		"another cluster's": {join.Token{ID: "aaaaaa", Secret: secret, CAHash: strings.Repeat("0", 64)}, false,
			"ID        aaaaaa\nkind      made by `kedge token create`\nCA hash   sha256:" + strings.Repeat("0", 64) + "\ncluster   another one: the CA hash here is sha256:" + caHash + "\n",
			"the token is for another cluster than https://127.0.0.1:6443"},
		"mistyped": {join.Token{ID: "aaaaaa", Secret: "x" + secret[1:]}, false,
			"ID            aaaaaa\nkind          a bootstrap token without a CA hash\nCA hash       none: joiners recognise the cluster by its knowledge of the token\nrole          server\nexpires in    24h\ndescription   shed\n",
			"the cluster has a token aaaaaa, but with another secret: this one was mistyped, or is an old one"},
		"expired": {join.Token{ID: "bbbbbb", Secret: secret, Derived: true}, false,
			"ID           bbbbbb\nkind         a text of your own; ID and secret are derived from it\nCA hash      none: joiners recognise the cluster by its knowledge of the token\nrole         agent\nexpires in   expired\n",
			"token bbbbbb has expired; make another with `kedge token create`"},
		"other": {join.Token{ID: "dddddd", Secret: secret}, false,
			"ID           dddddd\nkind         a bootstrap token without a CA hash\nCA hash      none: joiners recognise the cluster by its knowledge of the token\nrole         other\nexpires in   never\n",
			"token dddddd is not for joining machines to Kedge; something else made it"},
	} {
		t.Run(name, func(t *testing.T) {
			cl, api := newCluster(objects...)
			if tt.down {
				api.PrependReactor("get", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
					return true, nil, errors.New("connection refused")
				})
			}
			var out bytes.Buffer
			err := inspect(t.Context(), &out, tt.token, cl, nil)
			if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
				t.Errorf("got  %v\nwant %s", err, tt.err)
			}
			if diff := cmp.Diff(tt.out, out.String()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestParseTTL(t *testing.T) {
	for text, want := range map[string]time.Duration{"24h": 24 * time.Hour, "30m": 30 * time.Minute, "0": 0, "7d": 168 * time.Hour, "1h30m": 90 * time.Minute} {
		if got, err := parseTTL(text); got != want || err != nil {
			t.Errorf("%s: %s %v", text, got, err)
		}
	}
	for _, text := range []string{"", "x", "-1h", "24", "d", "-1d", "1.5d", "99999d"} {
		if _, err := parseTTL(text); err == nil || !strings.Contains(err.Error(), "is no time: write 30m, 24h or 7d, or 0") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// run is the command line.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	app := &cli.App{Name: "kedge", Commands: []*cli.Command{Command()}, Writer: &out, ErrWriter: &out, ExitErrHandler: func(*cli.Context, error) {}}
	err := app.RunContext(t.Context(), append([]string{"kedge", "token"}, args...))
	return out.String(), err
}

// TestCommand goes through the flags to the kubeconfig that a server writes; its API is off.
func TestCommand(t *testing.T) {
	dir := t.TempDir()
	kubeconfig, missing, damaged := filepath.Join(dir, "kubeconfig.yaml"), filepath.Join(dir, "missing"), filepath.Join(dir, "damaged")
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := closed.Addr().(*net.TCPAddr).Port
	closed.Close()
	p, err := pki.Ensure(t.Context(), pki.Config{Dir: filepath.Join(dir, "pki"), NodeName: "n1", APIPort: port, AdminKubeconfigPath: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(damaged, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	noAnswer := "the API does not answer at " + regexp.QuoteMeta("https://"+closed.Addr().String()) + "; `kedge status` on a server says why: .*connection refused"
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"list", "--kubeconfig", missing}, "^there is no .*missing: tokens are managed on a server of the cluster, after its first start; elsewhere give an administrator's kubeconfig with --kubeconfig$"},
		{[]string{"list", "--kubeconfig", damaged}, "^kubeconfig: "},
		{[]string{"list", "--kubeconfig", kubeconfig}, "^list the tokens: " + noAnswer},
		{[]string{"create", "--kubeconfig", kubeconfig}, "^find the servers' addresses: " + noAnswer},
		{[]string{"create", "--print-token", "--kubeconfig", kubeconfig}, "^create a token: " + noAnswer},
		{[]string{"delete", "--kubeconfig", kubeconfig, "aaaaaa"}, "^read token aaaaaa: " + noAnswer},
		{[]string{"rotate", "--kubeconfig", kubeconfig, "aaaaaa"}, "^read token aaaaaa: " + noAnswer},
		{[]string{"create", "--role", "worker", "--kubeconfig", kubeconfig}, `^--role: "worker" is no role: server or agent$`},
		{[]string{"create", "--ttl", "soon", "--kubeconfig", kubeconfig}, `^--ttl "soon" is no time`},
		{[]string{"rotate", "--ttl", "soon", "--kubeconfig", kubeconfig, "aaaaaa"}, `^--ttl "soon" is no time`},
		{[]string{"create", "server"}, "^unexpected argument: only flags are accepted; see `kedge token create --help`$"},
		{[]string{"delete"}, `^usage: kedge token delete \[flags\] ID\|TOKEN\.\.\.$`},
		{[]string{"rotate", "aaaaaa", "bbbbbb"}, `^usage: kedge token rotate \[flags\] ID\|TOKEN$`},
		{[]string{"delete", "aaaaaa", "--kubeconfig", "x"}, "^--kubeconfig stands behind an argument: flags come first$"},
		{[]string{"inspect", "--kubeconfig", kubeconfig, "abc"}, "^the token cannot be used: it has 3 characters"},
	} {
		out, err := run(t, tt.args...)
		if err == nil || !regexp.MustCompile(tt.want).MatchString(err.Error()) {
			t.Errorf("%q: got %v\nwant %s\n%s", tt.args, err, tt.want, out)
		}
	}
	hash := strings.TrimPrefix(p.CAHash(), "sha256:")
	out, err := run(t, "inspect", "--kubeconfig", missing, "aaaaaa.0123456789abcdef."+hash)
	if err != nil || !strings.Contains(out, "CA hash   sha256:"+hash) || !strings.Contains(out, "cluster   not asked: there is no ") || strings.Contains(out, "0123456789abcdef ") {
		t.Errorf("%v\n%s", err, out)
	}
	out, err = run(t, "inspect", "--kubeconfig", kubeconfig, "aaaaaa.0123456789abcdef."+hash)
	if err != nil || !strings.Contains(out, "this one (https://") || !strings.Contains(out, "validity   unknown: ") {
		t.Errorf("%v\n%s", err, out)
	}
}
