// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// kedgeOf serves a unix socket as the Kedge of a node does, and says which node it is.
func kedgeOf(t *testing.T, node string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, node, " ", r.URL.Path) })}
	go srv.Serve(l) //nolint:errcheck // ends with the test
	t.Cleanup(func() { srv.Close() })
	return socket
}

// TestKedge asks the Kedge of nodes, of this machine and of others.
func TestKedge(t *testing.T) {
	b := newBed(t, func(s *Server) { s.cfg.NodeName, s.cfg.Socket = "self", kedgeOf(t, "self") })
	b.addNode("self", "10.42.0.0/24", internal("127.0.0.2"))
	b.addNode("n1", "10.42.1.0/24", internal("127.0.0.3"))
	b.addNode("n2", "10.42.2.0/24", internal("127.0.0.4"))
	b.addNode("n3", "10.42.3.0/24", internal("192.0.2.99")) // no address of this machine, although its tunnel says so
	b.join("n1", func(c *Client) { c.cfg.Socket = kedgeOf(t, "n1") })
	b.join("n3", func(c *Client) { c.cfg.Socket = kedgeOf(t, "n3") })
	b.open("n1", "n3")
	client := http.Client{Transport: &http.Transport{DialContext: b.server.Dial, DisableKeepAlives: true}}
	for host, want := range map[string]string{"self": "self /status", "127.0.0.2": "self /status", "n1": "n1 /status", "127.0.0.3": "n1 /status"} {
		res, err := client.Get("http://" + net.JoinHostPort(host, "1") + "/status")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(body) != want {
			t.Errorf("%s answered %q: %v", host, body, err)
		}
	}
	for host, want := range map[string]string{"n2": errNoTunnel.Error(), "n3": "192.0.2.99 is another machine's"} {
		if res, err := client.Get("http://" + net.JoinHostPort(host, "1") + "/status"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", host, res, err)
		}
	}
}
