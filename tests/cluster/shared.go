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

	home
	once   sync.Once
	server *Server
	err    error
}

// home is where the machines of a package live.
type home struct {
	bed *testbed.Bed
	dir string // for files
}

// Main runs the tests and removes the machines afterwards; if a test failed it keeps the logs and says where.
func (h *home) Main(m *testing.M) int {
	code := m.Run()
	if err := h.close(code != 0); err != nil {
		fmt.Println(err)
		code = max(code, 1)
	}
	return code
}

func (h *home) open(ctx context.Context, name string) error {
	var err error
	if h.bed, err = testbed.Open(ctx, name); err != nil {
		return err
	}
	h.dir, err = os.MkdirTemp("", "kedge-"+name+"-")
	return err
}

// close removes the machines; if a test failed it keeps the logs and says where.
func (h *home) close(failed bool) error {
	var errs []error
	if h.bed != nil {
		if failed {
			fmt.Println("logs are kept in", h.bed.KeepLogs())
		}
		if err := h.bed.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close the test bed: %w", err))
		}
	}
	if h.dir != "" {
		errs = append(errs, os.RemoveAll(h.dir))
	}
	*h = home{}
	return errors.Join(errs...)
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
	err := s.open(ctx, s.Name)
	if err != nil {
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

// SharedCluster is one cluster for all tests of a package, which run one after the other. The first that asks for it starts it:
//
//	var shared = cluster.SharedCluster{Name: "ha", Spec: cluster.Spec{Servers: 3, Agents: 1}}
//	func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }
type SharedCluster struct {
	// Name of the package, for the directory with logs.
	Name string
	// Spec of the cluster. Images are added when none are given.
	Spec Spec

	home
	cluster *Cluster
	err     error // of the start
}

// Cluster returns the cluster, in which everything is ready. When the test ends, what it did to the machines is repaired; if
// that does not succeed the test has failed, and the next one gets a new cluster. It skips the test without root.
func (s *SharedCluster) Cluster(t *testing.T) *Cluster {
	t.Helper()
	if s.cluster == nil && s.err == nil {
		s.err = s.start(t)
	}
	if errors.Is(s.err, testbed.ErrNotRoot) {
		t.Skip(s.err)
	}
	if s.err != nil {
		t.Fatal(s.err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		err := s.cluster.Repair(ctx)
		if err == nil {
			return
		}
		t.Errorf("repair the cluster: %v", err)
		s.cluster = nil
		if err := s.close(true); err != nil {
			t.Error(err)
		}
	})
	return s.cluster
}

func (s *SharedCluster) start(t *testing.T) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	err := s.open(ctx, s.Name)
	if err != nil {
		return err
	}
	spec := s.Spec
	if spec.Options.Images == nil {
		if spec.Options.Images, err = Images(ctx, s.bed, s.dir); err != nil {
			return err
		}
	}
	if s.cluster, err = New(ctx, s.bed, spec); err != nil {
		return err
	}
	start, cancelStart := context.WithTimeout(ctx, 5*time.Minute)
	defer cancelStart()
	err = s.cluster.Start(start)
	t.Logf("seconds from start to Ready: %v", s.cluster.Took)
	return err
}

// ForTest makes the machines of a cluster for one test. Nothing runs in them yet. It skips the test without root.
func ForTest(t *testing.T, spec Spec) *Cluster {
	t.Helper()
	bed := testbed.New(t)
	ctx := Within(t, 3*time.Minute)
	var err error
	if spec.Options.Images, err = Images(ctx, bed, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	c, err := New(ctx, bed, spec)
	if err != nil {
		t.Fatal(err)
	}
	return c
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
