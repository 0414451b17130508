// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/pkg/join/authority"
)

// Times of the driver.
const (
	askTimeout    = 5 * time.Second        // one server, for what it has loaded
	askAgain      = 300 * time.Millisecond // until it has
	sayAgain      = 15 * time.Second       // between two lines about the same wait
	progressEvery = 5 * time.Second        // between two lines about the objects
	apiAway       = 2 * time.Minute        // an API that does not answer for so long ends the command
	batch         = 500                    // objects whose names are asked for at a time
	parallelism   = 4                      // objects that are written at the same time: a small board's disk is not to stall the others
)

// Driver carries out a change from wherever it stands. It keeps nothing: another one can go on in its place, at any moment.
type Driver struct {
	config  *rest.Config // of an administrator
	client  kubernetes.Interface
	objects metadata.Interface
	// Say tells what goes on, a line at a time.
	Say func(string)
	// Skip are servers that the change does not wait for when they do not answer: they load the configuration when they start.
	Skip []string
}

// NewDriver reaches the cluster with an administrator's rights.
func NewDriver(config *rest.Config) (*Driver, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1 // the server's own limits are enough
	config.Timeout = 30 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	objects, err := metadata.NewForConfig(config)
	return &Driver{config: config, client: client, objects: objects, Say: func(string) {}}, err
}

// Change begins a change, or goes on with it, and returns when all servers that run have ended it.
func (d *Driver) Change(ctx context.Context, action Action) error {
	if err := d.ready(ctx); err != nil {
		return err
	}
	v, err := d.post(ctx, pathBegin, "action", string(action))
	if err != nil {
		return err
	}
	d.Say(fmt.Sprintf("%s: from %s to %s", action, d.from(v), describe(v, v.State.Target)))
	for v.State.Stage != Stable {
		if err := d.loaded(ctx, v.State.Generation); err != nil {
			return err
		}
		if v.State.Stage == Write {
			if err := d.rewrite(ctx, v.State.Target); err != nil {
				return err
			}
		}
		if v, err = d.advance(ctx, v.State.Generation); err != nil {
			return err
		}
		switch v.State.Stage {
		case Write:
			d.Say("every server can read it; from now on they write with it")
		case Stable:
			d.Say("all Secrets are stored by " + describe(v, v.Providers[0].Name) + "; the old configuration is dropped")
		}
	}
	// A server that is off loads it when it starts: nothing depends on it any more.
	return d.settled(ctx, v.State.Generation)
}

func (d *Driver) from(v *View) string {
	for _, p := range v.Providers {
		if p.Name != v.State.Target {
			return describe(v, p.Name)
		}
	}
	return "nothing"
}

func describe(v *View, provider string) string {
	if provider == Identity {
		return "clear text"
	}
	for _, p := range v.Providers {
		if p.Name == provider {
			return p.Name + " (" + p.ID + ")"
		}
	}
	return provider
}

// ready refuses what could not be ended: all servers that answer have to know how.
func (d *Driver) ready(ctx context.Context) error {
	servers, err := d.Servers(ctx)
	if err != nil {
		return err
	}
	for _, s := range servers {
		switch {
		case s.Old:
			return fmt.Errorf("server %s is of a version that cannot change the encryption while it runs: upgrade it first", s.Name)
		case s.Err == nil && s.View.Foreign != "":
			return fmt.Errorf("on server %s Kedge does not manage the encryption: %s", s.Name, s.View.Foreign)
		}
	}
	return nil
}

// Server is what one of them says.
type Server struct {
	Name    string
	Address string
	View    *View // nil with Err
	Err     error
	Old     bool // it answers, and does not know the question
}

// Servers asks all servers with an API. It waits for a cluster that has just started, and for an API that is away for a moment.
func (d *Driver) Servers(ctx context.Context) ([]Server, error) {
	return retry(ctx, d.Say, func() ([]Server, error) { return d.servers(ctx) })
}

