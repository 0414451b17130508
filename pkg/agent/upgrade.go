// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/release"
	"github.com/kedge-io/kedge/pkg/upgrade"
	"github.com/kedge-io/kedge/pkg/version"
)

// PathUpgrade is where a machine's Kedge tells of upgrades (GET), takes a release (PUT) and is told to try it (POST): on the socket of
// its root, and on the one that the cluster's administrators reach.
const PathUpgrade = "upgrade"

// restartDelay lets the answer to a request arrive before the machine starts again.
const restartDelay = 500 * time.Millisecond

// factsTimeout bounds questions to the cluster before an upgrade.
const factsTimeout = 20 * time.Second

// UpgradeStatus is what a machine tells of upgrades.
type UpgradeStatus struct {
	Version string           `json:"version"`
	Node    string           `json:"node"`
	Role    config.Role      `json:"role"`
	Arch    string           `json:"arch"`
	DataDir string           `json:"dataDir"`
	Missing string           `json:"missing,omitempty"` // what is not ready
	Pending *upgrade.Pending `json:"pending,omitempty"` // under way
	History []upgrade.Result `json:"history,omitempty"` // the latest last
}

// UpgradeRequest is what POST asks for, as parameters.
type UpgradeRequest struct {
	Check   bool          // only say what is against it
	Back    bool          // to the previous version, not to the one that was sent
	Force   bool          // see upgrade.Facts.Judge
	Timeout time.Duration // zero: upgrade.DefaultTimeout
	SHA256  string        // of the program that was sent; with Check, nothing needs to have been sent
	Info    release.Info  // with Check: what would be sent; with Back: the version that the previous one has to be, if any
	Signer  string        // with Check: who has signed it
	Cluster bool          // with Check: the servers get it before this machine
}

// Values are the parameters of the request.
func (r UpgradeRequest) Values() url.Values {
	v := url.Values{"check": {strconv.FormatBool(r.Check)}, "back": {strconv.FormatBool(r.Back)}, "force": {strconv.FormatBool(r.Force)}, "timeout": {r.Timeout.String()}}
	v.Set("cluster", strconv.FormatBool(r.Cluster))
	v.Set("sha256", r.SHA256)
	v.Set("signer", r.Signer)
	v.Set("version", r.Info.Version)
	v.Set("arch", r.Info.Arch)
	v.Set("size", strconv.FormatInt(r.Info.Size, 10))
	return v
}

// parseUpgradeRequest is the other side of Values.
func parseUpgradeRequest(v url.Values) (UpgradeRequest, error) {
	r := UpgradeRequest{SHA256: v.Get("sha256"), Signer: v.Get("signer"), Info: release.Info{Version: v.Get("version"), Arch: v.Get("arch")}}
	var errs []error
	flag := func(name string) bool {
		b, err := strconv.ParseBool(v.Get(name))
		if v.Get(name) != "" {
			errs = append(errs, err)
		}
		return b
	}
	r.Check, r.Back, r.Force, r.Cluster = flag("check"), flag("back"), flag("force"), flag("cluster")
	var err error
	if text := v.Get("timeout"); text != "" {
		r.Timeout, err = time.ParseDuration(text)
		errs = append(errs, err)
	}
	if text := v.Get("size"); text != "" {
		r.Info.Size, err = strconv.ParseInt(text, 10, 64)
		errs = append(errs, err)
	}
	return r, errors.Join(errs...)
}

// upgrading is the part of a machine that replaces its program.
type upgrading struct {
	busy    sync.Mutex       // held while a request is served
	staged  *release.Release // what was sent, beside the program
	restart chan struct{}    // closed when the machine is to start again
	once    sync.Once
}

// Try is called first of all by a start: it becomes the version that is under trial, if there is one, and calls run otherwise, or when
// this is that version. See upgrade.Run.
func (m *Machine) Try(run func() error) error {
	return upgrade.Run(m.cfg.DataDir, m.log, func(err error) bool { return errors.Is(err, ErrRestart) }, run)
}

