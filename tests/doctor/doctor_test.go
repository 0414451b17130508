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

// found waits until the doctor finds exactly these; texts and remedies are parts of what it says.
func found(t *testing.T, n *cluster.Node, want ...finding) {
	t.Helper()
	cluster.EventuallyWithin(t, 2*time.Minute, "exactly the findings that are meant", func(ctx context.Context) error {
		got, err := diagnose(ctx, n)
		if err != nil {
			return err
		}
		matches := func(f finding) bool {
			return slices.ContainsFunc(want, func(w finding) bool {
				return f.Level == w.Level && f.About == w.About && f.Check == w.Check && strings.Contains(f.Text, w.Text) && strings.Contains(f.Remedy, w.Remedy)
			})
		}
		if len(got) != len(want) || slices.ContainsFunc(got, func(f finding) bool { return !matches(f) }) {
			return fmt.Errorf("findings: %+v", got)
		}
		return nil
	})
}

// closed is the finding for one direction of an overlay network; that the other one is open belongs to it.
func closed(from, to *cluster.Node) finding {
	return finding{"problem", from.Name(), "ways", fmt.Sprintf("nothing that %s sends arrives there; what %s sends arrives here", from.Name(), to.Name()),
		fmt.Sprintf("Open UDP port 8472 (VXLAN) from %s to %s:", from.Name(), to.Name())}
}

// cut replaces what a machine drops at a hook by what a rule says; no hook, nothing.
func cut(t *testing.T, n *cluster.Node, hook, rule string) {
	t.Helper()
	commands := "add table inet cut; delete table inet cut"
	if hook != "" {
		commands += "; add table inet cut; add chain inet cut c { type filter hook " + hook + " priority -300; }; add rule inet cut c " + rule
	}
	if _, err := n.Shell(cluster.Within(t, time.Minute), "exec $(ls -d /var/lib/kedge/bin/*/nft | head -1) '"+commands+"'"); err != nil {
		t.Fatal(err)
	}
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

	// What comes to a2 through the overlay is dropped, then what leaves it, then large packets that come; all else passes. Exactly those directions
	// are found, once each.
	cut(t, a2, "input", "udp dport 8472 drop")
	found(t, s.Node, closed(a1, a2), closed(s.Node, a2))
	cut(t, a2, "output", "udp dport 8472 drop")
	found(t, s.Node, closed(a2, a1), closed(a2, s.Node))
	cut(t, a2, "input", "udp dport 8472 ip saddr "+a1.IP()+" drop")
	found(t, s.Node, closed(a1, a2))
	cut(t, a2, "input", "udp dport 8472 meta length gt 1400 drop")
	small := func(n *cluster.Node) finding {
		return finding{"problem", n.Name(), "ways", "path MTU: small packets from " + n.Name() + " arrive there", "smaller MTU"}
	}
	found(t, s.Node, small(a1), small(s.Node))
	cut(t, a2, "", "")

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
