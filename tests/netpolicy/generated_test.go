// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
	"github.com/kedge-io/kedge/tests/cluster"
)

// mutations of each generated world, one after the other.
const mutations = 2

// testGenerated makes policies from seeds and compares what gets through with the oracle: first all policies at once, then changes
// one by one.
func testGenerated(t *testing.T, s *site, kept int) {
	s.peace(t)
	seeds := keptSeeds[:kept:kept]
	for range freshSeeds(t) {
		seeds = append(seeds, rand.Uint64())
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			w := s.base.Clone()
			oracle.Mutate(r, w) // other labels, maybe
			w.Policies = oracle.Policies(r, w)
			s.check(t, w, "all at once")
			for range mutations {
				change := oracle.Mutate(r, w)
				s.check(t, w, change.Text)
			}
		})
	}
	s.untouched(t)
}

// check gives the cluster a world and fails the test if it does not come to agree with the oracle; then it looks for a smaller
// world in which they differ.
func (s *site) check(t *testing.T, w *oracle.World, what string) {
	t.Helper()
	begin := time.Now()
	ctx := cluster.Within(t, 3*minute)
	if err := s.become(ctx, w); err != nil {
		t.Fatal(err)
	}
	err := s.agrees(ctx)
	if err == nil {
		t.Logf("%s: %d policies agree after %s", what, len(w.Policies), time.Since(begin).Round(10*time.Millisecond))
		return
	}
	t.Errorf("%s: %v", what, err)
	s.reduce(ctx, t, w)
	t.FailNow()
}

// reduce takes policies away as long as the cluster and the oracle differ.
func (s *site) reduce(ctx context.Context, t *testing.T, w *oracle.World) {
	t.Helper()
	small := w.Clone()
	for i := 0; i < len(small.Policies); {
		without := small.Clone()
		without.Policies = append(without.Policies[:i:i], without.Policies[i+1:]...)
		if s.become(ctx, without) == nil && s.agrees(ctx) != nil {
			small = without
		} else {
			i++
		}
	}
	if err := s.become(ctx, small); err != nil {
		t.Log(err)
		return
	}
	var text strings.Builder
	for _, p := range small.Policies {
		b, err := yaml.Marshal(p)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(&text, "---\n%s", b)
	}
	for _, p := range small.Pods {
		fmt.Fprintf(&text, "# %s/%s on %s has %v, addresses %v\n", p.Namespace, p.Name, p.Spec.NodeName, p.Labels, p.Status.PodIPs)
	}
	for _, ns := range small.Namespaces {
		fmt.Fprintf(&text, "# namespace %s has %v\n", ns.Name, ns.Labels)
	}
	t.Logf("they differ with these policies (more often than not a smaller set):\n%s%v", text.String(), s.agrees(ctx))
}

// peace takes all policies away, waits until everything reaches everything, and does it again when the test ends, for the next one.
func (s *site) peace(t *testing.T) {
	t.Helper()
	ctx := cluster.Within(t, 2*minute)
	if err := s.refresh(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.become(ctx, s.base); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	learn, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := s.learn(learn); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d probes without policies: %s", len(s.probers)*len(s.targets), time.Since(begin).Round(10*time.Millisecond))
}

// untouched: whatever the policies were, the kubelet reached all pods all the time.
func (s *site) untouched(t *testing.T) {
	t.Helper()
	for _, p := range s.base.Pods {
		got, err := s.client.CoreV1().Pods(p.Namespace).Get(cluster.Within(t, minute), p.Name, metav1.GetOptions{})
		if err != nil {
			t.Error(err)
			continue
		}
		for i, c := range got.Status.Conditions {
			if was := p.Status.Conditions[i]; c.Type != was.Type || c.Status != was.Status || !c.LastTransitionTime.Equal(&was.LastTransitionTime) {
				t.Errorf("%s/%s: %+v, was %+v", p.Namespace, p.Name, c, was)
			}
		}
	}
}
