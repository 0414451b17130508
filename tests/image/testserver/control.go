// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// control serves the same as the port on a unix socket, which no packet filter knows of.
func (s *server) control(socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	h := &http.Server{Handler: s.routes(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = h.Serve(l) }() // as long as the process
	return nil
}

func (s *server) probeRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST /probe", func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, probe(parseTargets(string(text)), duration(r.FormValue("timeout"), 500*time.Millisecond)))
	})
	mux.HandleFunc("POST /watch", func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.startWatches(string(text), r.FormValue("every"), r.FormValue("timeout"))
		answer(w, nil)
	})
	mux.HandleFunc("GET /watch", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		answer(w, s.watches)
	})
	mux.HandleFunc("DELETE /watch", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.stopWatches()
		answer(w, s.watches)
		s.watches = nil
	})
	mux.HandleFunc("GET /seen", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		answer(w, s.seen)
	})
	mux.HandleFunc("DELETE /seen", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		answer(w, s.seen)
		clear(s.seen)
	})
}

func duration(text string, otherwise time.Duration) time.Duration {
	if d, err := time.ParseDuration(text); err == nil {
		return d
	}
	return otherwise
}

// probed is what came of one try.
type probed struct {
	OK            bool
	Answer, Error string
}

// probe tries all targets at the same time.
func probe(targets []*target, timeout time.Duration) []probed {
	results := make([]probed, len(targets))
	var all sync.WaitGroup
	for i, t := range targets {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			text, err := t.try(ctx)
			results[i] = probed{OK: err == nil, Answer: text}
			if err != nil {
				results[i].Error = err.Error()
			}
		})
	}
	all.Wait()
	return results
}

func (s *server) startWatches(targets, every, timeout string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watching == nil {
		s.watching, s.stopWatching = context.WithCancel(context.Background())
	}
	for _, t := range parseTargets(targets) {
		go s.watch(s.watching, t, duration(every, 50*time.Millisecond), duration(timeout, 500*time.Millisecond))
	}
}

// stopWatches ends what startWatches has started. The mutex is held.
func (s *server) stopWatches() {
	if s.watching != nil {
		s.stopWatching()
		s.watching = nil
	}
}
