// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
)

// AdminKubeconfig stands for the certificate inside the administrator's kubeconfig.
const AdminKubeconfig Name = "kubeconfig"

// State says how a certificate is doing.
type State string

// The states, from good to bad.
const (
	StateOK      State = "ok"
	StateEnding  State = "near its end" // its renewal is overdue, or it is a CA in its last year
	StateFuture  State = "not valid yet"
	StateExpired State = "expired"
	StateBroken  State = "unusable" // missing or damaged
)

// CertStatus describes a CA or leaf certificate for `kedge status` and `kedge certificate check`.
type CertStatus struct {
	Name      Name      `json:"name"`
	File      string    `json:"file,omitempty"`
	Subject   string    `json:"subject"`
	Issuer    string    `json:"issuer,omitempty"`
	NotBefore time.Time `json:"notBefore,omitzero"`
	NotAfter  time.Time `json:"notAfter,omitzero"`
	DaysLeft  int       `json:"daysLeft"`          // whole days; negative after the end
	RenewAt   time.Time `json:"renewAt,omitzero"`  // when it is renewed by itself, at the latest; zero for a CA
	State     State     `json:"state"`             //
	Warning   string    `json:"warning,omitempty"` // what is wrong, and what to do about it
}

// Places are where a machine's certificates are.
type Places struct {
	Dir        string `json:"dir"`                  // what this package keeps: data-dir/pki
	KubeletDir string `json:"kubeletDir,omitempty"` // where the kubelet of an agent keeps what it got from the cluster
	Kubeconfig string `json:"kubeconfig,omitempty"` // the administrator's
}

// currentSuffix ends the names of the files that a kubelet renews (k8s.io/client-go/util/certificate, FileStore).
const currentSuffix = "-current.pem"

// Inspect reads the certificates of a machine, CAs first. It needs nothing to be running.
func Inspect(places Places) []CertStatus {
	now := wallClock()
	var out []CertStatus
	add := func(name Name, path string, required bool) {
		certs, err := certutil.CertsFromFile(path)
		if errors.Is(err, fs.ErrNotExist) && !required {
			return
		}
		out = append(out, judge(name, path, certs, err, strings.HasSuffix(path, currentSuffix), now))
	}
	server := false
	for _, name := range authorityNames() {
		_, err := os.Stat(filepath.Join(places.Dir, string(name)+".key"))
		server = server || err == nil
		add(name, filepath.Join(places.Dir, string(name)+".crt"), err == nil)
	}
	if !server {
		if places.KubeletDir != "" {
			add(KubeletClient, filepath.Join(places.KubeletDir, "kubelet-client"+currentSuffix), len(out) > 0)
			add(KubeletServing, filepath.Join(places.KubeletDir, "kubelet-server"+currentSuffix), false)
		}
		return out
	}
	for _, spec := range leafSpecs(Config{}) {
		add(spec.name, filepath.Join(places.Dir, string(spec.name)+".pem"), true)
	}
	if places.Kubeconfig != "" {
		out = append(out, inspectKubeconfig(places.Kubeconfig, now)...)
	}
	return out
}

// inspectKubeconfig looks at the client certificate in a kubeconfig; without a file there is nothing to say.
func inspectKubeconfig(path string, now time.Time) []CertStatus {
	config, err := clientcmd.LoadFromFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var certs []*x509.Certificate
	if err == nil {
		err = errors.New("it has no client certificate")
		if c, ok := config.Contexts[config.CurrentContext]; ok {
			if user, ok := config.AuthInfos[c.AuthInfo]; ok && len(user.ClientCertificateData) > 0 {
				certs, err = certutil.ParseCertsPEM(user.ClientCertificateData)
			}
		}
	}
	return []CertStatus{judge(AdminKubeconfig, path, certs, err, false, now)}
}

// judge looks at the first of certs. byKubelet says that a kubelet renews it.
func judge(name Name, path string, certs []*x509.Certificate, err error, byKubelet bool, now time.Time) CertStatus {
	s := CertStatus{Name: name, File: path, State: StateOK}
	if err == nil && len(certs) == 0 {
		err = errors.New("there is no certificate in it")
	}
	if err != nil {
		s.State, s.Warning = StateBroken, fmt.Sprintf("%s: %v; Kedge says at its start what to do, or makes it anew", path, err)
		return s
	}
	cert := certs[0]
	left := cert.NotAfter.Sub(now)
	s.Subject, s.Issuer, s.NotBefore, s.NotAfter, s.DaysLeft = cert.Subject.String(), cert.Issuer.String(), cert.NotBefore, cert.NotAfter, int(left/day)
	overdue := s.NotAfter
	if !name.isCA() {
		s.RenewAt = renewAt(cert)
		if byKubelet { // when 70 to 90 percent of its life are over
			s.RenewAt = cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 10 * 9)
		}
		overdue = s.RenewAt.Add(2 * retryInterval)
	}
	switch {
	case left < 0 && name.isCA():
		s.State, s.Warning = StateExpired, "this CA has ended: see docs/certificates.md, \"A CA nears its end\""
	case left < 0:
		s.State, s.Warning = StateExpired, "it is replaced when Kedge starts; if Kedge runs, its log says why it was not"
	case time.Now().Before(cert.NotBefore):
		s.State, s.Warning = StateFuture, "it begins on "+cert.NotBefore.Format(time.RFC3339)+": set the clock of this machine"
	case name.isCA() && left < caWarnBefore:
		s.State, s.Warning = StateEnding, fmt.Sprintf("this CA ends soon: run `kedge certificate rotate-ca`, or, to keep its key, remove %s (not the key), "+
			"restart and hand out kubeconfigs again", path)
	case !name.isCA() && now.After(overdue):
		s.State, s.Warning = StateEnding, "its renewal is overdue: Kedge renews it while it runs; if it does run, see its log"
	}
	return s
}

// Status lists the certificates of this server, CAs first.
func (p *PKI) Status() []CertStatus {
	return Inspect(Places{Dir: p.cfg.Dir, Kubeconfig: p.cfg.AdminKubeconfigPath})
}

// Soonest is the certificate that ends first; false if there is none that can be read.
func Soonest(list []CertStatus) (CertStatus, bool) {
	list = slices.DeleteFunc(slices.Clone(list), func(s CertStatus) bool { return s.NotAfter.IsZero() })
	if len(list) == 0 {
		return CertStatus{}, false
	}
	return slices.MinFunc(list, func(a, b CertStatus) int { return a.NotAfter.Compare(b.NotAfter) }), true
}
