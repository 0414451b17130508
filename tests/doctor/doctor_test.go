// SPDX-License-Identifier: Apache-2.0

// Package doctor tests `kedge doctor`: a sound cluster has no findings, and each thing that is broken is found, with its remedy.
package doctor

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/kedge-io/kedge/tests/cluster"
)

type finding struct{ Level, About, Check, Text, Remedy string }

// diagnose gives the findings, without those about the machine that the tests run on: its kernel and disk are what they are.
func diagnose(ctx context.Context, n *cluster.Node, args ...string) ([]finding, error) {
	var out bytes.Buffer
	cmd := n.Command(ctx, append([]string{"kedge", "doctor", "-o", "json"}, args...)...)
	cmd.Stdout = &out
	err := cmd.Run()
	var answer struct {
		Findings []finding
		Nodes    map[string]struct {
			Preflight struct {
				Groups []struct{ Probes []struct{ Name string } }
			}
		}
	}
	if e := json.Unmarshal(out.Bytes(), &answer); e != nil {
		return nil, errors.Join(err, e)
	}
	var preflight []string
	for _, report := range answer.Nodes {
		for _, g := range report.Preflight.Groups {
			for _, p := range g.Probes {
				preflight = append(preflight, p.Name)
			}
		}
	}
	return slices.DeleteFunc(answer.Findings, func(f finding) bool { return slices.Contains(preflight, f.Check) }), nil
}

// finds waits until the doctor says something with these words.
func finds(t *testing.T, n *cluster.Node, about, check, text, remedy string) {
	t.Helper()
	cluster.EventuallyWithin(t, 2*time.Minute, "a finding about "+about+": "+text, func(ctx context.Context) error {
		got, err := diagnose(ctx, n)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(got, func(f finding) bool {
			return f.About == about && f.Check == check && strings.Contains(f.Text, text) && strings.Contains(f.Remedy, remedy)
		}) {
			return fmt.Errorf("findings: %+v", got)
		}
		return nil
	})
}

func sound(t *testing.T, n *cluster.Node, args ...string) {
	t.Helper()
	cluster.EventuallyWithin(t, 2*time.Minute, "no findings", func(ctx context.Context) error {
		got, err := diagnose(ctx, n, args...)
		if err == nil && len(got) > 0 {
			err = fmt.Errorf("findings: %+v", got)
		}
		return err
	})
}

func TestDoctor(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 2})
	ctx := cluster.Within(t, 8*time.Minute)
	s, a1, a2 := c.Servers[0], c.Agents[0], c.Agents[1]
	if out, err := s.Exec(ctx, "kedge", "doctor"); err == nil || !strings.Contains(err.Error()+out, "kedge is not running") {
		t.Errorf("before the start: %s, %v", out, err)
	}
	cluster.Do(t, c.Start)
	sound(t, s.Node)
	sound(t, a1, "--local")

	// The overlay between two nodes is cut in one direction; all else passes.
	const rule = "add table inet cut; add chain inet cut in { type filter hook input priority -300; }; add rule inet cut in udp dport 8472 drop"
	nft := func(args ...string) error {
		_, err := a2.Shell(ctx, "exec $(ls -d /var/lib/kedge/bin/*/nft | head -1) "+strings.Join(args, " "))
		return err
	}
	if err := nft("'" + rule + "'"); err != nil {
		t.Fatal(err)
	}
	finds(t, s.Node, a1.Name(), "ways", "no way to the pods of "+a2.Name(), "UDP port 8472")
	finds(t, s.Node, s.Name(), "ways", "no way to the pods of "+a2.Name(), "UDP port 8472")
	if err := nft("delete", "table", "inet", "cut"); err != nil {
		t.Fatal(err)
	}

	// Large packets get lost on the way.
	const large = "add table inet cut; add chain inet cut in { type filter hook input priority -300; }; add rule inet cut in udp dport 8472 meta length gt 1400 drop"
	if err := nft("'" + large + "'"); err != nil {
		t.Fatal(err)
	}
	finds(t, s.Node, a1.Name(), "ways", "path MTU", "smaller MTU")
	if err := nft("delete", "table", "inet", "cut"); err != nil {
		t.Fatal(err)
	}

	// The kubelet's port is closed: the tunnel is used, and it is said.
	if err := a1.Shield(ctx); err != nil {
		t.Fatal(err)
	}
	finds(t, s.Node, s.Name(), "ways", "no way to the kubelet of "+a1.Name(), "tunnel")
	if _, err := s.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+a1.Name()+"/proxy/healthz"); err != nil {
		t.Error(err)
	}
	if err := c.Repair(ctx); err != nil {
		t.Fatal(err)
	}

	const pods = `
apiVersion: v1
kind: Pod
metadata: {name: image, namespace: default}
spec: {containers: [{name: c, image: "registry.invalid/none:1", env: [{name: PASSWORD, value: hunter22}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: nowhere, namespace: default}
spec: {nodeSelector: {no: where}, containers: [{name: c, image: x}]}
`
	if err := s.Apply(ctx, "default", pods); err != nil {
		t.Fatal(err)
	}
	finds(t, s.Node, "pod default/image", "pod", "registry.invalid", "kedge images import")
	finds(t, s.Node, "pod default/nowhere", "pod", "no node takes it", "labels")

	// A node that is gone.
	if err := a2.PowerCut(ctx); err != nil {
		t.Fatal(err)
	}
	finds(t, s.Node, a2.Name(), "reachability", "does not answer", "machine on")

	bundle(t, ctx, s.Node)
}

// bundle checks that what is handed on has everything in it but secrets.
func bundle(t *testing.T, ctx context.Context, n *cluster.Node) {
	t.Helper()
	const file = "/root/bundle.tar.zst"
	if out, err := n.Exec(ctx, "kedge", "doctor", "--bundle", file); err == nil || !strings.Contains(out+err.Error(), "PROBLEM") {
		t.Errorf("exit status 0 with problems: %s", out)
	}
	data, err := n.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	key, err := n.ReadFile("/var/lib/kedge/pki/service-account.key")
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var names []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name[strings.IndexByte(h.Name, '/')+1:])
		for _, secret := range []string{"hunter22", string(key[40:80])} {
			if bytes.Contains(text, []byte(secret)) {
				t.Errorf("%s has a secret in it", h.Name)
			}
		}
	}
	for _, want := range []string{"findings.json", "silent.json", "nodes.json", "pods.json", "events.json", "node-" + n.Name() + ".json"} {
		if !slices.Contains(names, want) {
			t.Errorf("the bundle lacks %s: %v", want, names)
		}
	}
}
