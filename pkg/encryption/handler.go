// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/keyring"
)

// Paths of the API. They are for administrators: no rule of Kedge's gives them to anybody else.
const (
	Path        = "/kedge/v1/encryption"
	pathObjects = Path + "/objects"
	pathBegin   = Path + "/begin"
	pathAdvance = Path + "/advance"
)

// View is what a server tells about the encryption. It holds no secret.
type View struct {
	Node string `json:"node"`
	// Foreign says why Kedge leaves the encryption alone; empty: it does not.
	Foreign   string     `json:"foreign,omitempty"`
	Loaded    Loaded     `json:"loaded"` // by this server
	State     Progress   `json:"state"`
	Providers []ViewedBy `json:"providers"` // the first one writes
}

// Progress is where a change stands.
type Progress struct {
	Generation int64      `json:"generation"`
	Action     Action     `json:"action,omitempty"`
	Stage      Stage      `json:"stage,omitempty"`
	Target     string     `json:"target,omitempty"`
	Started    *time.Time `json:"started,omitempty"`
}

// ViewedBy is a provider without its key.
type ViewedBy struct {
	Name    string     `json:"name"`
	ID      string     `json:"id,omitempty"`
	Created *time.Time `json:"created,omitempty"`
}

// Handler serves the API, behind the API server's own filters, which authenticate, authorize and audit.
func (k *Keeper) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Path, func(w http.ResponseWriter, r *http.Request) { answer(w)(k.view(r.Context())) })
	mux.HandleFunc("GET "+pathObjects, func(w http.ResponseWriter, r *http.Request) {
		limit, _ := strconv.Atoi(r.FormValue("limit")) // none: no names
		answer(w)(k.objects(r.Context(), limit))
	})
	mux.HandleFunc("POST "+pathBegin, func(w http.ResponseWriter, r *http.Request) {
		answer(w)(k.begin(r.Context(), Action(r.FormValue("action"))))
	})
	mux.HandleFunc("POST "+pathAdvance, func(w http.ResponseWriter, r *http.Request) {
		generation, err := strconv.ParseInt(r.FormValue("generation"), 10, 64)
		if err != nil {
			answer(w)(nil, fmt.Errorf("generation: %w", err))
			return
		}
		answer(w)(k.advance(r.Context(), generation))
	})
	return mux
}

// answer writes a value, or the error in the form that clients of the API know.
func answer(w http.ResponseWriter) func(any, error) {
	return func(value any, err error) {
		code := http.StatusOK
		if err != nil {
			code = http.StatusInternalServerError
			reason := metav1.StatusReasonInternalError
			var refused *refusal
			switch {
			case errors.Is(err, keyring.ErrConflict):
				code, reason = http.StatusConflict, metav1.StatusReasonConflict
			case errors.As(err, &refused):
				code, reason = http.StatusUnprocessableEntity, metav1.StatusReasonInvalid
			case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
				code, reason = http.StatusGatewayTimeout, metav1.StatusReasonTimeout
			}
			value = metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
				Code: int32(code), Reason: reason, Message: err.Error()}
		}
		text, err := json.Marshal(value)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(code)
		w.Write(text) //nolint:errcheck // the client is gone
	}
}

// refusal is an error that trying again does not cure.
type refusal struct{ error }

func (k *Keeper) reason() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.foreign
}

// state reads the keyring.
func (k *Keeper) state(ctx context.Context) (*State, int64, error) {
	if why := k.reason(); why != "" {
		return nil, 0, &refusal{fmt.Errorf("on server %s the encryption is not Kedge's business: %s", k.NodeName, why)}
	}
	data, revision, err := k.Ring.Get(ctx, ringName)
	if err != nil {
		return nil, 0, err
	}
	if data == nil {
		return nil, 0, errors.New("there is nothing in the keyring yet, the server has just started: try again")
	}
	state, err := Parse(data)
	return state, revision, err
}

func (k *Keeper) view(ctx context.Context) (any, error) {
	v := View{Node: k.NodeName, Foreign: k.reason(), Loaded: k.Loaded()}
	if v.Foreign != "" {
		return v, nil
	}
	state, _, err := k.state(ctx)
	if err != nil {
		return nil, err
	}
	return v.with(state), nil
}

func (v View) with(s *State) View {
	v.State = Progress{s.Generation, s.Action, s.Stage, s.Target, s.Started}
	for _, p := range s.Providers {
		v.Providers = append(v.Providers, ViewedBy{p.Name, p.ID(), p.Created})
	}
	return v
}

func (k *Keeper) objects(ctx context.Context, limit int) (any, error) {
	state, _, err := k.state(ctx)
	if err != nil {
		return nil, err
	}
	return countObjects(ctx, k.Store, k.Prefix, state.Writer().Name, limit)
}

func (k *Keeper) begin(ctx context.Context, action Action) (any, error) {
	state, revision, err := k.state(ctx)
	if err != nil {
		return nil, err
	}
	next, err := state.Begin(action, time.Now().UTC().Truncate(time.Second))
	if err != nil {
		return nil, &refusal{err}
	}
	if next == nil {
		next = state
	} else if err := k.store(ctx, next, revision); err != nil {
		return nil, err
	} else {
		k.Logger.Info("a change of the encryption of Secrets begins", "action", action, "target", next.Target)
	}
	return View{Node: k.NodeName, Loaded: k.Loaded()}.with(next), nil
}

// advance ends a stage, if it is still the one that the caller knows. Before the old provider goes, nothing may be stored by it.
func (k *Keeper) advance(ctx context.Context, generation int64) (any, error) {
	state, revision, err := k.state(ctx)
	if err != nil {
		return nil, err
	}
	if state.Generation != generation {
		return nil, fmt.Errorf("%w: it is at generation %d", keyring.ErrConflict, state.Generation)
	}
	if state.Stage == Write {
		objects, err := countObjects(ctx, k.Store, k.Prefix, state.Target, 5)
		if err != nil {
			return nil, err
		}
		if n := objects.Unlike(state.Target); n > 0 {
			return nil, &refusal{fmt.Errorf("%d Secrets are not stored by %s yet, as %v", n, state.Target, objects.Pending)}
		}
	}
	next, err := state.Advance()
	if err != nil {
		return nil, &refusal{err}
	}
	if err := k.store(ctx, next, revision); err != nil {
		return nil, err
	}
	k.Logger.Info("the encryption of Secrets goes on to its next stage", "generation", next.Generation, "stage", next.Stage, "writes", next.Writer().Name)
	return View{Node: k.NodeName, Loaded: k.Loaded()}.with(next), nil
}
