// SPDX-License-Identifier: Apache-2.0

// Package announce is how the CNI plugin tells the node process about a pod's addresses. It is linked into the plugin, which is a file of
// its own in Kedge: nothing big may be imported here.
package announce

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/textproto"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Path of the resource with the announcements at the node process's socket: HTTP, [Pod] in JSON. POST returns when the pod's rules are
// loaded, DELETE with the container's ID behind forgets, and PUT fails if a pod is not announced like this.
const Path = "/v1/pods"

const (
	// dialTimeout is how long a process that is being started again is waited for.
	dialTimeout = 15 * time.Second
	// answerTimeout is longer than the node process lets a pod wait.
	answerTimeout = 60 * time.Second
	// maxAnswer is more than any error text.
	maxAnswer = 64 << 10
)

// Pod is one that is being attached to the network.
type Pod struct {
	Container string       `json:"container"` // ID of its sandbox
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	UID       string       `json:"uid,omitempty"`
	Addresses []netip.Addr `json:"addresses"`
}

// Validate looks whether all that is needed is there and fit to be part of a file's name.
func (p Pod) Validate() error {
	if err := p.ValidateContainer(); err != nil {
		return err
	}
	switch {
	case p.Namespace == "" || p.Name == "":
		return errors.New("no namespace or name of a pod: only pods of Kubernetes can be attached to this network")
	case len(p.Addresses) == 0:
		return fmt.Errorf("pod %s/%s has no address", p.Namespace, p.Name)
	}
	for _, a := range p.Addresses {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("pod %s/%s: %q is not an address of a pod", p.Namespace, p.Name, a)
		}
	}
	return nil
}

// ValidateContainer looks at the ID only.
func (p Pod) ValidateContainer() error {
	if !regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,200}$`).MatchString(p.Container) {
		return fmt.Errorf("container ID %q is not valid", p.Container)
	}
	return nil
}

// File that keeps the announcement of a container.
func File(dir, container string) string { return filepath.Join(dir, container+".json") }

// Add announces a pod and returns when its rules are loaded.
func Add(socket string, p Pod) error { return call(socket, "POST", Path, p) }

// Check fails if the pod is not known as it is given.
func Check(socket string, p Pod) error { return call(socket, "PUT", Path, p) }

// Release takes an announcement back. Without the node process its file is removed, and the process learns of it when it starts.
func Release(socket, dir, container string) error {
	err := os.Remove(File(dir, container))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	conn, dialErr := net.Dial("unix", socket)
	if dialErr != nil {
		return err
	}
	conn.Close()
	return call(socket, "DELETE", Path+"/"+container, nil)
}

// call speaks HTTP by hand: net/http would triple the size of the plugin.
func call(socket, method, path string, body any) error {
	conn, err := dial(socket)
	if err != nil {
		return fmt.Errorf("the node process of Kedge does not answer at %s, and without network policies no pod is attached; it is tried again, `kedge status` says more: %w", socket, err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	var text []byte
	if body != nil {
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.0\r\nHost: kedge\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", method, path, len(text), text); err != nil {
		return err
	}
	return readAnswer(conn)
}

func dial(socket string) (net.Conn, error) {
	for deadline := time.Now().Add(dialTimeout); ; time.Sleep(200 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
	}
}

// readAnswer gives the error that an answer stands for.
func readAnswer(from io.Reader) error {
	r := textproto.NewReader(bufio.NewReader(io.LimitReader(from, maxAnswer)))
	status, err := r.ReadLine()
	if err != nil {
		return fmt.Errorf("the node process's answer: %w", err)
	}
	fields := strings.Fields(status)
	if len(fields) < 2 || !strings.HasPrefix(fields[0], "HTTP/1.") {
		return fmt.Errorf("the node process's answer: %q is not HTTP", status)
	}
	code, err := strconv.Atoi(fields[1])
	if err != nil {
		return fmt.Errorf("the node process's answer: status %q", fields[1])
	}
	if _, err := r.ReadMIMEHeader(); err != nil {
		return fmt.Errorf("the node process's answer: %w", err)
	}
	text, err := io.ReadAll(r.R)
	if err != nil {
		return fmt.Errorf("the node process's answer: %w", err)
	}
	if code < 200 || code > 299 {
		return errors.New(strings.TrimSpace(string(text)))
	}
	return nil
}
