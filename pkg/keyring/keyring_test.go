// SPDX-License-Identifier: Apache-2.0

package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// store is a real etcd in this process.
func store(t *testing.T) *clientv3.Client {
	t.Helper()
	dir := t.TempDir()
	ec := embed.NewConfig()
	ec.Dir = filepath.Join(dir, "data")
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "c.sock")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p.sock")}
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(ec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{client.String()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	<-e.Server.ReadyNotify()
	return c
}

func open(t *testing.T, c *clientv3.Client, fill byte) *Ring {
	t.Helper()
	r, err := Open(c, bytes.Repeat([]byte{fill}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestRing(t *testing.T) {
	c := store(t)
	r, other := open(t, c, 1), open(t, c, 2)
	ctx := within(t)

	data, revision, err := r.Get(ctx, "encryption")
	if data != nil || revision != 0 || err != nil {
		t.Fatalf("an empty ring has %q, %d, %v", data, revision, err)
	}
	if err := r.Put(ctx, "encryption", []byte("hello secret"), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Put(ctx, "encryption", []byte("too late"), 0); !errors.Is(err, ErrConflict) {
		t.Errorf("a second first value: %v", err)
	}
	data, revision, err = r.Get(ctx, "encryption")
	if string(data) != "hello secret" || revision == 0 || err != nil {
		t.Fatalf("got %q, %d, %v", data, revision, err)
	}
	if err := r.Put(ctx, "encryption", []byte("second"), revision); err != nil {
		t.Fatal(err)
	}
	if err := r.Put(ctx, "encryption", []byte("third"), revision); !errors.Is(err, ErrConflict) {
		t.Errorf("an old revision: %v", err)
	}

	resp, err := c.Get(ctx, Prefix, clientv3.WithPrefix())
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("%v, %v", resp, err)
	}
	raw := resp.Kvs[0].Value
	if bytes.Contains(raw, []byte("second")) {
		t.Error("the datastore holds the value in the clear")
	}

	// Another cluster's secret, another name, a changed bit, what is too short: none is taken for a value.
	if _, _, err := other.Get(ctx, "encryption"); !errors.Is(err, ErrSealed) {
		t.Errorf("with another secret: %v", err)
	}
	put := func(name string, value []byte) {
		t.Helper()
		if _, err := c.Put(ctx, Prefix+name, string(value)); err != nil {
			t.Fatal(err)
		}
	}
	put("other", raw)
	flipped := bytes.Clone(raw)
	flipped[len(flipped)-1] ^= 1
	put("flipped", flipped)
	put("short", []byte("x"))
	for _, name := range []string{"other", "flipped", "short"} {
		if data, revision, err := r.Get(ctx, name); !errors.Is(err, ErrSealed) || data != nil || revision == 0 {
			t.Errorf("%s: %q, %d, %v", name, data, revision, err)
		}
	}
	// What is damaged can be replaced.
	_, revision, _ = r.Get(ctx, "flipped")
	if err := r.Put(ctx, "flipped", []byte("new"), revision); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	c := store(t)
	if _, err := Open(c, make([]byte, 16)); err == nil {
		t.Error("a short secret was taken")
	}
	r := open(t, c, 1)
	for _, name := range []string{"", "A", "a/b", "..", "-a", strings.Repeat("a", 65)} {
		if err := r.Put(within(t), name, []byte("x"), 0); err == nil {
			t.Errorf("name %q was taken", name)
		}
		if _, _, err := r.Get(within(t), name); err == nil {
			t.Errorf("name %q was read", name)
		}
	}
	for _, data := range [][]byte{nil, make([]byte, maxValue+1)} {
		if err := r.Put(within(t), "a", data, 0); err == nil {
			t.Errorf("%d bytes were taken", len(data))
		}
	}
}

// TestConcurrentPuts: of writers who have read the same, one succeeds; with reading again, all do, and nothing is lost.
func TestConcurrentPuts(t *testing.T) {
	c := store(t)
	r := open(t, c, 1)
	ctx := within(t)
	const writers = 8
	var conflicts atomic.Int32
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for {
				data, revision, err := r.Get(ctx, "list")
				if err != nil {
					t.Error(err)
					return
				}
				err = r.Put(ctx, "list", fmt.Appendf(data, "%d,", i), revision)
				if err == nil {
					return
				}
				if !errors.Is(err, ErrConflict) {
					t.Error(err)
					return
				}
				conflicts.Add(1)
			}
		})
	}
	wg.Wait()
	data, _, err := r.Get(ctx, "list")
	if err != nil || len(data) != 2*writers {
		t.Errorf("%q after %d conflicts, %v", data, conflicts.Load(), err)
	}
	for i := range writers {
		if !bytes.Contains(data, fmt.Appendf(nil, "%d,", i)) {
			t.Errorf("the write of %d is lost: %q", i, data)
		}
	}
}

func TestWatch(t *testing.T) {
	c := store(t)
	r := open(t, c, 1)
	ctx, cancel := context.WithCancel(within(t))
	values, err := r.Watch(ctx, "ca")
	if err != nil {
		t.Fatal(err)
	}
	next := func() Value {
		t.Helper()
		select {
		case v, ok := <-values:
			if !ok {
				t.Fatal("the watch has ended")
			}
			return v
		case <-time.After(20 * time.Second):
			t.Fatal("nothing was told")
			return Value{}
		}
	}
	if v := next(); v.Data != nil || v.Revision != 0 || v.Err != nil {
		t.Errorf("at first: %+v", v)
	}
	if err := r.Put(ctx, "ca", []byte("one"), 0); err != nil {
		t.Fatal(err)
	}
	one := next()
	if string(one.Data) != "one" {
		t.Errorf("then: %+v", one)
	}
	if _, err := c.Put(ctx, Prefix+"ca", "tampered"); err != nil {
		t.Fatal(err)
	}
	bad := next()
	if !errors.Is(bad.Err, ErrSealed) {
		t.Errorf("tampered: %+v", bad)
	}
	if err := r.Put(ctx, "ca", []byte("two"), bad.Revision); err != nil {
		t.Fatal(err)
	}
	if v := next(); string(v.Data) != "two" {
		t.Errorf("at last: %+v", v)
	}
	// A watch that begins later starts with what is there.
	late, err := r.Watch(ctx, "ca")
	if err != nil {
		t.Fatal(err)
	}
	if v := <-late; string(v.Data) != "two" {
		t.Errorf("late: %+v", v)
	}
	cancel()
	for range values {
	}
}
