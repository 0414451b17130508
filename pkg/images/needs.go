// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/distribution/reference"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Need is an image and what needs it.
type Need struct {
	// Image is the full name, as docker.io/library/busybox:1.36.
	Image string `json:"image"`
	// By are the objects that name it, as "Deployment shop/web", in order.
	By []string `json:"by"`
}

// Needs collects what images objects need.
type Needs struct {
	by map[string]map[string]bool
}

// Name gives the full name of an image as people write it: busybox is docker.io/library/busybox:latest. With a digest the tag is
// dropped, as containerd does.
func Name(image string) (string, error) {
	ref, err := reference.ParseDockerRef(image)
	if err != nil {
		return "", fmt.Errorf("image %q: %w", image, err)
	}
	return ref.String(), nil
}

// Add counts an image as needed by an object.
func (n *Needs) Add(image, by string) error {
	name, err := Name(image)
	if err != nil {
		return fmt.Errorf("%s: %w", by, err)
	}
	if n.by == nil {
		n.by = map[string]map[string]bool{}
	}
	if n.by[name] == nil {
		n.by[name] = map[string]bool{}
	}
	n.by[name][by] = true
	return nil
}

// List gives the images by name.
func (n *Needs) List() []Need {
	list := make([]Need, 0, len(n.by))
	for image, by := range n.by {
		list = append(list, Need{image, slices.Sorted(maps.Keys(by))})
	}
	slices.SortFunc(list, func(a, b Need) int { return cmp.Compare(a.Image, b.Image) })
	return list
}

// Read adds the images that the objects in a stream of YAML or JSON documents name: those of containers, wherever a pod template stands
// in an object, so that custom resources with pod templates count, and those of image volumes. Bad images and documents are errors; the
// others are added all the same.
func (n *Needs) Read(r io.Reader) error {
	documents := yaml.NewYAMLReader(bufio.NewReader(r))
	var errs []error
	for i := 1; ; i++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return errors.Join(errs...)
		}
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		var object any
		if err := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(document), len(document)+1).Decode(&object); err != nil && !errors.Is(err, io.EOF) {
			errs = append(errs, fmt.Errorf("document %d: %w", i, err))
			continue
		}
		errs = append(errs, n.walk(object, fmt.Sprintf("document %d", i)))
	}
}

// walk looks at a value inside of the object named by.
func (n *Needs) walk(value any, by string) error {
	var errs []error
	switch v := value.(type) {
	case []any:
		for _, item := range v {
			errs = append(errs, n.walk(item, by))
		}
	case map[string]any:
		if name := objectName(v); name != "" {
			by = name
		}
		for _, list := range []string{"containers", "initContainers", "ephemeralContainers"} {
			errs = append(errs, n.addField(v[list], by, "image"))
		}
		errs = append(errs, n.addField(v["volumes"], by, "image", "reference"))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			errs = append(errs, n.walk(v[key], by))
		}
	}
	return errors.Join(errs...)
}

// addField adds the text at path in every element of list.
func (n *Needs) addField(list any, by string, path ...string) error {
	items, _ := list.([]any)
	var errs []error
	for _, item := range items {
		value := item
		for _, key := range path {
			m, _ := value.(map[string]any)
			value = m[key]
		}
		if image, _ := value.(string); image != "" {
			errs = append(errs, n.Add(image, by))
		}
	}
	return errors.Join(errs...)
}

// objectName is "Kind namespace/name" of an object, and empty for other values. A pod template has no kind.
func objectName(m map[string]any) string {
	kind, _ := m["kind"].(string)
	metadata, _ := m["metadata"].(map[string]any)
	name, _ := metadata["name"].(string)
	if kind == "" || name == "" {
		return ""
	}
	if namespace, _ := metadata["namespace"].(string); namespace != "" {
		name = namespace + "/" + name
	}
	return kind + " " + name
}

// ReadCluster adds what the workloads of a cluster need: pods, and the templates that pods are made from.
func (n *Needs) ReadCluster(ctx context.Context, client kubernetes.Interface) error {
	core, apps, batch := client.CoreV1().RESTClient(), client.AppsV1().RESTClient(), client.BatchV1().RESTClient()
	for _, kind := range []struct {
		api      rest.Interface
		resource string
		kind     string
	}{
		{core, "pods", "Pod"}, {core, "replicationcontrollers", "ReplicationController"},
		{apps, "deployments", "Deployment"}, {apps, "daemonsets", "DaemonSet"}, {apps, "statefulsets", "StatefulSet"},
		{batch, "jobs", "Job"}, {batch, "cronjobs", "CronJob"},
	} {
		body, err := kind.api.Get().Resource(kind.resource).SetHeader("Accept", "application/json").DoRaw(ctx)
		if err != nil {
			return fmt.Errorf("list %s: %w", kind.resource, err)
		}
		var list struct {
			Items []map[string]any `json:"items"`
		}
		if err := json.Unmarshal(body, &list); err != nil {
			return fmt.Errorf("list %s: %w", kind.resource, err)
		}
		for _, item := range list.Items {
			if kind.kind == "Pod" && ofWorkload(item) {
				continue // it counts as its template
			}
			item["kind"] = kind.kind // which objects in a list lack
			if err := n.walk(item, kind.kind); err != nil {
				return err
			}
		}
	}
	return nil
}

// ofWorkload says whether a pod was made from the template of one of the other kinds that ReadCluster lists.
func ofWorkload(pod map[string]any) bool {
	owner := metav1.GetControllerOf(&unstructured.Unstructured{Object: pod})
	return owner != nil && slices.Contains([]string{"ReplicaSet", "ReplicationController", "DaemonSet", "StatefulSet", "Job"}, owner.Kind)
}
