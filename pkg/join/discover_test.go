// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/pki"
)

// discoverAt runs Discover without its patience with new tokens.
func discoverAt(ctx context.Context, target Target) (*Cluster, error) {
	d, err := newDiscovery(target)
	if err != nil {
		return nil, err
	}
	d.patience = 0
	return d.run(ctx)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestDiscover(t *testing.T) {
	c := newCluster(t)
	tok := testToken(t)
	own, err := Parse("a-text-that-somebody-chose")
	if err != nil {
		t.Fatal(err)
	}
	withHash := tok
	withHash.CAHash = c.caHash
	for name, tt := range map[string]struct {
		token   Token
		warning bool
	}{
		"with CA hash": {withHash, false}, "without": {tok, true}, "operator's own": {own, true},
	} {
		t.Run(name, func(t *testing.T) {
			c.admit(t, tt.token, GroupBootstrapAgents)
			var log bytes.Buffer
			got, err := Discover(t.Context(), Target{Server: c.address, Token: tt.token, Role: Agent, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			ca, err := os.ReadFile(c.pki.CertFile(pki.ServerCA))
			if err != nil {
				t.Fatal(err)
			}
			if got.URL != "https://"+c.address || !bytes.Equal(got.CA, ca) || got.Version != "v1.37.2" || got.Clock.Abs() > time.Second {
				t.Errorf("%+v", got)
			}
			if warned := strings.Contains(log.String(), "level=WARN"); warned != tt.warning {
				t.Errorf("log: %s", log.String())
			}
			if strings.Contains(log.String(), tt.token.Secret) {
				t.Error("the secret is in the log")
			}
		})
	}
}

// TestDiscoverErrors: each has its own message, and nothing secret goes to a server that is not the token's.
func TestDiscoverErrors(t *testing.T) {
	const correct = ": correct the address or port of --server"
	type target struct {
		c    *testCluster
		tok  Token
		role Role
		own  string // version
	}
	for name, tt := range map[string]struct {
		prepare func(t *testing.T, x *target)
		kind    Kind
		retry   bool
		want    string // with ADDRESS, ID, TIME
		secret  bool   // may be sent: the server is verified
	}{
		"wrong CA": {
			prepare: func(t *testing.T, x *target) { x.tok.CAHash = testHash }, kind: KindCA,
			want: "the token belongs to another cluster, or to this one before its CAs were changed: it is for the CA fedcba987654, and ADDRESS has HASH; take a token that was made in this cluster now (kedge token create), or correct --server",
		},
		"right CA, other server": {
			// It has copied cluster-info, which is public, but cannot have the key.
			prepare: func(t *testing.T, x *target) {
				other := newCluster(t)
				x.c.set(func() { x.c.info = other.info })
				x.tok.CAHash = other.caHash
			}, kind: KindCA,
			want: "the certificate of ADDRESS is not of the cluster that the token belongs to: another machine answers, or something in between opens the encryption (a proxy); nothing secret was sent to it",
		},
		"a CA added to the right one": {
			prepare: func(t *testing.T, x *target) {
				other := newCluster(t)
				mine, err := os.ReadFile(x.c.pki.CertFile(pki.ServerCA))
				if err != nil {
					t.Fatal(err)
				}
				theirs, err := os.ReadFile(other.pki.CertFile(pki.ServerCA))
				if err != nil {
					t.Fatal(err)
				}
				x.c.set(func() { x.c.info["kubeconfig"] = kubeconfigOf(append(mine, theirs...)) })
				x.tok.CAHash = other.caHash
			}, kind: KindCA,
			want: "the certificate of ADDRESS is not of the cluster that the token belongs to: another machine answers, or something in between opens the encryption (a proxy); nothing secret was sent to it",
		},
		"signed, then changed": {
			prepare: func(t *testing.T, x *target) {
				x.tok.CAHash = ""
				x.c.set(func() { x.c.info["kubeconfig"] += "# x\n" })
			}, kind: KindToken,
			want: "ADDRESS cannot prove that it knows the secret of token ID: the token was mistyped or is an old one, or another machine answers in the server's place; a token with a CA hash (kedge token create) tells these apart",
		},
		"expired or revoked": {
			prepare: func(t *testing.T, x *target) {
				x.c.set(func() { clear(x.c.tokens); delete(x.c.info, "jws-kubeconfig-"+x.tok.ID) })
			},
			kind: KindToken, secret: true,
			want: "the cluster at ADDRESS does not know token ID: it has expired or was revoked, or is another cluster's; make another with `kedge token create`",
		},
		"expired or revoked, no CA hash": {
			prepare: func(t *testing.T, x *target) {
				x.tok = testToken(t)
			}, kind: KindToken,
			want: "the cluster at ADDRESS does not know token ID: it has expired or was revoked, or is another cluster's; make another with `kedge token create`",
		},
		"mistyped": {
			prepare: func(t *testing.T, x *target) { x.tok.Secret = testSecret }, kind: KindToken, secret: true,
			want: "the secret of token ID is not the one that the cluster at ADDRESS knows: it was mistyped; copy the token again",
		},
		"mistyped, no CA hash": {
			prepare: func(t *testing.T, x *target) { x.tok.Secret, x.tok.CAHash = testSecret, "" }, kind: KindToken,
			want: "ADDRESS cannot prove that it knows the secret of token ID: the token was mistyped or is an old one, or another machine answers in the server's place; a token with a CA hash (kedge token create) tells these apart",
		},
		"own token not taken up": {
			prepare: func(t *testing.T, x *target) { x.tok = Token{ID: testID, Secret: testSecret, Derived: true} }, kind: KindNotReady, retry: true,
			want: "the cluster at ADDRESS does not know this machine's --token: its servers were started without it or with another text, or are about to take it up; the text must be the same on all machines",
		},
		"nothing signed yet": {
			prepare: func(t *testing.T, x *target) {
				x.tok.CAHash = ""
				x.c.set(func() { delete(x.c.info, "jws-kubeconfig-"+x.tok.ID) })
			}, kind: KindNotReady, retry: true,
			want: "the cluster at ADDRESS knows no token yet: a new cluster does so in a moment; an older one has none that is still valid (kedge token list)",
		},
		"agent's token for a server": {
			prepare: func(t *testing.T, x *target) { x.role = Server }, kind: KindRole, secret: true,
			want: "token ID is for joining an agent, and this machine is to become a server: make one with `kedge token create --role server`",
		},
		"kubeadm's token": {
			prepare: func(t *testing.T, x *target) { x.c.admit(t, x.tok, "system:bootstrappers:kubeadm:default-node-token") }, kind: KindRole, secret: true,
			want: "token ID is a bootstrap token of the cluster, but not for joining machines to Kedge: make one with `kedge token create --role agent`",
		},
		"clock behind": {
			prepare: func(t *testing.T, x *target) { x.c.set(func() { x.c.clock = 7 * time.Minute }) }, kind: KindClock, retry: true,
			want: "the clocks are 7m apart: here it is TIME, at ADDRESS it is TIME; set the clock of the machine that is wrong (timedatectl), joining then goes on by itself",
		},
		"clock ahead": {
			prepare: func(t *testing.T, x *target) { x.c.set(func() { x.c.clock = -50 * time.Hour }) }, kind: KindClock, retry: true,
			want: "the clocks are 2d2h apart: here it is TIME, at ADDRESS it is TIME; set the clock of the machine that is wrong (timedatectl), joining then goes on by itself",
		},
		"newer than the cluster": {
			prepare: func(t *testing.T, x *target) { x.own = "v1.38.0" }, kind: KindVersion,
			want: "this Kedge brings Kubernetes v1.38.0, and the cluster runs v1.37.2: an agent must not be newer than the servers, nor older than them by more than three minor versions; install the cluster's version here, or upgrade the cluster first",
		},
		"API starts": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, _ *http.Request) { sendStatus(w, 500, "etcd\nis away") }
			},
			kind: KindNotReady, retry: true, want: "the API on ADDRESS is not ready: HTTP 500: etcd",
		},
		"overloaded": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, _ *http.Request) {
					http.Error(w, "Too many requests", http.StatusTooManyRequests)
				}
			},
			kind: KindNotReady, retry: true, want: "the API on ADDRESS is not ready: HTTP 429: Too many requests",
		},
		"no rules yet": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, _ *http.Request) {
					sendStatus(w, 403, `configmaps "cluster-info" is forbidden`)
				}
			},
			kind: KindNotReady, retry: true,
			want: `the cluster at ADDRESS has not got what a joining machine looks for: configmaps "cluster-info" is forbidden; this ends when a new cluster is up, or else it is a Kubernetes, but not Kedge's`,
		},
		"no anonymous requests": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, _ *http.Request) { sendStatus(w, 401, "Unauthorized") }
			},
			kind: KindNotKedge, want: "ADDRESS answers only to those it knows (HTTP 401): it is not Kedge's API, or anonymous requests were switched off on the server",
		},
		"a web server": {
			prepare: func(t *testing.T, x *target) { x.c.override = http.NotFound },
			kind:    KindNotKedge, want: "what answers on ADDRESS is no Kubernetes API (HTTP 404: 404 page not found)" + correct,
		},
		"a web server with a page for everything": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>\x1b[2J"+strings.Repeat("x", 200)) }
			},
			kind: KindNotKedge, want: "what answers on ADDRESS is no Kubernetes API (<html>.[2J" + strings.Repeat("x", 90) + "...)" + correct,
		},
		"a redirect": {
			prepare: func(t *testing.T, x *target) {
				x.c.override = func(w http.ResponseWriter, r *http.Request) {
					http.Redirect(w, r, "https://192.0.2.1/", http.StatusFound)
				}
			},
			kind: KindNotKedge, want: `what answers on ADDRESS is no Kubernetes API (HTTP 302: <a href="https://192.0.2.1/">Found</a>.)` + correct,
		},
		"cluster-info of something else": {
			prepare: func(t *testing.T, x *target) { x.c.set(func() { x.c.info["kubeconfig"] = "clusters: []" }) },
			kind:    KindNotKedge,
			want:    "the ConfigMap cluster-info of ADDRESS cannot be used: its kubeconfig has 0 clusters instead of one; it is a Kubernetes, but not Kedge's, or the ConfigMap was changed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			tok := testToken(t)
			tok.CAHash = c.caHash
			x := &target{c: c, role: Agent, own: "v1.37.2", tok: c.admit(t, tok, GroupBootstrapAgents)}
			tt.prepare(t, x)
			got, err := discoverAt(t.Context(), Target{Server: c.URL, Token: x.tok, Role: x.role, Version: x.own, Log: quiet()})
			if err == nil || got != nil {
				t.Fatalf("got %+v, %v", got, err)
			}
			text := strings.NewReplacer(c.address, "ADDRESS", x.tok.ID, "ID", short(c.caHash), "HASH").Replace(err.Error())
			text = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC`).ReplaceAllString(text, "TIME")
			// The header has whole seconds.
			text = strings.NewReplacer("6m59s", "7m", "7m1s", "7m", "2d1h", "2d2h").Replace(text)
			if text != tt.want || KindOf(err) != tt.kind || Retryable(err) != tt.retry {
				t.Errorf("kind %q, retry %v:\n%s\nwant %q, %v:\n%s", KindOf(err), Retryable(err), text, tt.kind, tt.retry, tt.want)
			}
			if strings.Contains(err.Error(), x.tok.Secret) {
				t.Error("the message shows the secret")
			}
			c.set(func() {
				if !tt.secret && len(c.seen) > 0 {
					t.Errorf("the token went to a server that was not verified")
				}
			})
		})
	}
}

// TestDiscoverCertificate: the server is the right one, and still cannot be talked to.
func TestDiscoverCertificate(t *testing.T) {
	c := newClusterFor(t, pki.Config{NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.7")}}, pki.KubeletServing)
	tok := testToken(t)
	tok.CAHash = c.caHash
	c.admit(t, tok, GroupBootstrapAgents)
	_, err := discoverAt(t.Context(), Target{Server: c.URL, Token: tok, Role: Agent, Log: quiet()})
	want := "the server's certificate is not for the address 127.0.0.1 but for 192.0.2.7, n1: use one of these in --server, or start the server with --tls-san 127.0.0.1"
	if err == nil || err.Error() != want || KindOf(err) != KindSetting || Retryable(err) {
		t.Errorf("got  %v (%s)\nwant %s", err, KindOf(err), want)
	}
}

// TestDiscoverExpired: the server's certificate has ended, or one of the two clocks is so wrong that it seems so.
func TestDiscoverExpired(t *testing.T) {
	c := newCluster(t)
	ca, err := tls.LoadX509KeyPair(c.pki.CertFile(pki.ServerCA), c.pki.KeyFile(pki.ServerCA))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{NotBefore: time.Unix(0, 0), NotAfter: time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, key.Public(), ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	c.TLS.Certificates[0] = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	tok := testToken(t)
	tok.CAHash = c.caHash
	c.admit(t, tok, GroupBootstrapAgents)
	for clock, want := range map[time.Duration]struct {
		kind Kind
		text string
	}{
		0:                          {KindNotReady, "a certificate of ADDRESS is valid from 1970-01-01 00:00:00 UTC to 2020-01-02 03:04:05 UTC, and here it is "},
		-20 * 365 * 24 * time.Hour: {KindClock, "the clocks are "},
	} {
		c.set(func() { c.clock = clock })
		_, err := discoverAt(t.Context(), Target{Server: c.URL, Token: tok, Role: Agent, Log: quiet()})
		if err == nil || KindOf(err) != want.kind || !Retryable(err) || !strings.HasPrefix(strings.ReplaceAll(err.Error(), c.address, "ADDRESS"), want.text) {
			t.Errorf("%s: %v", clock, err)
		}
	}
}

// TestDiscoverUnreachable makes the failures with real sockets where the machine has them, and in the dialler elsewhere.
func TestDiscoverUnreachable(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	listen := func(serve func(net.Conn)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				serve(conn)
				conn.Close()
			}
		}()
		return l.Addr().String()
	}
	ssh := listen(func(c net.Conn) {
		_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n")
		_, _ = io.ReadAll(c)
	})
	mute := listen(func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) })
	failing := func(err error) DialFunc {
		return func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}
		}
	}
	const port = "is `kedge server` running there (`kedge status` says so), and is this the right address and port?"
	for name, tt := range map[string]struct {
		address string
		dial    DialFunc
		kind    Kind
		want    string
	}{
		"closed":   {closed.Addr().String(), nil, KindUnreachable, "nothing listens on ADDRESS (connection refused): " + port},
		"http":     {plain.Listener.Addr().String(), nil, KindNotKedge, "what listens on ADDRESS does not speak TLS as a Kubernetes API does: correct the address or port of --server"},
		"ssh":      {ssh, nil, KindNotKedge, "what listens on ADDRESS does not speak TLS as a Kubernetes API does: correct the address or port of --server"},
		"mute":     {mute, nil, KindUnreachable, "ADDRESS closed the connection without an answer: is it starting or stopping, or does something in between (a proxy, a firewall) cut it?"},
		"no route": {"192.0.2.1:6443", failing(syscall.EHOSTUNREACH), KindUnreachable, "there is no way to ADDRESS (no route to host): is the machine on, and are cable, address and routes right? `ip route get` shows the way taken"},
		"no net":   {"192.0.2.1:6443", failing(syscall.ENETUNREACH), KindUnreachable, "there is no way to ADDRESS (network is unreachable): is the machine on, and are cable, address and routes right? `ip route get` shows the way taken"},
		"dropped":  {"192.0.2.1:6443", failing(syscall.ETIMEDOUT), KindUnreachable, "no answer from ADDRESS: is the machine on, and does no firewall between here and there drop TCP to this port? " + port},
		"other":    {"192.0.2.1:6443", failing(syscall.EADDRNOTAVAIL), KindUnreachable, "the connection to ADDRESS failed: cannot assign requested address"},
		"name": {"nowhere.invalid:6443", func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "nowhere.invalid", IsNotFound: true}}
		}, KindUnreachable, "the name nowhere.invalid cannot be resolved (no such host): use an IP address in --server, or add the name to the DNS or to /etc/hosts"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Discover(t.Context(), Target{Server: tt.address, Token: Token{ID: testID, Secret: testSecret}, Role: Agent, Dial: tt.dial, Log: quiet()})
			if err == nil {
				t.Fatal("no error")
			}
			if text := strings.ReplaceAll(err.Error(), tt.address, "ADDRESS"); text != tt.want || KindOf(err) != tt.kind || Retryable(err) != (tt.kind == KindUnreachable) {
				t.Errorf("kind %q, retry %v:\n%s\nwant %q:\n%s", KindOf(err), Retryable(err), text, tt.kind, tt.want)
			}
		})
	}
}

// TestDiscoverFreshToken: the token is made while the machine tries it.
func TestDiscoverFreshToken(t *testing.T) {
	for _, withHash := range []bool{true, false} {
		c := newCluster(t)
		c.admit(t, testToken(t), GroupBootstrapAgents) // an older one
		tok := testToken(t)
		if withHash {
			tok.CAHash = c.caHash
		}
		time.AfterFunc(200*time.Millisecond, func() { c.admit(t, tok, GroupBootstrapAgents) })
		if _, err := Discover(t.Context(), Target{Server: c.URL, Token: tok, Role: Agent, Log: quiet()}); err != nil {
			t.Errorf("with hash %v: %v", withHash, err)
		}
	}
}

// TestDiscoverSilent: a server that accepts connections and says nothing does not hold a joiner for longer than its context.
func TestDiscoverSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // its backlog takes connections that nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newCluster(t) // its TLS works
	c.override = func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for name, address := range map[string]string{"nobody accepts": l.Addr().String(), "no answer": c.address} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err = Discover(ctx, Target{Server: address, Token: Token{ID: testID, Secret: testSecret}, Role: Agent, Log: quiet()})
		want := address + " takes connections and does not answer: it hangs or is overloaded, its datastore has no majority, or the network was cut just now; `kedge status` there says more"
		if err == nil || KindOf(err) != KindNotReady || !Retryable(err) || err.Error() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckVersions(t *testing.T) {
	for _, tt := range []struct {
		role         Role
		own, cluster string
		ok           bool
	}{
		{Agent, "v1.37.2", "v1.37.2", true},
		{Agent, "v1.37.9", "v1.37.2", true}, // patches do not matter
		{Agent, "v1.34.0", "v1.37.2", true},
		{Agent, "v1.33.0", "v1.37.2", false},
		{Agent, "v1.38.0", "v1.37.2", false},
		{Agent, "v1.38.0-rc.1", "v1.37.2", false},
		{Agent, "v1.37.2+kedge1", "v1.37.2", true},
		{Agent, "v2.0.0", "v1.37.2", false},
		{Server, "v1.37.2", "v1.37.2", true},
		{Server, "v1.38.0", "v1.37.2", true},
		{Server, "v1.36.0", "v1.37.2", true},
		{Server, "v1.35.0", "v1.37.2", false},
		{Server, "v1.39.0", "v1.37.2", false},
		{Server, "v0.0.0-master+$Format:%H$", "v1.37.2", true}, // development builds do not know theirs
		{Agent, "v1.37.2", "", true},
	} {
		if err := checkVersions(tt.role, tt.own, tt.cluster); (err == nil) != tt.ok || err != nil && KindOf(err) != KindVersion {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

// TestDocumented: every kind of error is explained in docs/tokens.md, by the beginning of its message.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/tokens.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, phrase := range []string{
		"nothing listens on", "no answer from", "there is no way to", "cannot be resolved", "closed the connection without an answer", "takes connections and does not answer", "does not speak TLS", "is no Kubernetes API",
		"is not ready", "has not got what a joining machine looks for", "the token belongs to another cluster", "is not of the cluster that the token belongs to",
		"cannot prove that it knows the secret", "does not know token", "is not the one that the cluster at", "does not know this machine's --token", "knows no token yet",
		"is for joining an agent", "the clocks are", "this Kedge brings Kubernetes", "certificate is not for the address", "in the cluster, and it must be the same on all machines",
		"the token cannot be used:", "nobody has approved or signed",
	} {
		if !bytes.Contains(doc, []byte(phrase)) {
			t.Errorf("not in docs/tokens.md: %q", phrase)
		}
	}
}
