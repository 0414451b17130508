// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/service"
)

// leaveGrace is what pods get at the most to end when their machine leaves the cluster.
const leaveGrace = 15 * time.Second

// errLeft ends Run when the machine has left its cluster: not a failure.
var errLeft = errors.New("left the cluster")

// leaving is a request to leave under way.
type leaving struct {
	say  func(string)
	done chan error // what became of it, when the machine has stopped
}

// Leave takes this machine out of the cluster, stops its pods and processes, and removes what makes it part of the cluster. say gets
// progress. When it returns without error, the machine is about to end.
func (m *Machine) leave(ctx context.Context, force bool, say func(string)) error {
	m.mu.Lock()
	if m.leaving != nil || m.supervisor == nil {
		defer m.mu.Unlock()
		return errors.New("this machine is not part of a cluster yet, or is about to leave it already")
	}
	l := &leaving{say: say, done: make(chan error, 1)}
	m.leaving = l
	m.mu.Unlock()
	out := m.LeaveCluster
	if out == nil {
		out = m.leaveAsNode
	}
	if err := out(ctx, force, say); err != nil {
		m.mu.Lock()
		m.leaving = nil
		m.mu.Unlock()
		return err
	}
	close(m.left)
	return <-l.done
}

// Leaving says whether the machine is about to leave the cluster.
func (m *Machine) Leaving() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leaving != nil
}

// hasLeft says that the cluster has forgotten the machine: there is no way back.
func (m *Machine) hasLeft() bool {
	select {
	case <-m.left:
		return true
	default:
		return false
	}
}

// leaveAsNode has the cluster forget this node: a node may ask that for itself.
func (m *Machine) leaveAsNode(ctx context.Context, _ bool, say func(string)) error {
	config, err := clientcmd.BuildConfigFromFlags("", m.Credentials.Kubeconfig)
	if err != nil {
		return err
	}
	return m.forgetNode(ctx, config, say)
}

func (m *Machine) forgetNode(ctx context.Context, config *rest.Config, say func(string)) error {
	config.Timeout = 30 * time.Second
	api, err := join.NewAPI(config)
	if err != nil {
		return err
	}
	if err := api.RemoveNode(ctx, m.cfg.NodeName); err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	say("node " + m.cfg.NodeName + " removed from the cluster")
	return nil
}

// watchLeave ends the machine's run when it has left.
func (m *Machine) watchLeave(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-m.left:
		return errLeft
	}
}

// beforeStop is called before a process stops, the last one but containerd being gone: a machine that leaves takes its pods along.
func (m *Machine) beforeStop(name string) {
	if name != Containerd || !m.hasLeft() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	m.leaving.say("stopping the pods")
	o := node.PodStop{Grace: leaveGrace, GraceCritical: leaveGrace, Remove: true, Say: m.leaving.say}
	if err := node.StopPods(ctx, m.containerdSocket(), o); err != nil {
		m.leaving.say("some pods are left: " + err.Error())
	}
}

// ErrRemoved ends a machine that was removed from the cluster while it ran.
var ErrRemoved = errors.New("removed from the cluster")

// Ended is how a run ended, as the service manager is to see it: after ErrRemoved it was no failure, and Kedge is not to be started again.
func (m *Machine) Ended(err error) error {
	if !errors.Is(err, ErrRemoved) {
		return err
	}
	m.stayEnded()
	return nil
}

func (m *Machine) stayEnded() {
	if err := service.StayEnded(); err != nil {
		m.log.Error("the service may be started again, and join again: stop it", "error", err)
	}
}

// finishLeave removes what made the machine part of the cluster, when everything has stopped. Images and logs stay.
func (m *Machine) finishLeave() {
	c := m.cfg
	var errs []error
	for _, path := range append(m.LeaveFiles, membershipFile(c), BalancerFile(c), c.PKIDir(), node.CertDir(c.KubeletRootDir)) {
		errs = append(errs, os.RemoveAll(path))
	}
	err := errors.Join(errs...)
	if err == nil {
		m.leaving.say("this machine is not part of the cluster any more")
	}
	m.stayEnded()
	m.leaving.done <- err
}

// serveLeave answers POST /leave on the status socket.
func (m *Machine) serveLeave(w http.ResponseWriter, r *http.Request) {
	m.progress(w, r, "leaving the cluster", func(ctx context.Context, say func(string)) error {
		return m.leave(ctx, r.URL.Query().Get("force") == "true", say)
	})
}
