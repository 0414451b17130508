// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// bad gives the certificates that are not well, as NAME: STATE.
func bad(list []CertStatus) string {
	var out []string
	for _, s := range list {
		if s.State != StateOK {
			out = append(out, string(s.Name)+": "+string(s.State))
		}
	}
	return strings.Join(out, ", ")
}

func TestInspectServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepUntilRelease()
		cfg := testConfig(t.TempDir())
		p := mustEnsure(t, cfg)
		list := p.Status()
		if len(list) != 4+len(p.specs)+1 || list[0].Name != ServerCA || list[len(list)-1].Name != AdminKubeconfig {
			t.Errorf("%d entries: %+v", len(list), list)
		}
		if got := bad(list); got != "" {
			t.Errorf("new certificates: %s", got)
		}
		if s, ok := Soonest(list); !ok || s.Name.isCA() || s.DaysLeft != 364 && s.DaysLeft != 365 {
			t.Errorf("ends first: %+v", s)
		}
		time.Sleep(leafLife - renewBefore + time.Hour)
		if got := bad(p.Status()); !strings.Contains(got, "apiserver: near its end") || !strings.Contains(got, "kubeconfig: near its end") || strings.Contains(got, "-ca") {
			t.Errorf("not renewed: %s", got)
		}
		time.Sleep(leafLife)
		if got := bad(p.Status()); !strings.Contains(got, "apiserver: expired") {
			t.Errorf("expired: %s", got)
		}
		if err := os.WriteFile(p.CertFile(APIServer), []byte("nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(p.CertFile(EtcdPeer)); err != nil {
			t.Fatal(err)
		}
		if got := bad(p.Status()); !strings.Contains(got, "apiserver: unusable") || !strings.Contains(got, "etcd-peer: unusable") {
			t.Errorf("damaged and missing: %s", got)
		}
		time.Sleep(8 * 365 * day)
		if got := bad(mustEnsure(t, cfg).Status()); !strings.HasPrefix(got, "server-ca: near its end, client-ca: near its end") {
			t.Errorf("old CAs: %s", got)
		}
	})
}

func TestInspectAgent(t *testing.T) {
	server := mustEnsure(t, testConfig(t.TempDir()))
	dir := t.TempDir()
	kubelet := filepath.Join(dir, "kubelet")
	if err := os.MkdirAll(kubelet, 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		server.CertFile(ServerCA): "server-ca.crt", server.CertFile(ClientCA): "client-ca.crt",
		server.CertFile(KubeletClient): "kubelet/kubelet-client-current.pem",
	} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var names []Name
	list := Inspect(Places{Dir: dir, KubeletDir: kubelet})
	for _, s := range list {
		names = append(names, s.Name)
	}
	if want := []Name{ServerCA, ClientCA, KubeletClient}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
	if got := Inspect(Places{Dir: t.TempDir(), KubeletDir: t.TempDir(), Kubeconfig: "/nonexistent"}); got != nil {
		t.Errorf("an empty machine: %+v", got)
	}
}

func TestCollector(t *testing.T) {
	p := mustEnsure(t, testConfig(t.TempDir()))
	registry := prometheus.NewRegistry()
	if err := registry.Register(Collector(Places{Dir: p.cfg.Dir})); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil || len(families) != 1 || families[0].GetName() != "kedge_certificate_expiration_seconds" {
		t.Fatalf("%v, %v", families, err)
	}
	for _, m := range families[0].GetMetric() {
		if m.GetLabel()[0].GetValue() != string(APIServer) {
			continue
		}
		if got, want := m.GetGauge().GetValue(), float64(time.Now().Add(leafLife).Unix()); got < want-3600 || got > want+3600 {
			t.Errorf("apiserver ends at %f, want about %f", got, want)
		}
		return
	}
	t.Errorf("no apiserver in %v", families)
}

func TestRotate(t *testing.T) {
	dir := t.TempDir()
	p := mustEnsure(t, testConfig(dir))
	before := snapshot(t, dir)
	if _, err := p.Rotate("apiserver", "nobody"); err == nil || !strings.Contains(err.Error(), `no leaf certificate "nobody"`) || !strings.Contains(err.Error(), "etcd-peer") {
		t.Errorf("an unknown name: %v", err)
	}
	if got := changed(before, snapshot(t, dir)); len(got) > 0 {
		t.Errorf("changed all the same: %v", got)
	}
	names, err := p.Rotate(APIServer, Admin)
	if err != nil || !slices.Equal(names, []Name{APIServer, Admin}) {
		t.Errorf("%v, %v", names, err)
	}
	if got := changed(before, snapshot(t, dir)); !slices.Equal(got, []string{"etc/kubeconfig.yaml", "pki/admin.pem", "pki/apiserver.pem"}) {
		t.Errorf("changed %v", got)
	}
	handshake(t, p, APIServer, Admin, ServerCA, ClientCA, "localhost")
	if names, err := p.Rotate(); err != nil || len(names) != len(p.specs) {
		t.Errorf("all: %v, %v", names, err)
	}
}
