// SPDX-License-Identifier: Apache-2.0

package singlenode

import (
	"slices"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"

	"github.com/kedge-io/kedge/tests/image"
)

func TestImportedImages(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	out, err := n.Exec(n.Within(minute), "kedge", "ctr", "-n", "k8s.io", "images", "ls", "-q")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{image.BusyboxName, image.ServerName} {
		if !slices.Contains(strings.Fields(out), name) {
			t.Errorf("%s was not imported from images/: %s", name, out)
		}
	}
	// Nobody can pull it: it runs because it is there.
	n.Apply(strings.Replace(cluster.ClientPod, "    command:", "    imagePullPolicy: Never\n    command:", 1))
	n.Ready("client")
}

func TestPulls(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	const pod = `
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: %q, imagePullPolicy: Always%s}]
`
	n.Apply(pod, "mirror", "course:1", `, command: [sleep, "100000"]`) // the short name that people type
	n.Apply(pod, "private", privateImage, "")
	n.Apply(pod, "direct", registries.private.Addr()+"/"+directImagePath, "")
	n.Apply(pod, "missing", "registry.example/team/none:1", "")
	n.Ready("mirror", "private", "direct")
	n.Eventually("the missing image to be reported", func() error {
		got, err := n.Try("get", "pod", "missing", "-o", "jsonpath={.status.containerStatuses[0].state.waiting.message}")
		if err == nil && !strings.Contains(got, "not found") {
			err = unexpected(got)
		}
		return err
	})
	if got := registries.private.Requests(); !slices.ContainsFunc(got, func(r string) bool { return strings.HasSuffix(r, "/v2/team/app/manifests/2 200") }) {
		t.Errorf("requests to the private registry: %v", got)
	}
}
