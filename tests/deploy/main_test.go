// SPDX-License-Identifier: Apache-2.0

// Package deploy tests the manifests directory: what is in it is in the cluster, on whichever server somebody writes it.
package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	minute = time.Minute
	dir    = cluster.DataDir + "/manifests"
)

// atStart is in the directory of every server before its first start.
const atStart = `
apiVersion: v1
kind: ConfigMap
metadata: {name: at-start}
data: {from: start}
`

var shared = cluster.SharedCluster{Name: "deploy", Spec: cluster.Spec{Servers: 3, Options: cluster.Options{ //policy:allow variable one cluster for the package
	Images: []string{}, Files: map[string]string{dir + "/start.yaml": atStart}}}}

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

// put writes a file into the directory of a server.
func put(t *testing.T, s *cluster.Server, name, text string) {
	t.Helper()
	if err := s.WriteFile(path.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, s *cluster.Server, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := s.Exec(cluster.Within(t, minute), "rm", path.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// file is the part of `kedge manifests -o json` that tests look at.
type file struct {
	File, State, ChangedBy string
	Revision               int64
	Objects                int
	Problems               []struct{ Where, Object, Error string }
	Remarks                []string
}

// becomes waits until a file has a state on a server's word, and gives what it says. A file that is not there has the state "".
func becomes(t *testing.T, s *cluster.Server, name, state string, more ...func(file) error) file {
	t.Helper()
	var got file
	cluster.Eventually(t, fmt.Sprintf("%s to be %s, says %s", name, state, s.Name()), func(ctx context.Context) error {
		out, err := s.Exec(ctx, cluster.Program, "manifests", "--all", "-o", "json")
		var exit *testbed.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.Code != 3) {
			return err
		}
		var list []file
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		got = file{}
		for _, f := range list {
			if f.File == name {
				got = f
			}
		}
		if got.State != state {
			return fmt.Errorf("it says %+v", got)
		}
		for _, check := range more {
			if err := check(got); err != nil {
				return fmt.Errorf("%w: %+v", err, got)
			}
		}
		return nil
	})
	return got
}

func revision(n int64) func(file) error {
	return func(f file) error {
		if f.Revision != n {
			return fmt.Errorf("revision %d, want %d", f.Revision, n)
		}
		return nil
	}
}

func says(text string) func(file) error {
	return func(f file) error {
		if !strings.Contains(fmt.Sprintf("%v %v", f.Problems, f.Remarks), text) {
			return fmt.Errorf("it does not say %q", text)
		}
		return nil
	}
}

// has waits until kubectl get gives exactly that; "" is for what is not there.
func has(t *testing.T, s *cluster.Server, want string, args ...string) {
	t.Helper()
	cluster.Eventually(t, fmt.Sprintf("kubectl get %s to say %q", strings.Join(args, " "), want), func(ctx context.Context) error {
		out, err := s.Kubectl(ctx, append([]string{"get", "--ignore-not-found"}, args...)...)
		if err == nil && strings.TrimSpace(out) != want {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
}

// contains waits until a file in the directory of a server has that text; "" is for a file that is not there.
func contains(t *testing.T, s *cluster.Server, name, want string) {
	t.Helper()
	cluster.Eventually(t, fmt.Sprintf("%s of %s to have %q", name, s.Name(), want), func(ctx context.Context) error {
		out, err := s.Shell(ctx, "cat "+path.Join(dir, name)+" 2>/dev/null || true")
		if err == nil && out != want {
			err = fmt.Errorf("it has %q", out)
		}
		return err
	})
}

// configMap gives a file with one object.
func configMap(name, value string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s}\ndata: {value: %q}\n", name, value)
}

const value = "jsonpath={.data.value}"
