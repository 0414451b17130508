// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// Session is a test at work in a namespace of its own. Its methods fail the test instead of returning errors, and give up
// after a minute unless said otherwise.
type Session struct {
	*Server

	t  testing.TB
	NS string
}

// Session makes a namespace, which is deleted when the test ends.
func (s *Server) Session(t *testing.T) *Session {
	t.Helper()
	return &Session{Server: s, t: t, NS: s.Namespace(t)}
}

// Within gives a context for one step.
func (s *Session) Within(d time.Duration) context.Context { return Within(s.t, d) }

// Apply creates what the YAML says. %[1]q and the like in it are for args.
func (s *Session) Apply(yaml string, args ...any) {
	s.t.Helper()
	if len(args) > 0 {
		yaml = fmt.Sprintf(yaml, args...)
	}
	if err := s.Server.Apply(s.Within(time.Minute), s.NS, yaml); err != nil {
		s.t.Fatal(err)
	}
}

// Kubectl runs a command in the test's namespace and returns its standard output without space around it.
func (s *Session) Kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.Try(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// Try is Kubectl for commands that may fail.
func (s *Session) Try(args ...string) (string, error) {
	s.t.Helper()
	out, err := s.Server.Kubectl(s.Within(time.Minute), append([]string{"-n", s.NS}, args...)...)
	return strings.TrimSpace(out), err
}

// Ready waits until pods are Ready.
func (s *Session) Ready(pods ...string) {
	s.t.Helper()
	for _, p := range pods {
		s.Kubectl("wait", "--for=condition=Ready", "--timeout=55s", "pod/"+p)
	}
}

// InPod runs a line of shell in a pod.
func (s *Session) InPod(pod, line string) string {
	s.t.Helper()
	return s.Kubectl("exec", pod, "--", "sh", "-c", line)
}

// Eventually waits until cond returns nil.
func (s *Session) Eventually(what string, cond func() error) {
	s.t.Helper()
	s.EventuallyWithin(time.Minute, what, cond)
}

// EventuallyWithin is Eventually with another limit.
func (s *Session) EventuallyWithin(d time.Duration, what string, cond func() error) {
	s.t.Helper()
	EventuallyWithin(s.t, d, what, func(context.Context) error { return cond() })
}

// Becomes waits until a command prints exactly want.
func (s *Session) Becomes(want string, args ...string) {
	s.t.Helper()
	s.Eventually(fmt.Sprintf("kubectl %s to say %q", strings.Join(args, " "), want), func() error {
		got, err := s.Try(args...)
		if err == nil && got != want {
			err = fmt.Errorf("it says %q", got)
		}
		return err
	})
}

// Pods for Apply.
const (
	// ServerPod is a pod with the test server. Its arguments: the name, more YAML for the container, more YAML for the spec.
	ServerPod = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  containers:
  - name: server
    image: kedge.test/server:1
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
%[2]s
%[3]s
`
	// ClientPod is a pod "client" with busybox that does nothing by itself. It ends with the container: more can follow.
	ClientPod = `
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: kedge.test/busybox:1
    command: [sleep, "100000"]
`
)
