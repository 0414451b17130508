// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Server is a node that runs kedge server.
type Server struct{ *Node }

// Prepare makes a machine that is ready for Run.
func Prepare(ctx context.Context, bed *testbed.Bed, name string, o Options) (*Server, error) {
	n, err := prepareNode(ctx, bed, name, ServerRole, o)
	if err != nil {
		return nil, err
	}
	return &Server{n}, nil
}

// Start makes a machine, starts a server in it and waits until the node is ready.
func Start(ctx context.Context, bed *testbed.Bed, name string, o Options) (*Server, error) {
	s, err := Prepare(ctx, bed, name, o)
	if err != nil {
		return nil, err
	}
	return s, errors.Join(s.Run(ctx), s.WaitReady(ctx))
}

// URL is where machines reach this server.
func (s *Server) URL() string {
	if i := slices.Index(s.Flags, "--cluster-cidr"); i >= 0 && !strings.Contains(s.Flags[i+1], ".") {
		return "https://[" + s.IP6() + "]:6443" // a cluster without IPv4
	}
	return "https://" + s.IP() + ":6443"
}

// WaitReady waits until the node is Ready and new pods are accepted. It gives up at once when the server ends.
func (s *Server) WaitReady(ctx context.Context) error {
	return testbed.Wait(ctx, "the node "+s.Name()+" to be Ready", func(ctx context.Context) error {
		if err := s.ended(ctx); err != nil {
			return err
		}
		if err := s.NodesReady(ctx, s.Name()); err != nil {
			return err
		}
		_, err := s.Kubectl(ctx, "-n", "default", "get", "serviceaccount", "default")
		return err
	})
}

// NodesReady asks this server whether all of some nodes are Ready.
func (s *Server) NodesReady(ctx context.Context, names ...string) error {
	nodes, err := s.Nodes(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		n, ok := nodes[name]
		if !ok {
			errs = append(errs, fmt.Errorf("there is no node %s", name))
			continue
		}
		if !n.Ready {
			errs = append(errs, fmt.Errorf("the node %s is not Ready: %s", name, n.Message))
		}
	}
	return errors.Join(errs...)
}

// NodeState is what a server knows about a node.
type NodeState struct {
	Ready      bool
	Message    string // of the condition Ready
	InternalIP string
	Labels     map[string]string
	UID        string
}

// Nodes asks this server for all nodes.
func (s *Server) Nodes(ctx context.Context) (map[string]NodeState, error) {
	out, err := s.Kubectl(ctx, "get", "nodes", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name, UID string
				Labels    map[string]string
			}
			Status struct {
				Conditions []struct{ Type, Status, Message string }
				Addresses  []struct{ Type, Address string }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("kubectl get nodes: %w: %s", err, out)
	}
	nodes := map[string]NodeState{}
	for _, item := range list.Items {
		n := NodeState{Labels: item.Metadata.Labels, UID: item.Metadata.UID, Message: "it has no such condition"}
		for _, c := range item.Status.Conditions {
			if c.Type == "Ready" {
				n.Ready, n.Message = c.Status == "True", c.Message
			}
		}
		for _, a := range item.Status.Addresses {
			if a.Type == "InternalIP" && n.InternalIP == "" {
				n.InternalIP = a.Address
			}
		}
		nodes[item.Metadata.Name] = n
	}
	return nodes, nil
}

// Member is one of the datastore.
type Member struct {
	Name, ID string
	PeerURLs []string
	Learner  bool
}

const membersPath = "/kedge/v1/members"

// Members asks this server for the members of the datastore, by name.
func (s *Server) Members(ctx context.Context) (map[string]Member, error) {
	out, err := s.Kubectl(ctx, "get", "--raw", membersPath)
	if err != nil {
		return nil, err
	}
	var list struct{ Members []Member }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", membersPath, err, out)
	}
	members := map[string]Member{}
	for _, m := range list.Members {
		if _, ok := members[m.Name]; ok {
			return nil, fmt.Errorf("two members %s: %+v", m.Name, list.Members)
		}
		members[m.Name] = m
	}
	return members, nil
}

// Voters asks this server whether exactly these nodes vote in the datastore, and nobody else belongs to it.
func (s *Server) Voters(ctx context.Context, names ...string) error {
	members, err := s.Members(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if m, ok := members[name]; !ok || m.Learner {
			return fmt.Errorf("%s does not vote; members: %+v", name, members)
		}
	}
	if len(members) != len(names) {
		return fmt.Errorf("%d members instead of %v: %+v", len(members), names, members)
	}
	return nil
}

// LeadsDatastore asks the server's own member whether it is the leader.
func (s *Server) LeadsDatastore(ctx context.Context) (bool, error) {
	out, err := s.Shell(ctx, `curl -sS -m 2 --unix-socket "$(find /run/kedge -name 'etcd*.sock' | head -1)" http://etcd/metrics | grep '^etcd_server_is_leader '`)
	return strings.TrimSpace(out) == "etcd_server_is_leader 1", err
}

// Kubectl runs kedge kubectl in the machine, each request limited to 30 seconds, and returns its standard output.
func (s *Server) Kubectl(ctx context.Context, args ...string) (string, error) {
	return s.Exec(ctx, kubectl(args)...)
}

// Apply hands YAML to kubectl apply, in a namespace.
func (s *Server) Apply(ctx context.Context, namespace, yaml string) error {
	_, err := s.ExecInput(ctx, strings.NewReader(yaml), kubectl([]string{"-n", namespace, "apply", "-f", "-"})...)
	return err
}

func kubectl(args []string) []string {
	for _, a := range args {
		switch a {
		case "exec", "attach", "port-forward", "logs", "wait", "rollout": // these last as long as they must
			return append([]string{Program, "kubectl"}, args...)
		}
	}
	return append([]string{Program, "kubectl", "--request-timeout=30s"}, args...)
}

// Token makes a join token on this server and returns its text.
func (s *Server) Token(ctx context.Context, role Role, args ...string) (string, error) {
	out, err := s.Exec(ctx, append([]string{Program, "token", "create", "--role", string(role), "--print-token"}, args...)...)
	return strings.TrimSpace(out), err
}