// watchUpgrade ends the run when the machine is to start again as another version, and lets a version under trial prove itself.
func (m *Machine) watchUpgrade(ctx context.Context) error {
	trial, err := upgrade.UnderTrial(m.cfg.DataDir, m.started, m.log)
	if err != nil {
		m.log.Error("whether this version is under trial is not known", "error", err)
	}
	if trial != nil {
		if err := trial.Watch(ctx, func() string { return notReady(m.supervisor.Status()) }); err != nil {
			m.log.Error("this version gives up", "error", err)
			return errors.Join(ErrRestart, err)
		}
	}
	select {
	case <-ctx.Done():
		return nil
	case <-m.upgrading.restart:
		m.log.Info("starting again for an upgrade; pods keep running")
		return ErrRestart
	}
}

// trialAgainst is the version to go back to if this is one under trial.
func (m *Machine) trialAgainst() string {
	trial, err := upgrade.UnderTrial(m.cfg.DataDir, m.started, m.log)
	if trial == nil || err != nil {
		return ""
	}
	return trial.From()
}

func (m *Machine) upgradeStaging() (upgrade.Staging, error) {
	program, err := upgrade.Program()
	if err != nil {
		return upgrade.Staging{}, err
	}
	keys, err := release.TrustedKeys(release.DefaultKeyFile)
	return upgrade.Staging{Store: upgrade.In(m.cfg.DataDir), DataDir: m.cfg.DataDir, Program: program, Keys: keys}, err
}

func (m *Machine) serveUpgradeStatus(w http.ResponseWriter, _ *http.Request) {
	st := m.status()
	u := UpgradeStatus{Version: version.Version, Node: st.Node, Role: st.Role, Arch: upgrade.Arch, DataDir: m.cfg.DataDir, Missing: m.missing(st)}
	store := upgrade.In(m.cfg.DataDir)
	var err, historyErr error
	u.Pending, err = store.Pending()
	u.History, historyErr = store.History()
	if err := errors.Join(err, historyErr); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(u); err != nil {
		m.log.Debug("question about upgrades", "error", err)
	}
}

// missing says what is not ready; empty when everything is.
func (m *Machine) missing(st Status) string {
	switch {
	case st.Phase != "":
		return st.Phase
	case st.Processes == nil:
		return "it is starting"
	}
	return notReady(st.Processes)
}

