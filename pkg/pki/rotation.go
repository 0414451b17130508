// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	certutil "k8s.io/client-go/util/cert"
)

// Phase of a change of the CAs. Each server goes through all of them, in this order.
type Phase string

// The phases.
const (
	PhaseTrust Phase = "trust" // the new CAs are trusted beside the old ones, which go on issuing
	PhaseIssue Phase = "issue" // the new CAs issue, the old ones are still trusted
	PhaseDone  Phase = "done"  // the old ones are trusted no more
)

// Before says whether p comes before other; the empty phase before all.
func (p Phase) Before(other Phase) bool {
	order := []Phase{"", PhaseTrust, PhaseIssue, PhaseDone}
	return slices.Index(order, p) < slices.Index(order, other)
}

// RotationFile is the name of the file that holds a change of the CAs that is under way, keys included. Servers hand it to each other
// as they do with SharedFiles.
const RotationFile = "rotation.json"

// nextDir is where an operator puts CAs of his own before a change.
const nextDir = "next"

// rotation is the content of RotationFile. The issuing CAs are where they always are; a file of New that differs from there is one that
// a power loss kept from getting there.
type rotation struct {
	ID    string            `json:"id"` // begins the hash of the new server CA
	Phase Phase             `json:"phase"`
	Old   map[string][]byte `json:"old"` // by file name: certificates and the service-account key; old CAs' keys are not kept here
	New   map[string][]byte `json:"new"` // likewise, with the keys
	// Cross are the certificates of the new CAs, signed by the old ones: who knows only an old CA accepts what a new one has issued, if it is
	// shown together with this.
	Cross map[string][]byte `json:"cross"`
}

// rotated are the names of the files that a change replaces.
func rotated() []string {
	var names []string
	for _, ca := range authorityNames() {
		names = append(names, string(ca)+".key", string(ca)+".crt")
	}
	return append(names, string(ServiceAccount)+".key")
}

func parseRotation(data []byte) (*rotation, error) {
	var r rotation
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, err
	}
	if r.Phase != PhaseTrust && r.Phase != PhaseIssue {
		return nil, fmt.Errorf("%q is no phase of a change of CAs", r.Phase)
	}
	for _, name := range rotated() {
		if len(r.New[name]) == 0 {
			return nil, fmt.Errorf("there is no new %s in it", name)
		}
	}
	for _, ca := range authorityNames() {
		crt := string(ca) + ".crt"
		key, err := parseKey(r.New[string(ca)+".key"])
		if err != nil {
			return nil, fmt.Errorf("new key of %s: %w", ca, err)
		}
		if _, err := parseCA(r.New[crt], key); err != nil {
			return nil, fmt.Errorf("new %s: %w", crt, err)
		}
		if _, err := certutil.ParseCertsPEM(r.Old[crt]); err != nil {
			return nil, fmt.Errorf("old %s: %w", crt, err)
		}
	}
	if _, err := parseKey(r.New[string(ServiceAccount)+".key"]); err != nil {
		return nil, fmt.Errorf("new service-account key: %w", err)
	}
	if _, err := parseKey(r.Old[string(ServiceAccount)+".key"]); err != nil {
		return nil, fmt.Errorf("old service-account key: %w", err)
	}
	if hash, err := HashOfCA(r.New[string(ServerCA)+".crt"]); err != nil || rotationID(hash) != r.ID {
		return nil, fmt.Errorf("its name %s is not that of the new server CA", r.ID)
	}
	return &r, nil
}

func rotationID(hash string) string { return hash[:12] }

func (p *PKI) rotationPath() string { return filepath.Join(p.cfg.Dir, RotationFile) }

// loadRotation reads the change that is under way, and brings the issuing CAs to where its phase wants them.
func (p *PKI) loadRotation() error {
	data, err := readSecret(p.rotationPath())
	if errors.Is(err, fs.ErrNotExist) {
		p.setRotation(nil)
		return nil
	}
	if err != nil {
		return fmt.Errorf("load the change of CAs: %w", err)
	}
	r, err := parseRotation(data)
	if err != nil {
		return fmt.Errorf("%s is damaged: %w; take it from another server of the cluster, or, if there is none, remove it: the CAs stay as they are on this server",
			p.rotationPath(), err)
	}
	p.setRotation(r)
	if r.Phase == PhaseTrust {
		return nil
	}
	return p.installNew(r)
}

func (p *PKI) setRotation(r *rotation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rotation = r
}

// installNew makes the new CAs the issuing ones. A certificate must never be on disk without its key: of each kind all are replaced
// at once, and what a power loss leaves is put right by the next start.
func (p *PKI) installNew(r *rotation) error {
	var files []file
	for _, name := range rotated() {
		f := file{path: filepath.Join(p.cfg.Dir, name), data: r.New[name], mode: 0o600}
		same, err := unchanged(f)
		if err != nil {
			return err
		}
		if !same {
			files = append(files, f)
		}
	}
	return writeFiles(files)
}

