// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	certutil "k8s.io/client-go/util/cert"
)

// SharedFiles are the names of the files that all servers of a cluster have alike: the CAs with their keys, the service-account
// key, the secret of the keyring and the encryption configuration.
func SharedFiles() []string {
	var names []string
	for _, ca := range authorityNames() {
		names = append(names, string(ca)+".key", string(ca)+".crt")
	}
	return append(names, string(ServiceAccount)+".key", string(Keyring)+".key", string(Encryption)+".yaml")
}

// Import writes what another server of the cluster handed over into the empty or equally filled directory dir. Other files of the
// same names are an error: they belong to another cluster.
func Import(dir string, files map[string][]byte) error {
	lock, err := lockDir(dir)
	if err != nil {
		return fmt.Errorf("PKI directory %s: %w", dir, err)
	}
	defer lock.Close()
	var keys, certs []file
	member := false // this machine was part of the cluster before
	for _, name := range SharedFiles() {
		data, ok := files[name]
		if !ok || len(data) == 0 {
			return fmt.Errorf("the other server did not hand over %s: is it of an older version? upgrade it first", name)
		}
		f := file{path: filepath.Join(dir, name), data: data, mode: 0o600}
		have, err := os.ReadFile(f.path)
		switch {
		case err == nil && bytes.Equal(have, data):
			member = member || name == string(ServerCA)+".key"
			continue
		case err == nil && member && name == string(Encryption)+".yaml":
			// It changes during a cluster's life, and this server was away.
		case err == nil:
			return fmt.Errorf("%s is that of another cluster: this machine was part of one before; move %s away first", f.path, dir)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		// As in Ensure: a certificate is never on disk without its key.
		if strings.HasSuffix(name, ".crt") {
			certs = append(certs, f)
		} else {
			keys = append(keys, f)
		}
	}
	// The CAs may be changing now.
	if data := files[RotationFile]; len(data) > 0 {
		if _, err := parseRotation(data); err != nil {
			return fmt.Errorf("the other server's %s: %w", RotationFile, err)
		}
		keys = append(keys, file{path: filepath.Join(dir, RotationFile), data: data, mode: 0o600})
	}
	if err := writeFiles(keys); err != nil {
		return err
	}
	return writeFiles(certs)
}

// HashOfCA gives the hash of the first certificate in PEM data, see HashOfCertificate.
func HashOfCA(certPEM []byte) (string, error) {
	certs, err := certutil.ParseCertsPEM(certPEM)
	if err != nil {
		return "", fmt.Errorf("CA certificate: %w", err)
	}
	return HashOfCertificate(certs[0]), nil
}

// HashOfCertificate gives the hash of a CA's public key (SPKI), by which join tokens know a cluster: 64 hexadecimal digits, as in
// kubeadm's --discovery-token-ca-cert-hash.
func HashOfCertificate(ca *x509.Certificate) string {
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// shareCA says whether a CA is in both of two lists, PEM.
func shareCA(a, b []byte) (bool, error) {
	as, err := certutil.ParseCertsPEM(a)
	if err != nil {
		return false, err
	}
	bs, err := certutil.ParseCertsPEM(b)
	if err != nil {
		return false, err
	}
	for _, x := range as {
		if slices.ContainsFunc(bs, func(y *x509.Certificate) bool { return HashOfCertificate(x) == HashOfCertificate(y) }) {
			return true, nil
		}
	}
	return false, nil
}

// WriteCAs replaces the CAs that an agent trusts, when the cluster changes them. It says whether there was a change.
func (a Agent) WriteCAs(serverCA, clientCA []byte) (changed bool, err error) {
	lock, err := lockDir(a.Dir)
	if err != nil {
		return false, fmt.Errorf("PKI directory %s: %w", a.Dir, err)
	}
	defer lock.Close()
	files := []file{{a.ServerCAFile(), serverCA, 0o600}, {a.ClientCAFile(), clientCA, 0o600}}
	files = slices.DeleteFunc(files, func(f file) bool {
		same, err := unchanged(f)
		return err == nil && same
	})
	return len(files) > 0, writeFiles(files)
}

// Agent is what a node without keys of the CAs keeps: whom it trusts, and how its components reach the API.
type Agent struct {
	Dir          string
	ServerCA     []byte // PEM
	ClientCA     []byte // PEM
	Credentials  string // path of the kubelet's client certificate and key, which it rotates itself
	BalancerPort int
}

// ServerCAFile, ClientCAFile and KubeconfigFile are the paths of what Write writes.
func (a Agent) ServerCAFile() string { return filepath.Join(a.Dir, string(ServerCA)+".crt") }

// ClientCAFile is what the kubelet checks its callers against.
func (a Agent) ClientCAFile() string { return filepath.Join(a.Dir, string(ClientCA)+".crt") }

// KubeconfigFile is that of kubelet, kube-proxy, flannel and DNS.
func (a Agent) KubeconfigFile() string {
	return filepath.Join(a.Dir, string(KubeletClient)+".kubeconfig")
}

// Write writes the files, durable against power loss. A CA of another cluster is not replaced.
func (a Agent) Write() error {
	lock, err := lockDir(a.Dir)
	if err != nil {
		return fmt.Errorf("PKI directory %s: %w", a.Dir, err)
	}
	defer lock.Close()
	if have, err := os.ReadFile(a.ServerCAFile()); err == nil {
		if _, err := HashOfCA(have); err != nil {
			return fmt.Errorf("%s is damaged: %w; remove it, the cluster hands it out again", a.ServerCAFile(), err)
		}
		if same, err := shareCA(have, a.ServerCA); err != nil || !same {
			return errors.Join(err, fmt.Errorf("%s is that of another cluster, or from before this one changed its CAs: this machine was part of it before; move %s away first",
				a.ServerCAFile(), a.Dir))
		}
	}
	cluster, user := clientcmdapi.NewCluster(), clientcmdapi.NewAuthInfo()
	cluster.Server, cluster.CertificateAuthority = balancerURL(a.BalancerPort), a.ServerCAFile()
	user.ClientCertificate, user.ClientKey = a.Credentials, a.Credentials
	data, err := kubeconfig(KubeletClient, cluster, user)
	if err != nil {
		return err
	}
	files := []file{{a.ServerCAFile(), a.ServerCA, 0o600}, {a.ClientCAFile(), a.ClientCA, 0o600}, {a.KubeconfigFile(), data, 0o600}}
	files = slices.DeleteFunc(files, func(f file) bool {
		same, err := unchanged(f)
		return err == nil && same
	})
	return writeFiles(files)
}
