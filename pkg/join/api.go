// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
)

// API is a client of the join API. Behind its errors are StatusErrors where the API answered, so that apierrors.IsConflict and
// the like work.
type API struct {
	base    string
	address string // for messages
	client  *http.Client
}

// NewAPI returns a client with the identity in config: an administrator's kubeconfig, or a server's certificate.
func NewAPI(config *rest.Config) (*API, error) {
	config = rest.CopyConfig(config)
	if config.Timeout == 0 {
		config.Timeout = 3 * requestTimeout // membership changes wait for the disks of a majority
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("client of the join API: %w", err)
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("client of the join API: %w", err)
	}
	return &API{base: strings.TrimSuffix(base.String(), "/"), address: base.Host, client: client}, nil
}

// API returns a client with the certificate that Client.ServerCertificate got. dial may be nil.
func (c *Cluster) API(certPEM, keyPEM []byte, dial DialFunc) (*API, error) {
	config := c.config(dial)
	config.CertData, config.KeyData = certPEM, keyPEM
	config.Timeout = 0
	return NewAPI(config)
}

// Keys hands over the cluster's key material by the names of its files.
func (a *API) Keys(ctx context.Context) (map[string][]byte, error) {
	var r KeysResponse
	if err := a.do(ctx, http.MethodGet, PathKeys, nil, &r); err != nil {
		return nil, err
	}
	return r.Files, nil
}

// Members of the datastore.
func (a *API) Members(ctx context.Context) ([]Member, error) {
	var r MembersResponse
	if err := a.do(ctx, http.MethodGet, PathMembers, nil, &r); err != nil {
		return nil, err
	}
	return r.Members, nil
}

// AddMember makes a server that has not started yet a learner of the datastore. A conflict is worth another try: another server
// is joining, or a majority is missing.
func (a *API) AddMember(ctx context.Context, name, peerURL string) (*AddMemberResponse, error) {
	var r AddMemberResponse
	if err := a.do(ctx, http.MethodPost, PathMembers, AddMemberRequest{Name: name, PeerURL: peerURL}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Promote makes a learner a voter. A conflict says that it has not caught up yet; apierrors.IsNotFound, that it is no member any more.
func (a *API) Promote(ctx context.Context, name string) error {
	return a.do(ctx, http.MethodPost, memberPath(name)+"/promote", nil, nil)
}

// RemoveMember takes a server out of the datastore. A conflict says that the rest would have no majority; force does it all the same.
func (a *API) RemoveMember(ctx context.Context, name string, force bool) error {
	path := memberPath(name)
	if force {
		path += "?force=true"
	}
	return a.do(ctx, http.MethodDelete, path, nil, nil)
}

func memberPath(name string) string { return PathMembers + "/" + url.PathEscape(name) }

// RemoveNode deletes a Node object, which the API allows no node to do; the join API does for its own.
func (a *API) RemoveNode(ctx context.Context, name string) error {
	return a.do(ctx, http.MethodDelete, PathNodes+"/"+url.PathEscape(name), nil, nil)
}

// do asks once, unless what is asked is forbidden: an API server that starts knows no roles yet and forbids everything. When it is ready, it
// means it.
func (a *API) do(ctx context.Context, method, path string, in, out any) error {
	err := a.once(ctx, method, path, in, out)
	if !apierrors.IsForbidden(err) {
		return err
	}
	if starts := a.once(ctx, http.MethodGet, "/readyz", nil, nil); starts != nil {
		return problem(KindNotReady, err, "the API on %s is not ready for %s: it is starting", a.address, path)
	}
	return a.once(ctx, method, path, in, out)
}

func (a *API) once(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	ctx, connected := traced(ctx)
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return connectionError(a.address, connected, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return connectionError(a.address, connected, err)
	}
	if resp.StatusCode != http.StatusOK {
		return a.refusal(method, path, resp.StatusCode, data)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return problem(KindNotKedge, err, "%s answers %s %s not like Kedge: %v", a.address, method, path, err)
	}
	return nil
}

// refusal puts an answer other than 200 into words, which are the server's if it has some.
func (a *API) refusal(method, path string, code int, data []byte) error {
	var err error
	var s metav1.Status
	own := json.Unmarshal(data, &s) == nil && s.Kind == "Status" && s.Message != ""
	if own {
		s.Code = int32(code)
		err = &apierrors.StatusError{ErrStatus: s}
	} else {
		s.Message = firstLine("", data)
		err = apierrors.NewGenericServerResponse(code, strings.ToLower(method), schema.GroupResource{Resource: path}, "", s.Message, 0, true)
	}
	switch {
	case code == http.StatusConflict:
		return problem(KindBusy, err, "%s", s.Message)
	case code == http.StatusUnauthorized:
		return problem(KindToken, err, "%s does not accept this machine's certificate any more: it has expired, or the cluster's CA is another one; join again", a.address)
	case code == http.StatusForbidden:
		return problem(KindRole, err, "%s does not allow this machine %s %s: %s", a.address, method, path, s.Message)
	case code == http.StatusTooManyRequests || code >= http.StatusInternalServerError:
		return problem(KindNotReady, err, "the API on %s is not ready for %s: HTTP %d: %s", a.address, path, code, s.Message)
	case code == http.StatusNotFound && !own:
		return problem(KindNotKedge, err, "%s does not know %s: it is not Kedge's API, or its version is older", a.address, path)
	}
	return problem(KindRefused, err, "%s", s.Message)
}
