// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// checkInterval is also how long it takes at most to notice a clock that was set or a machine that has slept: timers
	// stand still while it sleeps, and do not follow the wall clock. The check compares a dozen times in memory.
	checkInterval = time.Minute
	// rereadInterval is how often the files are read again and damaged or lost leaves replaced.
	rereadInterval = day
	// retryInterval is the pause after a renewal that failed.
	retryInterval = 10 * time.Minute
	// loopbackLife is 2/3 of what the API server gives the certificate of its loopback connection
	// (k8s.io/apiserver/pkg/server/options/serving_with_loopback.go: 3 years and a day, beginning an hour before its start).
	loopbackLife = 2 * 365 * day
)

// Run renews leaf certificates, and the admin kubeconfig with them, until ctx is done. It logs what it does and what
// fails, tries again by itself, and always returns nil.
func (p *PKI) Run(ctx context.Context) error {
	ticker := time.NewTicker(checkInterval)
	defer ticker.Stop()
	now := wallClock()
	state := renewal{loopback: time.Now().Round(0), reread: now, warned: now}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			p.tick(&state, wallClock(), time.Now().Round(0))
		}
	}
}

// renewal is what Run remembers from one check to the next.
type renewal struct {
	loopback time.Time // raw clock when the API server's loopback certificate was made
	reread   time.Time // when the files were read last
	warned   time.Time // when the CAs were looked at last
	failed   time.Time // when a renewal failed; zero if the last one did not
}

// tick is one check. now is wallClock; raw is the clock as it stands, which is what the API server goes by.
func (p *PKI) tick(s *renewal, now, raw time.Time) {
	if raw.Before(s.loopback.Add(-time.Hour)) || raw.After(s.loopback.Add(loopbackLife)) {
		p.log.Info("the API server needs a restart for a new loopback certificate", "madeAt", s.loopback, "clock", raw)
		s.loopback = raw
		p.cfg.OnRenew(APIServerLoopback)
	}
	if passed(s.warned, now, day) {
		s.warned = now
		p.warnAuthorities(now)
	}
	if !s.failed.IsZero() && !passed(s.failed, now, retryInterval) {
		return
	}
	if !p.due(now) && !passed(s.reread, now, rereadInterval) {
		return
	}
	if _, err := p.renew(now); err != nil {
		s.failed = now
		p.log.Error("cannot renew certificates, trying again", "error", err, "in", retryInterval)
		return
	}
	s.reread, s.failed = now, time.Time{}
}

// passed tells whether interval has passed since a moment; a clock that was set back counts as such.
func passed(since, now time.Time, interval time.Duration) bool {
	return now.Before(since) || now.Sub(since) >= interval
}

// due tells whether a leaf in memory has to be renewed.
func (p *PKI) due(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, cert := range p.leaves {
		if !now.Before(renewAt(cert)) {
			return true
		}
	}
	return false
}

// Rotate issues leaf certificates anew at once: those of the given names, or all. It returns their names. Their users load them as
// they do after a renewal; see docs/decisions/pki.md.
func (p *PKI) Rotate(names ...Name) ([]Name, error) {
	for _, n := range names {
		if !slices.ContainsFunc(p.specs, func(s leafSpec) bool { return s.name == n }) {
			return nil, fmt.Errorf("there is no leaf certificate %q on this machine; there are %s", n, joinNames(p.LeafNames()))
		}
	}
	if len(names) == 0 {
		names = p.LeafNames()
	}
	return p.renew(wallClock(), names...)
}

// LeafNames are those of the certificates that this server renews.
func (p *PKI) LeafNames() []Name {
	var names []Name
	for _, s := range p.specs {
		names = append(names, s.name)
	}
	return names
}

func joinNames(names []Name) string {
	var list []string
	for _, n := range names {
		list = append(list, string(n))
	}
	return strings.Join(list, ", ")
}

// renew reads all leaves again and replaces those that need it, and those of the given names. It returns the names of what was replaced.
func (p *PKI) renew(now time.Time, force ...Name) ([]Name, error) {
	dir, err := lockDir(p.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("PKI directory %s: %w", p.cfg.Dir, err)
	}
	defer dir.Close()
	leaves, err := p.refreshLeaves(now, force)
	if err != nil {
		return nil, err
	}
	renewed := slices.DeleteFunc(slices.Clone(leaves), func(l leaf) bool { return l.file == nil })
	kubeconfigs, err := p.kubeconfigs(renewed)
	if err != nil {
		return nil, err
	}
	var names []Name
	for _, l := range renewed {
		names = append(names, l.name)
	}
	return names, p.commit(leaves, kubeconfigs...)
}

func (p *PKI) warnAuthorities(now time.Time) {
	for _, name := range authorityNames() {
		cert := p.authority(name).cert
		if clock := time.Now(); clock.Before(cert.NotBefore) { // an operator's CA; Kedge's own begin in 1970
			p.log.Warn("the clock stands before the beginning of a certificate authority: nothing can connect until it is set",
				"name", name, "clock", clock, "notBefore", cert.NotBefore)
		}
		if cert.NotAfter.Sub(now) < caWarnBefore {
			p.log.Warn("certificate authority ends soon: plan to have its certificate made anew",
				"name", name, "file", p.CertFile(name), "notAfter", cert.NotAfter)
		}
	}
}
