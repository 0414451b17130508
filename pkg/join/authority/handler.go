// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// Members changes the membership of the datastore: [datastore.Members]. Its errors are that package's.
type Members interface {
	List(ctx context.Context) ([]datastore.Member, error)
	Add(ctx context.Context, name, peerURL string) (id string, all []datastore.Member, err error)
	Promote(ctx context.Context, name string) error
	Remove(ctx context.Context, name string, force bool) error
}

var _ Members = (*datastore.Members)(nil)

// Config of the join API's handlers.
type Config struct {
	// Files are what a server needs to be one: the name in the answer, and where the file is. They are read at each request.
	Files map[string]string
	// ClientCA is the file of the CAs whose client certificates are accepted. IssuingCA and IssuingCAKey are those of the one that signs.
	ClientCA, IssuingCA, IssuingCAKey string
	// Members is nil in a cluster whose datastore is not Kedge's.
	Members Members
	Client  kubernetes.Interface
	// BeforeJoin is called before keys are handed out and before a member is added: from its return on, this server has to count
	// on others. Without error.
	BeforeJoin func(ctx context.Context, name string) error
	Logger     *slog.Logger
}

// maxBody is far above what a request needs.
const maxBody = 16 << 10

// Reasons in the Status of a refusal (409), beside upstream's.
const (
	StatusReasonBusy        metav1.StatusReason = "Busy"        // another server is joining: try again
	StatusReasonQuorum      metav1.StatusReason = "Quorum"      // the datastore would lose its majority
	StatusReasonNotCaughtUp metav1.StatusReason = "NotCaughtUp" // the learner has not got all data yet: try again
	StatusReasonNotExpired  metav1.StatusReason = "NotExpired"  // the certificate to renew is still valid by this server's clock
)

// NewHandler serves join.PathKeys and join.PathMembers. It is to be called behind the API server's own filters, which authenticate,
// authorize and audit; it checks again who is asking where RBAC cannot tell: a server acts for itself alone, and shows a certificate.
func NewHandler(cfg Config) http.Handler {
	h := &handler{Config: cfg, log: cfg.Logger.With("component", component)}
	if h.Members == nil {
		h.Members = noMembers{}
	}
	mux := http.NewServeMux()
	mux.Handle(join.PathKeys, methods{http.MethodGet: h.keys})
	mux.Handle(join.PathMembers, methods{http.MethodGet: h.list, http.MethodPost: h.add})
	mux.Handle(join.PathMembers+"/{name}", methods{http.MethodDelete: h.remove})
	mux.Handle(join.PathMembers+"/{name}/promote", methods{http.MethodPost: h.promote})
	mux.Handle(join.PathNodes+"/{name}", methods{http.MethodDelete: h.removeNode})
	mux.Handle(join.PathRenew, methods{http.MethodPost: h.renew})
	mux.Handle("/", endpoint(func(*http.Request) (any, error) {
		return nil, refuse(http.StatusNotFound, metav1.StatusReasonNotFound, "the join API has no such path")
	}))
	return mux
}

type handler struct {
	Config
	log *slog.Logger
}

// endpoint answers a request with a value for JSON, or an error.
type endpoint func(*http.Request) (any, error)

func (e endpoint) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	req.Body = http.MaxBytesReader(w, req.Body, maxBody)
	answer, err := e(req)
	code := http.StatusOK
	if err != nil {
		status := statusOf(err)
		answer, code = status, int(status.Code)
	}
	text, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	w.Write(text) //nolint:errcheck // the client is gone
}

// methods are the endpoints of one path.
type methods map[string]endpoint

func (m methods) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	e, ok := m[req.Method]
	if !ok {
		var allowed []string
		for method := range m {
			allowed = append(allowed, method)
		}
		slices.Sort(allowed)
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		e = func(*http.Request) (any, error) {
			return nil, refuse(http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "this path takes %v", allowed)
		}
	}
	e.ServeHTTP(w, req)
}

func (h *handler) keys(req *http.Request) (any, error) {
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	if c.server == "" {
		return nil, c.forbidden("the cluster's keys are for its servers")
	}
	if err := h.beforeJoin(req.Context(), c.server); err != nil {
		return nil, err
	}
	answer := join.KeysResponse{Files: map[string][]byte{}}
	for name, path := range h.Files {
		data, err := os.ReadFile(path)
		if name == pki.RotationFile && errors.Is(err, fs.ErrNotExist) {
			continue // the CAs do not change now
		}
		if err != nil {
			return nil, fmt.Errorf("read the cluster's keys: %w", err)
		}
		answer.Files[name] = data
	}
	h.log.Info("handed out the cluster's keys", "to", c.server, "user", c.user, "address", req.RemoteAddr)
	return answer, nil
}

func (h *handler) list(req *http.Request) (any, error) {
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	if c.server == "" && !c.admin {
		return nil, c.forbidden("the datastore's members are shown to servers and administrators")
	}
	members, err := h.Members.List(req.Context())
	if err != nil {
		return nil, err
	}
	return join.MembersResponse{Members: wire(members)}, nil
}

