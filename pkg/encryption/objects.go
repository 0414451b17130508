// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"context"
	"fmt"
	"path"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// pageSize is how many objects are read from the datastore at a time. One may be a megabyte.
const pageSize = 32

// Objects says by which provider the Secrets in the datastore are stored.
type Objects struct {
	// By counts them by the name of the provider.
	By map[string]int `json:"by"`
	// Pending are some that are not stored by the one that writes: NAMESPACE/NAME, in order.
	Pending []string `json:"pending,omitempty"`
}

// Total of all objects.
func (o Objects) Total() int {
	n := 0
	for _, c := range o.By {
		n += c
	}
	return n
}

// Unlike counts those that are not stored by a provider.
func (o Objects) Unlike(provider string) int { return o.Total() - o.By[provider] }

// providerOf tells by which provider a value in the datastore was written: what the API server puts before it says so.
func providerOf(value []byte) string {
	// The name of a key has no colon.
	head, _, _ := strings.Cut(string(value[:min(len(value), 512)]), "\x00")
	rest, encrypted := strings.CutPrefix(head, "k8s:enc:")
	if !encrypted {
		return Identity
	}
	if rest, ok := strings.CutPrefix(rest, "secretbox:v1:"); ok {
		if name, _, ok := strings.Cut(rest, ":"); ok && name != "" {
			return name
		}
	}
	return "unknown"
}

// countObjects reads all Secrets in the datastore below the API server's prefix. At most limit names of those that are not stored by
// writer are in the result.
func countObjects(ctx context.Context, store *clientv3.Client, prefix, writer string, limit int) (Objects, error) {
	o := Objects{By: map[string]int{}}
	base := path.Join("/", prefix, "secrets") + "/"
	from, end := base, clientv3.GetPrefixRangeEnd(base)
	for {
		resp, err := store.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize))
		if err != nil {
			return o, fmt.Errorf("read the Secrets in the datastore: %w", err)
		}
		for _, kv := range resp.Kvs {
			provider := providerOf(kv.Value)
			o.By[provider]++
			if provider != writer && len(o.Pending) < limit {
				o.Pending = append(o.Pending, strings.TrimPrefix(string(kv.Key), base))
			}
		}
		if !resp.More {
			return o, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}
