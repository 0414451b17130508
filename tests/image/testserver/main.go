// SPDX-License-Identifier: Apache-2.0

// Command testserver is the program of the image that scenario tests run in pods.
//
//	GET  /            one line: hostname, client address as the server sees it
//	GET  /echo        JSON: hostname, client, method, host, headers
//	GET  /healthz     200 ok, or 503 after POST /healthz?ok=false
//	POST /healthz     ?ok=true|false switches the answer
//	POST /memory      ?mib=N allocates N MiB more and touches them
//	POST /log         ?line=TEXT writes a line to standard output
//	POST /exit        ?code=N ends the process
//	GET  /env         the environment
//	POST /validate    a validating webhook, which denies objects whose data has verdict: deny
//	GET  /apis/GROUP/VERSION[/greetings/NAME]  an aggregated API with one resource, "greetings", of which any name exists
//	POST /probe       ?timeout=500ms tries the targets in the body, one a line, see target; JSON of what came of each
//	POST /watch       ?every=50ms&timeout=500ms tries them again and again
//	GET  /watch       JSON of how that goes; DELETE ends it
//	GET  /seen        JSON of who came to the ports LISTEN, by protocol and address; DELETE forgets them
//
// SIGTERM: it writes "SIGTERM: stopping", fails /healthz, waits TERM_DELAY (a Go duration, default 0), finishes
// requests in progress, writes "stopped" and exits with 0. PORT is the port (default 8080), FILE a file whose content /file answers,
// TLS a directory with tls.crt and tls.key: with it the server speaks HTTPS.
// LISTEN are more ports ("7080,7081") that tell everybody NAME (default: the hostname), over TCP and UDP; SOCKET is a unix socket
// with the same API as the port; WATCH are targets, with ";" between them, that are watched from the start on, every EVERY with a
// limit of TIMEOUT.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "testserver:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var delay time.Duration
	if s := os.Getenv("TERM_DELAY"); s != "" {
		var err error
		if delay, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("TERM_DELAY: %w", err)
		}
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	s, err := newServer()
	if err != nil {
		return err
	}
	s.startWatches(os.Getenv("WATCH"), os.Getenv("EVERY"), os.Getenv("TIMEOUT"))
	if err := s.greet(os.Getenv("LISTEN")); err != nil {
		return err
	}
	if socket := os.Getenv("SOCKET"); socket != "" {
		if err := s.control(socket); err != nil {
			return err
		}
	}
	h := &http.Server{Addr: ":" + port, Handler: s.routes(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() {
		if dir := os.Getenv("TLS"); dir != "" {
			failed <- h.ListenAndServeTLS(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
			return
		}
		failed <- h.ListenAndServe()
	}()
	fmt.Println("listening on", h.Addr)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	fmt.Println("SIGTERM: stopping")
	s.sick.Store(true)
	time.Sleep(delay)
	end, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err = h.Shutdown(end)
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	fmt.Println("stopped")
	return err
}

type server struct {
	hostname string
	name     string // for greet
	sick     atomic.Bool

	mu           sync.Mutex
	heap         [][]byte
	seen         map[string]*visitor
	watches      []*watched
	watching     context.Context // of the watches; nil when none was started
	stopWatching context.CancelFunc
}

func newServer() (*server, error) {
	hostname, err := os.Hostname()
	name := os.Getenv("NAME")
	if name == "" {
		name = hostname
	}
	return &server{hostname: hostname, name: name, seen: map[string]*visitor{}}, err
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, s.hostname, r.RemoteAddr)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{"hostname": s.hostname, "client": r.RemoteAddr, "method": r.Method, "host": r.Host, "headers": r.Header})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if s.sick.Load() {
			http.Error(w, "sick", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("POST /healthz", func(_ http.ResponseWriter, r *http.Request) {
		s.sick.Store(r.FormValue("ok") == "false")
	})
	mux.HandleFunc("POST /memory", s.allocate)
	mux.HandleFunc("POST /log", func(_ http.ResponseWriter, r *http.Request) { fmt.Println(r.FormValue("line")) })
	mux.HandleFunc("POST /exit", func(_ http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.FormValue("code"))
		os.Exit(code)
	})
	mux.HandleFunc("GET /env", func(w http.ResponseWriter, _ *http.Request) {
		for _, e := range os.Environ() {
			fmt.Fprintln(w, e)
		}
	})
	s.probeRoutes(mux)
	mux.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, os.Getenv("FILE")) })
	mux.HandleFunc("POST /validate", s.validate)
	mux.HandleFunc("GET /apis/{group}/{version}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{
			"apiVersion": "v1", "kind": "APIResourceList", "groupVersion": r.PathValue("group") + "/" + r.PathValue("version"),
			"resources": []any{map[string]any{"name": "greetings", "singularName": "greeting", "kind": "Greeting", "verbs": []string{"get"}}},
		})
	})
	mux.HandleFunc("GET /apis/{group}/{version}/greetings/{name}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{
			"apiVersion": r.PathValue("group") + "/" + r.PathValue("version"), "kind": "Greeting", "metadata": map[string]string{"name": r.PathValue("name")},
			"from": s.hostname, "to": r.Header.Get("X-Remote-User"),
		})
	})
	return mux
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}

func (s *server) validate(w http.ResponseWriter, r *http.Request) {
	var review struct {
		Request struct {
			UID    string
			Object struct{ Data map[string]string }
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer(w, map[string]any{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": map[string]any{
		"uid": review.Request.UID, "allowed": review.Request.Object.Data["verdict"] != "deny",
		"status": map[string]string{"message": "no, says " + s.hostname},
	}})
}

// allocate writes to every page, since untouched memory is not charged.
func (s *server) allocate(w http.ResponseWriter, r *http.Request) {
	mib, err := strconv.Atoi(r.FormValue("mib"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for range mib {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		s.mu.Lock()
		s.heap = append(s.heap, block)
		s.mu.Unlock()
	}
	fmt.Fprintln(w, "allocated", mib, "MiB")
}
