// SPDX-License-Identifier: Apache-2.0

package helm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const (
	// resultFD is where a child writes its result: what Helm's library prints goes elsewhere.
	resultFD = 3
	// spare is how long a child may last beyond its own timeout, and then to end.
	spare   = time.Minute
	endTime = 20 * time.Second
	// tail is how much of what a child printed is kept for an error, in bytes.
	tail = 2000
)

// start runs one piece of work in a process of its own. The error is for work of which nothing is known.
func start(ctx context.Context, req Request) (Result, error) {
	var res Result
	scratch, err := os.MkdirTemp(req.Scratch, "helm-")
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(scratch)
	req.Scratch = scratch
	input, err := json.Marshal(req)
	if err != nil {
		return res, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return res, err
	}
	defer r.Close()
	limit := DefaultTimeout
	if req.Spec.Timeout != nil {
		limit = req.Spec.Timeout.Duration
	}
	// Twice: an upgrade that failed is rolled back, which may take as long.
	ctx, cancel := context.WithTimeout(ctx, 2*limit+spare)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{"kedge [helm]"}
	cmd.Stdin = bytes.NewReader(input)
	said := &lastBytes{}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = endTime
	ended := make(chan error, 1)
	go func() {
		// The parent-death signal is for the end of the thread that forked.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		w.Close()
		if err == nil {
			err = cmd.Wait()
		}
		ended <- err
	}()
	output, readErr := io.ReadAll(r)
	err = <-ended
	if len(output) > 0 {
		return res, json.Unmarshal(output, &res)
	}
	return res, fmt.Errorf("the process ended without a result: %w: %s", errors.Join(err, readErr), strings.TrimSpace(string(said.b)))
}

// lastBytes keeps the end of what is written to it.
type lastBytes struct{ b []byte }

func (l *lastBytes) Write(p []byte) (int, error) {
	l.b = append(l.b, p...)
	l.b = l.b[max(0, len(l.b)-tail):]
	return len(p), nil
}

// Serve is the other side: it reads a request, has it done and writes the result.
func Serve(ctx context.Context, do func(context.Context, Request) Result) error {
	var req Request
	if err := json.NewDecoder(os.Stdin).Decode(&req); err != nil {
		return fmt.Errorf("this process is started by `kedge server`, not by hand: %w", err)
	}
	// It was started through /proc/self/exe, and that is what top would call it.
	if err := os.WriteFile("/proc/self/comm", []byte("kedge-helm"), 0); err != nil {
		return err
	}
	b, err := json.Marshal(do(ctx, req))
	if err != nil {
		return err
	}
	_, err = os.NewFile(resultFD, "result").Write(b)
	return err
}
