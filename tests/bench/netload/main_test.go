// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// ask asks for something as the benchmark does.
func ask(t *testing.T, path string) (Result, int) {
	t.Helper()
	w := httptest.NewRecorder()
	routes().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	var res Result
	if w.Code == http.StatusOK {
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
			t.Fatal(err)
		}
	}
	return res, w.Code
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go accept(l)
	to := "?to=" + l.Addr().String()
	if res, code := ask(t, "/throughput"+to+"&for=50ms"); code != http.StatusOK || res.PerSecond < blockSize {
		t.Errorf("throughput: %d, %+v", code, res)
	}
	for _, what := range []string{"/requests", "/connections"} {
		if res, code := ask(t, what+to+"&for=50ms"); code != http.StatusOK || res.Done == 0 || res.P50 <= 0 || res.P99 < res.P50 {
			t.Errorf("%s: %d, %+v", what, code, res)
		}
	}
	if res, code := ask(t, "/watch"+to+"&reached=true&timeout=10s"); code != http.StatusOK || time.Since(res.At) > 10*time.Second {
		t.Errorf("reached: %d, %+v", code, res)
	}
	if _, code := ask(t, "/watch"+to+"&reached=false&timeout=50ms"); code != http.StatusInternalServerError {
		t.Errorf("not refused, and the answer is %d", code)
	}
	time.AfterFunc(20*time.Millisecond, func() { l.Close() })
	begin := time.Now()
	if res, code := ask(t, "/watch"+to+"&reached=false&timeout=10s"); code != http.StatusOK || res.At.Before(begin) || res.Failed != 1 {
		t.Errorf("refused: %d, %+v", code, res)
	}
}

func TestLookups(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if q.Question[0].Name == "there.example." {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 7)}}
		}
		if err := w.WriteMsg(m); err != nil {
			t.Error(err)
		}
	})}
	done := make(chan error, 1)
	go func() { done <- s.ActivateAndServe() }()
	defer func() {
		if err := s.ShutdownContext(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	to := "/lookups?for=50ms&workers=4&to=" + pc.LocalAddr().String() + "&name="
	if res, code := ask(t, to+"there.example"); code != http.StatusOK || res.Done == 0 || res.Failed != 0 {
		t.Errorf("%d, %+v", code, res)
	}
	if res, code := ask(t, to+"missing.example"); code != http.StatusOK || res.Done != 0 || res.Failed == 0 || res.Failure == "" {
		t.Errorf("a name that is not there: %d, %+v", code, res)
	}
}
