// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/netpolicy"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// GetStatusOf asks the Kedge of a node of the cluster, through the API and the tunnel that the node keeps open to its servers.
func GetStatusOf(ctx context.Context, kubeconfig, node string) (*Status, error) {
	b, err := Query(ctx, kubeconfig, node, "status", nil)
	if err != nil {
		return nil, err
	}
	var st Status
	if err := json.Unmarshal(b, &st); err != nil {
		return nil, fmt.Errorf("answer of node %s: %w", node, err)
	}
	return &st, nil
}

// queryPolicy is what a node's network policies say about a connection; parameter q is a netpolicy.Question.
const queryPolicy = "netpolicy"

// QueryPolicy asks a node of the cluster what its network policies say about a connection.
func QueryPolicy(ctx context.Context, kubeconfig, node string, q netpolicy.Question) (netpolicy.Answer, error) {
	var answer netpolicy.Answer
	text, err := json.Marshal(q)
	if err != nil {
		return answer, err
	}
	b, err := Query(ctx, kubeconfig, node, queryPolicy, url.Values{"q": {string(text)}})
	if err != nil {
		return answer, err
	}
	return answer, json.Unmarshal(b, &answer)
}

func (m *Machine) servePolicy(w http.ResponseWriter, r *http.Request) {
	var q netpolicy.Question
	if err := json.Unmarshal([]byte(r.FormValue("q")), &q); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer, err := netpolicy.Query(r.Context(), node.PolicySocket(m.cfg.RunDir), q)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		m.log.Debug("question about network policies", "error", err)
	}
}

// Query asks the Kedge of a node for a path of its QuerySocket, with the rights of an administrator (nodes/proxy).
func Query(ctx context.Context, kubeconfig, node, path string, parameters url.Values) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	body, err := Ask(ctx, kubeconfig, node, http.MethodGet, path, parameters, nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

// Ask sends a request to the Kedge of a node, as Query does, and returns the answer while it is being made. It takes as long as ctx lets it.
func Ask(ctx context.Context, kubeconfig, node, method, path string, parameters url.Values, body io.Reader) (io.ReadCloser, error) {
	config, err := adminConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	req := client.CoreV1().RESTClient().Verb(method).Resource("nodes").Name("http:" + node + ":" + strconv.Itoa(tunnel.KedgePort)).SubResource("proxy").Suffix(path)
	for name, values := range parameters {
		for _, v := range values {
			req.Param(name, v)
		}
	}
	if body != nil {
		req.SetHeader("Content-Type", "application/octet-stream").Body(body)
	}
	stream, err := req.Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask node %s: %w", node, err)
	}
	return stream, nil
}

func adminConfig(kubeconfig string) (*rest.Config, error) {
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, fmt.Errorf("an administrator's kubeconfig is needed: run this on a server, or give --kubeconfig: %w", err)
	}
	return clientcmd.BuildConfigFromFlags("", kubeconfig)
}