func (d *Driver) servers(ctx context.Context) ([]Server, error) {
	registry, err := authority.ListServers(ctx, d.client)
	if err != nil {
		return nil, err
	}
	var list []Server
	for _, name := range slices.Sorted(maps.Keys(registry)) {
		if s := registry[name]; s.ControlPlane && s.Address != "" {
			list = append(list, Server{Name: name, Address: s.Address})
		}
	}
	if len(list) == 0 {
		return nil, errors.New("no server has registered itself yet, the cluster has just started")
	}
	var wg sync.WaitGroup
	for i := range list {
		wg.Go(func() {
			s := &list[i]
			config := rest.CopyConfig(d.config)
			config.Host, config.Timeout = "https://"+s.Address, askTimeout
			var client kubernetes.Interface
			if client, s.Err = kubernetes.NewForConfig(config); s.Err == nil {
				s.View, s.Err = get[View](ctx, client, Path)
			}
			s.Old = apierrors.IsNotFound(s.Err)
			if failed := (*url.Error)(nil); errors.As(s.Err, &failed) {
				s.Err = failed.Err // without the URL, which everybody knows
			}
		})
	}
	wg.Wait()
	return list, nil
}

// loaded waits until all servers have loaded a generation.
func (d *Driver) loaded(ctx context.Context, generation int64) error {
	return d.each(ctx, func(s Server) string {
		switch {
		case s.Old:
			return "its version is too old: upgrade it"
		case s.Err != nil && slices.Contains(d.Skip, s.Name):
			return ""
		case s.Err != nil:
			return fmt.Sprintf("does not answer (%v). If it is off: start it, remove it (kedge node remove %s), or go on without it (--skip %s)", s.Err, s.Name, s.Name)
		}
		return behind(s.View, generation)
	})
}

// settled waits for the servers that answer.
func (d *Driver) settled(ctx context.Context, generation int64) error {
	off := map[string]bool{}
	err := d.each(ctx, func(s Server) string {
		if off[s.Name] = s.Err != nil; s.Err != nil {
			return ""
		}
		return behind(s.View, generation)
	})
	for _, name := range slices.Sorted(maps.Keys(off)) {
		if off[name] && err == nil {
			d.Say("server " + name + " does not answer: it drops the old configuration when it starts")
		}
	}
	return err
}

func behind(v *View, generation int64) string {
	switch {
	case v.Loaded.Generation >= generation:
		return ""
	case v.Loaded.Error != "":
		return "cannot load the configuration: " + v.Loaded.Error
	}
	return "has not loaded the configuration yet"
}

// each asks all servers until there is nothing to wait for at any of them, and says what it waits for.
func (d *Driver) each(ctx context.Context, wait func(Server) string) error {
	var said string
	var saidAt time.Time
	for {
		servers, err := d.Servers(ctx)
		if err != nil {
			return err
		}
		var waits []string
		for _, s := range servers {
			if why := wait(s); why != "" {
				waits = append(waits, fmt.Sprintf("server %s (%s) %s", s.Name, s.Address, why))
			}
		}
		if len(waits) == 0 {
			return nil
		}
		// The first answers come before a server has had the time to load it.
		if text := strings.Join(waits, "; "); (text != said || time.Since(saidAt) > sayAgain) && said != "" {
			d.Say("waiting: " + text)
			said, saidAt = text, time.Now()
		} else if said == "" {
			said = "-"
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("interrupted while waiting; nothing is lost, the same command goes on: %w", ctx.Err())
		case <-time.After(askAgain):
		}
	}
}

// rewrite has the API server store all objects anew that are not stored by target. A patch that changes nothing is enough: it writes what
// is not stored as it would be now, and cannot conflict with anybody's change.
func (d *Driver) rewrite(ctx context.Context, target string) error {
	first, done, saidAt := -1, 0, time.Now()
	for {
		o, err := retry(ctx, d.Say, func() (*Objects, error) {
			return get[Objects](ctx, d.client, pathObjects, "limit", strconv.Itoa(batch))
		})
		if err != nil {
			return err
		}
		left := o.Unlike(target)
		if first < 0 {
			first = left
			d.Say(fmt.Sprintf("%d of %d Secrets are to be stored anew", left, o.Total()))
		}
		if left == 0 {
			return nil
		}
		failed := d.patch(ctx, o.Pending, func() {
			if done++; time.Since(saidAt) > progressEvery {
				saidAt = time.Now()
				d.Say(fmt.Sprintf("%d of %d", min(done, first), first))
			}
		})
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("interrupted; nothing is lost, the same command goes on: %w", err)
		}
		if len(failed) == len(o.Pending) {
			return fmt.Errorf("%d Secrets cannot be stored anew, as %s: %w. All can be read as before; mend the cause (an admission webhook?), and the same command goes on",
				left, o.Pending[0], failed[0])
		}
	}
}

