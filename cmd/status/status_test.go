// SPDX-License-Identifier: Apache-2.0

package status

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

func TestWrite(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	ended := now.Add(-90 * time.Second)
	st := &agent.Status{
		Version: "v1", Role: "server", Node: "n1", PID: 7, Started: now.Add(-time.Hour),
		Processes: []supervise.ProcessStatus{
			{Name: "etcd", Restarts: 1, LastExit: "signal: killed", LastExitAt: &ended, Components: []supervise.Component{{Name: "etcd", State: supervise.Ready, Since: now.Add(-80 * time.Second)}}},
			{Name: "node", Components: []supervise.Component{{Name: "kubelet", State: supervise.Waiting, Reason: "for the API and containerd", Since: now.Add(-time.Minute)}}},
		},
		APIServers:   []apilb.Server{{Address: "127.0.0.1:6443", Healthy: true, Local: true, Active: true, Connections: 3}, {Address: "192.0.2.2:6443", Reason: "no answer"}},
		Tunnels:      []tunnel.Link{{Server: "192.0.2.2:6443", Reason: "refused"}},
		Certificates: []pki.CertStatus{{Name: "client-ca", Warning: "ends in 300 days"}, {Name: "apiserver", NotAfter: now.Add(360 * 24 * time.Hour), DaysLeft: 360}},
	}
	var out bytes.Buffer
	if err := write(&out, st, now); err != nil {
		t.Fatal(err)
	}
	want := `Kedge v1 on server n1: not ready, running for 60m (pid 7)

PROCESS   COMPONENT   STATE     SINCE   RESTARTS   REMARK
etcd      etcd        ready     80s     1          
node      kubelet     waiting   60s     0          for the API and containerd

API SERVER       STATE             CONNECTIONS   TUNNEL            REMARK
127.0.0.1:6443   healthy, in use   3                               on this machine
192.0.2.2:6443   unhealthy         0             closed: refused   no answer

etcd ended 90s ago: signal: killed
certificate client-ca: ends in 300 days
certificates: apiserver ends first, on 2027-11-17 (360 days left); see kedge certificate check
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
