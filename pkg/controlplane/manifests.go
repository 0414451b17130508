// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/template"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/manifests"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// fieldManager owns what the manifests set.
const fieldManager = "kedge"

// manifestsReport is the state of one component of two parts: what Kedge brings along, and what the operator has in the manifests
// directory. An error in the latter is a remark: the server works.
type manifestsReport struct {
	child  *supervise.Child
	mu     sync.Mutex
	state  supervise.State
	reason string
	said   string // about the directory
}

func (r *manifestsReport) report(state supervise.State, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state, r.reason = state, reason
	r.send()
}

func (r *manifestsReport) remark(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = text
	r.send()
}

func (r *manifestsReport) send() {
	reason := r.reason
	if r.said != "" && reason != "" {
		reason += "; "
	}
	r.child.Report(ComponentManifests, r.state, reason+r.said)
}

// applyManifests brings the embedded manifests into the cluster by server-side apply, again and again until it has succeeded
// once: an object that did not change costs no write.
func (p *plane) applyManifests(ctx context.Context, config *rest.Config) error {
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	p.manifests.report(supervise.Running, "")
	for delay := 100 * time.Millisecond; ; delay = min(2*delay, 30*time.Second) {
		err := p.applyAll(ctx, client)
		if err == nil {
			p.manifests.report(supervise.Ready, "")
			return nil
		}
		p.manifests.report(supervise.Failed, err.Error())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
		p.log.Debug("applying manifests again", "component", ComponentManifests, "error", err)
	}
}

func (p *plane) applyAll(ctx context.Context, client dynamic.Interface) error {
	entries, err := manifests.FS.ReadDir(".")
	if err != nil {
		return err
	}
	var all []*unstructured.Unstructured
	for _, e := range entries {
		if slices.Contains(p.cfg.Cluster.Disable, strings.TrimSuffix(e.Name(), ".yaml")) {
			continue
		}
		objects, err := render(e.Name(), p.cfg)
		if err != nil {
			return err
		}
		all = append(all, objects...)
	}
	// Rules first, nodes wait for them; and on a cluster's first start the namespaces are not there yet. For new kinds nobody waits.
	rank := func(o *unstructured.Unstructured) int {
		if o.GetKind() == "CustomResourceDefinition" {
			return 2
		}
		return min(len(o.GetNamespace()), 1)
	}
	slices.SortStableFunc(all, func(a, b *unstructured.Unstructured) int { return cmp.Compare(rank(a), rank(b)) })
	var errs []error
	for _, o := range all {
		gvr, _ := meta.UnsafeGuessKindToResource(o.GroupVersionKind())
		_, err := client.Resource(gvr).Namespace(o.GetNamespace()).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err))
		}
	}
	return errors.Join(errs...)
}

// render fills in a manifest's template fields and splits it into objects.
func render(name string, cfg Config) ([]*unstructured.Unstructured, error) {
	b, err := manifests.FS.ReadFile(name)
	if err != nil {
		return nil, err
	}
	t, err := template.New(name).Option("missingkey=error").Parse(string(b))
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", name, err)
	}
	var text bytes.Buffer
	if err := t.Execute(&text, cfg); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", name, err)
	}
	var objects []*unstructured.Unstructured
	for dec := yaml.NewYAMLOrJSONDecoder(&text, 4096); ; {
		o := &unstructured.Unstructured{}
		if err := dec.Decode(&o.Object); errors.Is(err, io.EOF) {
			return objects, nil
		} else if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", name, err)
		}
		if len(o.Object) > 0 {
			objects = append(objects, o)
		}
	}
}
