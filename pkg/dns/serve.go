// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// applied is the configuration in use and what was tried last.
type applied struct {
	upstreams []string
	good      customConfig // in use

	want  customConfig // the latest one, from the API or (at start) the last good one
	retry time.Time    // when to try want again after it was refused, zero if it was not, far away if only a change helps
}

// serve runs CoreDNS and follows resolv.conf and coredns-custom. It owns the engine.
func (s *Server) serve(ctx context.Context) error {
	if err := os.MkdirAll(s.cfg.Dir, 0o755); err != nil {
		return fmt.Errorf("dns: directory for generated files: %w", err)
	}
	var st applied
	want, err := s.custom.lastGood()
	if err != nil {
		s.log.Warn("the custom DNS configuration of the last run cannot be read, waiting for the API's", "error", err)
	}
	st.want = want

	for {
		s.converge(&st, s.readUpstreams(st.good))
		wait := s.poll
		if s.engine.instance == nil {
			wait = retryInterval
		}
		select {
		case <-ctx.Done():
			s.update(func(st *Status) { st.Listen = "" })
			s.setProblem(problemListen, "stopped")
			if err := s.engine.stop(); err != nil {
				s.log.Warn("CoreDNS did not stop cleanly", "error", err)
			}
			return nil
		case st.want = <-s.fromAPI:
			st.retry = time.Time{}
		case <-time.After(wait):
		}
	}
}

// readUpstreams reads the host's resolv.conf, keeps the kubelet's up to date and returns the upstreams as host:port. That there are none is
// no problem if custom forwards all names itself.
func (s *Server) readUpstreams(custom customConfig) []string {
	r, err := HostResolvConf(s.cfg.ResolvConf, s.cfg.Addr)
	problem := ""
	switch {
	case custom.forwardsAll:
	case err != nil:
		problem = err.Error()
	case len(r.Nameservers) == 0 && len(r.Skipped) > 0:
		problem = fmt.Sprintf("%s has no usable nameserver (skipped: %s), names outside of the cluster get SERVFAIL; "+
			"name a real resolver there or with --resolv-conf", r.Path, strings.Join(r.Skipped, ", "))
	case len(r.Nameservers) == 0:
		problem = r.Path + " has no nameserver, names outside of the cluster get SERVFAIL"
	}
	if s.setProblem(problemResolvConf, problem) && problem != "" {
		s.log.Warn("no upstream for DNS", "reason", problem)
	}
	if s.cfg.KubeletResolvConf != "" {
		if err := r.WriteKubelet(s.cfg.KubeletResolvConf, s.cfg.HostSearch); err != nil {
			s.problem(problemFiles, "write the kubelet's resolv.conf", err)
		}
	}
	s.update(func(st *Status) { st.ResolvConf = r.Path })
	return r.upstreams(s.upstreamAt)
}

// converge brings the upstreams and st.want into effect. What cannot be is refused and told; the last good configuration goes on.
func (s *Server) converge(st *applied, upstreams []string) {
	if s.engine.instance == nil || !slices.Equal(upstreams, st.upstreams) {
		if !s.useUpstreams(st, upstreams) {
			return
		}
	}
	switch {
	case st.want.hash == st.good.hash:
		s.customInUse(st.good)
	case time.Now().After(st.retry):
		s.tryCustom(st)
	}
}

// useUpstreams brings upstreams into effect, together with the custom configuration in use. At the start there is none, so that it cannot
// keep the main address from being opened.
func (s *Server) useUpstreams(st *applied, upstreams []string) bool {
	err := s.load(upstreams, st.good)
	if err != nil && !st.good.empty() {
		s.log.Error("the custom DNS configuration does not load any more, going on without it", "error", err)
		st.good, st.retry = customConfig{}, time.Time{}
		err = s.load(upstreams, st.good)
	}
	if err != nil {
		s.problem(problemListen, "cluster DNS cannot be started", err)
		return false
	}
	st.upstreams = upstreams
	s.log.Info("cluster DNS in use", "listen", s.cfg.listen(), "upstreams", upstreams)
	s.update(func(v *Status) { v.Listen, v.Upstreams = s.cfg.listen(), upstreams })
	s.setProblem(problemListen, "")
	return true
}

// tryCustom brings st.want into effect.
func (s *Server) tryCustom(st *applied) {
	want, err := s.custom.stage(st.want)
	if err == nil {
		want.forwardsAll, err = forwardsAll(want)
	}
	if err == nil {
		err = s.load(st.upstreams, want)
	}
	if err != nil {
		s.custom.discard(want, st.good)
		st.retry = time.Now().Add(never)
		if errors.Is(err, errListen) || strings.Contains(err.Error(), "plugin/bind") {
			st.retry = time.Now().Add(listenRetry)
		}
		// Errors of the parser name the file: show the ConfigMap's key.
		err = errors.New(strings.ReplaceAll(err.Error(), want.dir+"/", ""))
		text := fmt.Sprintf("ConfigMap %s/%s is refused, the last good configuration goes on: %v", CustomNamespace, CustomName, err)
		if s.setProblem(problemCustom, text) {
			s.log.Error("custom DNS configuration refused", "error", err)
			offer(s.refusals, refusal{want.uid, err})
		}
		s.update(func(v *Status) { v.Custom = "refused" })
		return
	}
	st.good, st.retry = want, time.Time{}
	s.customInUse(want)
	s.log.Info("custom DNS configuration in use", "keys", want.names())
	if err := s.custom.keep(want); err != nil {
		s.problem(problemFiles, "keep the custom DNS configuration for the next start", err)
	}
}

func (s *Server) customInUse(c customConfig) {
	state := "in use"
	if c.empty() {
		state = "none"
	}
	s.update(func(v *Status) { v.Custom = state })
	s.setProblem(problemCustom, "")
}

// load assembles a Corefile, loads it, and writes it down for people to read.
func (s *Server) load(upstreams []string, custom customConfig) error {
	text, err := corefile(s.cfg, upstreams, custom)
	if err != nil {
		return err
	}
	path := filepath.Join(s.cfg.Dir, "Corefile")
	if err := s.engine.load(text, path, custom.root(s.cfg.Dir)); err != nil {
		return err
	}
	if err := writeIfChanged(path, string(text)); err != nil {
		s.problem(problemFiles, "write the Corefile", err)
	}
	return nil
}

// problem records and, when it is new, logs what failed.
func (s *Server) problem(kind int, what string, err error) {
	if s.setProblem(kind, what+": "+err.Error()) {
		s.log.Error(what, "error", err)
	}
}

// refusal is a custom configuration that was refused.
type refusal struct {
	configMap types.UID
	reason    error
}

// offer puts v into the one-slot channel c in place of what is there. One sender per channel.
func offer[T any](c chan T, v T) {
	select {
	case <-c:
	default:
	}
	c <- v
}
