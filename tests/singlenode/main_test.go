// SPDX-License-Identifier: Apache-2.0

// Package singlenode tests what pods and the network of one node can do, on one server that all its tests share.
package singlenode

import (
	"os"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
)

var shared = cluster.Shared{Name: "singlenode"}

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

func TestFirst(t *testing.T) {
	s := shared.Server(t)
	ns := s.Namespace(t)
	t.Log(ns)
	out, err := s.Kubectl(t.Context(), "get", "nodes,pods,services", "-A", "-o", "wide")
	t.Log(out, err)
	out, err = s.Exec(t.Context(), "kedge", "status")
	t.Log(out, err)
}
