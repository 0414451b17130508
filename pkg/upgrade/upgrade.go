// SPDX-License-Identifier: Apache-2.0

// Package upgrade replaces the program of a machine by another version, and goes back by itself when that one does not do.
//
// The program that the service manager starts is the old one until the new one has proved itself. Stage puts the new one beside it
// (kedge.next), verified. The supervisor notes an upgrade under way (Begin) and starts again in place. From then on each start of the
// old program counts a try and becomes the new one by exec (Run). The new one watches itself (Trial.Watch): when everything has been
// ready for a while it takes the old one's name, which is kept as kedge.previous; when its time is over, or it ends with an error, it
// becomes the old one again. When it crashes, cannot be executed, or the machine loses power, the old one is what starts next, and
// gives up after three tries. A guardian, a process of the old program, ends one that hangs.
//
// Why that is so: docs/decisions/upgrade.md.
package upgrade

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

// Suffixes of the programs beside the one that is started.
const (
	nextSuffix     = ".next"
	previousSuffix = ".previous"
)

// tries is how often a new version may be started before it has proved itself. A power cut costs one, too.
const tries = 3

// historyLength is how many results are kept.
const historyLength = 50

// DefaultTimeout is what a new version has from its start until it is ready.
const DefaultTimeout = 5 * time.Minute

// Phase of an upgrade that is under way.
type Phase string

// Phases.
const (
	// PhaseTrial: the new version is started and has to prove itself.
	PhaseTrial Phase = "trial"
	// PhaseConfirming: it has, and takes the place of the old one.
	PhaseConfirming Phase = "confirming"
	// PhaseFailed: it has not; the old one clears it away with its next start.
	PhaseFailed Phase = "failed"
)

// Pending is an upgrade that is under way.
type Pending struct {
	ID       string        `json:"id"`
	From     string        `json:"from"` // version
	To       string        `json:"to"`
	Program  string        `json:"program"` // what the service manager starts
	Started  time.Time     `json:"started"`
	Timeout  time.Duration `json:"timeout"` // nanoseconds
	Tries    int           `json:"tries"`
	Phase    Phase         `json:"phase"`
	Reason   string        `json:"reason,omitempty"` // of a failure
	Back     bool          `json:"back,omitempty"`   // it goes back to the previous version
	Stopped  bool          `json:"stopped,omitempty"`
	Guardian int           `json:"guardian,omitempty"` // its process ID
	Snapshot string        `json:"snapshot,omitempty"` // of the datastore, taken before
}

// Next is the program under trial.
func (p *Pending) Next() string { return p.Program + nextSuffix }

// Previous is where the old program stays.
func (p *Pending) Previous() string { return p.Program + previousSuffix }

// Result is an upgrade that is over.
type Result struct {
	ID       string    `json:"id"`
	From     string    `json:"from"`
	To       string    `json:"to"`
	Started  time.Time `json:"started"`
	Ended    time.Time `json:"ended"`
	Failed   bool      `json:"failed"`
	Reason   string    `json:"reason,omitempty"`
	Back     bool      `json:"back,omitempty"`
	Snapshot string    `json:"snapshot,omitempty"`
}

// Line says it to people.
func (r Result) Line() string {
	what := "upgrade"
	if r.Back {
		what = "way back"
	}
	switch {
	case r.Failed:
		return fmt.Sprintf("%s from %s to %s failed: %s", what, r.From, r.To, r.Reason)
	default:
		return fmt.Sprintf("%s from %s to %s succeeded", what, r.From, r.To)
	}
}

// Store is what a machine keeps of its upgrades, in data-dir/upgrade.
type Store struct{ dir string }

// In gives the store of a data directory. It need not exist.
func In(dataDir string) Store { return Store{filepath.Join(dataDir, "upgrade")} }

// Dir is where it is.
func (s Store) Dir() string { return s.dir }

func (s Store) pendingFile() string { return filepath.Join(s.dir, "pending.json") }

func (s Store) historyFile() string { return filepath.Join(s.dir, "history.json") }

// Pending is the upgrade under way, nil if there is none.
func (s Store) Pending() (*Pending, error) {
	var p Pending
	if found, err := read(s.pendingFile(), &p); !found || err != nil {
		return nil, err
	}
	if !filepath.IsAbs(p.Program) {
		return nil, fmt.Errorf("%s: it has no program", s.pendingFile())
	}
	return &p, nil
}

// History has the results, the latest last.
func (s Store) History() ([]Result, error) {
	var list []Result
	_, err := read(s.historyFile(), &list)
	return list, err
}

func read(file string, into any) (found bool, err error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return false, fmt.Errorf("%s: %w", file, err)
	}
	return true, nil
}

// write is safe against power loss: afterwards it is the old content or the new one.
func (s Store) write(file string, content any) error {
	b, err := json.MarshalIndent(content, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if err := renameio.WriteFile(file, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return syncDir(s.dir)
}

func (s Store) put(p *Pending) error { return s.write(s.pendingFile(), p) }

// finish moves an upgrade to the history. What is left of a new version that failed goes away.
func (s Store) finish(p *Pending) error {
	history, err := s.History()
	if err != nil { // it is damaged, and only a record
		history = nil
	}
	r := Result{ID: p.ID, From: p.From, To: p.To, Started: p.Started, Ended: time.Now().UTC().Truncate(time.Second), Failed: p.Phase == PhaseFailed, Reason: p.Reason,
		Back: p.Back, Snapshot: p.Snapshot}
	if len(history) == 0 || history[len(history)-1].ID != p.ID { // else a power cut came between the two files
		history = append(history, r)
	}
	history = history[max(0, len(history)-historyLength):]
	if err := s.write(s.historyFile(), history); err != nil {
		return err
	}
	if r.Failed {
		if err := os.Remove(p.Next()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Remove(s.pendingFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(s.dir)
}

// syncDir makes names in a directory safe against power loss.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Program is the file that this process runs, also when it has been replaced meanwhile.
func Program() (string, error) {
	self, err := os.Executable()
	return strings.TrimSuffix(self, " (deleted)"), err
}
