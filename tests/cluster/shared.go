// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Shared is one server for all tests of a package, started by the first that asks for it:
//
//	var shared = cluster.Shared{Name: "network"}
//	func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }
type Shared struct {
	// Name of the package, for the directory with logs.
	Name string
	// Options are asked for with the bed and a directory for files. Images are added when none are given.
	Options func(bed *testbed.Bed, dir string) (Options, error)

	once   sync.Once
	bed    *testbed.Bed
	dir    string
	server *Server
	err    error
}

// Main runs the tests and removes the machines afterwards; if a test failed it keeps the logs and says where.
func (s *Shared) Main(m *testing.M) int {
	code := m.Run()
	if s.bed != nil {
		if code != 0 {
			fmt.Println("logs are kept in", s.bed.KeepLogs())
		}
		if err := s.bed.Close(); err != nil {
			fmt.Println("close the test bed:", err)
			code = max(code, 1)
		}
	}
	if err := os.RemoveAll(s.dir); s.dir != "" && err != nil {
		fmt.Println(err)
	}
	return code
}

// Server returns the running server. It skips the test without root, and fails it when the server did not start.
func (s *Shared) Server(t *testing.T) *Server {
	t.Helper()
	s.once.Do(func() { s.err = s.start() })
	if errors.Is(s.err, testbed.ErrNotRoot) {
		t.Skip(s.err)
	}
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.server
}

func (s *Shared) start() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var err error
	if s.bed, err = testbed.Open(ctx, s.Name); err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "kedge-"+s.Name+"-"); err != nil {
		return err
	}
	var o Options
	if s.Options != nil {
		if o, err = s.Options(s.bed, s.dir); err != nil {
			return err
		}
	}
	if o.Images == nil {
		if o.Images, err = Images(ctx, s.bed, s.dir); err != nil {
			return err
		}
	}
	start, cancelStart := context.WithTimeout(ctx, 3*time.Minute)
	defer cancelStart()
	s.server, err = Start(start, s.bed, "m1", o)
	return err
}

// Namespace makes a namespace for a test, in which pods are accepted, and deletes it afterwards. When the test failed, its
// output shows the namespace's pods and events.
func (s *Server) Namespace(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ns := strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(t.Name()), "-"), "-")
	ns = ns[:min(len(ns), 50)] + time.Now().Format("-150405")
	if _, err := s.Kubectl(ctx, "create", "namespace", ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			s.show(ctx, t, ns)
		}
		if _, err := s.Kubectl(ctx, "delete", "namespace", ns, "--wait=false"); err != nil {
			t.Logf("delete the namespace: %v", err)
		}
	})
	err := testbed.Wait(ctx, "the service account of namespace "+ns, func(ctx context.Context) error {
		_, err := s.Kubectl(ctx, "-n", ns, "get", "serviceaccount/default", "configmap/kube-root-ca.crt")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func (s *Server) show(ctx context.Context, t *testing.T, ns string) {
	t.Helper()
	for _, args := range [][]string{
		{"-n", ns, "get", "pods,services", "-o", "wide"},
		{"-n", ns, "get", "events", "--sort-by=.lastTimestamp"},
	} {
		out, err := s.Kubectl(ctx, args...)
		t.Logf("kubectl %s\n%s%s", strings.Join(args, " "), out, errorText(err))
	}
}
