// SPDX-License-Identifier: Apache-2.0

// Package snapshot tests that a cluster can be saved and brought back: on the server that it was on, after the loss of most
// servers, on other hardware, from a bucket, and in spite of power losses in the middle of it.
package snapshot

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

const (
	minute = time.Minute
	dir    = cluster.DataDir + "/snapshots/"
)

// machine is a server on which commands are typed.
type machine struct {
	*cluster.Server

	t *testing.T
}

// kedge runs a command that has to succeed.
func (m machine) kedge(args ...string) string {
	m.t.Helper()
	out, err := m.Exec(cluster.Within(m.t, 2*minute), append([]string{cluster.Program}, args...)...)
	if err != nil {
		m.t.Fatalf("kedge %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

func (m machine) snapshot(args ...string) string {
	m.t.Helper()
	return m.kedge(append([]string{"snapshot"}, args...)...)
}

// refuses runs a command that has to fail, and say why.
func (m machine) refuses(want string, args ...string) {
	m.t.Helper()
	_, err := m.Exec(cluster.Within(m.t, minute), append([]string{cluster.Program, "snapshot"}, args...)...)
	if err == nil || !strings.Contains(err.Error(), want) {
		m.t.Errorf("kedge snapshot %s: %v, want %q", strings.Join(args, " "), err, want)
	}
}

func (m machine) kubectl(args ...string) string {
	m.t.Helper()
	out, err := m.Kubectl(cluster.Within(m.t, minute), args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// mark leaves something in the cluster, in the clear and encrypted, and returns the revision.
func (m machine) mark(name string) int64 {
	m.t.Helper()
	m.kubectl("create", "secret", "generic", name, "--from-literal=x="+name)
	return m.revision(m.kubectl("create", "configmap", name, "-o", "jsonpath={.metadata.resourceVersion}"))
}

func (m machine) revision(text string) int64 {
	m.t.Helper()
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		m.t.Fatal(err)
	}
	return n
}

// marks says which marks are there.
func (m machine) marks(names ...string) string {
	m.t.Helper()
	var found []string
	for _, name := range names {
		cm := m.kubectl("get", "configmap", name, "--ignore-not-found", "-o", "name")
		secret := m.kubectl("get", "secret", name, "--ignore-not-found", "-o", "jsonpath={.data.x}")
		if (cm == "") != (secret == "") {
			m.t.Errorf("%s: %q, but %q", name, cm, secret)
		}
		if cm != "" {
			found = append(found, name)
		}
	}
	return strings.Join(found, " ")
}

type entry struct {
	Name, Trigger, Node, Location, Problem string
	Recipients                             []string
}

func (m machine) list() (names []string, all []entry) {
	m.t.Helper()
	if err := json.Unmarshal([]byte(m.snapshot("list", "-o", "json")), &all); err != nil {
		m.t.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e.Name)
	}
	return names, all
}

func (m machine) start() {
	m.t.Helper()
	cluster.Do(m.t, m.Restart, m.WaitReady)
}

// files of the data directory that a restore makes or leaves.
func (m machine) files() string {
	m.t.Helper()
	out, err := m.Shell(cluster.Within(m.t, minute), "cd "+cluster.DataDir+" && ls -d etcd* pki* restore* 2>/dev/null; true")
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.Join(strings.Fields(out), " ")
}
