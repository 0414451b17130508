// SPDX-License-Identifier: Apache-2.0

// Command writer writes ConfigMaps and reads them, with several clients at once, and records a history of it for
// [github.com/kedge-io/kedge/tests/history]. It runs in a machine of a scenario test.
//
// Each writer has a key of its own that it counts up, and creates another key after every few of those writes. A request
// that fails is repeated at once, as long as it takes. SIGTERM, or the end of -duration, ends it: it then reads all keys
// back, and exits with 0 if that was recorded.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/kedge-io/kedge/tests/history"
)

// options are the flags.
type options struct {
	server, kubeconfig, namespace, out string
	writers, readers                   int
	readOnly                           bool
	rate                               float64
	duration, timeout                  time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.server, "server", "https://127.0.0.1:6444", "`URL` of the API server")
	flag.StringVar(&o.kubeconfig, "kubeconfig", "/etc/kedge/kubeconfig.yaml", "`FILE` with the client certificate and the CA; its server is not used")
	flag.StringVar(&o.namespace, "namespace", "default", "write to this namespace, which nobody else uses")
	flag.StringVar(&o.out, "o", "history.jsonl", "write the history to `FILE`")
	flag.IntVar(&o.writers, "writers", 4, "clients that write")
	flag.IntVar(&o.readers, "readers", 1, "clients that read")
	flag.BoolVar(&o.readOnly, "read-only", false, "only read, what another process with as many writers writes")
	flag.Float64Var(&o.rate, "rate", 10, "writes, or reads, per second and client")
	flag.DurationVar(&o.duration, "duration", 0, "end after this time; 0: with SIGTERM")
	flag.DurationVar(&o.timeout, "timeout", 2*time.Second, "of one request")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "writer:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if o.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.duration)
		defer cancel()
	}
	config, err := readKubeconfig(o.kubeconfig)
	if err != nil {
		return err
	}
	out, err := os.Create(o.out)
	if err != nil {
		return err
	}
	rec := history.NewRecorder(out)
	var clients sync.WaitGroup
	for i := 0; i < o.writers && !o.readOnly; i++ {
		w := writer{client: newClient(o, config, rec, fmt.Sprintf("w%d", i))}
		clients.Go(func() { w.run(ctx, o.rate) })
	}
	for i := range o.readers {
		r := reader{client: newClient(o, config, rec, fmt.Sprintf("r%d", i)), writers: o.writers}
		clients.Go(func() { r.run(ctx, o.rate) })
	}
	fmt.Println("at work on", o.server)
	clients.Wait()
	err = errors.Join(readBack(newClient(o, config, rec, "end")), rec.Err(), out.Close())
	if err == nil {
		fmt.Println(complete)
	}
	return err
}

// complete is the last line on standard output if the history is complete.
const complete = "everything was read back"

// readBack reads everything once more, now that nobody writes.
func readBack(c *client) error {
	deadline := time.Now().Add(time.Minute)
	for {
		err := c.list(context.Background())
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("read everything back: %w", err)
		}
		time.Sleep(retryPause)
	}
}

// retryPause keeps a client from burning the processor while connections are refused.
const retryPause = 20 * time.Millisecond

// every calls f at a rate until ctx ends. What could not be done in time is not made up for.
func every(ctx context.Context, rate float64, f func(n int)) {
	tick := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer tick.Stop()
	for n := 0; ; n++ {
		f(n)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// createEvery says after how many counts of its own key a writer creates a new one.
const createEvery = 4

type writer struct{ *client }

func (w writer) run(ctx context.Context, rate float64) {
	own := &key{name: w.name}
	every(ctx, rate, func(n int) {
		if n%createEvery == createEvery-1 {
			w.write(ctx, &key{name: fmt.Sprintf("%s-%d", w.name, n)})
			return
		}
		w.write(ctx, own)
	})
}

// key is what its writer knows about it.
type key struct {
	name    string
	attempt int64
	version string // resourceVersion; "" if it does not exist
}

// write makes attempts until one is acknowledged or ctx ends. After each that was not it reads the key, because an attempt
// that got no answer may have changed it.
func (w writer) write(ctx context.Context, k *key) {
	for {
		k.attempt++
		version, err := w.put(k)
		if err == nil {
			k.version = version
			return
		}
		for err != nil {
			if !pause(ctx) {
				return
			}
			k.version, err = w.get(k.name)
		}
	}
}

func pause(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(retryPause):
		return true
	}
}

type reader struct {
	*client
	writers int
}

// listEvery says after how many reads of single keys a reader reads all of them.
const listEvery = 20

func (r reader) run(ctx context.Context, rate float64) {
	every(ctx, rate, func(n int) {
		if n%listEvery == listEvery-1 {
			_ = r.list(ctx) // recorded, and soon tried again
			return
		}
		_, _ = r.get(fmt.Sprintf("w%d", rand.IntN(r.writers)))
	})
}
