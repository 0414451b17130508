// SPDX-License-Identifier: Apache-2.0

// Package helm installs, upgrades and removes what HelmChart objects say. It watches them, and starts a child process of this program for each
// piece of work (package release does it there): Helm's library needs memory only while it works.
package helm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Resource is that of the objects.
func Resource() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "helm.kedge.io", Version: "v1", Resource: "helmcharts"}
}

const (
	finalizer = "helm.kedge.io/uninstall"
	// annotationRetry makes a chart that is given up be tried again when it is set to another value.
	annotationRetry = "helm.kedge.io/retry"
	// DefaultTimeout of an installation, including the time until all is ready.
	DefaultTimeout = 5 * time.Minute
)

// Spec of a HelmChart. The names are those that k3s's have.
type Spec struct {
	Chart                 string                       `json:"chart,omitempty"` // name in Repo, URL (https://, oci://) or file (file:///, or a name in the charts directory)
	Version               string                       `json:"version,omitempty"`
	Repo                  string                       `json:"repo,omitempty"`
	ChartContent          string                       `json:"chartContent,omitempty"` // the archive itself, in base64
	TargetNamespace       string                       `json:"targetNamespace,omitempty"`
	CreateNamespace       bool                         `json:"createNamespace,omitempty"`
	ValuesContent         string                       `json:"valuesContent,omitempty"` // YAML
	Values                map[string]any               `json:"values,omitempty"`        // win over ValuesContent
	Set                   map[string]any               `json:"set,omitempty"`           // win over both
	Timeout               *metav1.Duration             `json:"timeout,omitempty"`       // default DefaultTimeout
	TakeOwnership         bool                         `json:"takeOwnership,omitempty"`
	AuthSecret            *corev1.LocalObjectReference `json:"authSecret,omitempty"` // of type kubernetes.io/basic-auth
	AuthPassCredentials   bool                         `json:"authPassCredentials,omitempty"`
	RepoCA                string                       `json:"repoCA,omitempty"` // PEM
	InsecureSkipTLSVerify bool                         `json:"insecureSkipTLSVerify,omitempty"`
	PlainHTTP             bool                         `json:"plainHTTP,omitempty"`
}

// Verb is what a child process does.
type Verb string

// The verbs.
const (
	Deploy    Verb = "deploy" // install or upgrade
	Uninstall Verb = "uninstall"
)

// Request is one piece of work.
type Request struct {
	Verb       Verb   `json:"verb"`
	Name       string `json:"name"`      // of the release
	Namespace  string `json:"namespace"` // of the release
	Own        string `json:"own"`       // namespace of the object, with its Secrets
	Spec       Spec   `json:"spec"`
	Kubeconfig string `json:"kubeconfig"` // file
	ChartsDir  string `json:"chartsDir"`
	Scratch    string `json:"scratch"` // directory that the process has for itself
}

// Result of a piece of work.
type Result struct {
	Status     string `json:"status"` // of the release, in Helm's words; empty: there is none
	Revision   int    `json:"revision"`
	Chart      string `json:"chart"` // NAME-VERSION
	AppVersion string `json:"appVersion"`
	Error      string `json:"error,omitempty"`
	// Touched says that something in the cluster was changed, RolledBack that it was changed back.
	Touched    bool `json:"touched"`
	RolledBack bool `json:"rolledBack"`
}

// status is what the controller writes into an object.
type status struct {
	// Hash of what was tried last.
	Hash       string             `json:"hash"`
	Namespace  string             `json:"namespace"` // of the release
	Release    string             `json:"release"`   // status in Helm's words
	Revision   int                `json:"revision"`
	Chart      string             `json:"chart"`
	AppVersion string             `json:"appVersion"`
	Message    string             `json:"message"`
	Conditions []metav1.Condition `json:"conditions"`
}

// The conditions.
const (
	conditionReady   = "Ready"   // the release is what the object says
	conditionStalled = "Stalled" // it is not, and Kedge does not try again by itself
)

// chart is an object that was taken apart.
type chart struct {
	object *unstructured.Unstructured
	spec   Spec
	status status
}

func parse(o *unstructured.Unstructured) (chart, error) {
	c := chart{object: o}
	spec, _, _ := unstructured.NestedMap(o.Object, "spec")
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(spec, &c.spec); err != nil {
		return c, fmt.Errorf("spec: %w", err)
	}
	st, _, _ := unstructured.NestedMap(o.Object, "status")
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(st, &c.status); err != nil {
		c.status = status{} // it is written anew
	}
	switch s := c.spec; {
	case s.Chart == "" && s.ChartContent == "":
		return c, fmt.Errorf("spec: neither chart nor chartContent is given")
	case s.Timeout != nil && s.Timeout.Duration <= 0:
		return c, fmt.Errorf("spec.timeout: %s is no time to wait", s.Timeout.Duration)
	case len(o.GetName()) > 53:
		return c, fmt.Errorf("the name has %d characters, and a release's at the most 53", len(o.GetName()))
	}
	return c, nil
}

// namespace of the release.
func (c chart) namespace() string {
	if c.spec.TargetNamespace != "" {
		return c.spec.TargetNamespace
	}
	return c.object.GetNamespace()
}

// hash stands for all that decides what is installed. Another one is a reason to work, the same one is none, whatever else changes.
func (c chart) hash() string {
	b, err := json.Marshal([]any{c.spec, c.namespace(), c.object.GetAnnotations()[annotationRetry]})
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// ignored are the fields that mean something to k3s only.
func (c chart) ignored() []string {
	spec, _, _ := unstructured.NestedMap(c.object.Object, "spec")
	var names []string
	for name := range spec {
		if !slices.Contains(knownFields(), strings.ToLower(name)) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func knownFields() []string {
	return strings.Fields("chart version repo chartcontent targetnamespace createnamespace valuescontent values set timeout takeownership authsecret " +
		"authpasscredentials repoca insecureskiptlsverify plainhttp bootstrap")
}
