// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// gateway is versitygw, an S3 service in front of a directory. It is built from its module, outside of Kedge's.
const gateway = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

const accessKey, secretKey = "kedge-test", "a-secret-of-the-bucket"

// service runs the gateway on the host, where machines reach it.
type service struct {
	root string // a bucket is a directory in it
	url  string
	ca   []byte
}

func startService(t *testing.T, host string) service {
	t.Helper()
	bin := t.TempDir()
	build := exec.CommandContext(cluster.Within(t, 10*minute), "go", "install", gateway)
	build.Dir = bin // not in Kedge's module
	build.Env = append(os.Environ(), "GOBIN="+bin, "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", gateway, err, out)
	}
	s := service{root: t.TempDir()}
	cert, key := filepath.Join(bin, "cert.pem"), filepath.Join(bin, "key.pem")
	s.ca = certificate(t, host, cert, key)
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	s.url = "https://" + address
	if err := os.Mkdir(filepath.Join(s.root, "backup"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "versitygw"), "--port", address, "--cert", cert, "--key", key, "posix", s.root)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+accessKey, "ROOT_SECRET_KEY="+secretKey)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Log(log.String())
		}
	})
	err = testbed.Wait(cluster.Within(t, minute), "the S3 service", func(ctx context.Context) error {
		conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		t.Fatal(err, log.String())
	}
	return s
}

func certificate(t *testing.T, host, certFile, keyFile string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.ParseIP(host)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := errors.Join(os.WriteFile(certFile, cert, 0o600), os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert
}

// useBucket configures a server before its start.
func (m machine) useBucket(s service, retention int) {
	m.t.Helper()
	config := fmt.Sprintf("snapshot-s3-endpoint: %s\nsnapshot-s3-bucket: backup\nsnapshot-s3-folder: home/one\nsnapshot-s3-credentials: /etc/kedge/s3\n"+
		"snapshot-s3-cafile: /etc/kedge/s3.crt\nsnapshot-retention: %d\n", s.url, retention)
	credentials := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", accessKey, secretKey)
	for name, text := range map[string]string{"config.yaml": config, "s3": credentials, "s3.crt": string(s.ca)} {
		if err := m.WriteFile("/etc/kedge/"+name, []byte(text), 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
}

// places lists the names of snapshots on this server, and in the bucket with the server that each is of, by what m sees.
func (m machine) places() (here, bucket string) {
	m.t.Helper()
	var local, far []string
	_, all := m.list()
	for _, e := range all {
		if e.Problem != "" {
			m.t.Errorf("%s: %s: %s", m.Name(), e.Location, e.Problem)
		}
		if strings.HasPrefix(e.Location, "s3://") {
			far = append(far, e.Name+"@"+e.Node)
		} else {
			local = append(local, e.Name)
		}
	}
	slices.Sort(local)
	slices.Sort(far)
	return strings.Join(local, " "), strings.Join(far, " ")
}

// oneBucket: servers that share a bucket do not overwrite each other's snapshots there. Of the scheduled ones of the same time one is copied, the
// retention counts those of the cluster, and everybody sees all.
func oneBucket(t *testing.T, servers ...machine) {
	t.Helper()
	for _, m := range servers {
		m.snapshot("save", "--name", "of-"+m.Name())
		m.snapshot("save", "--trigger", "scheduled", "--name", "scheduled-1-"+m.Name())
	}
	s1, s2 := servers[0], servers[1]
	s2.refuses("taken on server s1", "save", "--name", "of-s1")
	for _, m := range servers {
		here, bucket := m.places()
		if want := "of-s1@s1 of-s2@s2 of-s3@s3 scheduled-1-s1@s1"; here != "of-"+m.Name()+" scheduled-1-"+m.Name() || bucket != want {
			t.Errorf("%s has %s, and sees %s in the bucket, want %s", m.Name(), here, bucket, want)
		}
	}
	s1.snapshot("save", "--trigger", "scheduled", "--name", "scheduled-2-s1")
	s2.snapshot("prune")
	for _, m := range servers {
		here, bucket := m.places()
		round := "1"
		if m.Name() == "s1" {
			round = "2"
		}
		if want := "of-s1@s1 of-s2@s2 of-s3@s3 scheduled-2-s1@s1"; here != "of-"+m.Name()+" scheduled-"+round+"-"+m.Name() || bucket != want {
			t.Errorf("after pruning %s has %s, and sees %s in the bucket, want %s", m.Name(), here, bucket, want)
		}
		m.snapshot("inspect", "s3://backup/home/one/of-"+m.Name()+".kedge")
	}
	s1.snapshot("delete", "s3://backup/home/one/of-s3.kedge") // s3 keeps its own
	if here, bucket := servers[2].places(); !strings.Contains(here, "of-s3") || strings.Contains(bucket, "of-s3") {
		t.Errorf("s3 has %s, in the bucket are %s", here, bucket)
	}
}

// TestBucket: snapshots go to an S3 service, are pruned there by what they say of themselves, and are restored from there.
func TestBucket(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 1})
	m := machine{c.Servers[0], t}
	s := startService(t, c.Bed.Gateway())
	m.useBucket(s, 2)
	cluster.Do(t, c.Start)
	m.mark("before")
	if out := m.snapshot("save", "--name", "good"); !strings.Contains(out, "copied to s3://backup/home/one/good.kedge") {
		t.Errorf("it says %s", out)
	}
	m.snapshot("inspect", "s3://backup/home/one/good.kedge")
	m.mark("after")
	// Scheduled ones, as if the server had another name for a while; of another cluster; in a folder below.
	folder := filepath.Join(s.root, "backup", "home", "one")
	for i := range 3 {
		m.snapshot("save", "--trigger", "scheduled", "--name", fmt.Sprintf("scheduled-old-%d", i))
	}
	if err := os.MkdirAll(filepath.Join(folder, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(filepath.Join(folder, "good.kedge"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(folder, "below", "x.kedge"), good, 0o644), os.WriteFile(filepath.Join(folder, "scheduled-broken.kedge"), good[:20000], 0o644)); err != nil {
		t.Fatal(err)
	}
	_, all := m.list()
	var there []string
	for _, e := range all {
		if strings.HasPrefix(e.Location, "s3://") {
			there = append(there, e.Name)
		}
	}
	slices.Sort(there)
	if got := strings.Join(there, " "); got != "good scheduled-broken scheduled-old-1 scheduled-old-2" {
		t.Errorf("in the bucket there are %s", got)
	}
	m.refuses("the snapshot is damaged", "inspect", "s3://backup/home/one/scheduled-broken.kedge")
	m.snapshot("delete", "s3://backup/home/one/scheduled-broken.kedge", "scheduled-old-1")
	m.refuses("does not exist", "restore", "--dry-run", "s3://nowhere/good.kedge")

	cluster.Do(t, m.Stop)
	m.refuses("file does not exist", "restore", "s3://backup/home/one/none.kedge")
	if out := m.snapshot("restore", "s3://backup/home/one/good.kedge"); !strings.Contains(out, "restored good") {
		t.Errorf("it says %s", out)
	}
	m.start()
	if got := m.marks("before", "after"); got != "before" {
		t.Errorf("after the restore there is %s", got)
	}
	// Neither the key of the bucket nor the recovery key is told to anybody.
	log, err := m.Log()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log, secretKey) || strings.Contains(log, "AGE-SECRET") {
		t.Error("a secret is in the log")
	}
}
