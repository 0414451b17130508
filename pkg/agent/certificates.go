// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
)

// CertificatePlaces are where a machine with this configuration keeps its certificates.
func CertificatePlaces(c *config.Config) pki.Places {
	p := pki.Places{Dir: c.PKIDir(), KubeletDir: node.CertDir(c.KubeletRootDir)}
	if c.Role == config.RoleServer {
		p.Kubeconfig = c.WriteKubeconfig
	}
	return p
}

// RotateCertificates has the Kedge of this machine renew leaf certificates, those of the given names or all, and writes what it says.
func RotateCertificates(ctx context.Context, runDir string, names []string, out io.Writer) error {
	body, err := ask(ctx, runDir, http.MethodPost, "/certificates/rotate?"+url.Values{"name": names}.Encode(), nil)
	if err != nil {
		return err
	}
	defer body.Close()
	return follow(body, out, "kedge ended in the middle of it: see its log, and `kedge certificate check`")
}

func (m *Machine) serveRotate(w http.ResponseWriter, r *http.Request) {
	m.progress(w, r, "renewing certificates", func(ctx context.Context, say func(string)) error {
		m.mu.Lock()
		running := m.supervisor != nil
		m.mu.Unlock()
		if !running {
			return errors.New("this machine is not part of a cluster yet")
		}
		var names []pki.Name
		for _, n := range r.URL.Query()["name"] {
			names = append(names, pki.Name(n))
		}
		return m.RotateCertificates(ctx, names, say)
	})
}

// progress answers a request with lines of progress. The last one is "ok" or begins with "error: ". The work goes on when who asked is
// gone.
func (m *Machine) progress(w http.ResponseWriter, r *http.Request, doing string, work func(ctx context.Context, say func(string)) error) {
	flush := func() { _ = http.NewResponseController(w).Flush() }
	say := func(text string) {
		m.log.Info(doing, "step", text)
		if _, err := fmt.Fprintln(w, text); err == nil {
			flush()
		}
	}
	flush() // the first line may take a while
	if err := work(context.WithoutCancel(r.Context()), say); err != nil {
		say("error: " + err.Error())
		return
	}
	say("ok")
}

// follow copies what progress wrote. cut is what to say when it ends in the middle.
func follow(body io.Reader, out io.Writer, cut string) error {
	for lines := bufio.NewScanner(body); lines.Scan(); {
		if lines.Text() == "ok" {
			return nil
		}
		if text, failed := strings.CutPrefix(lines.Text(), "error: "); failed {
			for lines.Scan() {
				text += "\n" + lines.Text()
			}
			return errors.New(text)
		}
		fmt.Fprintln(out, lines.Text())
	}
	return errors.New(cut)
}

// rotateKubelet gets new certificates for the kubelet of an agent, whose keys are its own, from the cluster. The kubelet holds the
// old ones in memory: its process restarts, pods run on.
func (m *Machine) rotateKubelet(ctx context.Context, names []pki.Name, say func(string)) error {
	known := []pki.Name{pki.KubeletClient, pki.KubeletServing}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return fmt.Errorf("there is no leaf certificate %q on this machine; there are %s and %s", n, known[0], known[1])
		}
	}
	if len(names) == 0 {
		names = known
	}
	config, err := clientcmd.BuildConfigFromFlags("", m.Credentials.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := join.NewClient(config)
	if err != nil {
		return err
	}
	dir := node.CertDir(m.cfg.KubeletRootDir)
	for _, n := range names {
		var cert, key []byte
		store := join.StoreKubeletClient
		if n == pki.KubeletClient {
			cert, key, err = client.NodeCertificate(ctx, m.cfg.NodeName)
		} else {
			var old tls.Certificate
			file := node.ServingCertFile(m.cfg.KubeletRootDir)
			if old, err = tls.LoadX509KeyPair(file, file); err == nil {
				cert, key, err = client.ServingCertificate(ctx, m.cfg.NodeName, old.Leaf.DNSNames, old.Leaf.IPAddresses)
			}
			store = join.StoreKubeletServing
		}
		if err == nil {
			err = store(dir, cert, key)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
		say(string(n) + " renewed")
	}
	say("restarting the node process, so that the kubelet takes them up; pods run on")
	return m.RestartAndWait(ctx, NodeProcess, "the kubelet has new certificates")
}

// renewExpired gets a client certificate for one that expired while the machine was off, from whichever server answers, and waits until
// one does. It returns why the cluster does not give it, which a token cures.
func (m *Machine) renewExpired(ctx context.Context, files pki.Agent, lapsed error) error {
	m.log.Warn("this node's client certificate has expired: asking the cluster for another one", "reason", lapsed)
	credentials, err := os.ReadFile(files.Credentials)
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(files.ServerCAFile())
	if err != nil {
		return err
	}
	report := func(reason string) {
		m.log.Info("waiting to renew the node's certificate", "reason", reason)
		m.Phase("waiting to renew the node's certificate: " + reason)
	}
	return join.Wait(ctx, m.cfg.JoinTimeout, report, func(ctx context.Context) error {
		if checkCredentials(files.Credentials, m.cfg.NodeName) == nil {
			m.log.Info("the node's client certificate is valid after all: the clock was set")
			return nil
		}
		addresses := m.knownServers()
		if len(addresses) == 0 {
			return fmt.Errorf("%w, and no server is known here that could renew them", lapsed)
		}
		var last error
		for _, address := range addresses {
			fresh, err := join.Renew(ctx, address, ca, credentials)
			if err != nil {
				// One that can be cured by waiting says more than another that is down.
				if last == nil || join.KindOf(last) == join.KindUnreachable {
					last = err
				}
				continue
			}
			m.log.Info("the node's client certificate was renewed", "by", address)
			cert, key := pem.Decode(fresh)
			return join.StoreKubeletClient(node.CertDir(m.cfg.KubeletRootDir), pem.EncodeToMemory(cert), key)
		}
		return last
	})
}

// watchCredentials starts an agent anew when its client certificate has expired while it ran: its clock was wrong when it started
// and was set, or it slept. The start gets another one; the kubelet by itself would not.
func (m *Machine) watchCredentials(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Minute):
		}
		if err := checkCredentials(m.Credentials.ClientCert, m.cfg.NodeName); errors.Is(err, errExpired) {
			m.log.Warn("the node's client certificate has expired while Kedge was running, starting again to get another one", "reason", err)
			return ErrRestart
		}
	}
}
