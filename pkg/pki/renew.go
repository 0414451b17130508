// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
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

// CertStatus describes a CA or leaf certificate for `kedge status`.
type CertStatus struct {
	Name     Name      `json:"name"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"notAfter"`
	DaysLeft int       `json:"daysLeft"`          // whole days; negative after the end
	RenewAt  time.Time `json:"renewAt,omitzero"`  // zero for a CA: it is not renewed by itself
	Warning  string    `json:"warning,omitempty"` // what to do about it
}

// Status lists all certificates, CAs first.
func (p *PKI) Status() []CertStatus {
	now := wallClock()
	entry := func(name Name, cert *x509.Certificate) CertStatus {
		left := cert.NotAfter.Sub(now)
		s := CertStatus{Name: name, Subject: cert.Subject.String(), NotAfter: cert.NotAfter, DaysLeft: int(left / day)}
		if !name.isCA() {
			s.RenewAt = renewAt(cert)
			if now.After(s.RenewAt.Add(2 * retryInterval)) {
				s.Warning = "its renewal is overdue: see the log for the reason"
			}
		} else if left < caWarnBefore {
			s.Warning = fmt.Sprintf("this CA ends soon: remove %s (not the key), restart and hand out kubeconfigs again", p.CertFile(name))
		}
		return s
	}
	var out []CertStatus
	for _, name := range authorityNames() {
		out = append(out, entry(name, p.authorities[name].cert))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, spec := range p.specs {
		out = append(out, entry(spec.name, p.leaves[spec.name]))
	}
	return out
}

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
	if err := p.renew(now); err != nil {
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

// renew reads all leaves again and replaces those that need it.
func (p *PKI) renew(now time.Time) error {
	dir, err := lockDir(p.cfg.Dir)
	if err != nil {
		return fmt.Errorf("PKI directory %s: %w", p.cfg.Dir, err)
	}
	defer dir.Close()
	leaves, err := p.refreshLeaves(now)
	if err != nil {
		return err
	}
	renewed := slices.DeleteFunc(slices.Clone(leaves), func(l leaf) bool { return l.file == nil })
	kubeconfigs, err := p.kubeconfigs(renewed)
	if err != nil {
		return err
	}
	return p.commit(leaves, kubeconfigs...)
}

func (p *PKI) warnAuthorities(now time.Time) {
	for _, name := range authorityNames() {
		cert := p.authorities[name].cert
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
