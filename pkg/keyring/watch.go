// SPDX-License-Identifier: Apache-2.0

package keyring

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// retry is how long a watch that broke waits before it starts again: the datastore is away, and the API with it.
const retry = time.Second

// watch reads the value and follows it from there; when that breaks (the datastore started again, history was compacted) it begins anew.
func (r *Ring) watch(ctx context.Context, name string, values chan<- Value) {
	var given int64 = -1 // revision
	give := func(v Value) {
		if v.Revision == given {
			return // known from before the watch broke
		}
		select {
		case values <- v:
			given = v.Revision
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		resp, err := r.client.Get(ctx, Prefix+name)
		if err == nil {
			now := Value{}
			if len(resp.Kvs) > 0 {
				now = r.value(name, resp.Kvs[0])
			}
			give(now)
			r.follow(ctx, name, resp.Header.Revision+1, give)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// follow gives changes from a revision on until the watch ends.
func (r *Ring) follow(ctx context.Context, name string, from int64, give func(Value)) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for resp := range r.client.Watch(ctx, Prefix+name, clientv3.WithRev(from)) {
		if resp.Err() != nil {
			return
		}
		if n := len(resp.Events); n > 0 {
			last := Value{}
			if e := resp.Events[n-1]; e.IsCreate() || e.IsModify() {
				last = r.value(name, e.Kv)
			}
			give(last)
		}
	}
}