// patch stores objects anew and returns the errors. What is gone, or was written by somebody else meanwhile, is none.
func (d *Driver) patch(ctx context.Context, names []string, done func()) []error {
	secrets := d.objects.Resource(corev1.SchemeGroupVersion.WithResource("secrets"))
	work := make(chan string)
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for range parallelism {
		wg.Go(func() {
			for key := range work {
				namespace, name, _ := strings.Cut(key, "/")
				_, err := secrets.Namespace(namespace).Patch(ctx, name, types.MergePatchType, []byte("{}"), metav1.PatchOptions{FieldManager: "kedge"})
				mu.Lock()
				if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
					errs = append(errs, err)
				} else {
					done()
				}
				mu.Unlock()
			}
		})
	}
	for _, name := range names {
		select {
		case work <- name:
		case <-ctx.Done():
		}
	}
	close(work)
	wg.Wait()
	return errs
}

// advance ends a stage. When the answer is lost, or somebody else was faster, the state says so.
func (d *Driver) advance(ctx context.Context, generation int64) (*View, error) {
	v, err := d.post(ctx, pathAdvance, "generation", strconv.FormatInt(generation, 10))
	if err == nil {
		return v, nil
	}
	if apierrors.IsInvalid(err) {
		return nil, err
	}
	now, getErr := d.View(ctx)
	if getErr == nil && now.State.Generation > generation {
		return now, nil
	}
	return nil, err
}

// View is what the server that the driver reaches says.
func (d *Driver) View(ctx context.Context) (*View, error) {
	return retry(ctx, d.Say, func() (*View, error) { return get[View](ctx, d.client, Path) })
}

// Objects counts what is in the datastore.
func (d *Driver) Objects(ctx context.Context) (*Objects, error) {
	return get[Objects](ctx, d.client, pathObjects)
}

func (d *Driver) post(ctx context.Context, path, parameter, value string) (*View, error) {
	raw, err := d.client.Discovery().RESTClient().Post().AbsPath(path).Param(parameter, value).DoRaw(ctx)
	return decode[View](raw, err)
}

func get[T any](ctx context.Context, client kubernetes.Interface, path string, parameters ...string) (*T, error) {
	req := client.Discovery().RESTClient().Get().AbsPath(path)
	for i := 0; i < len(parameters); i += 2 {
		req.Param(parameters[i], parameters[i+1])
	}
	raw, err := req.DoRaw(ctx)
	return decode[T](raw, err)
}

// decode puts the words of a refusal, which client-go leaves in the body, into the error.
func decode[T any](raw []byte, err error) (*T, error) {
	if err != nil {
		var status metav1.Status
		if json.Unmarshal(raw, &status) == nil && status.Kind == "Status" && status.Message != "" {
			return nil, &apierrors.StatusError{ErrStatus: status}
		}
		return nil, err
	}
	var value T
	return &value, json.Unmarshal(raw, &value)
}

// retry bears that the API is away for a while, as when its server starts again.
func retry[T any](ctx context.Context, say func(string), f func() (T, error)) (T, error) {
	var said string
	for start := time.Now(); ; {
		v, err := f()
		if err == nil || apierrors.IsInvalid(err) || apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) || apierrors.IsNotFound(err) ||
			ctx.Err() != nil || time.Since(start) > apiAway {
			return v, err
		}
		if err.Error() != said {
			said = err.Error()
			say("waiting for the API: " + said)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