// serveRelease takes a release (PUT) and answers with a release.Release. Nothing of the machine changes by it.
func (m *Machine) serveRelease(w http.ResponseWriter, r *http.Request) {
	if !m.upgrading.busy.TryLock() {
		http.Error(w, upgrade.ErrUnderWay.Error(), http.StatusConflict)
		return
	}
	defer m.upgrading.busy.Unlock()
	m.upgrading.staged = nil
	staging, err := m.upgradeStaging()
	var rel *release.Release
	if err == nil {
		rel, err = staging.Stage(r.Context(), r.Body, func(release.Info) error { return nil })
	}
	if err != nil {
		m.log.Warn("a release was not taken", "error", err)
		// Who sends all of it before reading gets to know why.
		_, _ = io.Copy(io.Discard, r.Body)
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	m.log.Info("a release was taken", "version", rel.Version, "signer", rel.Signer, "sha256", rel.SHA256)
	m.upgrading.staged = rel
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(rel); err != nil {
		m.log.Debug("answer to a release", "error", err)
	}
}

// serveUpgrade answers POST with lines of progress. The last one is "ok" with the upgrade's ID, with Check the version that it would go
// to, or begins with "error: ".
func (m *Machine) serveUpgrade(w http.ResponseWriter, r *http.Request) {
	say := func(text string) {
		if _, err := fmt.Fprintln(w, text); err == nil {
			_ = http.NewResponseController(w).Flush() // who asked may be gone: the upgrade goes on
		}
	}
	if !m.upgrading.busy.TryLock() {
		say("error: " + upgrade.ErrUnderWay.Error())
		return
	}
	defer m.upgrading.busy.Unlock()
	req, err := parseUpgradeRequest(r.URL.Query())
	id := ""
	if err == nil {
		id, err = m.upgrade(context.WithoutCancel(r.Context()), req, say)
	}
	if err != nil {
		say("error: " + err.Error())
		return
	}
	say(strings.TrimSpace("ok " + id))
	if !req.Check {
		time.AfterFunc(restartDelay, func() { m.upgrading.once.Do(func() { close(m.upgrading.restart) }) })
	}
}

// upgrade prepares everything for the next start to be that of another version. With Check it says only which one that would be.
func (m *Machine) upgrade(ctx context.Context, req UpgradeRequest, say func(string)) (id string, err error) {
	staging, err := m.upgradeStaging()
	if err != nil {
		return "", err
	}
	target := req.Info.Version
	switch {
	case req.Back:
		if target, err = staging.Back(ctx); err != nil {
			return "", err
		}
		defer func() {
			if req.Check || err != nil {
				err = errors.Join(err, staging.Unstage())
			}
		}()
		if want := req.Info.Version; want != "" && want != target {
			return "", fmt.Errorf("the version before is %s on this machine, and not %s", target, want)
		}
	case req.Check:
		if err := errors.Join(upgrade.CheckArch(req.Info), release.Trusts(staging.Keys, req.Signer), staging.Check(req.Info.Size)); err != nil {
			return "", err
		}
	default:
		if m.upgrading.staged == nil || m.upgrading.staged.SHA256 != req.SHA256 {
			return "", errors.New("that release has not been sent to this machine, or Kedge has started again since: send it again")
		}
		if err := staging.Check(0); err != nil {
			return "", err
		}
		target = m.upgrading.staged.Version
	}
	facts := m.upgradeFacts(ctx)
	facts.Back = req.Back
	if req.Cluster && !facts.Server {
		facts.Servers = nil
	}
	remarks, err := facts.Judge(target, req.Force)
	for _, remark := range remarks {
		say("remark: " + remark)
	}
	if err != nil {
		return "", err
	}
	if req.Check {
		say(fmt.Sprintf("%s %s can go from %s to %s", m.cfg.Role, m.cfg.NodeName, version.Version, target))
		return target, nil
	}
	p := upgrade.Pending{From: version.Version, To: target, Program: staging.Program, Timeout: req.Timeout, Back: req.Back}
	if m.SaveDatastore != nil {
		if p.Snapshot, err = m.SaveDatastore(ctx); err != nil {
			return "", fmt.Errorf("nothing was changed: the datastore could not be saved before: %w", err)
		}
		say("datastore saved: " + p.Snapshot)
	}
	begun, err := staging.Store.Begin(p)
	if err != nil {
		return "", err
	}
	m.log.Info("upgrading", "from", p.From, "to", p.To, "program", p.Program, "snapshot", p.Snapshot)
	return begun.ID, nil
}

// upgradeFacts asks this machine and the cluster. What cannot be asked is against the upgrade, too.
func (m *Machine) upgradeFacts(ctx context.Context) upgrade.Facts {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	f := upgrade.Facts{Server: m.cfg.HasControlPlane(), Current: version.Version, Missing: m.missing(m.status()), Servers: map[string]string{}}
	if f.Missing != "" {
		return f
	}
	if err := m.askCluster(ctx, &f); err != nil {
		f.Missing = "the cluster does not answer: " + err.Error()
	}
	return f
}

func (m *Machine) askCluster(ctx context.Context, f *upgrade.Facts) error {
	client, err := m.Client()
	if m.Administrator != nil {
		client, err = m.Administrator()
	}
	if err != nil {
		return err
	}
	servers, err := authority.ListServers(ctx, client)
	if err != nil {
		return err
	}
	for name, s := range servers {
		if name != m.cfg.NodeName && s.ControlPlane {
			f.Servers[name] = s.Version
		}
	}
	if m.Administrator == nil { // a node may see itself only
		return nil
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	f.Kubelets = map[string]string{}
	for _, n := range nodes.Items {
		if n.Name == m.cfg.NodeName {
			continue
		}
		f.Kubelets[n.Name] = n.Status.NodeInfo.KubeletVersion
		if servers[n.Name].Etcd && !nodeReady(&n) {
			f.NotReady = append(f.NotReady, n.Name)
		}
	}
	return nil
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
