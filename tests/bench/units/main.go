// SPDX-License-Identifier: Apache-2.0

// Command units stands in for systemd on the stock side of the benchmark: it starts the programs listed in a JSON file,
// all at once or when what they wait for is there, starts those that end again after half a second, and at SIGTERM ends
// them in reverse order, one after the other, so that none loses what it needs for a clean end. It costs next to nothing and is not counted.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Unit is one program.
type Unit struct {
	Name  string
	Args  []string
	Env   []string // added to ours
	After string   // a file that has to exist, or an https:// address that has to answer 200, before the program starts
	Once  bool     // it has to succeed once; the others are started again when they end
}

const (
	poll    = 20 * time.Millisecond
	restart = 500 * time.Millisecond
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "units:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if len(os.Args) != 2 {
		return errors.New("usage: units FILE.json")
	}
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		return err
	}
	var units []Unit
	if err := json.Unmarshal(text, &units); err != nil {
		return fmt.Errorf("%s: %w", os.Args[1], err)
	}
	stops := make([]func(), len(units))
	for i, u := range units {
		stops[i] = u.background()
	}
	<-ctx.Done()
	for _, stop := range slices.Backward(stops) {
		stop()
	}
	return nil
}

// background runs the unit until the function that it returns is called, which returns when the unit has ended.
func (u Unit) background() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { u.run(ctx) })
	return func() {
		cancel()
		wg.Wait()
	}
}

func (u Unit) run(ctx context.Context) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}, Timeout: 2 * time.Second}
	for !u.mayStart(ctx, client) {
		if !pause(ctx, poll) {
			return
		}
	}
	for {
		err := u.start(ctx)
		if u.Once && err == nil {
			return
		}
		fmt.Fprintf(os.Stderr, "units: %s ended: %v\n", u.Name, err)
		if !pause(ctx, restart) {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (u Unit) mayStart(ctx context.Context, client *http.Client) bool {
	if !strings.HasPrefix(u.After, "https://") {
		_, err := os.Stat(u.After)
		return u.After == "" || err == nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.After, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return errors.Join(err, resp.Body.Close()) == nil && resp.StatusCode == http.StatusOK
}

func (u Unit) start(ctx context.Context) error {
	log, err := os.OpenFile("/var/log/"+u.Name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, u.Args[0], u.Args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), u.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	return cmd.Run()
}
