// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/util"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	apitypes "k8s.io/apimachinery/pkg/types"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// podStop is a request to take the pods along when the machine's Kedge stops.
type podStop struct {
	why                  string
	grace, graceCritical time.Duration
	remove               bool
	say                  func(string)
}

// StopOptions are those of StopPods.
type StopOptions struct {
	// Timeout bounds the time that all pods together get to end. Zero or less: what the configuration says.
	Timeout time.Duration
	// Remove has the pods removed: they are not to start again.
	Remove bool
}

// armed is what Kedge says when it is going to take its pods along.
const armed = "the pods end with Kedge"

// StopPods asks the Kedge of this machine to take its pods along when it is told to stop, calls stop, which has to tell it so, and writes
// to out how it goes, until all have ended.
func StopPods(ctx context.Context, runDir string, o StopOptions, out io.Writer, stop func(context.Context) error) error {
	q := url.Values{"timeout": {o.Timeout.String()}}
	if o.Remove {
		q.Set("remove", "true")
	}
	body, err := ask(ctx, runDir, http.MethodPost, "/stop-pods?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer body.Close()
	stopped := make(chan error, 1)
	for lines := bufio.NewScanner(body); lines.Scan(); {
		text := lines.Text()
		if failed, ok := strings.CutPrefix(text, "error: "); ok {
			for lines.Scan() {
				failed += "\n" + lines.Text()
			}
			return errors.New(failed)
		}
		switch text {
		case armed:
			go func() {
				err := stop(ctx)
				stopped <- err
				if err != nil {
					body.Close() // takes the wish back
				}
			}()
		case "ok":
			return <-stopped
		default:
			fmt.Fprintln(out, text)
		}
	}
	select {
	case err := <-stopped:
		if err != nil {
			return err
		}
	default:
	}
	return errors.New("kedge ended before its pods did: see its log, and run `kedge stop --pods` again")
}

// serveStopPods answers POST /stop-pods: it notes the wish and says what becomes of it when Kedge is told to stop. The wish ends with the
// request.
func (m *Machine) serveStopPods(w http.ResponseWriter, r *http.Request) {
	timeout, err := time.ParseDuration(r.FormValue("timeout"))
	if err != nil {
		http.Error(w, "error: timeout: "+err.Error(), http.StatusBadRequest)
		return
	}
	lines := make(chan string, 64)
	done := make(chan struct{})
	stop := &podStop{why: "as asked for", grace: m.cfg.ShutdownGracePeriod, graceCritical: m.cfg.ShutdownGraceCritical, remove: r.FormValue("remove") == "true",
		say: func(text string) {
			select {
			case lines <- text:
			case <-done: // who asked is gone: the pods end all the same
			}
		}}
	stop.grace, stop.graceCritical = StopOptions{Timeout: timeout}.split(stop.grace, stop.graceCritical)
	m.mu.Lock()
	refused := m.leaving != nil || m.supervisor == nil || m.podStop != nil
	if !refused {
		m.podStop = stop
	}
	m.mu.Unlock()
	if refused {
		http.Error(w, "error: Kedge has not started its processes yet, or is about to stop already", http.StatusConflict)
		return
	}
	defer func() {
		close(done)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.podStop == stop && !m.podsEnding {
			m.podStop = nil
		}
	}()
	flush := func() { _ = http.NewResponseController(w).Flush() }
	fmt.Fprintln(w, armed)
	flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case text := <-lines:
			fmt.Fprintln(w, text)
			flush()
			if text == "ok" || strings.HasPrefix(text, "error: ") {
				return
			}
		}
	}
}

// endPods is called when Kedge was told to stop, while everything still runs: it ends the pods if somebody asked for it, or if the whole
// machine goes down.
func (m *Machine) endPods() {
	m.mu.Lock()
	stop := m.podStop
	if stop == nil && !m.hasLeft() && m.machineStops() {
		say := func(text string) { m.log.Info("the machine goes down", "step", text) }
		stop = &podStop{why: "the machine goes down", grace: m.cfg.ShutdownGracePeriod, graceCritical: m.cfg.ShutdownGraceCritical, say: say}
		m.podStop = stop
	}
	m.podsEnding = stop != nil
	m.mu.Unlock()
	if stop == nil {
		return
	}
	if !m.cfg.HasNode() {
		stop.say("ok")
		return
	}
	start := time.Now()
	limit := stop.grace + stop.graceCritical + time.Minute // for what comes before and after
	m.notify.send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=stopping the pods: %s", limit.Microseconds(), stop.why))
	m.log.Info("stopping the pods", "reason", stop.why, "grace", stop.grace, "graceCritical", stop.graceCritical)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := m.stopPods(ctx, stop); err != nil {
		m.log.Error("some pods did not end as they should", "error", err)
		stop.say("error: " + err.Error())
		return
	}
	m.log.Info("the pods have ended", "took", time.Since(start).Round(time.Millisecond))
	stop.say("ok")
}

func (m *Machine) stopPods(ctx context.Context, stop *podStop) error {
	pods := m.ownPods(ctx)
	if err := m.stopKubelet(ctx); err != nil {
		return err
	}
	// Nobody sends requests or pods here any more. Without an API server that answers there is nobody to tell.
	if err := m.markNode(ctx, stop.why); err != nil {
		m.log.Warn("the cluster does not know yet that this node stops", "error", err)
	}
	return node.StopPods(ctx, m.containerdSocket(),
		node.PodStop{Grace: stop.grace, GraceCritical: stop.graceCritical, Pods: pods, Remove: stop.remove, Say: stop.say})
}

