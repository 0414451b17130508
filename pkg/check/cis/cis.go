// SPDX-License-Identifier: Apache-2.0

// Package cis looks at a running Kedge with the eyes of the CIS Kubernetes Benchmark. It goes by what the processes of this machine were
// started with, as their own option sets understand it, by the files on disk, and by the API where an item is about objects. Items have the
// benchmark's numbers and titles of Kedge's own.
package cis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/node"
)

// Benchmark is what the numbers are of.
const Benchmark = "CIS Kubernetes Benchmark 1.12"

// Status is the outcome of an item.
type Status string

// The outcomes. Manual means that only people can judge; the finding says what there is to look at.
const (
	Pass          Status = "pass"
	Fail          Status = "fail"
	Manual        Status = "manual"
	NotApplicable Status = "n/a"
)

// Item of the benchmark.
type Item struct {
	ID    string `json:"id"`
	Title string `json:"title"`
	Result
}

// Result of an item.
type Result struct {
	Status  Status `json:"status"`
	Finding string `json:"finding"`          // what is the case
	Remedy  string `json:"remedy,omitempty"` // what to do about it
}

// Report is about one machine.
type Report struct {
	Benchmark string         `json:"benchmark"`
	Node      string         `json:"node"`
	Count     map[Status]int `json:"count"`
	Items     []Item         `json:"items"`
}

// Failed says whether an item failed.
func (r Report) Failed() bool { return r.Count[Fail] > 0 }

// Options say where things are on this machine.
type Options struct {
	RunDir     string // of the running Kedge
	Kubeconfig string // the administrator's; without one, objects of the API are not looked at
}

// check is one item and how it is found out.
type check struct {
	id, title string
	look      func(*machine) Result
}

// machine is what the items look at. Nil is what this machine does not have.
type machine struct {
	Options

	plane           *controlplane.Config
	api, kcm, sched controlplane.Flags
	etcd            *datastore.Config
	node            *node.Config
	settings        *node.Settings
	objects         *objects
	objectsErr      error
	unit            string // of the service manager
}

// Run looks at everything. The error says that there is no Kedge to look at.
func Run(ctx context.Context, o Options) (*Report, error) {
	m := &machine{Options: o, unit: "/etc/systemd/system/kedge.service"}
	err := errors.Join(read(o.RunDir, "controlplane", &m.plane), read(o.RunDir, "etcd", &m.etcd), read(o.RunDir, "node", &m.node))
	if err != nil {
		return nil, err
	}
	if m.plane == nil && m.node == nil && m.etcd == nil {
		return nil, fmt.Errorf("there is no configuration of running processes in %s: the benchmark looks at a Kedge that runs; start it first", o.RunDir)
	}
	r := &Report{Benchmark: Benchmark, Count: map[Status]int{}}
	if m.plane != nil {
		r.Node = m.plane.NodeName
		if m.api, m.kcm, m.sched, err = controlplane.EffectiveFlags(*m.plane); err != nil {
			return nil, err
		}
	}
	if m.node != nil {
		r.Node = m.node.Name
		if m.settings, err = node.EffectiveSettings(*m.node); err != nil {
			return nil, err
		}
	}
	if m.plane != nil {
		m.objects, m.objectsErr = ask(ctx, o.Kubeconfig)
	}
	for _, c := range checks() {
		item := Item{ID: c.id, Title: c.title, Result: c.look(m)}
		r.Count[item.Status]++
		r.Items = append(r.Items, item)
	}
	return r, nil
}

// read reads what the supervisor gave a process at its last start; none is no error.
func read[T any](runDir, process string, into **T) error {
	text, err := os.ReadFile(filepath.Join(runDir, process+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("only root may look: %w", err)
	}
	if err != nil {
		return err
	}
	*into = new(T)
	if err := json.Unmarshal(text, *into); err != nil {
		return fmt.Errorf("configuration of the process %s: %w", process, err)
	}
	return nil
}

func ask(ctx context.Context, kubeconfig string) (*objects, error) {
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = 10 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return list(ctx, client)
}

// WriteText writes the report for people, an item a line, with a remedy below those that failed.
func (r Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, node %s\n", r.Benchmark, r.Node)
	section := ""
	for _, i := range r.Items {
		if s := i.ID[:strings.LastIndexByte(i.ID, '.')]; s != section {
			section = s
			fmt.Fprintf(&b, "\n%s %s\n", s, sections()[s])
		}
		label := string(i.Status)
		if i.Status == Fail {
			label = "FAIL"
		}
		fmt.Fprintf(&b, "  %-6s %-6s %s: %s\n", i.ID, label, i.Title, i.Finding)
		if i.Remedy != "" && i.Status != Pass {
			fmt.Fprintf(&b, "  %13s > %s\n", "", i.Remedy)
		}
	}
	fmt.Fprintf(&b, "\nResult: %d pass, %d fail, %d manual, %d not applicable.\n", r.Count[Pass], r.Count[Fail], r.Count[Manual], r.Count[NotApplicable])
	_, err := io.WriteString(w, b.String())
	return err
}

func sections() map[string]string {
	return map[string]string{
		"1.1": "files of the control plane", "1.2": "API server", "1.3": "controller manager", "1.4": "scheduler", "2": "etcd",
		"3.1": "authentication of users", "3.2": "audit", "4.1": "files of the node", "4.2": "kubelet", "4.3": "kube-proxy",
		"5.1": "RBAC and service accounts", "5.2": "pod security", "5.3": "network policies", "5.4": "Secrets", "5.5": "admission", "5.6": "namespaces and pods",
	}
}

// Ways to put a result.

func pass(format string, args ...any) Result {
	return Result{Status: Pass, Finding: fmt.Sprintf(format, args...)}
}
func fail(remedy, format string, args ...any) Result {
	return Result{Fail, fmt.Sprintf(format, args...), remedy}
}
func manual(remedy, format string, args ...any) Result {
	return Result{Manual, fmt.Sprintf(format, args...), remedy}
}
func none(format string, args ...any) Result {
	return Result{Status: NotApplicable, Finding: fmt.Sprintf(format, args...)}
}

// when gives pass or fail.
func when(ok bool, finding, remedy string) Result {
	if ok {
		return pass("%s", finding)
	}
	return fail(remedy, "%s", finding)
}
