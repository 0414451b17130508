// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/check"
)

// A start waits for ports that a process of this program holds, unless a Kedge runs.
func TestAwaitPorts(t *testing.T) {
	cfg := testConfig(t)
	m := testMachine(t, cfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := check.Options{Ports: []check.Port{{Port: l.Addr().(*net.TCPAddr).Port, Proto: "tcp", Addr: netip.MustParseAddr("127.0.0.1"), Purpose: "test"}}}
	awaited := make(chan error, 1)
	await := func() { awaited <- m.AwaitPorts(t.Context(), o) }
	go await()
	select {
	case err := <-awaited:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	unlock, err := Lock(cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-awaited; err != nil {
		t.Error(err)
	}
	unlock()
	go await()
	time.AfterFunc(200*time.Millisecond, func() { l.Close() })
	if err := <-awaited; err != nil {
		t.Error(err)
	}
	if held, err := check.Lingering(t.Context(), o); err != nil || len(held) > 0 {
		t.Errorf("%v, %v", held, err)
	}
}
