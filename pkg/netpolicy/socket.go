// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

// maxRequest bounds what is read of a request.
const maxRequest = 64 << 10

// serve answers the CNI plugin and trace until ctx ends. Root only: that is the mode of the socket.
func (c *Controller) serve(ctx context.Context) error {
	if err := os.Remove(c.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", c.cfg.Socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(c.cfg.Socket, 0o600); err != nil {
		return errors.Join(err, listener.Close())
	}
	server := &http.Server{Handler: c.handler(), ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stopped := context.AfterFunc(ctx, func() { server.Close() })
	defer stopped()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (c *Controller) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+announce.Path, func(w http.ResponseWriter, r *http.Request) {
		withPod(w, r, func(p announce.Pod) error { return c.announce(r.Context(), p) })
	})
	mux.HandleFunc("PUT "+announce.Path, func(w http.ResponseWriter, r *http.Request) { withPod(w, r, c.check) })
	mux.HandleFunc("DELETE "+announce.Path+"/{container}", func(w http.ResponseWriter, r *http.Request) {
		p := announce.Pod{Container: r.PathValue("container")}
		if err := p.ValidateContainer(); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		reply(w, c.release(p.Container))
	})
	mux.HandleFunc("POST "+tracePath, func(w http.ResponseWriter, r *http.Request) {
		var q Question
		if err := decode(w, r, &q); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer, err := c.trace(r.Context(), q)
		if err != nil {
			reply(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// An error can only be that nobody listens any more.
		_ = json.NewEncoder(w).Encode(answer)
	})
	return mux
}

func withPod(w http.ResponseWriter, r *http.Request, do func(announce.Pod) error) {
	var p announce.Pod
	err := decode(w, r, &p)
	if err == nil {
		err = p.Validate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	reply(w, do(p))
}

func decode(w http.ResponseWriter, r *http.Request, into any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(into); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	return nil
}

func reply(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
