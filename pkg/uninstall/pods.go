// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/service"
)

// StopPods stops Kedge with all pods of this machine, and unmounts their volumes. st is the status of the Kedge that runs, nil if none does.
// timeout bounds the time that pods get, zero stands for what the configuration says.
func StopPods(ctx context.Context, p Places, st *agent.Status, timeout time.Duration, out io.Writer) error {
	o := agent.StopOptions{Timeout: timeout}
	if st != nil {
		if err := agent.StopPods(ctx, p.RunDir, o, out, func(ctx context.Context) error { return service.Stop(ctx, st.PID) }); err != nil {
			return err
		}
	} else {
		if err := service.Stop(ctx, 0); err != nil { // it may be about to start
			return err
		}
		if err := StopPodsAlone(ctx, p, timeout, out); err != nil {
			return err
		}
	}
	n, err := UnmountVolumes(ctx, p)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "Kedge and its pods are stopped, %d volumes unmounted\n", n)
	return err
}

// StopPodsAlone ends the pods of a Kedge that does not run, if there are any.
func StopPodsAlone(ctx context.Context, p Places, timeout time.Duration, out io.Writer) error {
	return stopPodsAlone(ctx, p, agent.StopOptions{Timeout: timeout}, out)
}

func stopPodsAlone(ctx context.Context, p Places, o agent.StopOptions, out io.Writer) error {
	running, err := findProcesses(p)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(running, func(p process) bool { return p.kind == "shim" || p.kind == "container" }) {
		return nil
	}
	return agent.StopPodsAlone(ctx, p.Config, o, out)
}
