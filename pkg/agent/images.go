// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/kedge-io/kedge/pkg/images"
	"github.com/kedge-io/kedge/pkg/node"
)

// queryImages is the images of a node: GET lists them, POST imports an archive, POST to /pull has them pulled.
const queryImages = "images"

// spareForImport is what has to be left on the disk when an archive comes in.
const spareForImport = 256 << 20

// event is a line of the answer to an import or a pull.
type event struct {
	Image string `json:"image,omitempty"` // is there now
	Error string `json:"error,omitempty"`
	Done  bool   `json:"done,omitempty"` // the last line of a success
}

// ImageStore is the images of a node: this machine's when Node is empty, else that node's of the cluster.
type ImageStore struct {
	RunDir     string
	Node       string
	Kubeconfig string // an administrator's, for another node
}

func (s ImageStore) ask(ctx context.Context, method, path string, parameters url.Values, body io.Reader) (io.ReadCloser, error) {
	if s.Node != "" {
		return Ask(ctx, s.Kubeconfig, s.Node, method, path, parameters, body)
	}
	return ask(ctx, s.RunDir, method, "/"+path+"?"+parameters.Encode(), body)
}

// List gives the images that are on the node.
func (s ImageStore) List(ctx context.Context) ([]images.Image, error) {
	body, err := s.ask(ctx, http.MethodGet, queryImages, nil, nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var answer struct {
		Images []images.Image `json:"images"`
		Error  string         `json:"error"`
	}
	if err := json.NewDecoder(body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("images of node %s: %w", s.Node, err)
	}
	if answer.Error != "" {
		return nil, errors.New(answer.Error)
	}
	return answer.Images, nil
}

// Import brings an archive of size bytes (OCI layout or docker save, plain or compressed) to the node. Its images are pinned.
func (s ImageStore) Import(ctx context.Context, archive io.Reader, size int64, imported func(string)) error {
	return s.do(ctx, queryImages, url.Values{"size": {strconv.FormatInt(size, 10)}}, archive, imported)
}

// Pull has the node pull images by its registries.yaml.
func (s ImageStore) Pull(ctx context.Context, names []string, pulled func(string)) error {
	return s.do(ctx, queryImages+"/pull", url.Values{"image": names}, nil, pulled)
}

func (s ImageStore) do(ctx context.Context, path string, parameters url.Values, send io.Reader, there func(string)) error {
	body, err := s.ask(ctx, http.MethodPost, path, parameters, send)
	if err != nil {
		return err
	}
	defer body.Close()
	for lines := json.NewDecoder(body); ; {
		var e event
		switch err := lines.Decode(&e); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return errors.New("the connection ended before the node said how it went: is its Kedge running? try again, what is there already is not sent twice")
		case err != nil:
			return err
		case e.Error != "":
			return errors.New(e.Error)
		case e.Done:
			return nil
		}
		there(e.Image)
	}
}

// ContainerdSocket is where containerd listens on a machine with that run directory.
func ContainerdSocket(runDir string) string {
	return node.ContainerdConfig{State: filepath.Join(runDir, "containerd")}.Socket()
}

func (m *Machine) containerdSocket() string { return ContainerdSocket(m.cfg.RunDir) }

func (m *Machine) serveImages(w http.ResponseWriter, r *http.Request) {
	list, err := images.OnNode(r.Context(), m.containerdSocket())
	m.answer(w, map[string]any{"images": list, "error": errorText(err)})
}

func (m *Machine) serveImport(w http.ResponseWriter, r *http.Request) {
	names, err := m.importImages(r)
	for _, name := range names {
		m.answer(w, event{Image: name})
	}
	if err != nil {
		m.log.Warn("import of an image archive", "component", "images", "error", err)
		m.answer(w, event{Error: err.Error()})
		return
	}
	m.log.Info("imported an image archive", "component", "images", "images", names)
	m.answer(w, event{Done: true})
}

func (m *Machine) importImages(r *http.Request) ([]string, error) {
	// Also after a failure: who sends gets to hear why, and not only that nobody reads on.
	defer io.Copy(io.Discard, r.Body) //nolint:errcheck // it is thrown away
	if size, err := strconv.ParseInt(r.FormValue("size"), 10, 64); err == nil {
		if err := spaceFor(filepath.Join(m.cfg.DataDir, "containerd"), size); err != nil {
			return nil, err
		}
	}
	store, err := images.Open(m.containerdSocket(), string(m.cfg.Snapshotter), m.log)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	return store.Import(r.Context(), r.Body)
}

// spaceFor refuses what would fill the disk: a full one stops more than an import.
func spaceFor(dir string, size int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	free := int64(fs.Bavail) * fs.Bsize
	if free < size+spareForImport {
		return fmt.Errorf("not enough space in %s: the archive has %s, %s are free; at least %s must remain", dir, bytesText(size), bytesText(free), bytesText(spareForImport))
	}
	return nil
}

func bytesText(n int64) string { return resource.NewQuantity(n>>20<<20, resource.BinarySI).String() }

func (m *Machine) servePull(w http.ResponseWriter, r *http.Request) {
	var errs []error
	for _, name := range r.URL.Query()["image"] {
		if err := images.Pull(r.Context(), m.containerdSocket(), name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		m.answer(w, event{Image: name})
	}
	if err := errors.Join(errs...); err != nil {
		m.answer(w, event{Error: err.Error()})
		return
	}
	m.answer(w, event{Done: true})
}

// answer sends a line, at once.
func (m *Machine) answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	if err := errors.Join(json.NewEncoder(w).Encode(value), http.NewResponseController(w).Flush()); err != nil {
		m.log.Debug("answer", "error", err)
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
