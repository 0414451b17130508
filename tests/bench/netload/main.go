// SPDX-License-Identifier: Apache-2.0

// Command netload is both ends of what the benchmark measures in networks. It serves on a TCP port, and asks others, through the
// network that it is in, when it is told to by HTTP on a unix socket:
//
//	GET /throughput?to=ADDR&for=2s    how many bytes a second one TCP connection takes
//	GET /requests?to=ADDR&for=2s      requests of 64 bytes and their answers, one after the other, over one connection
//	GET /connections?to=ADDR&for=2s   the same, each over a connection of its own
//	GET /lookups?to=ADDR&for=2s&name=NAME&workers=16   DNS queries over UDP, each from a socket of its own as programs send them
//	GET /watch?to=ADDR&reached=true|false&timeout=1m   since when a port is reached, or is not reached any more
//
// The answers are JSON, see Result.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Result is what came of it.
type Result struct {
	PerSecond float64       // bytes, requests, connections or lookups
	P50, P99  time.Duration // of each one
	Done      int
	Failed    int
	Failure   string    // the last one
	At        time.Time // of watch
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "netload:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: netload LISTEN-ADDRESS SOCKET")
	}
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	go accept(l)
	// Made under another name first: who sees the socket can connect to it.
	if err := os.MkdirAll(filepath.Dir(args[1]), 0o755); err != nil {
		return err
	}
	control, err := net.Listen("unix", args[1]+".new")
	if err != nil {
		return err
	}
	if err := os.Rename(args[1]+".new", args[1]); err != nil {
		return err
	}
	s := &http.Server{Handler: routes(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(control) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func routes() http.Handler {
	mux := http.NewServeMux()
	for path, do := range map[string]func(context.Context, url.Values) (Result, error){
		"/throughput": throughput, "/requests": requests, "/connections": connections, "/lookups": lookups, "/watch": watch,
	} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			res, err := do(r.Context(), r.URL.Query())
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			_ = json.NewEncoder(w).Encode(res) // who asked is gone if this fails
		})
	}
	return mux
}

// span is for how long something is done.
func span(q url.Values) (time.Duration, error) { return time.ParseDuration(q.Get("for")) }

func watch(ctx context.Context, q url.Values) (Result, error) {
	timeout, err := time.ParseDuration(q.Get("timeout"))
	if err != nil {
		return Result{}, err
	}
	want, err := strconv.ParseBool(q.Get("reached"))
	if err != nil {
		return Result{}, err
	}
	var trying sync.WaitGroup
	defer trying.Wait()
	deadline := time.Now().Add(timeout)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	// One after the other would not do: most refusals get lost, because the kernel limits how many it sends, and then an attempt takes
	// as long as it may, though the next one would succeed.
	attempts := make(chan attempt)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var res Result
	for {
		select {
		case <-ctx.Done():
			return res, fmt.Errorf("%s: not as wanted after %s: %+v", q.Get("to"), timeout, res)
		case begin := <-tick.C:
			trying.Go(func() {
				err := once(ctx, q.Get("to"), watchTimeout)
				select {
				case attempts <- attempt{begin: begin, end: time.Now(), err: err}:
				case <-ctx.Done():
				}
			})
		case a := <-attempts:
			// It may have been cut short, which says nothing. A connection knows of the deadline, and may fail by it before ctx has.
			if a.end.After(deadline) {
				continue
			}
			res.add(a)
			if want == (a.err == nil) {
				return res, nil
			}
		}
	}
}

const (
	watchEvery   = 5 * time.Millisecond
	watchTimeout = 200 * time.Millisecond
)

type attempt struct {
	begin, end time.Time
	err        error
}

// add takes an attempt. What is reached had been reached at its end, what is not had not at its beginning.
func (res *Result) add(a attempt) {
	res.Done++
	res.At = a.end
	if a.err != nil {
		res.Failed++
		res.Failure = a.err.Error()
		res.At = a.begin
	}
}
