// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// removed stands where a secret was.
const removed = "(removed)"

// Bundle is what others need to help: findings, what each node said, nodes, pods and events.
type Bundle struct {
	Facts    Facts
	Findings []Finding
}

// Write writes a tar archive compressed with zstd. Secrets and ConfigMaps are not in it; values of environment variables and arguments of
// containers are taken out, and what looks like a key, a token or a password in logs and messages.
func (b Bundle) Write(w io.Writer) error {
	z, err := zstd.NewWriter(w)
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	dir := "kedge-doctor-" + b.Facts.Now.UTC().Format("20060102-150405") + "/"
	add := func(name string, value any) error {
		text, ok := value.(string)
		if !ok {
			data, err := json.MarshalIndent(value, "", " ")
			if err != nil {
				return err
			}
			text = string(data)
		}
		text = Redact(text)
		if err := t.WriteHeader(&tar.Header{Name: dir + name, Mode: 0o600, Size: int64(len(text)), ModTime: b.Facts.Now.Truncate(time.Second)}); err != nil {
			return err
		}
		_, err := io.WriteString(t, text)
		return err
	}
	f := b.Facts
	errs := []error{
		add("findings.json", b.Findings), add("silent.json", f.Silent), add("skew.json", f.Skew),
		add("nodes.json", cleaned(f.Nodes)), add("pods.json", cleaned(f.Pods)), add("events.json", cleaned(f.Events)),
	}
	for _, name := range slices.Sorted(maps.Keys(f.Reports)) {
		report := *f.Reports[name]
		errs = append(errs, add("node-"+name+".log", report.Log))
		report.Log = ""
		errs = append(errs, add("node-"+name+".json", report))
	}
	return errors.Join(append(errs, t.Close(), z.Close())...)
}

// cleaned gives copies of objects without what is long and says nothing, and without what often is secret.
func cleaned[T any, P interface {
	*T
	metav1.Object
	DeepCopy() *T
}](list []T) []T {
	var copies []T
	for i := range list {
		object := P(&list[i]).DeepCopy()
		P(object).SetManagedFields(nil)
		annotations := P(object).GetAnnotations()
		delete(annotations, corev1.LastAppliedConfigAnnotation)
		if pod, ok := any(object).(*corev1.Pod); ok {
			cleanPod(pod)
		}
		copies = append(copies, *object)
	}
	return copies
}

func cleanPod(p *corev1.Pod) {
	clean := func(env []corev1.EnvVar, args ...[]string) {
		for i := range env {
			if env[i].Value != "" {
				env[i].Value = removed
			}
		}
		for _, list := range args {
			for i := range list {
				list[i] = removed
			}
		}
	}
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			c := &list[i]
			clean(c.Env, c.Command, c.Args)
		}
	}
	for i := range p.Spec.EphemeralContainers {
		c := &p.Spec.EphemeralContainers[i]
		clean(c.Env, c.Command, c.Args)
	}
}

// secrets are what Redact takes out: private keys, JSON web tokens, join and bootstrap tokens, credentials in URLs and headers, and values of
// what is called a password, token, secret or key.
func secrets() []*regexp.Regexp {
	return []*regexp.Regexp{
		regexp.MustCompile(`-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(-----END [A-Z ]*PRIVATE KEY-----|\z)`),
		regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`),
		regexp.MustCompile(`\b[A-Za-z0-9]*[:.]?[a-z0-9]{6}\.[a-z0-9]{16}\b`),
		regexp.MustCompile(`AGE-SECRET-KEY-[0-9A-Z]+`),
		regexp.MustCompile(`(?i)(Bearer|Basic) [A-Za-z0-9+/=._~-]{8,}`),
		regexp.MustCompile(`(?i)://[^/\s:@"]+:[^/\s@"]+@`),
	}
}

// Redact takes what looks like a secret out of a text.
func Redact(text string) string {
	for _, r := range secrets() {
		text = r.ReplaceAllString(text, removed)
	}
	return regexp.MustCompile(`(?i)([a-z0-9_-]*(?:password|passwd|token|secret|private[-_]?key|access[-_]?key)["']?\s*[=:]\s*["']?)[^\s"',}]{4,}`).ReplaceAllString(text, "${1}"+removed)
}

// String is a line for people, with the remedy below.
func (f Finding) String() string {
	return fmt.Sprintf("%s %s (%s): %s", f.Level, f.About, f.Check, f.Text)
}