// StartRotation makes new CAs and a new service-account key, and trusts them beside the present ones. If a change is under way already, it
// goes on with that. It returns its name, which all servers know it by. CAs of the operator are taken from the directory "next".
func (p *PKI) StartRotation() (id string, err error) {
	err = p.change(func() error {
		if p.rotation != nil {
			id = p.rotation.ID
			return nil
		}
		r, err := p.newRotation()
		if err != nil {
			return err
		}
		id = r.ID
		return p.saveRotation(r)
	})
	return id, err
}

func (p *PKI) newRotation() (*rotation, error) {
	r := &rotation{Phase: PhaseTrust, Old: map[string][]byte{}, New: map[string][]byte{}, Cross: map[string][]byte{}}
	now := wallClock()
	for _, name := range authorityNames() {
		crt, key := string(name)+".crt", string(name)+".key"
		fresh, keyPEM, certPEM, err := p.nextAuthority(name)
		if err != nil {
			return nil, err
		}
		if fresh == nil {
			fresh = &authority{}
			if fresh.key, keyPEM, err = newKey(); err == nil {
				fresh.cert, err = selfSign(name, fresh.key, now)
			}
			if err == nil {
				certPEM, err = certutil.EncodeCertificates(fresh.cert)
			}
			if err != nil {
				return nil, fmt.Errorf("make a new %s: %w", name, err)
			}
		}
		old := p.authority(name)
		if r.Old[crt], err = certutil.EncodeCertificates(old.cert); err != nil {
			return nil, err
		}
		r.New[crt], r.New[key] = certPEM, keyPEM
		if r.Cross[crt], err = crossSign(fresh.cert, old); err != nil {
			return nil, fmt.Errorf("sign the new %s by the old one: %w", name, err)
		}
		if name == ServerCA {
			r.ID = rotationID(HashOfCertificate(fresh.cert))
		}
	}
	name := string(ServiceAccount) + ".key"
	var err error
	if r.Old[name], err = os.ReadFile(p.KeyFile(ServiceAccount)); err != nil {
		return nil, err
	}
	_, r.New[name], err = newKey()
	return r, err
}

// nextAuthority is the operator's new CA, if there is one.
func (p *PKI) nextAuthority(name Name) (ca *authority, keyPEM, certPEM []byte, err error) {
	base := filepath.Join(p.cfg.Dir, nextDir, string(name))
	keyPEM, err = readSecret(base + ".key")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil, nil
	}
	if err == nil {
		certPEM, err = readSecret(base + ".crt")
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("your new %s: %w", name, err)
	}
	ca = &authority{}
	if ca.key, err = parseKey(keyPEM); err == nil {
		ca.cert, err = parseCA(certPEM, ca.key)
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("your new %s cannot be used: %w", base+".crt", err)
	}
	return ca, keyPEM, certPEM, nil
}

// crossSign makes a certificate of one CA by another one, PEM. A CA that may not sign CAs gives none.
func crossSign(ca *x509.Certificate, by *authority) ([]byte, error) {
	if by.cert.MaxPathLenZero {
		return nil, nil
	}
	template := &x509.Certificate{
		Subject: ca.Subject, RawSubject: ca.RawSubject, SubjectKeyId: ca.SubjectKeyId, NotBefore: by.cert.NotBefore, NotAfter: by.cert.NotAfter,
		KeyUsage: ca.KeyUsage, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, ca.PublicKey, by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return certutil.EncodeCertificates(cert)
}

// AdoptRotation takes over what another server of this cluster has in its RotationFile, in the first phase.
func (p *PKI) AdoptRotation(data []byte) error {
	r, err := parseRotation(data)
	if err != nil {
		return fmt.Errorf("what the other server handed over: %w", err)
	}
	r.Phase = PhaseTrust
	return p.change(func() error {
		if p.rotation != nil && p.rotation.ID == r.ID {
			return nil
		}
		own, err := certutil.EncodeCertificates(p.authority(ServerCA).cert)
		if err != nil {
			return err
		}
		ownHash, _ := HashOfCA(own)
		if oldHash, err := HashOfCA(r.Old[string(ServerCA)+".crt"]); err != nil || oldHash != ownHash {
			return fmt.Errorf("the change of CAs %s does not begin with this server's CA: it has missed another change, or is of another cluster; "+
				"remove this server (kedge node remove), and join it again", r.ID)
		}
		return p.saveRotation(r)
	})
}

// SetRotationPhase goes on to a phase. Going back is not possible; a phase that is over is no error.
func (p *PKI) SetRotationPhase(id string, phase Phase) error {
	return p.change(func() error {
		if p.rotationDone(id) {
			return nil
		}
		if p.rotation == nil || p.rotation.ID != id {
			return fmt.Errorf("this server does not take part in the change of CAs %s", id)
		}
		r := *p.rotation
		if !r.Phase.Before(phase) {
			return nil
		}
		if r.Phase = phase; phase != PhaseDone {
			return p.saveRotation(&r)
		}
		// With the file in the phase before, a power loss costs nothing; without it, everything is new.
		if err := p.installNew(&r); err != nil {
			return err
		}
		if err := os.Remove(p.rotationPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(p.cfg.Dir)
	})
}

func (p *PKI) saveRotation(r *rotation) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeFiles([]file{{path: p.rotationPath(), data: data, mode: 0o600}})
}

// change does something to the directory, and makes everything else there fit it.
func (p *PKI) change(do func() error) error {
	dir, err := lockDir(p.cfg.Dir)
	if err != nil {
		return fmt.Errorf("PKI directory %s: %w", p.cfg.Dir, err)
	}
	defer dir.Close()
	if err := do(); err != nil {
		return err
	}
	return p.refresh()
}

// RotationPhase is where this server is in the change of CAs of that name: the empty phase if it knows nothing of it.
func (p *PKI) RotationPhase(id string) Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.rotation != nil && p.rotation.ID == id:
		return p.rotation.Phase
	case p.rotationDone(id):
		return PhaseDone
	}
	return ""
}

