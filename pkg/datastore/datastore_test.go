// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestEtcdConfig(t *testing.T) {
	ec, err := etcdConfig(Config{
		Name: "n1", Dir: "/d", Socket: "/run/kedge/etcd.sock", PeerAddress: netip.MustParseAddrPort("192.0.2.1:2380"),
		PeerCert: "/pki/p.pem", PeerKey: "/pki/p.pem", PeerCA: "/pki/ca.crt", Args: []string{"--quota-backend-bytes=1000000"},
	}, Disk{Sync: 100 * time.Millisecond, total: 64 << 30, free: 60 << 30}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := ec.Validate(); err != nil {
		t.Errorf("etcd refuses the configuration: %v", err)
	}
	if got := ec.ListenClientUrls[0].String(); got != Endpoint("/run/kedge/etcd.sock") {
		t.Errorf("clients at %s", got)
	}
	if ec.TickMs != 200 || ec.ElectionMs != 2000 {
		t.Errorf("heartbeat %d ms, election %d ms", ec.TickMs, ec.ElectionMs)
	}
	if ec.InitialCluster != "n1=https://192.0.2.1:2380" || !ec.PeerTLSInfo.ClientCertAuth || ec.QuotaBackendBytes != 1000000 {
		t.Errorf("got %s, client certificates %v, quota %d", ec.InitialCluster, ec.PeerTLSInfo.ClientCertAuth, ec.QuotaBackendBytes)
	}
}

func TestCheckArgs(t *testing.T) {
	if err := CheckArgs([]string{"--quota-backend-bytes=1"}); err != nil {
		t.Error(err)
	}
	if err := CheckArgs([]string{"--nope=1"}); err == nil || !strings.Contains(err.Error(), "etcd-arg: flag provided but not defined: -nope") {
		t.Errorf("got %v", err)
	}
}
