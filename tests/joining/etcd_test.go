// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"context"
	"crypto"
	"fmt"
	"path"
	"strings"
	"testing"
	"time"

	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const credentials = "/etc/etcd"

// TestOperatorsEtcd: the cluster's data is in an etcd of the operator's own, which wants to see a client certificate. Two servers
// are enough then: either may die.
func TestOperatorsEtcd(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 2})
	url := startEtcd(t, c)
	first, second := c.Servers[0], c.Servers[1]
	with := func(name string) []string {
		file := path.Join(credentials, name)
		return []string{"--datastore-endpoint", url, "--datastore-cafile", path.Join(credentials, "server.crt"), "--datastore-certfile", file + ".crt", "--datastore-keyfile", file + ".key"}
	}
	first.Flags = with("stranger")
	cluster.Do(t, first.Run)
	cluster.Eventually(t, "a server with a wrong certificate to say so", func(ctx context.Context) error {
		st, err := first.Status(ctx)
		if err != nil {
			return err
		}
		if err = st.Problems(); err != nil && strings.Contains(err.Error(), url+": remote error: tls") {
			return nil
		}
		return fmt.Errorf("it says: %w", err)
	})
	cluster.Do(t, first.Stop)

	first.Flags, second.Flags = with("client"), with("client")
	cluster.Do(t, c.Start)
	t.Logf("from start to Ready: %v", c.Took)
	for _, s := range c.Servers {
		if st, err := s.Status(cluster.Within(t, minute)); err != nil || st.PIDs()["etcd"] != 0 {
			t.Errorf("%s runs an etcd of its own: %+v, %v", s.Name(), st, err)
		}
	}
	s := second.Session(t)
	cluster.Do(t, first.PowerCut)
	begin := time.Now()
	cluster.Eventually(t, "the other server to take a write", func(ctx context.Context) error {
		return second.Apply(ctx, s.NS, `{apiVersion: v1, kind: ConfigMap, metadata: {name: kept}}`)
	})
	t.Logf("first write %s after the loss of a server", time.Since(begin).Round(100*time.Millisecond))
	s.Apply(cluster.ServerPod, "web", "", "  nodeName: "+second.Name())
	s.Ready("web")
	t.Logf("a new pod is Ready %s after the loss of a server", time.Since(begin).Round(100*time.Millisecond))
	cluster.Do(t, first.Restart, c.WaitReady)
	if _, err := first.Kubectl(cluster.Within(t, minute), "-n", s.NS, "get", "configmap", "kept"); err != nil {
		t.Error(err)
	}
	// The keyring is in the operator's etcd, too: one command changes the key of Secrets on both servers.
	out, err := first.Exec(cluster.Within(t, minute), cluster.Program, "secrets-encrypt", "rotate-key")
	if err != nil || !strings.Contains(out, "all Secrets are stored by key2") {
		t.Errorf("rotate-key: %v\n%s", err, out)
	}
	if out, err := second.Exec(cluster.Within(t, minute), cluster.Program, "secrets-encrypt", "status"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// startEtcd runs a stock etcd in a machine of its own, and gives the servers what they need to reach it: its certificate, one that it
// accepts ("client") and one that it does not ("stranger").
func startEtcd(t *testing.T, c *cluster.Cluster) (url string) {
	t.Helper()
	ctx := cluster.Within(t, 3*minute)
	program, err := cluster.Build(ctx, "go.etcd.io/etcd/server/v3")
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Bed.Machine(ctx, "etcd")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	files["server.crt"], files["server.key"], err = certutil.GenerateSelfSignedCertKey(m.IP(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"client", "stranger"} {
		if files[name+".crt"], files[name+".key"], err = selfSigned(name); err != nil {
			t.Fatal(err)
		}
	}
	for _, machine := range []*testbed.Machine{m, c.Servers[0].Machine, c.Servers[1].Machine} {
		for name, text := range files {
			if err := machine.WriteFile(path.Join(credentials, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	const bin = "/usr/local/bin/etcd"
	if err := m.WriteFile(bin, program, 0o755); err != nil {
		t.Fatal(err)
	}
	url = "https://" + m.IP() + ":2379"
	_, err = m.Spawn(ctx, "/var/log/etcd.log", bin, "--data-dir", "/var/lib/etcd", "--listen-client-urls", url, "--advertise-client-urls", url,
		"--cert-file", path.Join(credentials, "server.crt"), "--key-file", path.Join(credentials, "server.key"),
		"--client-cert-auth", "--trusted-ca-file", path.Join(credentials, "client.crt"))
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// selfSigned makes a client certificate that is its own CA.
func selfSigned(name string) (cert, key []byte, err error) {
	if key, err = keyutil.MakeEllipticPrivateKeyPEM(); err != nil {
		return nil, nil, err
	}
	parsed, err := keyutil.ParsePrivateKeyPEM(key)
	if err != nil {
		return nil, nil, err
	}
	c, err := certutil.NewSelfSignedCACert(certutil.Config{CommonName: name}, parsed.(crypto.Signer))
	if err != nil {
		return nil, nil, err
	}
	cert, err = certutil.EncodeCertificates(c)
	return cert, key, err
}