// rotationDone: there is no file, and the server CA is the new one.
func (p *PKI) rotationDone(id string) bool {
	return p.rotation == nil && rotationID(HashOfCertificate(p.authorities[ServerCA].cert)) == id
}

// TrustFile is the path of all certificates by which a CA is known, those that issue first. Outside of a change of the CAs it holds the
// same as CertFile.
func (p *PKI) TrustFile(ca Name) string {
	return filepath.Join(p.cfg.Dir, string(ca)+"-trusted.crt")
}

// ServiceAccountTrustFile is the path of the keys by which service-account tokens are verified.
func (p *PKI) ServiceAccountTrustFile() string {
	return filepath.Join(p.cfg.Dir, string(ServiceAccount)+"-trusted.key")
}

// Trusted is the content of TrustFile.
func (p *PKI) Trusted(ca Name) ([]byte, error) {
	certs := []*x509.Certificate{p.authority(ca).cert}
	if r := p.rotation; r != nil {
		name := string(ca) + ".crt"
		for _, data := range [][]byte{r.New[name], r.Old[name]} {
			more, err := certutil.ParseCertsPEM(data)
			if err != nil {
				return nil, fmt.Errorf("change of CAs: %s: %w", name, err)
			}
			for _, c := range more {
				if !slices.ContainsFunc(certs, c.Equal) {
					certs = append(certs, c)
				}
			}
		}
	}
	return certutil.EncodeCertificates(certs...)
}

// trustFiles are those that are not on disk as they should be.
func (p *PKI) trustFiles() ([]file, error) {
	var all, files []file
	for _, ca := range authorityNames() {
		data, err := p.Trusted(ca)
		if err != nil {
			return nil, err
		}
		all = append(all, file{path: p.TrustFile(ca), data: data, mode: 0o600})
	}
	name := string(ServiceAccount) + ".key"
	keys, err := os.ReadFile(p.KeyFile(ServiceAccount))
	if err != nil {
		return nil, err
	}
	if r := p.rotation; r != nil {
		for _, more := range [][]byte{r.New[name], r.Old[name]} {
			if !bytes.Contains(keys, bytes.TrimSpace(more)) {
				keys = append(append(bytes.TrimSpace(keys), '\n'), more...)
			}
		}
	}
	all = append(all, file{path: p.ServiceAccountTrustFile(), data: keys, mode: 0o600})
	for _, f := range all {
		same, err := unchanged(f)
		if err != nil {
			return nil, err
		}
		if !same {
			files = append(files, f)
		}
	}
	return files, nil
}

// cross is what a leaf of ca has to be shown together with, DER; nil outside of the phase in which the new CAs issue and the old ones are
// trusted. Leaves that have it keep it until they are renewed: client-go looks for new CAs every five minutes only, and pods often never.
func (p *PKI) cross(ca Name) []byte {
	if p.rotation == nil || p.rotation.Phase != PhaseIssue {
		return nil
	}
	certs, err := certutil.ParseCertsPEM(p.rotation.Cross[string(ca)+".crt"])
	if err != nil {
		return nil // an operator's CA that may not sign others
	}
	return certs[0].Raw
}

// RotationState names the CAs of this server and the phase that it is in, as ID/PHASE: other machines and people see by it how far a
// change has come. Outside of a change the phase is "done".
func (p *PKI) RotationState() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rotation != nil {
		return p.rotation.ID + "/" + string(p.rotation.Phase)
	}
	return rotationID(HashOfCertificate(p.authorities[ServerCA].cert)) + "/" + string(PhaseDone)
}

// AbortRotation forgets a change in its first phase, of which no other server knows.
func (p *PKI) AbortRotation(id string) error {
	return p.change(func() error {
		if p.rotation == nil || p.rotation.ID != id || p.rotation.Phase != PhaseTrust {
			return nil
		}
		if err := os.Remove(p.rotationPath()); err != nil {
			return err
		}
		return syncDir(p.cfg.Dir)
	})
}

// RotationCAs are the new and the old certificate of a CA in the change that is under way, PEM.
func (p *PKI) RotationCAs(ca Name) (fresh, old []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rotation == nil {
		return nil, nil
	}
	name := string(ca) + ".crt"
	return p.rotation.New[name], p.rotation.Old[name]
}
