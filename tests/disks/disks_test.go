// SPDX-License-Identifier: Apache-2.0

// Package disks tests what a datastore does about its disk: a place of its own, and a database that is full.
package disks

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

func configMap(ctx context.Context, s *cluster.Server, name string, bytes int) error {
	yaml := fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s}\ndata: {a: %q}\n", name, strings.Repeat("x", bytes))
	// Not applied: that keeps a copy in an annotation, which has less room.
	out, err := s.ExecInput(ctx, strings.NewReader(yaml), "kedge", "kubectl", "create", "-f", "-")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// A server does not take a datastore that is elsewhere for one that never was, and goes on where it has been told.
func TestOwnDisk(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1})
	ctx := cluster.Within(t, 6*time.Minute)
	s := c.Servers[0]
	cluster.Do(t, s.Run, s.WaitReady)
	if err := configMap(ctx, s, "kept", 1); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	s.Flags = append(s.Flags, "--etcd-data-dir", "/mnt/ssd")
	refused := func(want string) {
		t.Helper()
		out, err := s.Exec(ctx, append([]string{"kedge", "server"}, s.Flags...)...)
		if err == nil || !strings.Contains(out+err.Error(), want) {
			t.Fatalf("%v, want %s\n%s", err, want, out)
		}
	}
	kept := func() {
		t.Helper()
		cluster.Do(t, s.Run, s.WaitReady)
		if out, err := s.Kubectl(ctx, "get", "configmap", "kept"); err != nil {
			t.Fatal(out, err)
		}
		if err := s.Stop(ctx); err != nil {
			t.Fatal(err)
		}
	}
	run := func(line string) {
		t.Helper()
		if out, err := s.Shell(ctx, line); err != nil {
			t.Fatal(out, err)
		}
	}
	const move = "mv /var/lib/kedge/etcd /var/lib/kedge/etcd.*.json /mnt/ssd/"
	refused(move)
	run("mkdir -p /mnt/ssd && mount -t tmpfs ssd /mnt/ssd && " + move)
	kept()
	// The disk is not mounted at the next start.
	run("mount --move /mnt/ssd /mnt/elsewhere 2>/dev/null || { mkdir -p /mnt/elsewhere && mount --bind /mnt/ssd /mnt/elsewhere && umount /mnt/ssd; }")
	refused("is its disk mounted?")
	run("mount --bind /mnt/elsewhere /mnt/ssd")
	kept()
	// Without the option it is not forgotten either.
	s.Flags = s.Flags[:len(s.Flags)-2]
	refused("etcd-data-dir has changed")
}

func TestFullDatabase(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Options: cluster.Options{Flags: []string{"--etcd-arg", "quota-backend-bytes=25000000"}}})
	ctx := cluster.Within(t, 8*time.Minute)
	s := c.Servers[0]
	cluster.Do(t, s.Run, s.WaitReady)
	remark := func(ctx context.Context) (string, error) {
		st, err := s.Status(ctx)
		if err != nil {
			return "", err
		}
		for _, p := range st.Processes {
			for _, component := range p.Components {
				if component.Name == "etcd" {
					return component.Reason, nil
				}
			}
		}
		return "", errors.New("no etcd in the status")
	}
	var err error
	for n := 0; err == nil; n++ {
		if n == 100 {
			t.Fatal("the quota is not kept")
		}
		err = configMap(ctx, s, fmt.Sprintf("big%d", n), 900<<10)
	}
	if !strings.Contains(err.Error(), "database space exceeded") {
		t.Fatal(err)
	}
	if out, err := s.Kubectl(ctx, "get", "nodes"); err != nil {
		t.Errorf("reading: %s, %v", out, err)
	}
	if out, err := s.Kubectl(ctx, "delete", "configmap", "--all"); err != nil && !strings.Contains(err.Error(), "space exceeded") {
		t.Errorf("deleting: %s, %v", out, err)
	}
	cluster.EventuallyWithin(t, 3*time.Minute, "writes again", func(ctx context.Context) error { return configMap(ctx, s, "again", 1) })
	cluster.EventuallyWithin(t, 2*time.Minute, "no remark", func(ctx context.Context) error {
		text, err := remark(ctx)
		if err == nil && text != "" {
			err = errors.New(text)
		}
		return err
	})
	if err := s.WaitLog(ctx, "the datastore takes writes again"); err != nil {
		t.Error(err)
	}
}