func (h *handler) add(req *http.Request) (any, error) {
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	var body join.AddMemberRequest
	if err := decode(req, &body); err != nil {
		return nil, err
	}
	if err := c.mayChange(body.Name); err != nil {
		return nil, err
	}
	if err := checkPeerURL(body.PeerURL); err != nil {
		return nil, refuse(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err)
	}
	ctx := req.Context()
	if err := h.beforeJoin(ctx, body.Name); err != nil {
		return nil, err
	}
	id, members, err := h.Members.Add(ctx, body.Name, body.PeerURL)
	if err != nil {
		return nil, err
	}
	h.log.Info("new member of the datastore", "name", body.Name, "peerURL", body.PeerURL, "user", c.user, "address", req.RemoteAddr)
	// Its own entry follows when it has an API. Until then, this one keeps the name from others.
	if err := applyServer(ctx, h.Client, body.Name, Server{PeerURL: body.PeerURL, Etcd: true}); err != nil {
		h.log.Warn("the new server is not in the registry yet; it will register itself", "error", err)
	}
	return join.AddMemberResponse{ID: id, Members: wire(members)}, nil
}

func (h *handler) promote(req *http.Request) (any, error) {
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	name := req.PathValue("name")
	if err := c.mayChange(name); err != nil {
		return nil, err
	}
	if err := h.Members.Promote(req.Context(), name); err != nil {
		return nil, err
	}
	h.log.Info("member of the datastore has a vote now", "name", name, "user", c.user, "address", req.RemoteAddr)
	return success(), nil
}

func (h *handler) remove(req *http.Request) (any, error) {
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	name, force := req.PathValue("name"), false
	if err := c.mayChange(name); err != nil {
		return nil, err
	}
	if text := req.URL.Query().Get("force"); text != "" {
		if force, err = strconv.ParseBool(text); err != nil {
			return nil, refuse(http.StatusBadRequest, metav1.StatusReasonBadRequest, "force=%q is neither true nor false", text)
		}
	}
	ctx := req.Context()
	err = h.Members.Remove(ctx, name, force)
	if errors.Is(err, datastore.ErrNotMember) {
		// A server without a datastore of its own is in the registry only.
		servers, listErr := ListServers(ctx, h.Client)
		if _, ok := servers[name]; listErr == nil && ok {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	h.log.Info("server removed", "name", name, "forced", force, "user", c.user, "address", req.RemoteAddr)
	// A server that removes itself may have no datastore to write to any more: then the others do it, see NodeController.
	if err := RemoveServer(ctx, h.Client, name); err != nil {
		h.log.Warn("the removed server is still in the registry", "name", name, "error", err)
	}
	return success(), nil
}

// removeNode deletes the caller's own Node, for `kedge leave` on an agent: the node authorizer lets no node do it.
func (h *handler) removeNode(req *http.Request) (any, error) {
	name := req.PathValue("name")
	if err := checkName(name); err != nil {
		return nil, err
	}
	c, err := h.caller(req)
	if err != nil {
		return nil, err
	}
	if !c.admin && c.user != join.UserNodePrefix+name {
		return nil, refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "a node removes itself only; run kedge node remove %s on a server", name)
	}
	ctx := req.Context()
	if err := forgetNode(ctx, h.Client, name); err != nil {
		return nil, err
	}
	h.log.Info("node removed by itself", "name", name, "address", req.RemoteAddr)
	return success(), nil
}

func (h *handler) beforeJoin(ctx context.Context, name string) error {
	if h.BeforeJoin == nil {
		return nil
	}
	if err := h.BeforeJoin(ctx, name); err != nil {
		return refuse(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "this server cannot let another one in now: %v; try again", err)
	}
	return nil
}

// noMembers is the datastore of somebody else.
type noMembers struct{}

func (noMembers) err() error {
	return fmt.Errorf("%w: the datastore of this cluster is not Kedge's (--datastore-endpoint)", datastore.ErrNotMember)
}
func (n noMembers) List(context.Context) ([]datastore.Member, error) { return nil, nil }
func (n noMembers) Add(context.Context, string, string) (string, []datastore.Member, error) {
	return "", nil, n.err()
}
func (n noMembers) Promote(context.Context, string) error      { return n.err() }
func (n noMembers) Remove(context.Context, string, bool) error { return n.err() }

// decode takes one JSON value without anything that is not asked for.
func decode(req *http.Request, into any) error {
	dec := json.NewDecoder(req.Body)
	dec.DisallowUnknownFields()
	err := dec.Decode(into)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("there is something behind the JSON value")
		}
	}
	if errors.As(err, new(*http.MaxBytesError)) {
		return refuse(http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge, "the request is larger than %d bytes", maxBody)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the request is not understood: %v", err)
	}
	return nil
}

func checkName(name string) error {
	if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
		return refuse(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%q cannot be a node name: %s", name, strings.Join(problems, "; "))
	}
	return nil
}

func wire(members []datastore.Member) []join.Member {
	list := make([]join.Member, 0, len(members))
	for _, m := range members {
		list = append(list, join.Member{Name: m.Name, ID: m.ID, PeerURLs: m.PeerURLs, Learner: m.Learner})
	}
	return list
}
