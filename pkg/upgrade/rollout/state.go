// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// ConfigMap in kube-system keeps the state of a cluster's upgrade.
const ConfigMap = "kedge-upgrade"

const stateKey = "state.json"

const (
	// renewEvery is how often the state is written while somebody is at work, and abandonedAfter when nobody is any more.
	renewEvery     = 30 * time.Second
	abandonedAfter = 2 * time.Minute
	// storeTimeout is how long the API may be away, as a server starts again in between.
	storeTimeout = 5 * time.Minute
)

// Phase of a cluster's upgrade, and of a node's in it.
type Phase string

// Phases.
const (
	Waiting Phase = "waiting" // of a node: for its turn; of the cluster: for the time window
	Running Phase = "running"
	Done    Phase = "done"
	Failed  Phase = "failed"
)

// Node is a machine of the cluster.
type Node struct {
	Name   string     `json:"name"`
	Role   string     `json:"role"`
	From   string     `json:"from,omitempty"` // version
	Phase  Phase      `json:"phase"`
	Text   string     `json:"text,omitempty"` // what it does, or why it failed
	Began  *time.Time `json:"began,omitempty"`
	Ended  *time.Time `json:"ended,omitempty"`
	Cordon bool       `json:"cordon,omitempty"` // it was cordoned by the upgrade
}

// State of a cluster's upgrade.
type State struct {
	Version string    `json:"version"`
	Back    bool      `json:"back,omitempty"` // to the version before
	Phase   Phase     `json:"phase"`
	Text    string    `json:"text,omitempty"`
	Began   time.Time `json:"began"`
	Renewed time.Time `json:"renewed"`
	By      string    `json:"by"` // who is at work
	Nodes   []Node    `json:"nodes"`
}

// Abandoned says whether whoever began has gone.
func (s *State) Abandoned(now time.Time) bool {
	return (s.Phase == Running || s.Phase == Waiting) && now.Sub(s.Renewed) > abandonedAfter
}

// Write shows it to people.
func (s *State) Write(out io.Writer, now time.Time) error {
	what := "upgrade"
	if s.Back {
		what = "way back"
	}
	fmt.Fprintf(out, "Cluster: %s to %s, %s", what, s.Version, s.Phase)
	if s.Text != "" {
		fmt.Fprintf(out, ": %s", s.Text)
	}
	fmt.Fprintf(out, "\nbegan %s, by %s\n", s.Began.Local().Format(time.DateTime), s.By)
	if s.Abandoned(now) {
		fmt.Fprintln(out, "whoever began it has gone: the same command goes on with it")
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nNODE\tROLE\tFROM\tSTATE\tTOOK\tREMARK")
	for _, n := range s.Nodes {
		took := ""
		if n.Began != nil && n.Ended != nil {
			took = n.Ended.Sub(*n.Began).Round(time.Second).String()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.Role, n.From, n.Phase, took, n.Text)
	}
	return w.Flush()
}

// Load reads the state of the last upgrade; nil: there was none.
func Load(ctx context.Context, client kubernetes.Interface) (*State, error) {
	cm, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, ConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parse(cm)
}

func parse(cm *corev1.ConfigMap) (*State, error) {
	var s State
	if err := json.Unmarshal([]byte(cm.Data[stateKey]), &s); err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s is damaged: %w; delete it to begin anew", metav1.NamespaceSystem, ConfigMap, err)
	}
	return &s, nil
}

// errTakenOver ends a rollout whose state somebody else writes.
var errTakenOver = errors.New("somebody else has begun an upgrade of this cluster meanwhile: see kedge upgrade --status")

// record keeps the state in the cluster while it changes.
type record struct {
	client kubernetes.Interface
	mu     sync.Mutex
	state  State
}

// change changes the state and stores it.
func (r *record) change(ctx context.Context, f func(*State)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.state)
	return r.store(ctx)
}

// node changes the state of one.
func (r *record) node(ctx context.Context, name string, f func(*Node)) error {
	return r.change(ctx, func(s *State) {
		for i := range s.Nodes {
			if s.Nodes[i].Name == name {
				f(&s.Nodes[i])
			}
		}
	})
}

// store writes the state, and waits for an API that is away.
func (r *record) store(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	r.state.Renewed = time.Now().UTC().Truncate(time.Second)
	for {
		err := r.put(ctx)
		if err == nil || errors.Is(err, errTakenOver) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the state of the upgrade cannot be kept: %w", err)
		case <-time.After(time.Second):
		}
	}
}

func (r *record) put(ctx context.Context) error {
	text, err := json.MarshalIndent(r.state, "", "  ")
	if err != nil {
		return err
	}
	maps := r.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	cm, err := maps.Get(ctx, ConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: ConfigMap}, Data: map[string]string{stateKey: string(text)}}, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	if have, err := parse(cm); err == nil && have.By != r.state.By && have.Began.After(r.state.Began) {
		return errTakenOver
	}
	cm.Data = map[string]string{stateKey: string(text)}
	_, err = maps.Update(ctx, cm, metav1.UpdateOptions{})
	return err
}

// renew keeps the state fresh until ctx ends.
func (r *record) renew(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(renewEvery):
		}
		_ = r.change(ctx, func(*State) {}) // who works will notice
	}
}