// dnsPatience is how long pods wait for names to be looked up again, before they end.
const dnsPatience = 10 * time.Second

// stopKubelet has the [node] process start again without what would start pods again.
func (m *Machine) stopKubelet(ctx context.Context) error {
	status := func() (st supervise.ProcessStatus) {
		for _, p := range m.supervisor.Status() {
			if p.Name == NodeProcess {
				st = p
			}
		}
		return st
	}
	m.draining.Store(true)
	was := status().PID
	if was == 0 { // it is about to start, maybe with the configuration of before
		was = -1
	}
	if err := m.Restart(NodeProcess, "the pods are about to end"); err != nil {
		return err
	}
	if err := supervise.Poll(ctx, func() error {
		if st := status(); st.PID == 0 || st.PID == was {
			return errors.New("the kubelet still runs")
		}
		return nil
	}); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, dnsPatience)
	defer cancel()
	_ = supervise.Poll(wait, func() error { // a pod that ends without names is better than one that does not end
		for _, c := range status().Components {
			if c.Name == node.ComponentDNS && c.State != supervise.Ready && !m.cfg.Disabled(config.ComponentCoreDNS) {
				return errors.New("names cannot be looked up yet")
			}
		}
		return nil
	})
	return nil
}

// apiPatience is how long a machine that stops waits for an answer of the API.
const apiPatience = 3 * time.Second

// ownPods asks the API for this node's pods, by UID; nil if it does not answer.
func (m *Machine) ownPods(ctx context.Context) map[string]*corev1.Pod {
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	client, err := m.Client()
	if err != nil {
		return nil
	}
	own := fields.OneTermEqualSelector("spec.nodeName", m.cfg.NodeName).String()
	list, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: own, ResourceVersion: "0"})
	if err != nil {
		m.log.Warn("the pods' priorities are not known: those of kube-system end last", "error", err)
		return nil
	}
	pods := make(map[string]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[string(list.Items[i].UID)] = &list.Items[i]
	}
	return pods
}

// markNode tells the cluster that the node is not ready. The kubelet says otherwise when it runs again.
func (m *Machine) markNode(ctx context.Context, why string) error {
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	client, err := m.Client()
	if err != nil {
		return err
	}
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionFalse, Reason: "NodeShutdown", Message: "Kedge stops with its pods: " + why,
		LastHeartbeatTime: now, LastTransitionTime: now,
	}}}})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Nodes().Patch(ctx, m.cfg.NodeName, apitypes.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// systemState asks systemd how the machine is: running, stopping … It speaks to PID 1 itself, so it takes neither D-Bus nor logind.
func systemState(ctx context.Context) (string, error) {
	if !util.IsRunningSystemd() {
		return "", nil
	}
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	p, err := conn.SystemStateContext(ctx)
	if err != nil {
		return "", err
	}
	state, _ := p.Value.Value().(string)
	return state, nil
}

// machineStops says whether the whole machine is about to stop: Kedge alone may be told to at any time, and then pods stay.
func (m *Machine) machineStops() bool {
	ctx, cancel := context.WithTimeout(context.Background(), apiPatience)
	defer cancel()
	state, err := systemState(ctx)
	if err != nil {
		m.log.Warn("whether the machine is about to stop is not known: pods keep running", "error", err)
	}
	return state == "stopping"
}

// StopPodsAlone ends the pods of this machine while no Kedge runs: it starts containerd for that, as the last Kedge has left it.
func StopPodsAlone(ctx context.Context, cfg *config.Config, o StopOptions, out io.Writer) error {
	runDir := cfg.RunDir
	unlock, err := Lock(runDir)
	if err != nil {
		return err
	}
	defer unlock()
	text, err := os.ReadFile(filepath.Join(runDir, Containerd+".json"))
	if err != nil {
		return fmt.Errorf("containerd's configuration from the last start: %w", err)
	}
	var known node.ContainerdConfig
	if err := json.Unmarshal(text, &known); err != nil {
		return fmt.Errorf("containerd's configuration from the last start: %w", err)
	}
	// It finds the program of the shims that it takes over in there.
	if err := os.Setenv("PATH", filepath.Dir(known.Shim)+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(runDir, "stop.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	s := &supervise.Supervisor{
		Processes: []*supervise.Process{{Name: Containerd, RunDir: runDir, StopTimeout: 10 * time.Second, Components: []string{node.ComponentContainerd},
			Config: func() (any, error) { return known, nil }, Output: log}},
		StopOrder: []string{Containerd},
		Logger:    slog.New(slog.DiscardHandler),
	}
	running, end := context.WithCancel(ctx)
	stopped := make(chan struct{})
	go func() { s.Run(running); close(stopped) }()
	defer func() { end(); <-stopped }()
	grace, critical := o.split(cfg.ShutdownGracePeriod, cfg.ShutdownGraceCritical)
	say := func(text string) { fmt.Fprintln(out, text) }
	if err := node.StopPods(ctx, known.Socket(), node.PodStop{Grace: grace, GraceCritical: critical, Remove: o.Remove, Say: say}); err != nil {
		return fmt.Errorf("%w (containerd's log: %s)", err, log.Name())
	}
	return nil
}

// split divides the time that there is, or takes what is given.
func (o StopOptions) split(grace, critical time.Duration) (time.Duration, time.Duration) {
	if o.Timeout <= 0 {
		return grace, critical
	}
	critical = min(o.Timeout/4, critical)
	return o.Timeout - critical, critical
}
